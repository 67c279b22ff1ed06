//! Making an image for a disk that is to be added.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ImageType;
use crate::allow;
use crate::config::{BuildError, Invalid};
use crate::disk::Format;
use crate::disk::qcow2::create::{CreateOptions, NewBacking, Preallocation, create_nameless};
use crate::sandbox::{Allow, Test};

/// What making an image takes beside opening one. A file can come into being only without a name,
/// and be given one that nothing has: no file of the host can be replaced this way.
pub const SYSCALLS: &[Allow] = &[
    allow!(fallocate, 1 => Test::Is(0)),
    allow!(fdatasync),
    allow!(fsync),
    allow!(ftruncate),
    allow!(linkat),
    allow!(pread64),
    allow!(pwrite64),
];

/// The most bytes that are written for an image: the VMM thread waits until they are on the host's
/// disk.
const MOST_BYTES: u64 = 256 << 20;
/// The longest that the VMM thread goes on making an image.
const LONGEST: Duration = Duration::from_secs(5);

/// A new, empty disk image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewDiskConfig {
    /// Where: a name that nothing has yet.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// `Raw` or `Qcow2`.
    pub image_type: ImageType,
    /// Size of the disk in bytes, a multiple of 512; without, that of the backing file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The smallest unit of allocation of a qcow2 image, in bytes: a power of two from 512 to 2 MiB.
    /// 64 KiB, or 128 KiB with subclusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether a 32nd of a cluster can be allocated by itself; if absent, with a backing file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// Width of a qcow2 image's refcounts: a power of two up to 64; 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 64)]
    pub refcount_bits: Option<u32>,
    /// Refcounts may lag behind what is written, and are mended after a crash.
    #[serde(default)]
    pub lazy_refcounts: bool,
    /// How much of it is allocated at once. Over a backing file it needs `extended_l2`. Refused is
    /// what would write more than 256 MiB, or take longer than five seconds: `ballast disk create`
    /// does that.
    #[serde(default)]
    pub preallocation: Preallocation,
    /// The image that shows through where the new one holds nothing, as it is to be recorded:
    /// relative to the new image's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub backing_path: Option<PathBuf>,
    /// The format of that image; must be given with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_type: Option<ImageType>,
}

impl NewDiskConfig {
    /// Makes it. On error nothing is left behind. Called on the VMM thread.
    pub fn create(&self) -> Result<(), BuildError> {
        let backing = match (&self.backing_path, self.backing_type) {
            (None, None) => None,
            (Some(name), Some(kind)) => Some(NewBacking {
                name: name.clone(),
                format: format("backing_type", kind)?,
            }),
            (Some(_), None) => {
                let reason = "must be given with `backing_path`: a format is never guessed";
                return Err(Invalid::new("backing_type", reason).into());
            }
            (None, Some(_)) => {
                return Err(
                    Invalid::new("backing_path", "must be given with `backing_type`").into(),
                );
            }
        };
        let options = CreateOptions {
            size_bytes: self.size,
            cluster_size: self.cluster_size,
            extended_l2: self.extended_l2,
            refcount_bits: self.refcount_bits,
            lazy_refcounts: self.lazy_refcounts,
            backing,
            preallocation: self.preallocation,
            ..CreateOptions::new(&self.path, format("image_type", self.image_type)?)
        };
        let begun = Instant::now();
        let mut watch = |_, _| match begun.elapsed() > LONGEST {
            false => Ok(()),
            true => {
                let reason = "takes too long here; `ballast disk create` has the time";
                Err(Invalid::new("preallocation", reason).into())
            }
        };
        create_nameless(&options, MOST_BYTES, &mut watch).map_err(|error| match error {
            BuildError::Invalid(wrong) if wrong.field == "backing_file" => {
                Invalid::new("backing_path", wrong.reason).into()
            }
            other => other,
        })
    }
}

fn format(field: &str, kind: ImageType) -> Result<Format, BuildError> {
    match kind {
        ImageType::Raw => Ok(Format::Raw),
        ImageType::Qcow2 => Ok(Format::Qcow2),
        ImageType::Unknown => Err(Invalid::new(field, "must be Raw or Qcow2").into()),
    }
}
