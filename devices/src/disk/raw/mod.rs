//! The raw engine: the bytes of the disk lie in a file or block device as they are.
//!
//! What has to be done for a request is decided in `job`, step by step; the steps are done by an
//! io_uring, or where the kernel refuses to make one by the threads of a pool (`queue`), or without
//! one by plain system calls on the queue's own thread (`sync`).

mod job;
mod queue;
mod sync;
#[cfg(test)]
mod tests;

pub use queue::SYSCALLS as URING_SYSCALLS;
pub use sync::SYSCALLS as SYNC_SYSCALLS;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::lock::ImageLock;
use super::open::HostFile;
use super::pool::{Pool, Threads};
use super::space::is_no_space;
use super::{Format, Geometry, Image, ImageInfo, OpenOptions, Queue, open, ring};
use crate::config::{BuildError, Invalid};

/// A raw image.
pub struct RawImage {
    host: Arc<Host>,
    size_bytes: AtomicU64,
    geometry: Geometry,
    serial: String,
    path: PathBuf,
    readonly: bool,
    disable_io_uring: bool,
    lock: Arc<ImageLock>,
}

/// What the queues of an image share.
struct Host {
    file: Arc<File>,
    /// With O_DIRECT: what it asks of addresses in memory.
    direct_memory_align: Option<u32>,
    logical_block: u32,
    /// A block device takes `fallocate` in whole blocks only.
    block_device: bool,
    /// Set when the file system turned out to lack the operation, so as not to ask again.
    no_punch_hole: AtomicBool,
    no_zero_range: AtomicBool,
    /// The error of a sync that failed, or 0. The kernel tells it once and may have forgotten the
    /// data, so that what was completed before can't be made to survive a power cut any more.
    lost: AtomicI32,
}

impl Host {
    /// Takes the result of a sync, and says what it means: after one that failed none succeeds any
    /// more. Without the page cache the kernel has kept nothing that it could forget.
    fn synced(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        if self.direct_memory_align.is_some() {
            return result;
        }
        if let Err(error) = result {
            tracing::error!(%error, "data in the host's page cache is lost");
            // Not for want of space: that would mean that it could be tried again.
            let error = if is_no_space(error) { Errno::IO } else { error };
            self.lost.store(error.raw_os_error(), Ordering::SeqCst);
        }
        match self.lost.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(errno)),
        }
    }
}

impl RawImage {
    /// Opens and locks the file.
    pub fn open(options: &OpenOptions) -> Result<Self, BuildError> {
        Ok(Self::of(open::open(options)?, options))
    }

    /// The same of a file that is open, and was checked.
    pub fn of(opened: HostFile, options: &OpenOptions) -> Self {
        Self {
            host: Arc::new(Host {
                file: opened.file,
                direct_memory_align: opened.direct_memory_align,
                logical_block: opened.geometry.logical_block,
                block_device: opened.block_device,
                no_punch_hole: AtomicBool::new(false),
                no_zero_range: AtomicBool::new(false),
                lost: AtomicI32::new(0),
            }),
            size_bytes: AtomicU64::new(opened.size_bytes),
            geometry: opened.geometry,
            serial: opened.serial,
            path: options.path.clone(),
            readonly: options.readonly,
            disable_io_uring: options.disable_io_uring,
            lock: opened.lock,
        }
    }
}

impl Image for RawImage {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn serial(&self) -> String {
        self.serial.clone()
    }

    fn open_queue_with(&self, depth: u16, threads: Option<&Threads>) -> io::Result<Box<dyn Queue>> {
        let host = self.host.clone();
        if !self.disable_io_uring
            && let Some(ring) = ring::unless_refused(queue::ring(&host, depth))?
        {
            return Ok(Box::new(queue::RawQueue::new(host, depth, ring.into())));
        }
        let files = vec![host.file.clone()];
        if let Some(pool) = Pool::open(threads, depth, files, sync::SYSCALLS)? {
            return Ok(Box::new(queue::RawQueue::new(host, depth, pool.into())));
        }
        Ok(Box::new(sync::SyncQueue::new(host, depth)))
    }

    fn host_file(&self) -> Arc<File> {
        self.host.file.clone()
    }

    fn info(&self) -> io::Result<ImageInfo> {
        Ok(ImageInfo::new(Format::Raw, self.size_bytes()))
    }

    fn reopen_base(&self) -> Result<Box<dyn Image>, BuildError> {
        Ok(Box::new(Self {
            host: self.host.clone(),
            size_bytes: AtomicU64::new(self.size_bytes()),
            geometry: self.geometry,
            serial: self.serial.clone(),
            path: self.path.clone(),
            readonly: self.readonly,
            disable_io_uring: self.disable_io_uring,
            lock: self.lock.clone(),
        }))
    }

    fn grow(&self, size_bytes: u64, _attend: &dyn Fn()) -> Result<(), BuildError> {
        let file = &*self.host.file;
        let path = self.path.display();
        let refuse = |reason: String| BuildError::from(Invalid::new("desired_size", reason));
        if self.readonly {
            return Err(refuse(format!("{path} is open for reading only")));
        }
        let failed = |e: Errno| BuildError::host(format!("growing {path}"), e);
        let is = rustix::fs::seek(file, SeekFrom::End(0)).map_err(failed)?;
        if is < size_bytes {
            if self.host.block_device {
                return Err(refuse(format!("the device {path} has {is} bytes")));
            }
            rustix::fs::ftruncate(file, size_bytes).map_err(|error| match error {
                Errno::FBIG | Errno::INVAL => {
                    refuse(format!("{path} can't be made that large: {error}"))
                }
                other => failed(other),
            })?;
        }
        self.size_bytes.store(size_bytes, Ordering::SeqCst);
        Ok(())
    }
}
