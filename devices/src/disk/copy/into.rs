//! Copying a disk into an image that is there already, and into a new one that lies on top of
//! another.
//!
//! Both are written by the engines that serve a guest, so that whatever the target is like, and
//! has, is heeded. What is zero in the original is made zero in the target, whatever was there.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use super::super::blocking::Blocking;
use super::super::qcow2::create::{CreateOptions, Watch, create};
use super::super::qcow2::extents::Extents;
use super::super::{Format, OpenOptions};
use super::{PIECE, is_zero};
use crate::config::{BuildError, Invalid};

/// Zeroes are looked for in pieces of this size, which most images can leave out.
const UNIT: usize = 64 << 10;

/// An image and its format.
pub type Source<'a> = (Format, &'a OpenOptions);

/// Copies a disk into the image `target`, which must be at least as large; what is behind stays as
/// it is. The target is whole only if this succeeds. An error names `target` where that is to blame.
pub fn copy_into(
    source: Source<'_>,
    target: Source<'_>,
    watch: &mut Watch<'_>,
) -> Result<(), BuildError> {
    let mut original = Original::open(source, false)?;
    let (format, options) = target;
    let options = OpenOptions {
        readonly: false,
        ..options.clone()
    };
    let mut disk = Blocking::open(format, &options).map_err(|error| match error {
        BuildError::Invalid(wrong) if wrong.field == "path" => {
            Invalid::new("target", wrong.reason).into()
        }
        other => other,
    })?;
    if disk.size_bytes() < original.size() {
        let reason = format!(
            "{} has {} bytes, and {} has {}",
            options.path.display(),
            disk.size_bytes(),
            source.1.path.display(),
            original.size()
        );
        return Err(Invalid::new("target", reason).into());
    }
    original.write_to(&mut disk, &options.path, watch)
}

/// Copies what the topmost image of `source` has into a new image that lies on top of another, which
/// is to show what the source has below: whatever the source leaves to its backing file, the copy
/// leaves to its own. On error nothing is left behind.
pub fn copy_onto(
    source: Source<'_>,
    target: &CreateOptions,
    watch: &mut Watch<'_>,
) -> Result<(), BuildError> {
    if target.data_file.is_some() {
        let reason = "not supported yet: a copy on top of another image, with a data file";
        return Err(Invalid::new("data_file", reason).into());
    }
    let mut original = Original::open(source, true)?;
    if rustix::fs::lstat(&target.path).is_ok() {
        return Err(exists(&target.path));
    }
    // It has to be in the same folder, as the name of its backing file counts from there, and is
    // taken away again wherever this fails.
    let mut name = target.path.as_os_str().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = CreateOptions {
        path: name.into(),
        size_bytes: Some(original.size()),
        ..target.clone()
    };
    create(&part)?;
    let part = Part(part.path);
    let options = OpenOptions {
        disable_io_uring: source.1.disable_io_uring,
        backing_files: true,
        ..OpenOptions::new(part.0.clone())
    };
    let mut disk = Blocking::open(target.format, &options)?;
    original.write_to(&mut disk, &target.path, watch)?;
    drop(disk);
    match rustix::fs::renameat_with(CWD, &part.0, CWD, &target.path, RenameFlags::NOREPLACE) {
        Ok(()) => {
            // The name is another's now.
            std::mem::forget(part);
            Ok(())
        }
        Err(Errno::EXIST) => Err(exists(&target.path)),
        Err(error) => Err(BuildError::host(
            format!("finishing {}", target.path.display()),
            error,
        )),
    }
}

/// A file that goes with this.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // Best effort: there is nobody to tell.
        let _ = rustix::fs::unlink(&self.0);
    }
}

/// What is copied.
struct Original<'a> {
    disk: Blocking,
    extents: Extents,
    path: &'a Path,
    /// Without what lies below.
    top_only: bool,
}

impl<'a> Original<'a> {
    fn open((format, options): Source<'a>, top_only: bool) -> Result<Self, BuildError> {
        let readonly = OpenOptions {
            readonly: true,
            ..options.clone()
        };
        Ok(Self {
            disk: Blocking::open(format, &readonly)?,
            extents: Extents::open(format, &readonly, true)?,
            path: &options.path,
            top_only,
        })
    }

    fn size(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn write_to(
        &mut self,
        target: &mut Blocking,
        path: &Path,
        watch: &mut Watch<'_>,
    ) -> Result<(), BuildError> {
        let source = self.path.display();
        let reading = |error: io::Error| BuildError::host(format!("reading {source}"), error);
        let writing = |error: io::Error| match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => {
                let reason = format!("{}: there is no space for it: {error}", path.display());
                Invalid::new("target", reason).into()
            }
            _ => BuildError::host(format!("writing {}", path.display()), error),
        };
        let size = self.size();
        let mut position = 0;
        while position < size {
            let extent = self.extents.next(position, size).map_err(reading)?;
            let mut end = extent.start + extent.length;
            if self.top_only && extent.depth > 0 {
                // Left to the target's own backing file.
            } else if extent.data {
                end = end.min(position + PIECE);
                let bytes = self.disk.read(position, (end - position) as usize);
                let bytes = bytes.map_err(reading)?;
                write(target, position, bytes.get()).map_err(writing)?;
            } else {
                target
                    .write_zeroes(position, extent.length, true, false)
                    .map_err(writing)?;
            }
            position = end;
            watch(position, size)?;
        }
        target.flush().map_err(writing)
    }
}

/// Writes bytes, and makes zeroes of those that are.
fn write(target: &mut Blocking, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = 0;
    let end_of = |at: usize| (at + UNIT).min(bytes.len());
    while at < bytes.len() {
        let start = at;
        let zero = is_zero(&bytes[at..end_of(at)]);
        while at < bytes.len() && is_zero(&bytes[at..end_of(at)]) == zero {
            at = end_of(at);
        }
        let position = offset + start as u64;
        match zero {
            true => target.write_zeroes(position, (at - start) as u64, true, false)?,
            false => target.write(position, &bytes[start..at], false)?,
        }
    }
    Ok(())
}

fn exists(path: &Path) -> BuildError {
    Invalid::new("path", format!("{} exists already", path.display())).into()
}
