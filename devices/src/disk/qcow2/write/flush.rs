//! What reaches the disk when.
//!
//! ```text
//!   refcounts ─► [sync, where L2 entries refer to anything new] ─► L2, L1 ─► sync ─► frees
//! ```
//!
//! What an L2 or L1 entry refers to (data, copies, new tables, refcounts) has been written before
//! the entry is changed in memory, and is synced before the entry is written. What an entry does
//! not refer to any more loses its reference only when the entry is on the disk; until then nobody
//! gets the space. So refcounts may be written at any time, and at most leaks are left by a power
//! cut.

use std::io;

use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::engine::{Engine, Tickets, own_copy};
use super::extents::Run;
use super::io::Kind as Do;
use super::lock::locked;
use super::pages::{Copy, Kind};

/// Pages that are written at once where they adjoin.
const MERGED_BYTES: usize = 256 << 10;

/// What is to be written, as it was at one moment.
struct Snapshot {
    refcounts: Vec<Copy>,
    l2: Vec<Copy>,
    l1: Vec<Copy>,
    barrier: bool,
    unlinked: Vec<u64>,
}

impl Engine {
    /// Makes all that has been completed survive a power cut.
    pub async fn flush(&self) -> io::Result<()> {
        let begun = locked(&self.tables).flushes.0;
        let unlinked = {
            let _baton = self.flushing.only().await;
            if locked(&self.tables).flushes.1 > begun {
                // One that began after we were asked.
                return self.alive();
            }
            self.checkpoint().await?
        };
        self.unreference(unlinked).await;
        Ok(())
    }

    /// Writes all metadata that has been changed; with `flushing` held. Returns the clusters that
    /// have lost a reference.
    pub async fn checkpoint(&self) -> io::Result<Vec<u64>> {
        self.alive()?;
        let (mut snapshot, number) = {
            let mut tables = locked(&self.tables);
            tables.flushes.0 += 1;
            let snapshot = Snapshot {
                refcounts: tables.pages.changed(Kind::Refcount),
                l2: tables.pages.changed(Kind::L2),
                l1: self.changed_l1(&tables),
                barrier: std::mem::take(&mut tables.barrier),
                unlinked: std::mem::take(&mut tables.unlinked),
            };
            (snapshot, tables.flushes.0)
        };
        let result = self.write_snapshot(&snapshot).await;
        let mut tables = locked(&self.tables);
        if let Err(error) = result {
            // All of it is still to be done.
            tables.barrier |= snapshot.barrier;
            snapshot.unlinked.append(&mut tables.unlinked);
            tables.unlinked = snapshot.unlinked;
            return Err(error);
        }
        tables.pages.written(&snapshot.refcounts);
        tables.pages.written(&snapshot.l2);
        for copy in &snapshot.l1 {
            let block = ((copy.offset - tables.l1_offset) / self.block_bytes) as usize;
            if tables.l1_changed.get(&block) == Some(&copy.version) {
                tables.l1_changed.remove(&block);
            }
        }
        tables.flushes.1 = number;
        Ok(snapshot.unlinked)
    }

    async fn write_snapshot(&self, snapshot: &Snapshot) -> io::Result<()> {
        self.write_copies(&[&snapshot.refcounts]).await?;
        if !(snapshot.l2.is_empty() && snapshot.l1.is_empty()) {
            if snapshot.barrier {
                self.sync().await?;
            }
            self.write_copies(&[&snapshot.l2, &snapshot.l1]).await?;
        }
        self.sync().await
    }

    async fn write_copies(&self, kinds: &[&[Copy]]) -> io::Result<()> {
        let mut tickets = Tickets::default();
        for copies in kinds {
            let mut rest = *copies;
            while let Some(first) = rest.first() {
                let mut len = 0;
                let adjoining = rest.iter().take_while(|copy| {
                    let adjoins = copy.offset == first.offset + len as u64 && len < MERGED_BYTES;
                    len += copy.bytes.len();
                    adjoins
                });
                let count = adjoining.count();
                let (now, later) = rest.split_at(count);
                rest = later;
                let bytes: Vec<&[u8]> = now.iter().map(|copy| &*copy.bytes).collect();
                let len = bytes.iter().map(|bytes| bytes.len()).sum();
                match own_copy(&bytes, len) {
                    Ok((_, buffers)) => {
                        let ticket = self.begin(Do::Write, first.offset, 0, buffers);
                        tickets.add(ticket).await;
                    }
                    Err(error) => tickets.note(Err(error)),
                }
            }
        }
        tickets.wait().await
    }

    fn changed_l1(&self, tables: &super::engine::Tables) -> Vec<Copy> {
        let mut copies: Vec<Copy> = tables
            .l1_changed
            .iter()
            .map(|(&block, &version)| {
                let per_block = self.block_bytes as usize / 8;
                let entries = tables.l1.iter().skip(block * per_block).take(per_block);
                let mut bytes: Vec<u8> = entries.flat_map(|entry| entry.to_be_bytes()).collect();
                bytes.resize(self.block_bytes as usize, 0);
                Copy {
                    offset: tables.l1_offset + block as u64 * self.block_bytes,
                    version,
                    bytes: bytes.into(),
                }
            })
            .collect();
        copies.sort_unstable_by_key(|copy| copy.offset);
        copies
    }

    /// These clusters have lost a reference, for good; those that have none left become free.
    async fn unreference(&self, mut clusters: Vec<u64>) {
        if clusters.is_empty() {
            return;
        }
        clusters.sort_unstable();
        let _baton = self.allocating.only().await;
        if locked(&self.tables).kept.is_some() {
            return self.unreference_shared(clusters).await;
        }
        let mut runs: Vec<Run> = Vec::new();
        for offset in clusters {
            let cluster = offset >> self.layout.cluster_bits;
            match self.decrement(cluster).await {
                Ok(true) => match runs.last_mut() {
                    Some(run) if run.first + run.count == cluster => run.count += 1,
                    _ => runs.push(Run {
                        first: cluster,
                        count: 1,
                        zero: false,
                    }),
                },
                Ok(false) => {}
                // They leak, which `qemu-img check -r leaks` repairs.
                Err(error) => tracing::warn!(%error, "clusters of a qcow2 image leak"),
            }
        }
        let mut tickets = Tickets::default();
        for run in &runs {
            let bits = self.layout.cluster_bits;
            let (offset, len) = (run.first << bits, run.count << bits);
            let ticket = self.begin(Do::Punch, offset, len, Buffers::default());
            tickets.add(ticket).await;
        }
        // Where the host can't, the space waits to be used again.
        let _ = tickets.wait().await;
        let mut tables = locked(&self.tables);
        for run in runs {
            for cluster in run.first..run.first + run.count {
                // It may have been a table.
                tables
                    .reserved
                    .remove(&(cluster << self.layout.cluster_bits));
            }
            tables.free.insert(run);
        }
    }

    /// Before the image is closed: writes all, and gives back what was allocated ahead.
    pub async fn close(&self) {
        if !locked(&self.tables).used || self.control.is_handed_over() {
            return;
        }
        // Twice: the first frees what the second records as free.
        for _ in 0..2 {
            if let Err(error) = self.flush().await {
                if Errno::from_io_error(&error) != Some(Errno::ROFS) {
                    tracing::error!(%error, "flushing a qcow2 image that is being closed");
                }
                return;
            }
        }
        let _baton = self.allocating.only().await;
        let bits = self.layout.cluster_bits;
        let start = {
            let tables = locked(&self.tables);
            tables.free.tail(tables.end >> bits)
        };
        if let Some(start) = start {
            let cut = self.host(Do::Truncate, start << bits, 0, Buffers::default());
            match cut.await {
                Ok(()) => locked(&self.tables).end = start << bits,
                Err(error) => tracing::warn!(%error, "giving back the end of a qcow2 image"),
            }
        }
    }
}
