//! Space that nobody refers to, as a process that was killed leaves it, goes back to where it can
//! be used, while the guest is served.
//!
//! ```text
//!   all tables, one piece after the other ─► marks ─┐
//!   what is allocated or unlinked meanwhile ─► marks ┴─► counted but not marked: freed
//! ```
//!
//! There is a bit for each cluster the file had when it was opened. What an entry refers to gets
//! its mark when the entry is read, whether from the disk or from a newer state; what was referred
//! to then and is not any more was unlinked meanwhile, and what is referred to only now was
//! allocated meanwhile, and both get it from whoever does that, from before the first request on.
//! So whatever has none at the end is referred to by nothing, neither on the disk nor in memory.
//! What the process that was killed wrote may not have reached the disk; it does before anything is
//! freed, or a power cut would bring back entries that refer to what others have got.
//! Where an entry makes no sense nothing is freed: it may be what the entry meant.
//!
//! Bitmaps count until the first write, which clears their autoclear bit: they would not know of
//! it. From then on nobody may use them (QEMU leaves their clusters to `qemu-img check -r leaks`),
//! so the search waits for that write and takes them for the leaks they have become. Where nothing
//! is written it waits to the end, and the bitmaps stay.
//!
//! Only clusters that nothing refers to are found, and not refcounts that are merely too high.

use std::collections::HashSet;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::Ordering;
use std::task::Poll;

use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::super::header::{MAX_L1_BYTES, OFFSET_LIMIT};
use super::cluster::{Cluster, Host};
use super::engine::{Engine, Tickets, own};
use super::extents::Run;
use super::io::Kind as Do;
use super::lock::locked;

/// Bytes of tables that are read at a time.
const PIECE: u64 = 64 << 10;
/// Pages of refcounts that are looked at in a row.
const APART: usize = 16;
/// The most clusters there are bits for.
pub const MAX_CLUSTERS: u64 = 1 << 29;
/// The most L2 tables that are read.
pub const MAX_TABLES: usize = 1 << 20;

/// Clusters that are referred to, or were at some moment since the image was opened.
pub struct Marks {
    bits: Vec<u64>,
    end: u64,
}

impl Marks {
    /// For clusters below `end`.
    pub fn new(end: u64) -> Self {
        let words = usize::try_from(end.div_ceil(64)).unwrap_or(0);
        Self {
            bits: vec![0; words],
            end,
        }
    }

    /// Marks `count` clusters.
    pub fn set(&mut self, first: u64, count: u64) {
        for cluster in first..first.saturating_add(count).min(self.end) {
            if let Some(word) = self.bits.get_mut((cluster / 64) as usize) {
                *word |= 1 << (cluster % 64);
            }
        }
    }

    fn has(&self, cluster: u64) -> bool {
        let word = self.bits.get((cluster / 64) as usize);
        cluster >= self.end || word.is_none_or(|word| word >> (cluster % 64) & 1 != 0)
    }
}

/// Why it ended early.
enum End {
    /// It is to.
    Stopped,
    /// An entry or a place makes no sense.
    Senseless,
    Host(io::Error),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl Engine {
    /// Finds and frees them all, unless the image must not be touched.
    pub async fn return_leaks(&self) {
        if locked(&self.tables).marks.is_none() {
            return;
        }
        if self.bitmaps_gone().await.is_err() {
            return;
        }
        let result = match self.mark_all().await {
            Ok(()) => match self.sync().await {
                Ok(()) => self.free_unmarked().await,
                Err(error) => Err(End::Host(error)),
            },
            Err(end) => Err(end),
        };
        locked(&self.tables).marks = None;
        match result {
            Ok(count) => {
                if count > 0 {
                    tracing::info!(clusters = count, "leaks of a qcow2 image were returned");
                }
                self.control.leaks_returned(count);
            }
            Err(End::Stopped) => {}
            Err(End::Senseless) => tracing::warn!(
                "a qcow2 image was not searched for leaks, as its tables contradict themselves; \
                 `ballast disk check` tells more"
            ),
            Err(End::Host(error)) => tracing::warn!(%error, "searching a qcow2 image for leaks"),
        }
    }

    /// Waits until nothing says any more that bitmaps are right.
    async fn bitmaps_gone(&self) -> Result<(), End> {
        poll_fn(|context| {
            if self.stopping.load(Ordering::Relaxed) {
                return Poll::Ready(Err(End::Stopped));
            }
            if !locked(&self.tables).autoclear {
                return Poll::Ready(Ok(()));
            }
            *locked(&self.breathing) = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    async fn mark_all(&self) -> Result<(), End> {
        let bits = self.layout.cluster_bits;
        let l1_entries = {
            let mut tables = locked(&self.tables);
            let tables = &mut *tables;
            if let Some(marks) = &mut tables.marks {
                tables
                    .reserved
                    .iter()
                    .for_each(|at| marks.set(at >> bits, 1));
            }
            tables.l1.len()
        };
        let mut seen = HashSet::new();
        let snapshots = &self.snapshots;
        self.mark(snapshots.table.0, snapshots.table.1)?;
        let mut l1_bytes = 0;
        for &(offset, entries) in &snapshots.l1_tables {
            l1_bytes += entries * 8;
            // Tables that lie apart fit into the file together.
            if entries * 8 > MAX_L1_BYTES || l1_bytes > locked(&self.tables).end {
                return Err(End::Senseless);
            }
            self.mark(offset, entries * 8)?;
            let mut done = 0;
            while done < entries * 8 {
                let len = PIECE.min((entries * 8 - done).next_multiple_of(self.block_bytes));
                let piece = self.read_apart(offset + done, len).await?;
                let (words, _) = piece.as_chunks();
                let left = ((entries * 8 - done) / 8) as usize;
                for word in words.iter().take(left) {
                    let entry = u64::from_be_bytes(*word);
                    let table = self.layout.l2_table(entry).map_err(|_| End::Senseless)?;
                    if let Some(table) = table.filter(|table| seen.insert(*table)) {
                        self.mark_table(table, || true).await?;
                    }
                    if seen.len() > MAX_TABLES {
                        return Err(End::Senseless);
                    }
                }
                done += len;
            }
        }
        for index in 0..l1_entries {
            // Until it is the same before and after it was read: what was freed meanwhile may hold
            // anything.
            loop {
                let entry = locked(&self.tables).l1.get(index).copied().unwrap_or(0);
                let table = self.layout.l2_table(entry).map_err(|_| End::Senseless)?;
                let Some(table) = table else { break };
                let same = || locked(&self.tables).l1.get(index) == Some(&entry);
                if self.mark_table(table, same).await? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Marks a range of the file.
    fn mark(&self, offset: u64, len: u64) -> Result<(), End> {
        let bits = self.layout.cluster_bits;
        let end = offset.checked_add(len).filter(|end| *end < OFFSET_LIMIT);
        let end = end.ok_or(End::Senseless)?;
        let first = offset >> bits;
        if let Some(marks) = &mut locked(&self.tables).marks {
            marks.set(first, end.div_ceil(1 << bits) - first);
        }
        Ok(())
    }

    /// Marks an L2 table and all that it refers to; whether it was `valid` to the end.
    async fn mark_table(&self, table: u64, valid: impl Fn() -> bool) -> Result<bool, End> {
        let cluster = self.cluster_bytes();
        self.mark(table, cluster)?;
        let mut done = 0;
        while done < cluster {
            let piece = self.read_apart(table + done, PIECE.min(cluster)).await?;
            if !valid() {
                return Ok(false);
            }
            for index in 0..piece.len() >> self.layout.entry_bits {
                let entry = Cluster::read(&self.layout, &piece, index);
                match entry.map_err(|_| End::Senseless)?.host {
                    Host::None => {}
                    // In another file, where nothing is counted.
                    _ if self.external.is_some() => {}
                    Host::Owned(host) | Host::Shared(host) => self.mark(host, cluster)?,
                    Host::Compressed(data) => self.mark(data.offset, data.len as u64)?,
                }
            }
            done += piece.len() as u64;
        }
        Ok(true)
    }

    /// Reads a piece of the file, and lets others go on meanwhile.
    async fn read_apart(&self, offset: u64, len: u64) -> Result<Vec<u8>, End> {
        self.breathe().await;
        if self.stopping.load(Ordering::Relaxed) || self.alive().is_err() {
            return Err(End::Stopped);
        }
        if offset.saturating_add(len) > locked(&self.tables).end {
            return Err(End::Senseless);
        }
        let (memory, buffers) = own(len as usize)?;
        self.begin_apart(Do::Read, offset, buffers).wait().await.0?;
        Ok(memory.bytes().to_vec())
    }

    /// Where reading does not wait for the host: waits for the next request of the guest.
    async fn breathe(&self) {
        if !self.io.is_plain() {
            return;
        }
        let mut waited = false;
        poll_fn(|context| {
            if std::mem::replace(&mut waited, true) || self.stopping.load(Ordering::Relaxed) {
                return Poll::Ready(());
            }
            *locked(&self.breathing) = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Frees what is counted and not marked; how many clusters.
    async fn free_unmarked(&self) -> Result<u64, End> {
        let per_page = self.widths.in_bytes(self.layout.slice_bytes());
        let end = locked(&self.tables)
            .marks
            .as_ref()
            .map_or(0, |marks| marks.end);
        let mut total = 0;
        for (number, first) in (0..end).step_by(per_page as usize).enumerate() {
            if number % APART == 0 {
                // So that others have their turn.
                self.read_apart(0, self.block_bytes).await?;
            }
            if self.refcount_page(first).is_none() {
                continue;
            }
            let candidates = {
                let tables = locked(&self.tables);
                let marks = tables.marks.as_ref().ok_or(End::Stopped)?;
                (first..(first + per_page).min(end)).any(|cluster| !marks.has(cluster))
            };
            if candidates {
                self.alive()?;
                total += self.free_page(first, per_page).await?;
            }
        }
        Ok(total)
    }

    async fn free_page(&self, first: u64, per_page: u64) -> Result<u64, End> {
        let _baton = self.allocating.only().await;
        let bits = self.layout.cluster_bits;
        let leaked: Vec<u64> = {
            let tables = locked(&self.tables);
            let marks = tables.marks.as_ref().ok_or(End::Stopped)?;
            (first..first + per_page)
                .filter(|c| !marks.has(*c) && !tables.reserved.contains(&(c << bits)))
                .collect()
        };
        // Nobody allocates or frees until the end of this.
        let leaked = self.clear_refcounts(first, &leaked).await?;
        let count = leaked.len() as u64;
        let mut runs: Vec<Run> = Vec::new();
        for cluster in leaked {
            match runs.last_mut() {
                Some(run) if run.first + run.count == cluster => run.count += 1,
                _ => runs.push(Run {
                    first: cluster,
                    count: 1,
                    zero: false,
                }),
            }
        }
        let mut tickets = Tickets::default();
        for run in &runs {
            let (offset, len) = (run.first << bits, run.count << bits);
            let ticket = self.begin(Do::Punch, offset, len, Buffers::default());
            tickets.add(ticket).await;
        }
        // Where the host can't, the space waits to be used again.
        let _ = tickets.wait().await;
        let mut tables = locked(&self.tables);
        // So that it is written, and the end of the file cut, when the image is closed.
        tables.used |= !runs.is_empty();
        for run in runs {
            tables.free.insert(run);
        }
        Ok(count)
    }
}

/// What snapshots take that no entry of the active tables refers to.
#[derive(Default)]
pub struct SnapshotTables {
    /// Where their table is, and its length.
    pub table: (u64, u64),
    /// Where their L1 tables are, and how many entries they have.
    pub l1_tables: Vec<(u64, u64)>,
}

impl From<Errno> for End {
    fn from(error: Errno) -> Self {
        Self::Host(error.into())
    }
}
