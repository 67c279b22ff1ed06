//! Writing what an overlay holds into its backing file, while nobody uses either.
//!
//! What is in the overlay is copied down and flushed before anything is taken away from the
//! overlay, so that wherever it is interrupted the overlay still shows the same disk. A backing file
//! that is smaller grows first: the overlay hides nothing of that, for it showed zeroes there too.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::blocking::Blocking;
use super::qcow2::check::empty;
use super::qcow2::extents::Extents;
use super::{Format, OpenOptions};
use crate::config::{BuildError, Invalid};

/// Copied at a time.
const PIECE: u64 = 1 << 20;

/// Writes what `options.path` holds into the image below it; with `drain`, empties it afterwards.
/// Needs `options.backing_files`, for the name of the backing file stands in its header. `direct` is
/// for writing past the host's page cache.
pub fn commit(
    format: Format,
    options: &OpenOptions,
    drain: bool,
    direct: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), BuildError> {
    let invalid = |field: &str, reason: String| BuildError::from(Invalid::new(field, reason));
    let path = options.path.display();
    let mut top = Extents::open_top(format, options)?;
    let Some((below, below_format)) = top.backing_file(options)? else {
        return Err(invalid("path", format!("{path} has no backing file")));
    };
    if let Some(data) = top.data_path() {
        let reason = format!(
            "not supported yet: committing {path}, whose data is in the file {}",
            data.display()
        );
        return Err(invalid("path", reason));
    }
    let target = OpenOptions {
        path: below.clone(),
        readonly: false,
        direct,
        ..options.clone()
    };
    let mut base = Blocking::open(below_format, &target)?;
    let size = top.size_bytes();
    if size > base.size_bytes() {
        base.grow(size).map_err(|error| match error {
            BuildError::Invalid(wrong) => {
                let reason = format!(
                    "{path} is larger than {}, which can't grow: {}",
                    below.display(),
                    wrong.reason
                );
                invalid("path", reason)
            }
            other => other,
        })?;
    }
    let reading = |error| BuildError::host(format!("reading {path}"), error);
    let writing = |error| BuildError::host(format!("writing {}", below.display()), error);
    let mut position = 0;
    while position < size {
        let extent = top.next(position, size).map_err(reading)?;
        let end = extent.start + extent.length;
        if extent.data {
            let mut at = position;
            while at < end {
                let len = PIECE.min(end - at);
                let bytes = top.read_top(at, len as usize).map_err(reading)?;
                base.write(at, &bytes, false).map_err(writing)?;
                at += len;
                progress(at, size);
            }
        } else if extent.present {
            base.write_zeroes(position, extent.length, true, false)
                .map_err(writing)?;
        }
        position = end;
        progress(position, size);
    }
    base.flush().map_err(writing)?;
    // Both are let go of: who empties it takes it for itself.
    drop(base);
    drop(top);
    match drain {
        true => empty(options),
        false => Ok(()),
    }
}

/// Writes what `options.path` and the images between hold into `base`, which lies somewhere below.
/// The topmost image is left as it is; each between gets what was above it as well, so that all of
/// them show the same disk, wherever it is interrupted too.
pub fn commit_down_to(
    base: &Path,
    format: Format,
    options: &OpenOptions,
    direct: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), BuildError> {
    let mut chain = vec![(options.path.clone(), format)];
    loop {
        let (below, name) = match chain.last() {
            Some((path, format)) => below(path, *format, options)?,
            None => (None, Vec::new()),
        };
        // The number of images is bounded, and loops are found, where one of them is opened.
        let Some((path, format)) = below.filter(|_| chain.len() <= 64) else {
            let reason = format!("{} is not below {}", base.display(), options.path.display());
            return Err(Invalid::new("base", reason).into());
        };
        let found = name == base.as_os_str().as_bytes() || same_file(&path, base);
        chain.push((path, format));
        if found {
            break;
        }
    }
    for (path, format) in chain.iter().take(chain.len() - 1) {
        let options = OpenOptions {
            path: path.clone(),
            ..options.clone()
        };
        commit(*format, &options, false, direct, progress)?;
    }
    Ok(())
}

type Below = (Option<(PathBuf, Format)>, Vec<u8>);

/// What lies below an image, and its name as the header has it.
fn below(path: &Path, format: Format, options: &OpenOptions) -> Result<Below, BuildError> {
    let options = OpenOptions {
        path: path.into(),
        ..options.clone()
    };
    let image = Extents::open_top(format, &options)?;
    let name = image.backing_name().map(<[u8]>::to_vec);
    Ok((image.backing_file(&options)?, name.unwrap_or_default()))
}

fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path| {
        let stat = rustix::fs::stat(path);
        stat.map(|stat| (stat.st_dev, stat.st_ino))
    };
    match (identity(one), identity(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}
