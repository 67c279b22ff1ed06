//! New images, empty ones.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::super::new_file::NewFile;
use super::super::{Format, OpenOptions, SECTOR};
use super::chain::backing_file;
use super::extents::Extents;
pub use super::fill::Watch;
use super::fill::{bytes_to_write, failed, fill};
use super::header::Backing;
use super::new_image::{self, NewImage};
use super::writer::{ImageWriter, Shape};
use crate::config::{BuildError, Invalid};

/// With subclusters: 4 KiB each, at the same cost of metadata as plain clusters of 64 KiB.
const EXTENDED_CLUSTER: u64 = 128 << 10;
const PLAIN_CLUSTER: u64 = 64 << 10;
const MAX_BACKING_NAME: usize = 1023;

/// How much of a new image is allocated at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables of a qcow2 image; the file has holes for the data.
    Metadata,
    /// Tables, and space on the host, which the file system sets aside (fallocate).
    Falloc,
    /// Tables, and zeroes written wherever data can be, so that the host has truly used the space.
    Full,
}

/// What lies below a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBacking {
    /// Its name, as it will stand in the header: relative to the folder of the new image.
    pub name: PathBuf,
    /// Its format, which is recorded.
    pub format: Format,
}

impl NewBacking {
    fn check_name(&self) -> Result<(), BuildError> {
        if !(1..=MAX_BACKING_NAME).contains(&self.name.as_os_str().len()) {
            let reason = format!("its name must have 1 to {MAX_BACKING_NAME} bytes");
            return Err(invalid("backing_file", reason));
        }
        Ok(())
    }
}

/// What a new image shall be. `None` leaves the choice to [`create`].
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Where; nothing may be there.
    pub path: PathBuf,
    /// Its format; raw has no options but `preallocation`.
    pub format: Format,
    /// Size of the disk; without, that of the backing file.
    pub size_bytes: Option<u64>,
    /// 512 B to 2 MiB. 64 KiB, or 128 KiB with subclusters.
    pub cluster_size: Option<u64>,
    /// Subclusters: a 32nd of a cluster can be allocated by itself. On with a backing file.
    pub extended_l2: Option<bool>,
    /// 1 to 64; 16.
    pub refcount_bits: Option<u32>,
    /// Refcounts may lag behind, and are rebuilt after a crash.
    pub lazy_refcounts: bool,
    /// Clusters that somebody compresses later are compressed by zstd, not zlib.
    pub zstd: bool,
    /// Version 2 of the format (`compat=0.10`).
    pub version_2: bool,
    /// The image below it.
    pub backing: Option<NewBacking>,
    /// That image is not looked at, and need not be there; the size must be given.
    pub unchecked_backing: bool,
    /// How much is allocated at once; a raw image has no `metadata`.
    pub preallocation: Preallocation,
    /// The name of a file for the data, as it will stand in the header: relative to the folder of
    /// the new image. Nothing may be there.
    pub data_file: Option<PathBuf>,
    /// That file, read as a raw image, is to be the disk at all times.
    pub data_file_raw: bool,
}

impl CreateOptions {
    /// The simplest.
    pub fn new(path: &Path, format: Format) -> Self {
        Self {
            path: path.into(),
            format,
            size_bytes: None,
            cluster_size: None,
            extended_l2: None,
            refcount_bits: None,
            lazy_refcounts: false,
            zstd: false,
            version_2: false,
            backing: None,
            unchecked_backing: false,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
        }
    }

    /// What all of this comes to; errors name the option that is to blame.
    fn shape(&self) -> Result<Shape, BuildError> {
        let backing_size = match &self.backing {
            Some(backing) if self.unchecked_backing => backing.check_name().map(|()| None)?,
            Some(backing) => Some(self.check_backing(backing)?),
            None => None,
        };
        let Some(size_bytes) = self.size_bytes.or(backing_size) else {
            return Err(invalid(
                "size",
                "must be given where there is no backing file that is looked at",
            ));
        };
        self.shape_of(size_bytes)
    }

    /// The same for a disk of `size_bytes`; the backing file is not looked at.
    pub fn shape_of(&self, size_bytes: u64) -> Result<Shape, BuildError> {
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) || size_bytes > i64::MAX as u64 {
            return Err(invalid(
                "size",
                format!("{size_bytes} is not a multiple of {SECTOR} bytes from {SECTOR} on"),
            ));
        }
        if self.format == Format::Raw {
            self.check_raw()?;
        }
        let shape = self.qcow2_shape(size_bytes)?;
        let cluster = 1 << shape.cluster_bits;
        if shape.l1_entries() * 8 > 32 << 20 {
            let reason = format!(
                "a disk of {size_bytes} bytes is too large for clusters of {cluster} bytes"
            );
            return Err(invalid("size", reason));
        }
        if shape.header_bytes() > cluster {
            let reason = format!("its name does not fit into a cluster of {cluster} bytes");
            let field = match &self.data_file {
                Some(_) => "data_file",
                None => "backing_file",
            };
            return Err(invalid(field, reason));
        }
        Ok(shape)
    }

    fn qcow2_shape(&self, size_bytes: u64) -> Result<Shape, BuildError> {
        let version = if self.version_2 { 2 } else { 3 };
        let small = self.cluster_size.is_some_and(|size| size < 16 << 10);
        let overlay = self.backing.is_some() && !self.version_2 && !small;
        let extended_l2 = self.extended_l2.unwrap_or(overlay);
        let cluster = self.cluster_size.unwrap_or(match extended_l2 {
            true => EXTENDED_CLUSTER,
            false => PLAIN_CLUSTER,
        });
        if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
            let reason = format!("{cluster} is not a power of two from 512 to 2097152");
            return Err(invalid("cluster_size", reason));
        }
        let only_v3 = |field: &str, set: bool| match set && self.version_2 {
            true => Err(invalid(field, "needs version 3 (compat=1.1)")),
            false => Ok(()),
        };
        only_v3("extended_l2", extended_l2)?;
        only_v3("lazy_refcounts", self.lazy_refcounts)?;
        only_v3("compression_type", self.zstd)?;
        if extended_l2 && cluster < 16 << 10 {
            return Err(invalid(
                "cluster_size",
                "must be at least 16384 with extended_l2",
            ));
        }
        let bits = self.refcount_bits.unwrap_or(16);
        only_v3("refcount_bits", bits != 16)?;
        if !bits.is_power_of_two() || bits > 64 {
            let reason = format!("{bits} is not a power of two from 1 to 64");
            return Err(invalid("refcount_bits", reason));
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off && !extended_l2 {
            let reason = "hides the backing file, unless extended_l2 is on";
            return Err(invalid("preallocation", reason));
        }
        let data = new_image::external(&Self {
            size_bytes: Some(size_bytes),
            ..self.clone()
        })?;
        Ok(Shape {
            size_bytes,
            data,
            version,
            cluster_bits: cluster.trailing_zeros(),
            extended_l2,
            refcount_order: bits.trailing_zeros(),
            lazy_refcounts: self.lazy_refcounts,
            zstd: self.zstd,
            backing: self.backing.as_ref().map(|backing| {
                let name = backing.name.as_os_str().as_bytes().to_vec();
                (name, backing.format.name().as_bytes())
            }),
        })
    }

    fn check_raw(&self) -> Result<(), BuildError> {
        let unknown = [
            ("cluster_size", self.cluster_size.is_some()),
            ("extended_l2", self.extended_l2.is_some()),
            ("refcount_bits", self.refcount_bits.is_some()),
            ("lazy_refcounts", self.lazy_refcounts),
            ("compression_type", self.zstd),
            ("compat", self.version_2),
            ("backing_file", self.backing.is_some()),
            ("data_file", self.data_file.is_some()),
            ("data_file_raw", self.data_file_raw),
            (
                "preallocation",
                self.preallocation == Preallocation::Metadata,
            ),
        ];
        match unknown.into_iter().find(|(_, set)| *set) {
            Some((field, _)) => Err(invalid(field, "a raw image has no such option")),
            None => Ok(()),
        }
    }

    /// The size of the disk below, whose whole chain must be there.
    fn check_backing(&self, backing: &NewBacking) -> Result<u64, BuildError> {
        backing.check_name()?;
        let name = backing.name.as_os_str().as_bytes();
        let recorded = Backing {
            name: name.to_vec(),
            format: Some(backing.format.name().as_bytes().to_vec()),
        };
        let options = OpenOptions {
            readonly: true,
            disable_io_uring: true,
            backing_files: true,
            ..OpenOptions::new(self.path.clone())
        };
        let under = |error| match error {
            BuildError::Invalid(wrong) => invalid("backing_file", wrong.reason),
            other => other,
        };
        let (path, format) = backing_file(&recorded, &self.path, &options).map_err(under)?;
        let below = OpenOptions { path, ..options };
        let extents = Extents::open(format, &below, true).map_err(under)?;
        Ok(extents.size_bytes())
    }
}

/// Makes an image; returns the size of its disk. On error nothing is left behind.
pub fn create(options: &CreateOptions) -> Result<u64, BuildError> {
    create_watched(options, &mut |_, _| Ok(()))
}

/// The same, which `watch` can end.
pub fn create_watched(options: &CreateOptions, watch: &mut Watch<'_>) -> Result<u64, BuildError> {
    let options = &new_image::settled(options);
    let shape = options.shape()?;
    fill(options, shape, NewImage::begin(options, true)?, watch)
}

/// The same on a thread that may not make files with names. What would have to write more than
/// `most_bytes` to the host is refused.
pub fn create_nameless(
    options: &CreateOptions,
    most_bytes: u64,
    watch: &mut Watch<'_>,
) -> Result<(), BuildError> {
    let options = &new_image::settled(options);
    let shape = options.shape()?;
    let bytes = bytes_to_write(options, &shape);
    if bytes > most_bytes {
        let reason = format!(
            "{bytes} bytes would have to be written for it, and a VM can't be held up for more than \
             {most_bytes}; `ballast disk create` can, with progress"
        );
        return Err(invalid("preallocation", reason));
    }
    let new = NewImage::begin(options, false)?;
    fill(options, shape, new, watch).map(drop)
}

/// Begins an overlay, with subclusters, of an image that is in use and is not looked at: a disk of
/// `size_bytes`. The file is whole, and has no name yet.
pub fn begin_overlay(
    path: &Path,
    size_bytes: u64,
    backing: NewBacking,
) -> Result<NewFile, BuildError> {
    backing.check_name()?;
    let options = CreateOptions {
        backing: Some(backing),
        ..CreateOptions::new(path, Format::Qcow2)
    };
    let shape = options.shape_of(size_bytes)?;
    let new = NewFile::begin_nameless(path)?;
    let written = ImageWriter::new(new.file(), shape).and_then(ImageWriter::finish);
    written.map_err(|e| failed(path, e))?;
    Ok(new)
}

/// The shape that an image of `size_bytes` would have, for one who fills it.
pub fn shape_for(options: &CreateOptions, size_bytes: u64) -> Result<Shape, BuildError> {
    CreateOptions {
        size_bytes: Some(size_bytes),
        ..options.clone()
    }
    .shape()
}

fn invalid(field: &str, reason: impl Into<String>) -> BuildError {
    Invalid::new(field, reason).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_the_file_system_can_not_count_is_named_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let options = CreateOptions {
            size_bytes: Some(1 << 50),
            ..CreateOptions::new(&folder.path().join("new"), Format::Raw)
        };
        let result = create(&options);
        let plain = std::fs::File::create(folder.path().join("plain")).unwrap();
        if plain.set_len(1 << 50).is_ok() {
            eprintln!("SKIPPED: this file system has files of a PiB");
            return;
        }
        let error = result.unwrap_err();
        assert!(
            matches!(&error, BuildError::Invalid(wrong) if wrong.field == "size"),
            "{error}"
        );
        assert!(!options.path.exists());
    }
}
