//! A disk becomes larger while it is in use.
//!
//! ```text
//!   L1 table with more entries ─► zeroes where something would show ─► flush ─► size in the header
//! ```
//!
//! Each step leaves an image that is in order, and as large as before until the last. Something
//! would show where a backing file is longer than the disk was, and in the rest of the last cluster.

use rustix::io::Errno;

use super::super::super::Operation;
use super::super::super::buffers::Buffers;
use super::super::header::{MAX_L1_BYTES, OFFSET_LIMIT};
use super::control::GrowError;
use super::engine::Engine;
use super::lock::locked;

/// Offset of the disk's size in the header.
const SIZE: usize = 24;
/// The most clusters of a backing file that are hidden: somebody waits for it.
const MAX_HIDDEN: u64 = 1 << 18;
/// The same in bytes, where they are written as data.
const MAX_HIDDEN_BYTES: u64 = 64 << 20;

impl Engine {
    /// Makes the disk larger, crash-safely.
    pub async fn grow(&self, size_bytes: u64) -> Result<(), GrowError> {
        let _alone = self.resizing.only().await;
        let old = locked(&self.tables).size_bytes;
        if size_bytes <= old {
            return match size_bytes == old {
                true => Ok(()),
                false => Err(GrowError::Refused(format!("the disk has {old} bytes"))),
            };
        }
        let cluster = self.cluster_bytes();
        let span = cluster << (self.layout.cluster_bits - self.layout.entry_bits);
        let entries = size_bytes.div_ceil(span);
        if entries > MAX_L1_BYTES / 8 {
            let most = (MAX_L1_BYTES / 8).saturating_mul(span);
            return Err(GrowError::Refused(format!(
                "with clusters of {cluster} bytes a disk has at most {most} bytes"
            )));
        }
        if self.external.is_some() && size_bytes >= OFFSET_LIMIT {
            let reason = "a disk in an external data file can't be that large";
            return Err(GrowError::Refused(reason.into()));
        }
        // What must become zeroes, so that it does not come to light.
        let below = self
            .chain
            .images()
            .get(1)
            .map_or(0, |layer| layer.disk_bytes());
        let hidden = below.max(old).next_multiple_of(cluster).min(size_bytes);
        let most = match self.layout.version {
            // They are written as data.
            2 => MAX_HIDDEN_BYTES / cluster,
            _ => MAX_HIDDEN,
        };
        if (hidden - old) / cluster > most {
            return Err(GrowError::Refused(format!(
                "the backing file has {below} bytes, so that {} of it would have to be hidden",
                hidden - old
            )));
        }
        self.prepare().await?;
        self.grow_l1(entries).await?;
        if hidden > old {
            let zeroes = Operation::WriteZeroes {
                unmap: false,
                durable: true,
            };
            let mut none = Buffers::default();
            self.execute(zeroes, old, hidden - old, &mut none).await?;
        }
        self.flush().await?;
        self.grow_data(old, size_bytes).await?;
        self.write_size(old, size_bytes).await
    }

    async fn write_size(&self, old: u64, size_bytes: u64) -> Result<(), GrowError> {
        let _baton = self.allocating.only().await;
        self.alive()?;
        let with = |size: u64| {
            self.patch_header(|header| header[SIZE..SIZE + 8].copy_from_slice(&size.to_be_bytes()))
        };
        let written = match self.write_header(with(size_bytes)).await {
            Ok(()) => self.sync().await,
            failed => failed,
        };
        if let Err(error) = written {
            // It may be there.
            let back = match self.write_header(with(old)).await {
                Ok(()) => self.sync().await,
                failed => failed,
            };
            if back.is_err() {
                self.lose(&Errno::IO.into());
            }
            return Err(error.into());
        }
        locked(&self.tables).size_bytes = size_bytes;
        self.control.set_size(size_bytes);
        Ok(())
    }
}
