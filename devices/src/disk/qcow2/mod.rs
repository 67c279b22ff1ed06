//! The qcow2 engine (QEMU's `docs/interop/qcow2.txt`).
//!
//! Images are read, not yet written: whatever they hold, in version 2 or 3, with plain, zero and
//! compressed clusters (zlib and zstd), subclusters, and backing files to any sane depth.
//!
//! ```text
//!   header ─ parsed and checked at open, pure          chain ─ an image and what lies below it
//!   map ──── what L1 and L2 entries say, pure          cache ─ L2 slices, bounded, of all layers
//!   queue ── the requests of one thread                task ── what each does, step by step
//!   op ───── one read of a host file, and what becomes of the bytes
//! ```
//!
//! Nothing here changes a file, so the queues of an image share the chain and its cache, whose lock
//! is held for a lookup and never over I/O.

mod cache;
mod chain;
mod decompress;
mod header;
mod map;
mod op;
mod queue;
mod task;
#[cfg(test)]
pub(crate) mod tests;

pub use queue::{SYNC_SYSCALLS, URING_SYSCALLS};

use std::io;
use std::sync::Arc;

use self::chain::Chain;
use self::map::Layout;
use self::queue::ChainQueue;
use super::{Geometry, Image, OpenOptions, Queue, SECTOR};
use crate::config::{BuildError, Invalid};

/// A qcow2 image and its backing files, open for reading.
pub struct Qcow2Image {
    chain: Arc<Chain>,
    geometry: Geometry,
    serial: String,
    disable_io_uring: bool,
}

impl Qcow2Image {
    /// Opens and locks all of the chain.
    pub fn open(options: &OpenOptions) -> Result<Self, BuildError> {
        if !options.readonly {
            let reason = "not supported yet: writing qcow2 images; must be true for them";
            return Err(Invalid::new("readonly", reason).into());
        }
        let (chain, top) = Chain::open(options)?;
        let size_bytes = chain.size_bytes();
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) {
            let reason = format!(
                "{} is a disk of {size_bytes} bytes; a disk has a multiple of {SECTOR}, and is \
                 not empty",
                options.path.display()
            );
            return Err(Invalid::new("path", reason).into());
        }
        let unit = chain.layers.first().and_then(|top| top.layout());
        Ok(Self {
            geometry: Geometry {
                // Whatever O_DIRECT asks for is done here.
                logical_block: SECTOR as u32,
                physical_block: top.geometry.physical_block,
                discard_granularity: unit.map_or(SECTOR, Layout::unit_bytes) as u32,
            },
            chain: Arc::new(chain),
            serial: top.serial,
            disable_io_uring: options.disable_io_uring,
        })
    }
}

impl Image for Qcow2Image {
    fn size_bytes(&self) -> u64 {
        self.chain.size_bytes()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn serial(&self) -> String {
        self.serial.clone()
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn Queue>> {
        let chain = self.chain.clone();
        Ok(Box::new(ChainQueue::new(
            chain,
            depth,
            self.disable_io_uring,
        )?))
    }
}
