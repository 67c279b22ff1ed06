//! A disk's configuration.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{Array, ArrayBuilder, ObjectBuilder, Type};

use crate::config::{Invalid, PciCommon};
pub use crate::disk::LockGranularity;
use crate::rate_limiter::RateLimiterConfig;

/// What `l2_cache_size` may be.
const L2_CACHE_SIZES: RangeInclusive<u64> = 1 << 20..=1 << 30;

/// Descriptors of all the queues that one thread may serve: what an engine is made to hold, well
/// within the entries of an io_uring (32768).
pub(super) const MAX_DESCRIPTORS: u32 = 16384;

/// A virtio block device and the image behind it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskConfig {
    #[serde(flatten)]
    #[allow(missing_docs)]
    pub common: PciCommon,
    /// The image: a regular file or a block device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Refuse the guest's writes, and open the image for reading only.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// Virtqueues, at most as many as the VM has vCPUs, each served by a thread of its own; those of
    /// a qcow2 image that is written to by one thread, and with 16384 descriptors at most in all.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 64)]
    pub num_queues: u16,
    /// Descriptors of each queue: a power of two.
    #[serde(default = "default_queue_size")]
    #[schema(minimum = 2, maximum = 1024)]
    pub queue_size: u16,
    /// Limits on bandwidth and operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Use plain preadv/pwritev, on up to 16 threads of each queue's, even where the kernel
    /// offers io_uring.
    #[serde(default)]
    pub disable_io_uring: bool,
    /// Accepted for Cloud Hypervisor's clients. Linux AIO is never used, so there is nothing to
    /// disable.
    #[serde(default)]
    pub disable_aio: bool,
    /// What the guest reads as the disk's serial number (VIRTIO_BLK_T_GET_ID), up to 20 ASCII bytes;
    /// derived from the image file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 20)]
    pub serial: Option<String>,
    /// Whether the guest's DISCARD and WRITE_ZEROES give space back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// Format of the image. It is never guessed: an absent or `Unknown` type means `Raw`.
    #[serde(default)]
    pub image_type: ImageType,
    /// Follow the name of a backing file that a qcow2 image has, to a regular file, raw or qcow2 as
    /// the image records, and of a file that has the image's data. Without it an image with either is
    /// refused.
    #[serde(default)]
    pub backing_files: bool,
    /// Most bytes of memory for the tables of a qcow2 image and of those below it: 1 MiB to 1 GiB,
    /// taken as they are read; 32 MiB when absent, which is enough for 256 GiB of disk with clusters
    /// of 64 KiB. With tables below an image that is written to, each side has a half. Changes that
    /// are yet to be written may take more for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1048576, maximum = 1073741824, example = 67_108_864)]
    pub l2_cache_size: Option<u64>,
    /// How the image is locked against other processes.
    #[serde(default)]
    pub lock_granularity: LockGranularity,
    /// What to do with a write for which the host has no space.
    #[serde(default)]
    pub on_enospc: OnEnospc,
    /// How many milliseconds a write may be held for lack of space before it fails after all; for
    /// ever when absent. Time in which the VM is paused does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, example = 600_000)]
    pub enospc_grace_ms: Option<u64>,
    /// Bytes that the image may take on the host before events say so (`disk-space`, at
    /// `space_watermarks` percent of it and at 100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub write_threshold: Option<u64>,
    /// How full, in percent, the host's file system, or the image measured by `write_threshold`,
    /// may be before an event says so: ascending, 1 to 99, at most 8; none for no such events.
    #[serde(default = "watermarks")]
    #[schema(schema_with = percentages)]
    pub space_watermarks: Vec<u8>,
    /// Whether writes of nothing but zeroes are looked for, which costs a look at the data.
    #[serde(default)]
    pub detect_zeroes: DetectZeroes,
}

/// What to do with a write for which the host has no space (ENOSPC), or no more for us (EDQUOT).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnEnospc {
    /// Hold it and try again until there is space; the VM runs on. The event `disk-full` tells.
    #[default]
    Hold,
    /// Tell the guest that it failed.
    Report,
    /// Hold it, and pause the VM until `vm.resume-disk` or `vm.resume`.
    PauseVm,
}

impl OnEnospc {
    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::Report => "report",
            Self::PauseVm => "pause-vm",
        }
    }
}

/// What to do with writes of nothing but zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DetectZeroes {
    /// Write them.
    #[default]
    Off,
    /// Have the host make zeroes of the range, without moving the data; its space is kept.
    On,
    /// The same, and its space goes back to the host; needs `sparse`.
    Unmap,
}

/// Format of a disk image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ImageType {
    /// The bytes of the disk, as they are.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// Accepted for Cloud Hypervisor's clients; means `Raw`.
    Unknown,
}

fn one() -> u16 {
    1
}

fn default_queue_size() -> u16 {
    128
}

fn percentages() -> Array {
    let percentage = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(1))
        .maximum(Some(99));
    ArrayBuilder::new()
        .items(percentage)
        .max_items(Some(8))
        .build()
}

fn watermarks() -> Vec<u8> {
    vec![75, 90, 95]
}

fn yes() -> bool {
    true
}

impl DiskConfig {
    /// Whether all queues are served by one thread, which owns the image's metadata.
    fn has_owner(&self) -> bool {
        self.image_type == ImageType::Qcow2 && !self.readonly
    }

    /// Those of all queues.
    pub(super) fn descriptors(&self) -> u32 {
        u32::from(self.num_queues) * u32::from(self.queue_size)
    }

    /// How many queues a thread serves: one, or all.
    pub(super) fn queues_per_thread(&self) -> u16 {
        match self.has_owner() {
            true => self.num_queues.max(1),
            false => 1,
        }
    }

    /// Checks all that can be known without looking at the host or at other devices.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.path.as_os_str().is_empty() {
            return Err(Invalid::new("path", "must not be empty"));
        }
        if !(1..=64).contains(&self.num_queues) {
            return Err(Invalid::new("num_queues", "must be 1 to 64"));
        }
        if !(2..=1024).contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            return Err(Invalid::new(
                "queue_size",
                "must be a power of two from 2 to 1024",
            ));
        }
        let qcow2 = self.image_type == ImageType::Qcow2;
        let descriptors = self.descriptors();
        if self.has_owner() && descriptors > MAX_DESCRIPTORS {
            let reason = format!(
                "the queues of a Qcow2 image that is written to have {MAX_DESCRIPTORS} descriptors \
                 at most, and {} of {} are {descriptors}",
                self.num_queues, self.queue_size
            );
            return Err(Invalid::new("num_queues", reason));
        }
        if self.backing_files && !qcow2 {
            return Err(Invalid::new(
                "backing_files",
                "only images of the type Qcow2 have backing files",
            ));
        }
        self.validate_cache()?;
        if let Some(serial) = &self.serial
            && (serial.len() > 20 || !serial.is_ascii())
        {
            return Err(Invalid::new("serial", "must have at most 20 ASCII bytes"));
        }
        self.validate_space()?;
        if let Some(limits) = &self.rate_limiter_config {
            limits
                .validate()
                .map_err(|e| e.within("rate_limiter_config"))?;
        }
        Ok(())
    }

    fn validate_cache(&self) -> Result<(), Invalid> {
        let refuse = |reason| Err(Invalid::new("l2_cache_size", reason));
        match self.l2_cache_size {
            None => Ok(()),
            Some(_) if self.image_type != ImageType::Qcow2 => {
                refuse("only images of the type Qcow2 have tables")
            }
            Some(bytes) if !L2_CACHE_SIZES.contains(&bytes) => {
                refuse("must be 1048576 (1 MiB) to 1073741824 (1 GiB)")
            }
            Some(_) => Ok(()),
        }
    }

    fn validate_space(&self) -> Result<(), Invalid> {
        if self.enospc_grace_ms == Some(0) {
            let reason = "must be at least 1; on_enospc `report` is what does not hold at all";
            return Err(Invalid::new("enospc_grace_ms", reason));
        }
        if self.enospc_grace_ms.is_some() && self.on_enospc == OnEnospc::Report {
            let reason = "has no meaning with on_enospc `report`, which holds nothing";
            return Err(Invalid::new("enospc_grace_ms", reason));
        }
        if self.write_threshold == Some(0) {
            return Err(Invalid::new("write_threshold", "must be at least 1"));
        }
        let marks = &self.space_watermarks;
        let in_range = marks.iter().all(|mark| (1..=99).contains(mark));
        if !in_range || marks.len() > 8 || !marks.is_sorted_by(|a, b| a < b) {
            return Err(Invalid::new(
                "space_watermarks",
                "must be at most 8 percentages from 1 to 99, ascending",
            ));
        }
        if self.detect_zeroes == DetectZeroes::Unmap && !self.sparse {
            return Err(Invalid::new(
                "detect_zeroes",
                "`unmap` gives space back to the host, which `sparse` false forbids",
            ));
        }
        Ok(())
    }
}
