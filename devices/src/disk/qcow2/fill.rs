//! What is in a new image: its tables, and the space that is allocated beforehand (`preallocation`).
//!
//! ```text
//!            raw                      qcow2
//!   off      a hole                   header, and tables of nothing
//!   metadata (no such thing)          all L2 tables and refcounts; holes where data will be
//!   falloc   fallocate                that, and fallocate over all of the file
//!   full     fallocate, then zeroes   that, and zeroes where data will be
//! ```
//!
//! Where the data is in a file of its own, that one has the length of the disk, and what is said of
//! space for data goes for it.
//!
//! It is done in pieces, between which `watch` is told how far it is and can end it; the file has no
//! name yet (`new_file`), so nothing is left of it then.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::super::Format;
use super::super::space::is_no_space;
use super::create::{CreateOptions, Preallocation};
use super::new_image::NewImage;
use super::writer::{ImageWriter, Shape};
use crate::config::{BuildError, Invalid};

/// Is told what is done and of how much, in bytes; an error ends it.
pub type Watch<'a> = dyn FnMut(u64, u64) -> Result<(), BuildError> + 'a;

/// Zeroes that are written at a time.
const PIECE: usize = 1 << 20;
/// Written before the host is made to put it on its disk, so that the end takes no longer than the
/// rest, and does not push all else out of the page cache.
const SYNCED: u64 = 256 << 20;
/// Space that is asked for at a time.
const SET_ASIDE: u64 = 1 << 30;
/// Clusters whose entries are made at a time.
const MAPPED: u64 = 1 << 16;

/// How many bytes making the image would write, about.
pub fn bytes_to_write(options: &CreateOptions, shape: &Shape) -> u64 {
    let data = match options.preallocation {
        Preallocation::Full => shape.size_bytes,
        _ => 0,
    };
    let all_tables = options.preallocation != Preallocation::Off;
    let tables = match options.format {
        Format::Qcow2 if all_tables => {
            let clusters = shape.size_bytes.div_ceil(1 << shape.cluster_bits);
            // An L2 entry each, of up to 16 bytes, and a refcount.
            clusters.saturating_mul(16 + (1 << shape.refcount_order) / 8)
        }
        _ => 0,
    };
    data.saturating_add(tables)
}

/// Fills a file and gives it its name; returns the size of the disk.
pub fn fill(
    options: &CreateOptions,
    shape: Shape,
    new: NewImage,
    watch: &mut Watch<'_>,
) -> Result<u64, BuildError> {
    let size = shape.size_bytes;
    let filling = Filling {
        options,
        size,
        file: new.file(),
        data: new.data(),
    };
    match options.format {
        Format::Raw => filling.raw(watch)?,
        Format::Qcow2 => filling.qcow2(shape, watch)?,
    }
    new.finish()?;
    Ok(size)
}

/// The host failed while an image was made: where it has no space, the place that was chosen is to
/// blame.
pub fn failed(path: &Path, error: io::Error) -> BuildError {
    let path = path.display();
    match Errno::from_io_error(&error) {
        Some(errno) if is_no_space(errno) => {
            Invalid::new("path", format!("{path}: there is no space for it: {error}")).into()
        }
        _ => BuildError::host(format!("writing {path}"), error),
    }
}

/// A new image that is being filled.
pub struct Filling<'a> {
    pub options: &'a CreateOptions,
    /// Bytes of the disk.
    pub size: u64,
    pub file: &'a File,
    /// Where its data is, if not there.
    pub data: Option<&'a File>,
}

impl Filling<'_> {
    /// The file that data goes to.
    pub fn place(&self) -> &File {
        self.data.unwrap_or(self.file)
    }

    /// Gives what has all of the disk its length.
    pub fn set_len(&self) -> Result<(), BuildError> {
        self.place().set_len(self.size).map_err(|error| {
            match error.raw_os_error() {
                // Beyond what this file system can count.
                Some(libc::EINVAL) => self.too_large(&error),
                _ => self.failed(error),
            }
        })
    }

    fn raw(&self, watch: &mut Watch<'_>) -> Result<(), BuildError> {
        self.set_len()?;
        match self.options.preallocation {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => self.set_aside(self.size, watch),
            Preallocation::Full => {
                self.set_aside_if_possible(self.size)?;
                let mut zeroes = Zeroes::new(self.size);
                self.write_zeroes(&mut zeroes, 0, self.size, watch)
            }
        }
    }

    fn qcow2(&self, shape: Shape, watch: &mut Watch<'_>) -> Result<(), BuildError> {
        let failed = |error| self.failed(error);
        let preallocation = self.options.preallocation;
        let cluster = 1_u64 << shape.cluster_bits;
        let clusters = self.size.div_ceil(cluster);
        // What there is below it shall be seen.
        let bitmap = if shape.backing.is_some() {
            0
        } else {
            u32::MAX.into()
        };
        if self.data.is_some() {
            self.set_len()?;
        }
        if preallocation == Preallocation::Full {
            self.set_aside_if_possible(self.size)?;
        }
        let mut writer = ImageWriter::new(self.file, shape).map_err(failed)?;
        let mut zeroes = Zeroes::new(self.size);
        let mut run = (0, 0);
        let mapped = match preallocation {
            Preallocation::Off => 0..0,
            _ => 0..clusters,
        };
        for number in mapped {
            let offset = writer.map(number, bitmap).map_err(failed)?;
            if preallocation != Preallocation::Full {
                if number % MAPPED == 0 {
                    watch(number * cluster, self.size)?;
                }
                continue;
            }
            if offset != run.0 + run.1 || run.1 >= SET_ASIDE {
                self.write_zeroes(&mut zeroes, run.0, run.1, watch)?;
                run = (offset, 0);
            }
            run.1 += cluster;
        }
        self.write_zeroes(&mut zeroes, run.0, run.1, watch)?;
        let end = writer.finish().map_err(failed)?;
        match preallocation {
            Preallocation::Falloc => self.set_aside(self.end(end), watch),
            _ => Ok(()),
        }
    }

    /// Where what holds the data ends, if the image does at `end`.
    pub fn end(&self, end: u64) -> u64 {
        match self.data {
            Some(_) => self.size,
            None => end,
        }
    }

    /// Has the file system keep space for the file up to `end`.
    pub fn set_aside(&self, end: u64, watch: &mut Watch<'_>) -> Result<(), BuildError> {
        self.check_room(end)?;
        let mut at = 0;
        while at < end {
            let len = SET_ASIDE.min(end - at);
            match self.allocate(at, len) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP) => {
                    let reason = format!(
                        "the file system of {} can't set space aside (fallocate); `full` writes it",
                        self.options.path.display()
                    );
                    return Err(Invalid::new("preallocation", reason).into());
                }
                Err(error) => return Err(self.failed(error.into())),
            }
            at += len;
            watch(at, end)?;
        }
        Ok(())
    }

    /// The same in one go, so that what has no space is refused before it is written, and lies
    /// together; not every file system can.
    pub fn set_aside_if_possible(&self, end: u64) -> Result<(), BuildError> {
        self.check_room(end)?;
        match self.allocate(0, end) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(self.failed(error.into())),
        }
    }

    /// What there is surely no space for is refused before it has taken from others, for a moment,
    /// all that there is.
    fn check_room(&self, end: u64) -> Result<(), BuildError> {
        let (Ok(system), Ok(own)) = (
            rustix::fs::fstatvfs(self.place()),
            rustix::fs::fstat(self.place()),
        ) else {
            return Ok(());
        };
        let free = system.f_bfree.saturating_mul(system.f_frsize);
        let taken = u64::try_from(own.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        // Those without a bound tell of no blocks at all.
        match system.f_blocks > 0 && free.saturating_add(taken) < end {
            true => Err(self.failed(Errno::NOSPC.into())),
            false => Ok(()),
        }
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        loop {
            let result = rustix::fs::fallocate(self.place(), FallocateFlags::empty(), offset, len);
            if result != Err(Errno::INTR) {
                return result;
            }
        }
    }

    /// Writes them to so many bytes from `offset` on, though not behind the end of a data file.
    pub fn write_zeroes(
        &self,
        zeroes: &mut Zeroes,
        mut offset: u64,
        mut len: u64,
        watch: &mut Watch<'_>,
    ) -> Result<(), BuildError> {
        if self.data.is_some() {
            len = len.min(self.size.saturating_sub(offset));
        }
        while len > 0 {
            let count = len.min(zeroes.bytes.len() as u64);
            let piece = zeroes.bytes.get(..count as usize).unwrap_or(&[]);
            let written = self.place().write_all_at(piece, offset);
            written.map_err(|error| self.failed(error))?;
            (offset, len) = (offset + count, len - count);
            zeroes.done += count;
            zeroes.unsynced += count;
            if zeroes.unsynced >= SYNCED {
                self.place()
                    .sync_data()
                    .map_err(|error| self.failed(error))?;
                zeroes.unsynced = 0;
            }
            watch(zeroes.done.min(zeroes.total), zeroes.total)?;
        }
        Ok(())
    }

    /// The host failed.
    pub fn failed(&self, error: io::Error) -> BuildError {
        match error.raw_os_error() {
            Some(libc::EFBIG) => self.too_large(&error),
            _ => failed(&self.options.path, error),
        }
    }

    fn too_large(&self, error: &io::Error) -> BuildError {
        let (path, size) = (self.options.path.display(), self.size);
        let reason = format!("{path} can't have what a disk of {size} bytes needs: {error}");
        Invalid::new("size", reason).into()
    }
}

/// Zeroes, and how many have been written.
pub struct Zeroes {
    bytes: Vec<u8>,
    done: u64,
    total: u64,
    unsynced: u64,
}

impl Zeroes {
    /// None yet, of so many.
    pub fn new(total: u64) -> Self {
        Self {
            bytes: vec![0; PIECE],
            done: 0,
            total,
            unsynced: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::create::create_watched;
    use super::*;

    #[test]
    fn whoever_watches_can_end_it_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        for format in [Format::Raw, Format::Qcow2] {
            for preallocation in [
                Preallocation::Metadata,
                Preallocation::Falloc,
                Preallocation::Full,
            ] {
                if (format, preallocation) == (Format::Raw, Preallocation::Metadata) {
                    continue;
                }
                let options = CreateOptions {
                    size_bytes: Some(8 << 20),
                    preallocation,
                    ..CreateOptions::new(&folder.path().join("new"), format)
                };
                let mut told = Vec::new();
                let ended = create_watched(&options, &mut |done, total| {
                    told.push((done, total));
                    Err(BuildError::host("making it", io::ErrorKind::Interrupted))
                });
                assert!(ended.unwrap_err().to_string().contains("making it"));
                assert_eq!(told.len(), 1, "{format:?} {preallocation:?}");
                let left = std::fs::read_dir(folder.path()).unwrap().count();
                assert_eq!(left, 0, "{format:?} {preallocation:?}");

                // How far it is never goes back, and comes to the end.
                let mut last = (0, 1);
                let made = create_watched(&options, &mut |done, total| {
                    assert!(done <= total);
                    assert!(done >= last.0 || total != last.1, "{done} {last:?}");
                    last = (done, total);
                    Ok(())
                });
                assert_eq!(made.unwrap(), 8 << 20);
                if preallocation != Preallocation::Metadata {
                    assert_eq!(last.0, last.1);
                }
                std::fs::remove_file(&options.path).unwrap();
            }
        }
    }

    #[test]
    fn what_there_is_no_space_for_takes_none_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let room = rustix::fs::statvfs(folder.path()).unwrap();
        if room.f_blocks == 0 {
            return;
        }
        let size = (room.f_blocks * room.f_frsize).next_multiple_of(1 << 20) + (8 << 30);
        for preallocation in [Preallocation::Falloc, Preallocation::Full] {
            let options = CreateOptions {
                size_bytes: Some(size),
                preallocation,
                ..CreateOptions::new(&folder.path().join("new"), Format::Raw)
            };
            let mut begun = false;
            let error = create_watched(&options, &mut |_, _| {
                begun = true;
                Err(BuildError::host("making it", io::ErrorKind::Interrupted))
            });
            let error = error.unwrap_err().to_string();
            assert!(!begun && error.contains("no space"), "{error}");
        }
    }

    #[test]
    fn a_full_host_is_the_fault_of_the_path() {
        let error = failed(Path::new("/a"), Errno::NOSPC.into());
        let BuildError::Invalid(wrong) = error else {
            panic!("{error}");
        };
        assert_eq!(wrong.field, "path");
        let error = failed(Path::new("/a"), Errno::IO.into());
        assert!(matches!(error, BuildError::Host { .. }));
    }
}
