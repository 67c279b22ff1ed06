//! What the requests of a writable image share: its tables in memory, its free space, its files.
//!
//! All of it belongs to the one thread of the image's queue. The mutexes are never waited for;
//! they are there because the future of a request must be able to move to its thread once, and
//! they see to it that nothing stays locked while a request waits for the host.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::poll_fn;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use rustix::io::Errno;

use super::super::super::buffers::{AlignedBuffer, Buffers};
use super::super::super::space::is_no_space;
use super::super::cache::SliceKey;
use super::super::chain::{Alignment, Chain, Found, Lookup, enclosing};
use super::super::decompress::Inflated;
use super::super::header::CORRUPT;
use super::super::map::{Corrupt, Layout, Mapping, Place};
use super::control::Control;
use super::extents::Extents;
use super::external::External;
use super::io::{HostOp, Io, Kind as Do, Ticket};
use super::keep::Kept;
use super::leaks::{Marks, SnapshotTables};
use super::lock::{RangeLock, locked};
use super::pages::{Kind, Pages};
use super::refcounts::Widths;

/// Of the topmost image, in its chain.
pub const TOP: u16 = 0;
/// Operations that one request has under way at a time.
const TICKETS: usize = 64;
/// Offset of the incompatible features in the header.
const INCOMPATIBLE: usize = 72;
/// Offset of the autoclear features in the header.
const AUTOCLEAR: usize = 88;

/// The changing part.
pub struct Tables {
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// The beginning of the file.
    pub header: Vec<u8>,
    pub l1: Vec<u64>,
    pub l1_offset: u64,
    /// Blocks of the L1 table, of [`Engine::block_bytes`], that have been changed, and how often.
    pub l1_changed: HashMap<usize, u64>,
    pub l1_version: u64,
    pub refcounts: Vec<u64>,
    pub refcounts_offset: u64,
    pub pages: Pages,
    /// Clusters that hold metadata, by their offsets: no L2 entry may lead there.
    pub reserved: HashSet<u64>,
    pub free: Extents,
    /// Where the file ends, for all we know; a multiple of the cluster size.
    pub end: u64,
    /// L2 entries refer to data or refcounts that may not have reached the disk.
    pub barrier: bool,
    /// Host clusters that lose a reference when the L2 tables have been written.
    pub unlinked: Vec<u64>,
    /// While leaks are searched for; set from the beginning.
    pub marks: Option<Marks>,
    /// Which L2 tables are read by somebody else, where somebody does.
    pub kept: Option<Kept>,
    /// The error after which nothing that was written can be relied upon any more.
    pub lost: Option<Errno>,
    /// There are autoclear features to be cleared before the first write.
    pub autoclear: bool,
    pub no_allocate: bool,
    pub corruption_logged: bool,
    /// Something may have been changed since it was opened.
    pub used: bool,
    pub loading: HashMap<SliceKey, Vec<Waker>>,
    /// Flushes that have begun, and the last that succeeded.
    pub flushes: (u64, u64),
}

/// See the module.
pub struct Engine {
    pub chain: Arc<Chain>,
    pub layout: Layout,
    pub widths: Widths,
    /// The smallest part of the metadata that is written.
    pub block_bytes: u64,
    pub direct: Option<Alignment>,
    /// Where data is, if not in the image.
    pub external: Option<External>,
    /// What does not exist in this image may exist below it.
    pub has_backing: bool,
    pub io: Io,
    pub tables: Mutex<Tables>,
    /// Clusters of the disk that requests are at.
    pub clusters: RangeLock,
    /// Taken by whoever changes what is allocated; taken before `flushing`.
    pub allocating: RangeLock,
    pub flushing: RangeLock,
    /// Bounds the memory of copies on their way.
    pub copies: RangeLock,
    /// Bounds the memory that reads of compressed clusters, and what O_DIRECT does not take, go
    /// through. Whoever has a place waits for the host alone, never for a place of another lock.
    pub bounces: RangeLock,
    pub inflated: Mutex<Inflated>,
    /// Taken by whoever changes the size of the disk; before all others.
    pub resizing: RangeLock,
    /// Shared with the image, on another thread.
    pub control: Arc<Control>,
    pub snapshots: SnapshotTables,
    /// What goes on in the background is to end.
    pub stopping: AtomicBool,
    /// It waits for a request of the guest.
    pub breathing: Mutex<Option<Waker>>,
}

/// Operations under way for one request.
#[derive(Default)]
pub struct Tickets {
    tickets: std::collections::VecDeque<Ticket>,
    result: Option<io::Error>,
}

impl Tickets {
    /// Adds one; waits for the oldest where there are too many.
    pub async fn add(&mut self, ticket: Ticket) {
        self.tickets.push_back(ticket);
        if self.tickets.len() > TICKETS
            && let Some(oldest) = self.tickets.pop_front()
        {
            let (result, _) = oldest.wait().await;
            self.note(result);
        }
    }

    /// Takes a result.
    pub fn note(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.result.get_or_insert(error);
        }
    }

    /// Waits for all.
    pub async fn wait(mut self) -> io::Result<()> {
        while let Some(ticket) = self.tickets.pop_front() {
            let (result, _) = ticket.wait().await;
            self.note(result);
        }
        self.result.map_or(Ok(()), Err)
    }
}

/// Memory of our own, in one piece, aligned for O_DIRECT.
pub fn own(len: usize) -> io::Result<(Arc<AlignedBuffer>, Buffers)> {
    filled(AlignedBuffer::zeroed(len, 4096)?)
}

/// The same, with these bytes and zeroes behind them up to `len`.
pub fn own_copy(bytes: &[&[u8]], len: usize) -> io::Result<(Arc<AlignedBuffer>, Buffers)> {
    let mut buffer = AlignedBuffer::zeroed(len, 4096)?;
    let mut rest = buffer.bytes_mut();
    for piece in bytes {
        let Some((to, behind)) = rest.split_at_mut_checked(piece.len()) else {
            break;
        };
        to.copy_from_slice(piece);
        rest = behind;
    }
    filled(buffer)
}

/// Memory of our own, filled already.
pub fn filled(buffer: AlignedBuffer) -> io::Result<(Arc<AlignedBuffer>, Buffers)> {
    let buffer = Arc::new(buffer);
    let mut buffers = Buffers::default();
    let len = buffer.len_bytes();
    buffers
        .push_own(&buffer, 0, len)
        .map_err(io::Error::other)?;
    Ok((buffer, buffers))
}

impl Engine {
    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.layout.cluster_bits
    }

    /// Bytes of a page.
    pub fn page_bytes(&self) -> u64 {
        self.layout.slice_bytes() as u64
    }

    /// Begins an operation on the topmost image's file.
    pub fn begin(&self, kind: Do, offset: u64, len: u64, buffers: Buffers) -> Ticket {
        self.begin_on(TOP, kind, offset, len, buffers)
    }

    /// The same for one that is never done at once, where there is another way.
    pub fn begin_apart(&self, kind: Do, offset: u64, buffers: Buffers) -> Ticket {
        self.io.begin(HostOp {
            file: TOP,
            kind,
            offset,
            len: 0,
            buffers,
            expected_bytes: 0,
            apart: true,
        })
    }

    /// The same on the file of any image of the chain.
    pub fn begin_on(&self, file: u16, kind: Do, offset: u64, len: u64, buffers: Buffers) -> Ticket {
        // What was there when it was opened must still be. The clusters behind may not have been
        // written yet.
        let layer = self.chain.layers.get(usize::from(file));
        let expected_bytes = layer.map_or(0, |layer| layer.file_bytes);
        self.io.begin(HostOp {
            file,
            kind,
            offset,
            len,
            buffers,
            expected_bytes,
            apart: false,
        })
    }

    /// Does one and waits for it.
    pub async fn host(&self, kind: Do, offset: u64, len: u64, buffers: Buffers) -> io::Result<()> {
        self.begin(kind, offset, len, buffers).wait().await.0
    }

    /// Writes bytes of ours to a place whose offset and length suit O_DIRECT.
    pub async fn write_own(&self, offset: u64, bytes: &[&[u8]], len: u64) -> io::Result<()> {
        let (_, buffers) = own_copy(bytes, len as usize)?;
        self.host(Do::Write, offset, 0, buffers).await
    }

    /// Has all that was done reach the disk. After an error nothing can be relied upon any more,
    /// unless the page cache is not used: the kernel has kept nothing that it could forget.
    pub async fn sync(&self) -> io::Result<()> {
        let external = self.external.as_ref();
        let files = [
            Some((TOP, self.direct)),
            external.map(|d| (d.file, d.direct)),
        ];
        let syncs = files.map(|file| {
            let (file, direct) = file?;
            let sync = self.begin_on(file, Do::Sync, 0, 0, Buffers::default());
            Some((sync, direct))
        });
        let mut result = Ok(());
        for (sync, direct) in syncs.into_iter().flatten() {
            match sync.wait().await.0 {
                Err(error) if direct.is_none() => result = Err(self.lose(&error)),
                Err(error) if result.is_ok() => result = Err(error),
                _ => {}
            }
        }
        result
    }

    /// From now on nothing is written any more; returns what all requests are told.
    pub fn lose(&self, error: &io::Error) -> io::Error {
        let errno = match Errno::from_io_error(error) {
            // Not for want of space: that would mean that it could be tried again.
            Some(errno) if !is_no_space(errno) => errno,
            _ => Errno::IO,
        };
        let lost = *locked(&self.tables).lost.get_or_insert(errno);
        lost.into()
    }

    /// Whether the image may still be written to.
    pub fn alive(&self) -> io::Result<()> {
        match locked(&self.tables).lost {
            Some(errno) => Err(errno.into()),
            None => Ok(()),
        }
    }

    /// Before a request changes anything.
    pub async fn prepare(&self) -> io::Result<()> {
        let (crowded, autoclear) = {
            let mut tables = locked(&self.tables);
            if let Some(errno) = tables.lost {
                return Err(errno.into());
            }
            tables.used = true;
            (
                tables.pages.is_crowded() || tables.unlinked.len() > 1 << 16,
                tables.autoclear,
            )
        };
        if autoclear {
            self.clear_autoclear().await?;
        }
        if crowded {
            self.flush().await?;
        }
        Ok(())
    }

    /// Features that depend on being kept up by whoever writes must go before the first write.
    async fn clear_autoclear(&self) -> io::Result<()> {
        let _baton = self.allocating.only().await;
        if !locked(&self.tables).autoclear {
            return Ok(());
        }
        let cleared = self.patch_header(|header| {
            let kept = External::kept_features(self.external.as_ref());
            let field = &mut header[AUTOCLEAR..AUTOCLEAR + 8];
            let now = u64::from_be_bytes((&*field).try_into().unwrap_or_default());
            field.copy_from_slice(&(now & kept).to_be_bytes());
        });
        self.write_header(cleared).await?;
        self.sync().await?;
        locked(&self.tables).autoclear = false;
        Ok(())
    }

    /// The header with a change; with `allocating` held.
    pub fn patch_header(&self, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut header = locked(&self.tables).header.clone();
        change(&mut header);
        header
    }

    /// Writes it; with `allocating` held.
    pub async fn write_header(&self, header: Vec<u8>) -> io::Result<()> {
        self.write_own(0, &[&header], header.len() as u64).await?;
        locked(&self.tables).header = header;
        Ok(())
    }

    /// As [`Engine::corrupt_locked`], with `allocating` not held.
    pub async fn corrupt(&self, what: &str, position: u64) -> io::Error {
        let _baton = self.allocating.only().await;
        self.corrupt_locked(what, position).await
    }

    /// The metadata contradicts itself: the image is marked, and not written to any more.
    pub async fn corrupt_locked(&self, what: &str, position: u64) -> io::Error {
        self.log_corruption(what, position);
        let error = self.lose(&Errno::IO.into());
        if self.layout.version > 2 {
            let header = self.patch_header(|header| {
                header[INCOMPATIBLE + 7] |= CORRUPT as u8;
            });
            // It has failed already.
            let _ = self.write_header(header).await;
            let _ = self.sync().await;
        }
        error
    }

    /// Said once: the guest may ask again and again.
    fn log_corruption(&self, what: &str, position: u64) {
        let logged = &mut locked(&self.tables).corruption_logged;
        if !std::mem::replace(logged, true) {
            tracing::error!(offset = position, "the qcow2 image is corrupt: {what}");
        }
    }

    /// Looks at the page that describes `position` of the disk; `look` gets `None` where there is
    /// no L2 table.
    pub async fn with_page<R>(
        &self,
        position: u64,
        mut look: impl FnMut(Option<&[u8]>, &Place) -> R,
    ) -> io::Result<R> {
        let place = self.layout.place(position);
        loop {
            let offset = {
                let mut tables = locked(&self.tables);
                match self.page_offset(&tables, &place) {
                    Err(Corrupt) => {
                        drop(tables);
                        self.log_corruption("a bad L1 entry", position);
                        return Err(Errno::IO.into());
                    }
                    Ok(None) => return Ok(look(None, &place)),
                    Ok(Some(offset)) => match tables.pages.get(offset) {
                        Some(page) => {
                            self.chain.lookups.answered(1);
                            return Ok(look(Some(page), &place));
                        }
                        None => offset,
                    },
                }
            };
            self.chain.lookups.missed();
            self.load(SliceKey { layer: TOP, offset }, Kind::L2).await?;
        }
    }

    /// Changes the page that describes `position`; its L2 table is there and ours alone.
    pub async fn change_page<R>(
        &self,
        position: u64,
        mut change: impl FnMut(&mut Tables, u64, &Place) -> R,
    ) -> io::Result<R> {
        let place = self.layout.place(position);
        loop {
            let offset = {
                let mut tables = locked(&self.tables);
                let Ok(Some(offset)) = self.page_offset(&tables, &place) else {
                    return Err(Errno::IO.into());
                };
                if tables.pages.get(offset).is_some() {
                    return Ok(change(&mut tables, offset, &place));
                }
                offset
            };
            self.load(SliceKey { layer: TOP, offset }, Kind::L2).await?;
        }
    }

    fn page_offset(&self, tables: &Tables, place: &Place) -> Result<Option<u64>, Corrupt> {
        let entry = tables.l1.get(place.l1_index).ok_or(Corrupt)?;
        let table = self.layout.l2_table(*entry)?;
        Ok(table.map(|table| table + place.slice_offset))
    }

    /// Reads a page, or waits until somebody else has.
    pub async fn load(&self, key: SliceKey, kind: Kind) -> io::Result<()> {
        let mut first = false;
        poll_fn(|context| {
            let mut tables = locked(&self.tables);
            if let Some(waiting) = tables.loading.get_mut(&key) {
                if first {
                    return Poll::Ready(());
                }
                waiting.push(context.waker().clone());
                // When it is over, the caller looks again, whatever came of it.
                first = true;
                return Poll::Pending;
            }
            if !first {
                tables.loading.insert(key, Vec::new());
            }
            Poll::Ready(())
        })
        .await;
        if first {
            return Ok(());
        }
        let result = self.read_page(key, kind).await;
        let waiting = locked(&self.tables).loading.remove(&key);
        waiting.into_iter().flatten().for_each(Waker::wake);
        result
    }

    async fn read_page(&self, key: SliceKey, kind: Kind) -> io::Result<()> {
        let (len, direct) = match self.chain.layers.get(usize::from(key.layer)) {
            Some(layer) => (self.chain.slice_bytes(key.layer), layer.direct),
            None => return Err(Errno::IO.into()),
        };
        let end = match key.layer {
            TOP => locked(&self.tables).end,
            other => self.chain.layers[usize::from(other)].file_bytes,
        };
        if key.offset.saturating_add(len as u64) > end {
            self.log_corruption("a table beyond the end of the file", key.offset);
            return Err(Errno::IO.into());
        }
        let (start, skip, total) = enclosing(direct, key.offset, len);
        let (memory, buffers) = own(total)?;
        self.begin_on(key.layer, Do::Read, start, 0, buffers)
            .wait()
            .await
            .0?;
        let bytes = memory.bytes().get(skip..skip + len).unwrap_or(&[]);
        match key.layer {
            TOP => locked(&self.tables)
                .pages
                .insert(key.offset, kind, bytes.into()),
            _ => self.chain.slice_read(key, bytes),
        }
        Ok(())
    }

    /// What the topmost image says about up to `len` bytes from `position` on.
    pub async fn look_up_top(&self, position: u64, len: u64) -> io::Result<(Mapping, u64)> {
        let mapped = self
            .with_page(position, |page, place| match page {
                None => Ok((Mapping::Unallocated, len.min(self.table_span(position)))),
                Some(page) => self.layout.map(page, place, len),
            })
            .await?;
        mapped.map_err(|Corrupt| {
            self.log_corruption("a bad L2 entry", position);
            Errno::IO.into()
        })
    }

    /// Where up to `len` bytes from `position` on are, in the whole chain.
    pub async fn look_up(&self, position: u64, len: u64) -> io::Result<(Found, u64)> {
        let (mapping, span) = self.look_up_top(position, len).await?;
        match mapping {
            Mapping::Zero => Ok((Found::Zero, span)),
            Mapping::Data(offset) => match self.found(position, offset) {
                Some(found) => Ok((found, span)),
                None => {
                    self.log_corruption("a bad L2 entry", position);
                    Err(Errno::IO.into())
                }
            },
            Mapping::Compressed(cluster, within) => {
                Ok((Found::Compressed(TOP, cluster, within), span))
            }
            Mapping::Unallocated => self.look_below(position, span).await,
        }
    }

    async fn look_below(&self, position: u64, len: u64) -> io::Result<(Found, u64)> {
        loop {
            match self.chain.look_up_from(TOP + 1, position, len) {
                Lookup::Found(found, span) => return Ok((found, span)),
                Lookup::Missing(key) => self.load(key, Kind::L2).await?,
                Lookup::Corrupt(_) => {
                    self.log_corruption("a backing file", position);
                    return Err(Errno::IO.into());
                }
            }
        }
    }

    /// Bytes from `position` to the end of what its L2 table describes.
    pub fn table_span(&self, position: u64) -> u64 {
        let bits = 2 * self.layout.cluster_bits - self.layout.entry_bits;
        let bytes = 1_u64 << bits;
        bytes - (position & (bytes - 1))
    }

    /// Whether any of the clusters of this range of the file holds metadata.
    pub fn is_reserved(&self, tables: &Tables, offset: u64, len: u64) -> bool {
        let cluster = self.cluster_bytes();
        let first = offset & !(cluster - 1);
        (first..offset.saturating_add(len))
            .step_by(cluster as usize)
            .any(|offset| tables.reserved.contains(&offset))
    }

    /// Blocks of the L1 table that hold these entries have changed.
    pub fn set_l1(&self, tables: &mut Tables, index: usize, entry: u64) {
        if let Some(slot) = tables.l1.get_mut(index) {
            *slot = entry;
            tables.l1_version += 1;
            let block = index * 8 / self.block_bytes as usize;
            tables.l1_changed.insert(block, tables.l1_version);
        }
    }
}

/// Offsets of the clusters of a range of the file.
pub fn clusters_of(offset: u64, len: u64, cluster: u64) -> BTreeSet<u64> {
    let first = offset & !(cluster - 1);
    (first..offset.saturating_add(len))
        .step_by(cluster as usize)
        .collect()
}
