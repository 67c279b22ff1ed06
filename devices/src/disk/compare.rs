//! Whether two images show the same disk.

use std::io;

use super::blocking::Blocking;
use super::copy::is_zero;
use super::qcow2::create::Watch;
use super::qcow2::extents::{Extent, Extents};
use super::{Format, OpenOptions, SECTOR};
use crate::config::{BuildError, Invalid};

/// Read at a time.
const PIECE: u64 = 1 << 20;

/// What comparing came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// They show the same; where one is larger, it is zero from there on.
    Identical {
        /// None is larger.
        same_size: bool,
    },
    /// They differ.
    Content {
        /// The first sector where they do.
        offset: u64,
        /// One of them has ended before.
        beyond_end: bool,
    },
    /// Strictly: they have different sizes.
    Size,
    /// Strictly: one has something in its files, and the other has not, or has zeroes.
    Allocation {
        /// From here on.
        offset: u64,
    },
}

/// Compares two disks; `strict`ly their sizes too, and what is allocated. An error names
/// `second` where that is to blame.
pub fn compare(
    first: (Format, &OpenOptions),
    second: (Format, &OpenOptions),
    strict: bool,
    watch: &mut Watch<'_>,
) -> Result<Comparison, BuildError> {
    let mut first = Side::open(first)?;
    let mut second = Side::open(second).map_err(|error| match error {
        BuildError::Invalid(wrong) if wrong.field == "path" => {
            Invalid::new("second", wrong.reason).into()
        }
        other => other,
    })?;
    let (one, other) = (first.disk.size_bytes(), second.disk.size_bytes());
    let (same_size, shared, size) = (one == other, one.min(other), one.max(other));
    if strict && !same_size {
        return Ok(Comparison::Size);
    }
    let mut position = 0;
    while position < shared {
        let (one, other) = (first.at(position, shared)?, second.at(position, shared)?);
        let kind = |extent: &Extent| (extent.present, extent.data, extent.zero);
        if strict && kind(&one) != kind(&other) {
            return Ok(Comparison::Allocation { offset: position });
        }
        let mut length = one.length.min(other.length);
        if one.data || other.data {
            length = length.min(PIECE);
            let zeroes = |extent: &Extent| !extent.data;
            let differs = match (zeroes(&one), zeroes(&other)) {
                (true, _) => second.first_nonzero(position, length)?,
                (_, true) => first.first_nonzero(position, length)?,
                (false, false) => first.first_difference(&mut second, position, length)?,
            };
            if let Some(offset) = differs {
                return Ok(Comparison::Content {
                    offset,
                    beyond_end: false,
                });
            }
        }
        position += length;
        watch(position, size)?;
    }
    let longer = if one > other { &mut first } else { &mut second };
    while position < size {
        let extent = longer.at(position, size)?;
        let mut length = extent.length;
        if extent.data {
            length = length.min(PIECE);
            if let Some(offset) = longer.first_nonzero(position, length)? {
                return Ok(Comparison::Content {
                    offset,
                    beyond_end: true,
                });
            }
        }
        position += length;
        watch(position, size)?;
    }
    Ok(Comparison::Identical { same_size })
}

/// One of them.
struct Side {
    disk: Blocking,
    extents: Extents,
    reading: String,
}

impl Side {
    fn open((format, options): (Format, &OpenOptions)) -> Result<Self, BuildError> {
        let options = OpenOptions {
            readonly: true,
            ..options.clone()
        };
        Ok(Self {
            disk: Blocking::open(format, &options)?,
            extents: Extents::open(format, &options, true)?,
            reading: format!("reading {}", options.path.display()),
        })
    }

    fn failed(&self, error: io::Error) -> BuildError {
        BuildError::host(&self.reading, error)
    }

    fn at(&mut self, position: u64, end: u64) -> Result<Extent, BuildError> {
        let extent = self.extents.next(position, end);
        extent.map_err(|e| self.failed(e))
    }

    fn read(&mut self, offset: u64, length: u64) -> Result<super::blocking::Bytes, BuildError> {
        let bytes = self.disk.read(offset, length as usize);
        bytes.map_err(|e| self.failed(e))
    }

    fn first_nonzero(&mut self, offset: u64, length: u64) -> Result<Option<u64>, BuildError> {
        let bytes = self.read(offset, length)?;
        let mut sectors = bytes.get().chunks(SECTOR as usize);
        let found = sectors.position(|sector| !is_zero(sector));
        Ok(found.map(|index| offset + index as u64 * SECTOR))
    }

    fn first_difference(
        &mut self,
        other: &mut Self,
        offset: u64,
        length: u64,
    ) -> Result<Option<u64>, BuildError> {
        let (one, other) = (self.read(offset, length)?, other.read(offset, length)?);
        if one.get() == other.get() {
            return Ok(None);
        }
        let sectors = one.get().chunks(SECTOR as usize);
        let mut pairs = sectors.zip(other.get().chunks(SECTOR as usize));
        let found = pairs.position(|(one, other)| one != other);
        Ok(found.map(|index| offset + index as u64 * SECTOR))
    }
}
