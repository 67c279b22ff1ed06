//! The files that the guest boots from: opened, checked, and where they will go.

use std::fs::File;
use std::path::Path;

use devices::allow;
use devices::config::Invalid;
use devices::sandbox::{Allow, Test};
use linux_loader::cmdline::Cmdline;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use vm_memory::GuestAddress;

use super::image::{Image, recognise};
use crate::config::PayloadConfig;
use crate::error::Error;
use crate::layout::{CMDLINE_MAX_BYTES, HOLE_START};

/// What opening, checking and loading call beyond [`devices::sandbox::COMMON`].
pub const SYSCALLS: &[Allow] = &[
    allow!(fstat),
    allow!(lseek),
    allow!(openat, 2 => Test::Without((libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT) as u64)),
    allow!(pread64),
    allow!(read),
];

/// A kernel or firmware, and what goes with it. The files stay open, so that what was checked is
/// what is loaded.
#[derive(Debug)]
pub struct Payload {
    /// `kernel` or `firmware`.
    pub(super) field: &'static str,
    pub(super) file: File,
    pub(super) image: Image,
    pub(super) initramfs: Option<Initramfs>,
    pub(super) cmdline: Cmdline,
}

#[derive(Debug)]
pub(super) struct Initramfs {
    pub(super) file: File,
    pub(super) len: u64,
}

impl Payload {
    /// Opens and checks the files of a configuration. Fields are named as seen from `payload`.
    ///
    /// Never waits, whatever the paths lead to.
    pub fn open(config: &PayloadConfig) -> Result<Self, Error> {
        let (field, path) = match (&config.kernel, &config.firmware) {
            (Some(kernel), _) => ("kernel", kernel),
            (None, Some(firmware)) => ("firmware", firmware),
            (None, None) => {
                return Err(Invalid::new("kernel", "give a kernel or a firmware").into());
            }
        };
        let text = config.cmdline.as_deref().unwrap_or_default();
        let cmdline = Cmdline::try_from(text, CMDLINE_MAX_BYTES)
            .and_then(|cmdline| cmdline.as_cstring().map(|_| cmdline))
            .map_err(|error| Invalid::new("cmdline", error.to_string()))?;
        let (file, len) = open(field, path)?;
        let image = recognise(&file, len, field == "kernel", text.len())
            .map_err(|reason| Invalid::new(field, format!("{}: {reason}", path.display())))?;
        let initramfs = config
            .initramfs
            .as_deref()
            .map(|path| open("initramfs", path))
            .transpose()?
            .map(|(file, len)| Initramfs { file, len });
        Ok(Self {
            field,
            file,
            image,
            initramfs,
            cmdline,
        })
    }

    /// Checks that kernel and initramfs fit into `memory_bytes` of RAM.
    pub fn fits(&self, memory_bytes: u64) -> Result<(), Error> {
        self.place_initramfs(memory_bytes.min(HOLE_START))
            .map(drop)
            .map_err(Into::into)
    }

    /// Where the initramfs goes when RAM below the hole ends at `low_end`: as high as possible,
    /// out of the kernel's way.
    pub(super) fn place_initramfs(&self, low_end: u64) -> Result<Option<GuestAddress>, Invalid> {
        let (kernel_end, limit) = match self.image {
            Image::Elf { end, .. } => (end, low_end),
            Image::BzImage { end, initramfs_end } => (end, low_end.min(initramfs_end)),
        };
        if kernel_end > low_end {
            return Err(Invalid::new(
                self.field,
                format!("needs {kernel_end} bytes of memory, and there are {low_end}"),
            ));
        }
        let Some(initramfs) = &self.initramfs else {
            return Ok(None);
        };
        limit
            .checked_sub(initramfs.len)
            .map(|start| start & !4095)
            .filter(|start| *start >= kernel_end)
            .map(|start| Some(GuestAddress(start)))
            .ok_or_else(|| {
                Invalid::new(
                    "initramfs",
                    format!(
                        "has {} bytes; the kernel leaves it {}",
                        initramfs.len,
                        limit.saturating_sub(kernel_end)
                    ),
                )
            })
    }
}

/// Opens a regular file that is not empty.
fn open(field: &'static str, path: &Path) -> Result<(File, u64), Error> {
    let invalid = |reason: &dyn std::fmt::Display| {
        Invalid::new(field, format!("{}: {reason}", path.display()))
    };
    // Opening a FIFO or a device must neither wait nor make it our terminal.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let descriptor = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        // That is not the file's fault.
        Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
            return Err(Error::os(format!("opening {}", path.display()), error));
        }
        other => other.map_err(|error| invalid(&error))?,
    };
    let stat = rustix::fs::fstat(&descriptor).map_err(|error| invalid(&error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(invalid(&"is not a regular file").into());
    }
    match u64::try_from(stat.st_size) {
        Ok(len) if len > 0 => Ok((descriptor.into(), len)),
        _ => Err(invalid(&"is empty").into()),
    }
}
