//! Where new clusters come from.
//!
//! ```text
//!   free run ─► refcount 0 → 1 in memory ─► caller writes, then links ─► owned
//!      ▲                                        └── fails: released ──┐
//!      └── punched ◄── unreferenced, once the unlinking is on the disk ┴── unlinked
//! ```
//!
//! Free runs are what this session has freed and the end of the file, which is allocated ahead:
//! what `fallocate` gives reads as zeroes, so the rest of a new cluster need not be written, writes
//! do not make the file longer, and a full host is found before a guest's write has begun.
//!
//! A refcount block is placed in the range that it describes, as its first cluster, and so needs no
//! allocation of its own; where the table of them is full, it moves ([`super::tables`]).

use std::io;

use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::super::cache::SliceKey;
use super::super::header::OFFSET_LIMIT;
use super::engine::Engine;
use super::extents::Run;
use super::external::is_unsupported;
use super::io::Kind as Do;
use super::lock::locked;
use super::pages::Kind;

/// Allocated ahead.
const AHEAD: u64 = 16 << 20;

impl Engine {
    /// Up to `want` clusters in a row that are the caller's, with a refcount of 1.
    pub async fn allocate(&self, want: u64) -> io::Result<Run> {
        let _baton = self.allocating.only().await;
        self.allocate_locked(want).await
    }

    /// The same, with `allocating` held.
    pub async fn allocate_locked(&self, want: u64) -> io::Result<Run> {
        loop {
            let found = locked(&self.tables).free.find(want.max(1));
            let Some(mut run) = found else {
                self.extend(want.max(1)).await?;
                continue;
            };
            run.count = self.unreserved(run);
            if run.count == 0 {
                // A table, whatever its refcount says.
                locked(&self.tables).free.take(run.first, 1);
                continue;
            }
            if (run.first + run.count) << self.layout.cluster_bits >= OFFSET_LIMIT {
                return Err(Errno::FBIG.into());
            }
            let (block, _) = self.widths.place(run.first);
            if self.refcount_block(block).is_none() {
                self.add_block(block, run).await?;
                continue;
            }
            let taken = self.reference(run).await?;
            let mut tables = locked(&self.tables);
            if taken == 0 {
                // Somebody's, whatever we thought.
                tables.free.take(run.first, 1);
                continue;
            }
            tables.free.take(run.first, taken);
            let bits = self.layout.cluster_bits;
            let (offset, len) = (run.first << bits, taken << bits);
            let page_bytes = self.page_bytes();
            tables.pages.forget(offset, len, page_bytes);
            return Ok(Run {
                count: taken,
                ..run
            });
        }
    }

    /// How many of the first clusters of a run hold no metadata.
    fn unreserved(&self, run: Run) -> u64 {
        let tables = locked(&self.tables);
        (run.first..run.first + run.count)
            .take_while(|cluster| {
                let offset = cluster << self.layout.cluster_bits;
                !tables.reserved.contains(&offset)
            })
            .count() as u64
    }

    /// Clusters that were allocated and never linked are free again.
    pub async fn release(&self, run: Run) {
        let _baton = self.allocating.only().await;
        for cluster in run.first..run.first + run.count {
            if matches!(self.decrement(cluster).await, Ok(true)) {
                locked(&self.tables).free.insert(Run {
                    first: cluster,
                    count: 1,
                    // It may have been written to.
                    zero: false,
                });
            }
        }
    }

    /// Where the refcount block is.
    pub fn refcount_block(&self, block: u64) -> Option<u64> {
        let tables = locked(&self.tables);
        let entry = tables.refcounts.get(usize::try_from(block).ok()?)?;
        (*entry != 0).then_some(*entry)
    }

    /// The page that holds a cluster's refcount: where it is, and which refcount of it.
    pub fn refcount_page(&self, cluster: u64) -> Option<(u64, u64)> {
        let (block, index) = self.widths.place(cluster);
        let per_page = self.widths.in_bytes(self.layout.slice_bytes());
        let page = index / per_page;
        let offset = self.refcount_block(block)? + page * self.page_bytes();
        Some((offset, index % per_page))
    }

    /// Has the page in memory, and changes it; with `allocating` held.
    pub async fn change_refcounts<R>(
        &self,
        offset: u64,
        mut change: impl FnMut(&mut [u8]) -> Option<R>,
    ) -> io::Result<Option<R>> {
        loop {
            {
                let mut tables = locked(&self.tables);
                // A copy, so that a page that stays as it is does not count as changed.
                let mut bytes = tables.pages.get(offset).map(<[u8]>::to_vec);
                if let Some(bytes) = &mut bytes {
                    let result = change(bytes);
                    if result.is_some()
                        && let Some(page) = tables.pages.change(offset)
                    {
                        page.copy_from_slice(bytes);
                    }
                    return Ok(result);
                }
            }
            let key = SliceKey { layer: 0, offset };
            self.load(key, Kind::Refcount).await?;
        }
    }

    /// Gives the first clusters of a run that are free a refcount of 1; how many.
    pub async fn reference(&self, run: Run) -> io::Result<u64> {
        let Some((offset, index)) = self.refcount_page(run.first) else {
            return Ok(0);
        };
        let per_page = self.widths.in_bytes(self.layout.slice_bytes());
        let most = run.count.min(per_page - index);
        let widths = self.widths;
        let taken = self
            .change_refcounts(offset, |page| {
                let free = (index..index + most).take_while(|i| widths.get(page, *i) == 0);
                let count = free.count() as u64;
                (index..index + count).for_each(|i| widths.set(page, i, 1));
                (count > 0).then_some(count)
            })
            .await?;
        let taken = taken.unwrap_or(0);
        if let Some(marks) = &mut locked(&self.tables).marks {
            marks.set(run.first, taken);
        }
        Ok(taken)
    }

    /// Those of these clusters, whose refcounts are in the page of `first`, that are counted are so
    /// no longer; returns them. With `allocating` held.
    pub async fn clear_refcounts(&self, first: u64, clusters: &[u64]) -> io::Result<Vec<u64>> {
        let Some((offset, start)) = self.refcount_page(first) else {
            return Ok(Vec::new());
        };
        let widths = self.widths;
        let cleared = self
            .change_refcounts(offset, |page| {
                let mut cleared = Vec::new();
                for cluster in clusters {
                    let index = start + (cluster - first);
                    if widths.get(page, index) > 0 {
                        widths.set(page, index, 0);
                        cleared.push(*cluster);
                    }
                }
                (!cleared.is_empty()).then_some(cleared)
            })
            .await?;
        Ok(cleared.unwrap_or_default())
    }

    /// Takes away a reference; whether it was the last. With `allocating` held.
    pub async fn decrement(&self, cluster: u64) -> io::Result<bool> {
        let page = self.refcount_page(cluster);
        let widths = self.widths;
        let left = match page {
            None => None,
            Some((offset, index)) => {
                self.change_refcounts(offset, |page| {
                    let left = widths.get(page, index).checked_sub(1)?;
                    widths.set(page, index, left);
                    Some(left)
                })
                .await?
            }
        };
        match left {
            Some(left) => Ok(left == 0),
            None => {
                let offset = cluster << self.layout.cluster_bits;
                Err(self
                    .corrupt_locked("a cluster in use has the refcount 0", offset)
                    .await)
            }
        }
    }

    /// Makes the file longer; with `allocating` held.
    async fn extend(&self, want: u64) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        let (end, ahead) = {
            let tables = locked(&self.tables);
            let most = if self.external.is_some() { 0 } else { AHEAD };
            let ahead = most.min(tables.size_bytes) >> bits;
            (tables.end >> bits, ahead.max(want))
        };
        let count = match self.extend_by(end, ahead).await {
            Ok(()) => ahead,
            Err(error) if is_full(&error) && ahead > want => {
                match self.extend_by(end, want).await {
                    Ok(()) => want,
                    Err(error) if is_full(&error) && want > 1 => {
                        self.extend_by(end, 1).await?;
                        1
                    }
                    Err(error) => return Err(error),
                }
            }
            Err(error) if is_full(&error) && want > 1 => {
                self.extend_by(end, 1).await?;
                1
            }
            Err(error) => return Err(error),
        };
        let mut tables = locked(&self.tables);
        tables.free.insert(Run {
            first: end,
            count,
            zero: true,
        });
        tables.end = (end + count) << bits;
        Ok(())
    }

    /// Makes the file `count` clusters longer than `end`, as far as the host can allocate.
    pub async fn extend_by(&self, end: u64, count: u64) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        if (end + count) << bits >= OFFSET_LIMIT {
            return Err(Errno::FBIG.into());
        }
        if locked(&self.tables).no_allocate {
            return Ok(());
        }
        let allocated = self.host(Do::Allocate, end << bits, count << bits, Buffers::default());
        match allocated.await {
            Err(error) if is_unsupported(&error) => {
                // What is beyond the end of the file reads as zeroes anyhow.
                locked(&self.tables).no_allocate = true;
                Ok(())
            }
            other => other,
        }
    }

    /// Makes the first cluster of a run the refcount block of the range it lies in.
    async fn add_block(&self, block: u64, run: Run) -> io::Result<()> {
        let bits = self.layout.cluster_bits;
        let offset = run.first << bits;
        let slot = usize::try_from(block).unwrap_or(usize::MAX);
        if slot >= locked(&self.tables).refcounts.len() {
            return self.move_tables(block, None).await;
        }
        locked(&self.tables).free.take(run.first, 1);
        let written = self.write_block(offset, run.first).await;
        if let Err(error) = written {
            locked(&self.tables).free.insert(Run {
                count: 1,
                zero: false,
                ..run
            });
            return Err(error);
        }
        // From here on the block may be in the table on the disk, so its cluster can't be used for
        // anything else, whatever happens.
        let (place, bytes) = {
            let tables = locked(&self.tables);
            let per_block = self.block_bytes as usize / 8;
            let first = slot / per_block * per_block;
            let mut entries: Vec<u64> = tables.refcounts[first..].to_vec();
            entries.truncate(per_block);
            if let Some(entry) = entries.get_mut(slot - first) {
                *entry = offset;
            }
            let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
            (tables.refcounts_offset + first as u64 * 8, bytes)
        };
        self.write_own(place, &[&bytes], self.block_bytes).await?;
        let mut tables = locked(&self.tables);
        if let Some(entry) = tables.refcounts.get_mut(slot) {
            *entry = offset;
        }
        tables.reserved.insert(offset);
        Ok(())
    }

    /// Writes a refcount block that describes only itself, and syncs it.
    async fn write_block(&self, offset: u64, cluster: u64) -> io::Result<()> {
        let (_, index) = self.widths.place(cluster);
        let mut bytes = vec![0; self.layout.cluster_bytes()];
        self.widths.set(&mut bytes, index, 1);
        self.write_own(offset, &[&bytes], bytes.len() as u64)
            .await?;
        let page_bytes = self.page_bytes();
        {
            let mut tables = locked(&self.tables);
            tables.pages.forget(offset, bytes.len() as u64, page_bytes);
        }
        self.sync().await
    }
}

/// Whether the host has no room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
