//! The configuration that all devices share, and the one list of the devices there are.
//!
//! A device's own configuration struct stands beside the device. The HTTP body, the config file
//! and the OpenAPI document all follow from it.

use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use utoipa::ToSchema;

use crate::allow;
use crate::balloon::{Balloon, BalloonConfig};
use crate::block::{Block, DiskConfig};
use crate::event::Reporter;
use crate::guest_memory::discard::inhibit::Inhibitor;
use crate::rng::{Rng, RngConfig};
use crate::sandbox::{Allow, SeccompMode, Test};
use crate::virtio::VirtioDevice;

/// What every PCI device's configuration begins with (flattened into it).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PciCommon {
    /// Name of the device, unique in the VM; must not start with `__`. Made up as `_disk0`,
    /// `_disk1`, … when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// PCI segment; there is only segment 0.
    #[serde(default)]
    #[schema(maximum = 0)]
    pub pci_segment: u16,
    /// PCI device number (slot) to use, 1–31; the lowest free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 31)]
    pub pci_device_id: Option<u8>,
}

/// A value in a configuration that can't be accepted: which one, and why.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field}: {reason}")]
pub struct Invalid {
    /// Path of the field from the struct it was found in, as in `rate_limiter_config.ops.size`.
    pub field: String,
    /// What is wrong with it, and what would be right.
    pub reason: String,
}

impl Invalid {
    /// Refuses `field` because of `reason`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// The same refusal as seen from an outer struct in which this one is the field `outer`.
    pub fn within(mut self, outer: &str) -> Self {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

impl PciCommon {
    /// Checks the rules of [`PciCommon`].
    pub fn validate(&self) -> Result<(), Invalid> {
        if let Some(id) = &self.id
            && (!(1..=255).contains(&id.len())
                || id.starts_with("__")
                || id.contains(char::is_control))
        {
            return Err(Invalid::new(
                "id",
                "must have 1 to 255 bytes, no control characters, and must not start with `__`",
            ));
        }
        if self.pci_segment != 0 {
            return Err(Invalid::new(
                "pci_segment",
                "not supported yet: there is only segment 0",
            ));
        }
        match self.pci_device_id {
            None | Some(1..=31) => Ok(()),
            Some(_) => Err(Invalid::new("pci_device_id", "must be 1 to 31")),
        }
    }
}

/// What is needed to make a device: everything is opened and every thread started with it.
pub struct BuildContext {
    /// Where the device reports.
    pub reporter: Reporter,
    /// The mode of its threads' filters.
    pub seccomp: SeccompMode,
    /// Holds discards of the VM's memory off.
    pub discards: Inhibitor,
}

// _IO(0x12, 123) and _IO(0x12, 104), include/uapi/linux/fs.h.
const BLKPBSZGET: u32 = 0x127b;
const BLKSSZGET: u32 = 0x1268;

/// What [`DeviceConfig::check_host`] and [`DeviceConfig::build`] call beyond
/// [`crate::sandbox::COMMON`] and spawning.
pub const BUILD: &[Allow] = &[
    allow!(epoll_create1),
    allow!(eventfd2),
    allow!(fcntl, 1 => Test::Is(libc::F_GETFL as u32)),
    allow!(fcntl, 1 => Test::Is(libc::F_OFD_GETLK as u32)),
    allow!(fcntl, 1 => Test::Is(libc::F_OFD_SETLK as u32)),
    allow!(fcntl, 1 => Test::Is(libc::F_SETFL as u32)),
    allow!(fstat),
    allow!(fstatfs),
    // Growing an image.
    allow!(ftruncate),
    allow!(io_uring_register),
    allow!(io_uring_setup),
    allow!(ioctl, 1 => Test::Is(BLKPBSZGET)),
    allow!(ioctl, 1 => Test::Is(BLKSSZGET)),
    allow!(lseek),
    allow!(newfstatat),
    allow!(openat, 2 => Test::Without((libc::O_CREAT | libc::O_TRUNC) as u64)),
    allow!(pidfd_open),
    // Reading what an image says about itself.
    allow!(preadv),
    allow!(preadv2),
    allow!(statx),
    allow!(timerfd_create),
];

/// Every kind of device thread, with the lists of its filter.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    let kinds = crate::block::thread_kinds().into_iter();
    kinds
        .chain(crate::balloon::thread_kinds())
        .chain(crate::rng::thread_kinds())
        .chain(crate::legacy::console::thread_kinds())
        .collect()
}

/// Why a device could not be made.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Something in the configuration does not fit the host (a missing file, a bad size).
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Somebody else has the image.
    #[error("{path} is in use by another process: {reason}")]
    Locked {
        /// The image.
        path: String,
        /// Which lock could not be had.
        reason: String,
    },
    /// The host failed us.
    #[error("{doing}: {source}")]
    Host {
        /// What was being done.
        doing: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl BuildError {
    /// The file that `field` names can't be opened: the file's fault, unless the host or the
    /// process has run out of something.
    pub fn cannot_open(field: &str, path: &Path, error: Errno) -> Self {
        let source = std::io::Error::from(error);
        match error {
            Errno::MFILE | Errno::NFILE | Errno::NOMEM => {
                Self::host(format!("opening {}", path.display()), source)
            }
            _ => Invalid::new(
                field,
                format!("{} can't be opened: {source}", path.display()),
            )
            .into(),
        }
    }

    /// The host failed while `doing`.
    pub fn host(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Host {
            doing: doing.into(),
            source: source.into(),
        }
    }
}

/// The one list of devices that can be plugged into a slot.
#[derive(Clone, Debug, PartialEq)]
pub enum DeviceConfig {
    /// A virtio balloon.
    Balloon(BalloonConfig),
    /// A virtio block device.
    Disk(DiskConfig),
    /// A virtio entropy device.
    Rng(RngConfig),
}

impl DeviceConfig {
    /// What all of them share.
    pub fn common(&self) -> &PciCommon {
        match self {
            Self::Balloon(config) => &config.common,
            Self::Disk(config) => &config.common,
            Self::Rng(config) => &config.common,
        }
    }

    /// The same, to fill in a made-up id.
    pub fn common_mut(&mut self) -> &mut PciCommon {
        match self {
            Self::Balloon(config) => &mut config.common,
            Self::Disk(config) => &mut config.common,
            Self::Rng(config) => &mut config.common,
        }
    }

    /// What made-up ids of such devices begin with.
    pub fn id_prefix(&self) -> &'static str {
        match self {
            Self::Balloon(_) => "_balloon",
            Self::Disk(_) => "_disk",
            Self::Rng(_) => "_rng",
        }
    }

    /// Checks what it needs of the host, and changes nothing there: files that exist, are of the
    /// right kind and can be opened.
    pub fn check_host(&self) -> Result<(), BuildError> {
        match self {
            Self::Balloon(_) => Ok(()),
            Self::Disk(config) => config.check_host(),
            Self::Rng(config) => config.check_host(),
        }
    }

    /// Checks all that can be known without looking at the host or at other devices.
    pub fn validate(&self) -> Result<(), Invalid> {
        self.common().validate()?;
        match self {
            Self::Balloon(config) => config.validate(),
            Self::Disk(config) => config.validate(),
            Self::Rng(config) => config.validate(),
        }
    }

    /// Makes the device: opens its files, starts its threads. Called on the VMM thread.
    pub fn build(&self, context: BuildContext) -> Result<Arc<dyn VirtioDevice>, BuildError> {
        match self {
            Self::Balloon(config) => Ok(Arc::new(Balloon::new(config, context)?)),
            Self::Disk(config) => Ok(Arc::new(Block::new(config, context)?)),
            Self::Rng(config) => Ok(Arc::new(Rng::new(config, context)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_can_not_name_a_thread_is_refused() {
        let with_id = |id: &str| PciCommon {
            id: Some(id.to_owned()),
            ..PciCommon::default()
        };
        for id in ["", "__rng", "a\0b", "a\nb", "\u{7f}", &"a".repeat(256)] {
            assert_eq!(with_id(id).validate().unwrap_err().field, "id", "{id:?}");
        }
        for id in ["disk", "NIC//name", "_disk0", "a \"b\" é"] {
            with_id(id).validate().unwrap();
        }
    }

    #[test]
    fn who_runs_out_of_descriptors_does_not_blame_the_file() {
        let outcome = |error| BuildError::cannot_open("path", Path::new("/x"), error);
        assert!(matches!(outcome(Errno::NOENT), BuildError::Invalid(_)));
        for error in [Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            assert!(matches!(outcome(error), BuildError::Host { .. }));
        }
    }
}
