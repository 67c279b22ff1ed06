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
//! A refcount block is placed in the range that it describes, as its first cluster, and a new
//! refcount table at the end of the file together with the blocks for that end, so that neither
//! needs an allocation of its own.

use std::io;

use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::super::cache::SliceKey;
use super::super::header::{MAX_REFCOUNT_TABLE_BYTES, OFFSET_LIMIT};
use super::cluster::COPIED;
use super::engine::{Engine, own};
use super::extents::Run;
use super::io::Kind as Do;
use super::lock::locked;
use super::pages::Kind;

/// Allocated ahead.
const AHEAD: u64 = 16 << 20;
/// Offset of the number of L1 entries in the header, followed by the place of the table.
const L1_TABLE: usize = 36;
/// Offset of the refcount table's place in the header, followed by its length in clusters.
const REFCOUNT_TABLE: usize = 48;

impl Engine {
    /// Up to `want` clusters in a row that are the caller's, with a refcount of 1.
    pub async fn allocate(&self, want: u64) -> io::Result<Run> {
        let _baton = self.allocating.only().await;
        self.allocate_locked(want).await
    }

    async fn allocate_locked(&self, want: u64) -> io::Result<Run> {
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
    fn refcount_block(&self, block: u64) -> Option<u64> {
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
    async fn reference(&self, run: Run) -> io::Result<u64> {
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
            let ahead = AHEAD.min(tables.size_bytes) >> bits;
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

    async fn extend_by(&self, end: u64, count: u64) -> io::Result<()> {
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

    /// Gives the L1 table so many entries. Crash-safe: the header names either table, and both are
    /// whole.
    pub async fn grow_l1(&self, entries: u64) -> io::Result<()> {
        let _baton = self.allocating.only().await;
        self.alive()?;
        if entries <= locked(&self.tables).l1.len() as u64 {
            return Ok(());
        }
        self.move_tables(0, Some(entries)).await
    }

    /// Moves the refcount table to the end of the file, with room for `block`, and where so many
    /// entries are given the L1 table too: one write of the header names both. With `allocating`
    /// held.
    async fn move_tables(&self, block: u64, l1_entries: Option<u64>) -> io::Result<()> {
        let cluster = self.cluster_bytes();
        let bits = self.layout.cluster_bits;
        let (start, old, old_offset) = {
            let tables = locked(&self.tables);
            let start = tables.end >> bits;
            (start, tables.refcounts.clone(), tables.refcounts_offset)
        };
        let l1_clusters = (l1_entries.unwrap_or(0) * 8).div_ceil(cluster);
        // How many clusters the tables and the blocks need that describe them all.
        let (mut table_clusters, mut missing) = (0, Vec::new());
        loop {
            let count = table_clusters + missing.len() as u64 + l1_clusters;
            let (first, _) = self.widths.place(start);
            let (last, _) = self.widths.place(start + count.max(1) - 1);
            let blocks: Vec<u64> = (first..=last)
                .filter(|block| old.get(*block as usize).is_none_or(|entry| *entry == 0))
                .collect();
            let entries = match l1_entries {
                None => with_room(last.max(block) + 1, old.len() as u64),
                Some(_) => (last + 1).max(old.len() as u64),
            };
            let clusters = (entries * 8).div_ceil(cluster);
            if (clusters, blocks.len()) == (table_clusters, missing.len()) {
                break;
            }
            (table_clusters, missing) = (clusters.max(table_clusters), blocks);
        }
        if table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Errno::FBIG.into());
        }
        let count = table_clusters + missing.len() as u64 + l1_clusters;
        self.extend_by(start, count).await?;
        locked(&self.tables).end = (start + count) << bits;
        let whole = Run {
            first: start,
            count,
            zero: false,
        };

        let mut table = old.clone();
        table.resize((table_clusters * cluster / 8) as usize, 0);
        for (number, block) in (start + table_clusters..).zip(&missing) {
            if let Some(entry) = table.get_mut(*block as usize) {
                *entry = number << bits;
            }
        }
        let l1_offset = (start + count - l1_clusters) << bits;
        let l1 = l1_entries.map(|entries| {
            let mut l1 = locked(&self.tables).l1.clone();
            l1.resize(entries as usize, 0);
            l1
        });
        let mut taken = Vec::new();
        let parts = Parts {
            table: &table,
            whole,
            table_clusters,
            missing: &missing,
            l1: l1.as_deref().map(|l1| (l1_offset, l1)),
        };
        if let Err(error) = self.write_table(parts, &mut taken).await {
            for cluster in taken
                .iter()
                .flat_map(|(first, count)| *first..first + count)
            {
                let _ = self.decrement(cluster).await;
            }
            // Not to be used again in this session: who knows what got there.
            return Err(error);
        }
        let header = self.patch_header(|header| {
            let field = &mut header[REFCOUNT_TABLE..REFCOUNT_TABLE + 12];
            field[..8].copy_from_slice(&(start << bits).to_be_bytes());
            field[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
            if let Some(l1) = &l1 {
                let field = &mut header[L1_TABLE..L1_TABLE + 12];
                field[..4].copy_from_slice(&(l1.len() as u32).to_be_bytes());
                field[4..].copy_from_slice(&l1_offset.to_be_bytes());
            }
        });
        let switched = match self.write_header(header).await {
            Ok(()) => self.sync().await,
            failed => failed,
        };
        if let Err(error) = switched {
            // Nobody knows which of the two counts.
            return Err(self.lose(&error));
        }
        let mut tables = locked(&self.tables);
        tables.refcounts = table;
        tables.refcounts_offset = start << bits;
        let mut given_up = vec![(old_offset, old.len() as u64)];
        if let Some(l1) = l1 {
            given_up.push((tables.l1_offset, tables.l1.len() as u64));
            tables.l1 = l1;
            tables.l1_offset = l1_offset;
        }
        for (first, entries) in given_up {
            for number in 0..(entries * 8).div_ceil(cluster) {
                let offset = first + number * cluster;
                tables.reserved.remove(&offset);
                if let Some(marks) = &mut tables.marks {
                    marks.set(offset >> bits, 1);
                }
                tables.unlinked.push(offset);
            }
        }
        for offset in (start..start + count).map(|number| number << bits) {
            tables.reserved.insert(offset);
        }
        Ok(())
    }

    /// Writes new tables and the refcount blocks between them, and everything that they rest on.
    async fn write_table(&self, parts: Parts<'_>, taken: &mut Vec<(u64, u64)>) -> io::Result<()> {
        let Parts {
            table,
            whole,
            table_clusters,
            missing,
            l1,
        } = parts;
        let bits = self.layout.cluster_bits;
        for (number, block) in (whole.first + table_clusters..).zip(missing) {
            let mut bytes = vec![0; self.layout.cluster_bytes()];
            for cluster in whole.first..whole.first + whole.count {
                let (other, index) = self.widths.place(cluster);
                if other == *block {
                    self.widths.set(&mut bytes, index, 1);
                }
            }
            let len = bytes.len() as u64;
            self.write_own(number << bits, &[&bytes], len).await?;
            let page_bytes = self.page_bytes();
            let mut tables = locked(&self.tables);
            tables.pages.forget(number << bits, len, page_bytes);
        }
        let bytes: Vec<u8> = table.iter().flat_map(|e| e.to_be_bytes()).collect();
        let len = bytes.len() as u64;
        self.write_own(whole.first << bits, &[&bytes], len).await?;
        if let Some((offset, l1)) = l1 {
            // It stays as it is: who changes the L1 table has `allocating`.
            let bytes: Vec<u8> = l1.iter().flat_map(|e| e.to_be_bytes()).collect();
            let len = (bytes.len() as u64).next_multiple_of(self.cluster_bytes());
            self.write_own(offset, &[&bytes], len).await?;
        }
        let mut at = whole.first;
        while at < whole.first + whole.count {
            let rest = Run {
                first: at,
                count: whole.first + whole.count - at,
                zero: false,
            };
            let (block, _) = self.widths.place(at);
            at += match self.refcount_block(block) {
                None => 1,
                Some(_) => match self.reference(rest).await? {
                    0 => return Err(Errno::IO.into()),
                    count => {
                        taken.push((at, count));
                        count
                    }
                },
            };
        }
        let unlinked = {
            let _baton = self.flushing.only().await;
            self.checkpoint().await?
        };
        locked(&self.tables).unlinked.extend(unlinked);
        Ok(())
    }

    /// Makes sure that the L2 table for `position` is there and ours alone. Whether it is, where
    /// `create` is not set: then an absent one stays absent.
    pub async fn own_table(&self, position: u64, create: bool) -> io::Result<bool> {
        let index = self.layout.place(position).l1_index;
        let state = |engine: &Self| -> io::Result<Option<u64>> {
            let tables = locked(&engine.tables);
            let entry = tables.l1.get(index).copied().ok_or(Errno::IO)?;
            let kept = tables.kept.as_ref().is_some_and(|kept| kept.has(index));
            Ok((entry & COPIED == 0 || kept).then_some(entry))
        };
        match state(self)? {
            None => return Ok(true),
            Some(0) if !create => return Ok(false),
            Some(_) => {}
        }
        let _baton = self.allocating.only().await;
        let Some(entry) = state(self)? else {
            return Ok(true);
        };
        let Ok(old) = self.layout.l2_table(entry) else {
            return Err(self.corrupt_locked("a bad L1 entry", position).await);
        };
        let run = self.allocate_locked(1).await?;
        let bits = self.layout.cluster_bits;
        let offset = run.first << bits;
        let written = match old {
            None if run.zero => Ok(()),
            None => {
                let zeroes = self.write_own(offset, &[], self.cluster_bytes());
                zeroes.await
            }
            Some(old) => self.copy_table(old, offset).await,
        };
        if let Err(error) = written {
            if matches!(self.decrement(run.first).await, Ok(true)) {
                locked(&self.tables).free.insert(Run { zero: false, ..run });
            }
            return Err(error);
        }
        let mut tables = locked(&self.tables);
        if old.is_none() {
            let page_bytes = self.page_bytes();
            // What is known to be zero need not be read.
            for page in (0..self.cluster_bytes())
                .step_by(page_bytes as usize)
                .take(16)
            {
                let bytes = vec![0; page_bytes as usize].into();
                tables.pages.insert(offset + page, Kind::L2, bytes);
            }
        }
        self.set_l1(&mut tables, index, offset | COPIED);
        if let Some(kept) = &mut tables.kept {
            kept.replaced(index);
        }
        tables.barrier = true;
        tables.reserved.insert(offset);
        // It may be the table of a snapshot now, and nothing else: still no place for data.
        tables.unlinked.extend(old);
        Ok(true)
    }

    async fn copy_table(&self, from: u64, to: u64) -> io::Result<()> {
        let (memory, buffers) = own(self.layout.cluster_bytes())?;
        self.host(Do::Read, from, 0, buffers).await?;
        let bytes = memory.bytes();
        self.write_own(to, &[bytes], bytes.len() as u64).await
    }
}

/// Tables that are about to be moved to the end of the file: the refcount table, blocks that it
/// does not have yet, and maybe the L1 table.
struct Parts<'a> {
    table: &'a [u64],
    whole: Run,
    table_clusters: u64,
    missing: &'a [u64],
    l1: Option<(u64, &'a [u64])>,
}

/// Entries of a refcount table that needs `needed` and has had `old`: some more, where the format
/// allows it.
fn with_room(needed: u64, old: u64) -> u64 {
    needed.max((old * 3 / 2).min(MAX_REFCOUNT_TABLE_BYTES / 8))
}

/// Whether the host has no room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refcount_table_grows_as_far_as_the_format_lets_it() {
        let most = MAX_REFCOUNT_TABLE_BYTES / 8;
        assert_eq!(with_room(11, 10), 15);
        assert_eq!(with_room(20, 10), 20);
        assert_eq!(with_room(most - 9, most - 10), most);
        assert_eq!(with_room(most, most - 1), most);
        assert_eq!(with_room(most + 1, most), most + 1);
    }
}
