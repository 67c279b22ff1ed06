//! The qcow2 engine (QEMU's `docs/interop/qcow2.txt`).
//!
//! Versions 2 and 3, with plain, zero and compressed clusters (zlib and zstd), subclusters, refcounts
//! of all widths, internal snapshots (which are kept as they are), and backing files to any sane
//! depth, and external data files (`data_file`). Not: encryption.
//!
//! ```text
//!   header ─ parsed and checked at open, pure          chain ─ an image and what lies below it
//!   map ──── what L1 and L2 entries say, pure          cache ─ L2 slices, bounded, of all layers
//!   queue ── the requests of one thread                task ── what each does, step by step
//!   op ───── one read of a host file, and what becomes of the bytes
//! ```
//!
//! An image that is only read is served by any number of queues, which share the chain and its
//! cache, whose lock is held for a lookup and never over I/O. One that is written to has one queue
//! (`write`), whose thread owns the metadata.
//!
//! What lies below an image in use is opened to be written to as well (`commit`), in a way that the
//! reader does not notice (`write/keep.rs`).
//!
//! Images that nobody uses are made (`create`), looked at (`info`, `extents`) and checked and mended
//! (`check`) by plain reads and writes, with no queue.

mod cache;
mod chain;
pub mod check;
mod commit;
pub mod create;
mod data_file;
mod decompress;
mod details;
mod entry;
pub mod extents;
pub(super) mod fill;
mod header;
pub mod info;
mod map;
pub(super) mod new_image;
mod op;
mod queue;
mod task;
#[cfg(test)]
pub(crate) mod tests;
mod write;
pub(super) mod writer;

pub use queue::{SYNC_SYSCALLS, URING_SYSCALLS};

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use self::chain::{Chain, Top};
use self::details::Snapshot;
use self::header::Header;
use self::map::Layout;
use self::queue::ChainQueue;
use self::write::{Control, GrowError, Writable};
use super::open::HostFile;
use super::steps::Steps;
use super::{
    BackingInfo, Commit, Format, Geometry, Image, ImageInfo, OpenOptions, Queue, SECTOR, Threads,
};
use crate::config::{BuildError, Invalid};
use crate::sandbox::Allow;

/// What the thread of a queue that writes calls, with a ring and without.
pub const WRITE_SYSCALLS: [&[Allow]; 2] = [write::URING_SYSCALLS, write::SYNC_SYSCALLS];

/// A qcow2 image and its backing files.
pub struct Qcow2Image {
    chain: Arc<Chain>,
    /// `None` for an image that is only read.
    writable: Option<Mutex<Option<Writable>>>,
    /// The topmost image's file, and its lock.
    host: HostFile,
    /// The same of its external data file.
    data: Option<HostFile>,
    /// What the queue of an image that is written to shares with it.
    control: Option<Arc<Control>>,
    snapshots: Vec<String>,
    /// Why it can't have another size.
    size_fixed: Option<&'static str>,
    /// How it was opened; with the name that it is known by.
    options: OpenOptions,
    geometry: Geometry,
}

/// Names of snapshots that are told.
const TOLD_SNAPSHOTS: usize = 1024;

/// Who else has the topmost image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Opened {
    /// Nobody.
    Usual,
    /// This process reads it as a backing file.
    BesideReader,
    /// It has done so, and may have left leaks.
    AfterReader,
}

impl Qcow2Image {
    /// Opens and locks all of the chain.
    pub fn open(options: &OpenOptions) -> Result<Self, BuildError> {
        let (mut chain, mut top) = Chain::open(options)?;
        if top.header.writing.dirty && !top.header.corrupt && !options.readonly {
            if !top.host.block_device {
                check::settle(options, &top.header, &top.host.file)?;
            }
            (chain, top) = Chain::open_again(options, &top.host, top.data.as_ref())?;
        }
        Self::of(chain, top, options, Opened::Usual)
    }

    /// Opens an overlay that is to be known as `name` of an image that this process is writing to,
    /// in the files `below`, the image's and maybe one for its data; nothing may be written there
    /// any more.
    pub fn open_overlay(
        options: &OpenOptions,
        name: &Path,
        below: &[Arc<File>],
    ) -> Result<Self, BuildError> {
        let (mut chain, top) = Chain::open_over_own(options)?;
        let identity = |file: &Arc<File>| {
            let stat = rustix::fs::fstat(file);
            let stat = stat.map_err(|e| BuildError::host("looking at a backing file", e))?;
            Ok::<_, BuildError>((stat.st_dev, stat.st_ino))
        };
        let expected: Result<Vec<_>, _> = below.iter().map(identity).collect();
        let found: Result<Vec<_>, _> = chain.files_of(1).map(identity).collect();
        if expected? != found? {
            let reason = "another file has come where the disk's image was";
            return Err(chain::refused(name, reason));
        }
        if let Some(layer) = chain.layers.first_mut() {
            layer.path = name.into();
        }
        let mut image = Self::of(chain, top, options, Opened::Usual)?;
        image.options.path = name.into();
        Ok(image)
    }

    fn of(
        chain: Chain,
        top: Top,
        options: &OpenOptions,
        opened: Opened,
    ) -> Result<Self, BuildError> {
        let size_bytes = chain.size_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) {
            let reason = format!(
                "{} is a disk of {size_bytes} bytes; a disk has a multiple of {SECTOR}, and is \
                 not empty",
                options.path.display()
            );
            return Err(Invalid::new("path", reason).into());
        }
        let Some(first) = chain.layers.first() else {
            return Err(Invalid::new("path", "there is no image").into());
        };
        let unit = first.layout();
        // What the guest writes to.
        let data = top.data.as_ref().unwrap_or(&top.host);
        let geometry = Geometry {
            logical_block: match options.readonly {
                // Whatever O_DIRECT asks for is done here.
                true => SECTOR as u32,
                false => data.geometry.logical_block,
            },
            physical_block: data.geometry.physical_block,
            discard_granularity: unit.map_or(SECTOR, Layout::unit_bytes) as u32,
        };
        let chain = Arc::new(chain);
        let size_fixed = size_fixed(&top.header, &top.snapshots);
        let names = top.snapshots.iter().take(TOLD_SNAPSHOTS);
        let snapshots = names.map(|s| s.name.clone()).collect();
        let mut control = None;
        let writable = match options.readonly {
            true => None,
            false => {
                let writable = Writable::open(chain.clone(), &top, &options.path)?;
                let writable = match opened {
                    Opened::Usual => writable,
                    Opened::BesideReader => writable.beside_reader(),
                    Opened::AfterReader => writable.search_leaks(&top.header),
                };
                control = Some(writable.control());
                Some(Mutex::new(Some(writable)))
            }
        };
        Ok(Self {
            geometry,
            control,
            snapshots,
            size_fixed,
            writable,
            chain,
            host: top.host,
            data: top.data,
            options: options.clone(),
        })
    }

    /// Whether there is an image below that a job may have to do with, and who does its steps.
    fn steps(&self) -> Result<Arc<dyn Steps>, BuildError> {
        let path = self.options.path.display();
        let refuse =
            |reason: &str| BuildError::from(Invalid::new("id", format!("{path} {reason}")));
        let Some(control) = &self.control else {
            return Err(refuse("is open for reading only"));
        };
        if self.chain.images().len() < 2 {
            return Err(refuse("has no backing file"));
        }
        if !self.snapshots.is_empty() {
            // What is not in them shows what is below.
            return Err(refuse(
                "has snapshots inside, which would lose what they have of its backing file",
            ));
        }
        Ok(control.clone())
    }
}

/// Why a disk with these snapshots keeps its size: what does not record how large the disk was
/// takes it to be as large as it is. (QEMU refuses version 2.)
fn size_fixed(header: &Header, snapshots: &[Snapshot]) -> Option<&'static str> {
    match snapshots {
        [] => None,
        _ if header.version < 3 => {
            Some("an image of version 2 that has snapshots can't be resized")
        }
        all if all.iter().any(|s| s.disk_size.is_none()) => {
            Some("a snapshot in it does not record the size of the disk, so it can't be resized")
        }
        _ => None,
    }
}

impl Image for Qcow2Image {
    fn size_bytes(&self) -> u64 {
        match &self.control {
            Some(control) => control.size_bytes(),
            None => self.chain.size_bytes(),
        }
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn serial(&self) -> String {
        self.host.serial.clone()
    }

    fn has_owner(&self) -> bool {
        self.writable.is_some()
    }

    fn host_file(&self) -> Arc<File> {
        let data = self.data.as_ref().unwrap_or(&self.host);
        data.file.clone()
    }

    fn files(&self) -> Vec<Arc<File>> {
        let files = [Some(&self.host), self.data.as_ref()];
        files
            .into_iter()
            .flatten()
            .map(|f| f.file.clone())
            .collect()
    }

    fn info(&self) -> io::Result<ImageInfo> {
        let layers = self.chain.images();
        let layout = layers.first().and_then(|top| top.layout());
        let backing = layers.iter().skip(1).map(|layer| BackingInfo {
            path: layer.path.clone(),
            format: match layer.layout() {
                Some(_) => Format::Qcow2,
                None => Format::Raw,
            },
        });
        Ok(ImageInfo {
            backing: backing.collect(),
            leaked_clusters: self.control.as_ref().and_then(|control| control.leaks()),
            snapshots: Some(self.snapshots.clone()),
            cache: Some(self.chain.lookups.counts()),
            cluster_bytes: layout.map(|layout| layout.cluster_bytes() as u64),
            ..ImageInfo::new(Format::Qcow2, self.size_bytes())
        })
    }

    fn grow(&self, size_bytes: u64, attend: &dyn Fn()) -> Result<(), BuildError> {
        let path = self.options.path.display();
        let refuse = |reason: String| BuildError::from(Invalid::new("desired_size", reason));
        let Some(control) = &self.control else {
            return Err(refuse(format!("{path} is open for reading only")));
        };
        if let Some(reason) = self.size_fixed {
            return Err(refuse(format!("{path}: {reason}")));
        }
        control.grow(size_bytes, attend).map_err(|e| match e {
            GrowError::Refused(reason) => refuse(format!("{path}: {reason}")),
            GrowError::Host(error) => BuildError::host(format!("growing {path}"), error),
        })
    }

    fn stream(&self) -> Result<Arc<dyn Steps>, BuildError> {
        self.steps()
    }

    fn begin_commit(&self) -> Result<Commit, BuildError> {
        self.open_base()
    }

    fn reopen_base(&self) -> Result<Box<dyn Image>, BuildError> {
        let (chain, top) = Chain::open_again(&self.options, &self.host, self.data.as_ref())?;
        let image = Self::of(chain, top, &self.options, Opened::AfterReader)?;
        Ok(Box::new(image))
    }

    fn reopen_alone(&self) -> Result<Box<dyn Image>, BuildError> {
        let options = OpenOptions {
            // It has none, or is refused; unless there is a data file, which is open.
            backing_files: self.data.is_some(),
            ..self.options.clone()
        };
        let (chain, top) = Chain::open_again(&options, &self.host, self.data.as_ref())?;
        if chain.images().len() > 1 {
            return Err(chain::refused(&options.path, "it has a backing file again"));
        }
        let mut image = Self::of(chain, top, &options, Opened::Usual)?;
        image.options.backing_files = self.options.backing_files;
        Ok(Box::new(image))
    }

    fn hand_over(&self) {
        if let Some(control) = &self.control {
            control.hand_over();
        }
    }

    fn is_handed_over(&self) -> bool {
        let control = self.control.as_ref();
        control.is_some_and(|control| control.is_handed_over())
    }

    fn reclaim(&self) -> Result<(), BuildError> {
        let layout = self.chain.layers.first().and_then(|layer| layer.layout());
        match layout {
            // A block device takes the same space whatever is in it.
            Some(layout) if !self.host.block_device => {
                check::reclaim(&self.options, layout.cluster_bits, &self.host.file)
            }
            _ => Ok(()),
        }
    }

    fn open_queue_with(&self, depth: u16, threads: Option<&Threads>) -> io::Result<Box<dyn Queue>> {
        if let Some(writable) = &self.writable {
            let writable = writable
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            // There is one queue only.
            let writable = writable.ok_or(io::Error::from(Errno::BUSY))?;
            return writable.into_queue(depth, self.options.disable_io_uring, threads);
        }
        let chain = self.chain.clone();
        Ok(Box::new(ChainQueue::new(
            chain,
            depth,
            self.options.disable_io_uring,
            threads,
        )?))
    }
}
