//! Giving an image that nobody uses another size.
//!
//! To grow is what the engines do while a guest uses the disk ([`super::Image::grow`]), crash-safe at
//! every step. To shrink is possible for raw files only, and only where nothing but zeroes is lost.

use std::fs::File;
use std::io;

use super::blocking::Blocking;
use super::copy::is_zero;
use super::qcow2::extents::Extents;
use super::{Format, OpenOptions, SECTOR, space};
use crate::config::{BuildError, Invalid};

/// Looked at at a time.
const PIECE: u64 = 1 << 20;

/// What size a disk is to have, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This.
    To(u64),
    /// So much more than now.
    More(u64),
    /// So much less than now.
    Less(u64),
}

impl NewSize {
    fn of(self, is: u64) -> Result<u64, BuildError> {
        let size = match self {
            Self::To(size) => Some(size),
            Self::More(more) => is.checked_add(more),
            Self::Less(less) => is.checked_sub(less),
        };
        let size = size.filter(|size| *size > 0 && size.is_multiple_of(SECTOR));
        let size = size.filter(|size| i64::try_from(*size).is_ok());
        size.ok_or_else(|| {
            let reason = format!("must come to a multiple of {SECTOR} bytes from {SECTOR} on");
            Invalid::new("size", reason).into()
        })
    }
}

/// Gives the disk of an image another size; returns the one it had and the one it has. Without
/// `shrink` it is not made smaller. An error names the field `size`, or `path`, and leaves the disk
/// as it was.
pub fn resize(
    format: Format,
    options: &OpenOptions,
    size: NewSize,
    shrink: bool,
) -> Result<(u64, u64), BuildError> {
    let options = OpenOptions {
        readonly: false,
        ..options.clone()
    };
    let mut disk = Blocking::open(format, &options)?;
    let old = disk.size_bytes();
    let new = size.of(old)?;
    if new < old {
        return match (shrink, format) {
            (false, _) => {
                let reason = format!("the disk has {old} bytes; only --shrink makes it smaller");
                Err(invalid(reason))
            }
            (true, Format::Qcow2) => Err(invalid(
                "not supported yet: making a qcow2 image smaller; a copy can be made of its \
                 beginning",
            )),
            (true, Format::Raw) => shrink_raw(&mut disk, &options, old, new).map(|()| (old, new)),
        };
    }
    if new > old {
        disk.grow(new).map_err(|error| match error {
            BuildError::Invalid(wrong) if wrong.field == "desired_size" => invalid(wrong.reason),
            other => other,
        })?;
    }
    disk.flush()
        .map_err(|error| BuildError::host(format!("writing {}", options.path.display()), error))?;
    Ok((old, new))
}

/// Cuts a file off, if there is nothing but zeroes behind.
fn shrink_raw(
    disk: &mut Blocking,
    options: &OpenOptions,
    old: u64,
    new: u64,
) -> Result<(), BuildError> {
    let path = options.path.display();
    let file = disk.host_file();
    let failed = |error: io::Error| BuildError::host(format!("shrinking {path}"), error);
    if space::of_file(&file).map_err(failed)?.is_none() {
        return Err(invalid(format!("{path} is a block device")));
    }
    // It is ours: the lock is held by the other opening.
    let mut extents = Extents::open(Format::Raw, options, false)?;
    if let Some(at) = first_data(disk, &mut extents, new, old).map_err(failed)? {
        let reason = format!(
            "there is something at {at}, which would be lost; only what is zero is cut off"
        );
        return Err(invalid(reason));
    }
    cut(&file, new).map_err(failed)
}

fn cut(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    file.sync_all()
}

/// Where the first piece is that is not zero.
fn first_data(
    disk: &mut Blocking,
    extents: &mut Extents,
    start: u64,
    end: u64,
) -> io::Result<Option<u64>> {
    let mut position = start;
    while position < end {
        let extent = extents.next(position, end)?;
        let extent_end = extent.start.saturating_add(extent.length).min(end);
        while extent.data && !extent.zero && position < extent_end {
            let length = PIECE.min(extent_end - position);
            if !is_zero(disk.read(position, length as usize)?.get()) {
                return Ok(Some(position));
            }
            position += length;
        }
        position = extent_end;
    }
    Ok(None)
}

fn invalid(reason: impl Into<String>) -> BuildError {
    Invalid::new("size", reason).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_can_not_be_are_refused_however_they_are_told() {
        assert_eq!(NewSize::To(1024).of(512).unwrap(), 1024);
        assert_eq!(NewSize::More(512).of(512).unwrap(), 1024);
        assert_eq!(NewSize::Less(512).of(1024).unwrap(), 512);
        for size in [
            NewSize::To(0),
            NewSize::To(513),
            NewSize::To(1 << 63),
            NewSize::More(u64::MAX),
            NewSize::More(1),
            NewSize::Less(1024),
            NewSize::Less(u64::MAX),
        ] {
            assert!(size.of(1024).is_err(), "{size:?}");
        }
    }
}
