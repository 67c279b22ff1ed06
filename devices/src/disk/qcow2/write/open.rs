//! What is found out about an image before it is written to, on the VMM thread.
//!
//! The time it takes does not depend on how much the image holds: only the tables of the first
//! level are read, and the refcounts before the end of the file.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::super::super::pool::{Pool, Threads};
use super::super::super::ring::{self, Ring};
use super::super::super::{Queue, SECTOR};
use super::super::chain::{Chain, Layer, Top, failed, read_file, refused};
use super::super::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW, Header, OFFSET_LIMIT};
use super::super::map::Layout;
use super::control::Control;
use super::engine::{Engine, Tables};
use super::extents::{Extents, Run};
use super::external::External;
use super::io::{Backend, HostFile, Io};
use super::keep::Kept;
use super::leaks::{MAX_CLUSTERS, MAX_TABLES, Marks, SnapshotTables};
use super::lock::RangeLock;
use super::pages::Pages;
use super::queue::{SYNC_SYSCALLS, WriteQueue};
use super::refcounts::Widths;
use crate::config::{BuildError, Invalid};

/// Entries of the ring, beside one for each request.
const EXTRA_OPS: u16 = 64;
/// Bytes of refcounts that are looked at for the end of what is in use.
const MAX_BYTES: usize = 16 << 20;
/// Bytes of L2 tables that are searched for leaks in an image that was closed cleanly.
const SEARCHED_ANYHOW: usize = 16 << 20;

/// An image that can be written to, until its queue is opened.
pub struct Writable {
    chain: Arc<Chain>,
    layout: Layout,
    widths: Widths,
    block_bytes: u64,
    tables: Tables,
    control: Arc<Control>,
    snapshots: SnapshotTables,
    external: Option<External>,
}

impl Writable {
    /// Checks that the topmost image can be written to, and reads what is needed for it. Changes
    /// nothing.
    pub fn open(chain: Arc<Chain>, top: &Top, path: &Path) -> Result<Self, BuildError> {
        let header = &top.header;
        let layer = chain.layers.first();
        let layer = layer.ok_or_else(|| refused(path, "there is no image"))?;
        let layout = Layout::new(header);
        check(header, &layout, layer, path)?;
        let external = External::of(&chain, header);
        if let Some((_, data)) = chain.data_of(0) {
            check_data(header, &layout, data)?;
        }
        let block_bytes = block_bytes(layer);
        let read = |what: &str, offset, len| {
            let bytes = read_file(&layer.file, layer.direct, offset, len);
            let bytes = bytes.map_err(|e| failed(path, e))?;
            match bytes.len() == len {
                true => Ok(bytes),
                false => Err(refused(path, format!("the file ends within its {what}"))),
            }
        };
        let writing = &header.writing;
        let cluster = layout.cluster_bytes() as u64;
        let widths = Widths {
            order: writing.refcount_order,
            cluster_bits: header.cluster_bits,
        };
        let first = read("header", 0, block_bytes as usize)?;
        let l1 = words(&read(
            "L1 table",
            header.l1_offset,
            writing.l1_table_entries * 8,
        )?);
        let table_bytes = u64::from(writing.refcount_table_clusters) * cluster;
        let refcounts = words(&read(
            "refcount table",
            writing.refcount_table_offset,
            table_bytes as usize,
        )?);
        let misplaced = |entry: &&u64| !layout.is_aligned(**entry) || **entry >= OFFSET_LIMIT;
        if let Some(entry) = refcounts.iter().find(misplaced) {
            return Err(refused(path, format!("a refcount block is at {entry:#x}")));
        }
        let mut tables = Tables {
            size_bytes: header.size_bytes,
            header: first,
            l1_offset: header.l1_offset,
            l1,
            l1_changed: HashMap::new(),
            l1_version: 0,
            refcounts,
            refcounts_offset: writing.refcount_table_offset,
            pages: Pages::new(chain.pages_bytes / layout.slice_bytes().max(1)),
            reserved: HashSet::new(),
            free: Extents::default(),
            end: 0,
            barrier: false,
            unlinked: Vec::new(),
            marks: None,
            kept: None,
            lost: None,
            autoclear: writing.autoclear & !External::kept_features(external.as_ref()) != 0,
            no_allocate: false,
            corruption_logged: false,
            used: false,
            loading: HashMap::new(),
            flushes: (0, 0),
        };
        if let Err(offset) = reserve(&mut tables, &layout, header) {
            let reason = format!("it has more than one table at {offset:#x}");
            return Err(refused(path, reason));
        }
        let unclean = find_end(&mut tables, &layout, widths, layer, path)?;
        if may_have_leaks(&tables, &layout, header, unclean) {
            tables.marks = Some(Marks::new(tables.end >> layout.cluster_bits));
        }
        Ok(Self {
            snapshots: SnapshotTables {
                table: (writing.snapshots_offset, top.snapshot_table_bytes),
                l1_tables: top
                    .snapshots
                    .iter()
                    .map(|s| (s.l1_offset, s.l1_entries))
                    .collect(),
            },
            layout,
            widths,
            block_bytes,
            control: Arc::new(Control::new(header.size_bytes)),
            tables,
            external,
            chain,
        })
    }

    /// Somebody reads the image as a backing file meanwhile; see [`super::keep`].
    pub fn beside_reader(mut self) -> Self {
        self.tables.kept = Some(Kept::of(&self.tables.l1));
        self.tables.marks = None;
        self
    }

    /// Leaks are to be searched for, though it was closed cleanly.
    pub fn search_leaks(mut self, header: &Header) -> Self {
        if may_have_leaks(&self.tables, &self.layout, header, true) {
            let end = self.tables.end >> self.layout.cluster_bits;
            self.tables.marks = Some(Marks::new(end));
        }
        self
    }

    /// What the image keeps of it when the queue is open.
    pub fn control(&self) -> Arc<Control> {
        self.control.clone()
    }

    /// The only queue there is for it.
    pub fn into_queue(
        self,
        depth: u16,
        disable_io_uring: bool,
        threads: Option<&Threads>,
    ) -> io::Result<Box<dyn Queue>> {
        let capacity = depth.saturating_add(EXTRA_OPS);
        let ring = match disable_io_uring {
            true => None,
            false => {
                let files = self.chain.layers.iter().map(|layer| layer.file.as_raw_fd());
                let files: Vec<_> = files.collect();
                ring::unless_refused(Ring::new(capacity.into(), &files, &ring::OPERATIONS))?
            }
        };
        let backend = match ring {
            Some(ring) => Backend::Ring(Box::new(ring)),
            None => {
                let files = self.chain.layers.iter().map(|layer| layer.file.clone());
                let pool = Pool::open(threads, depth, files.collect(), SYNC_SYSCALLS)?;
                pool.map_or(Backend::Plain, |pool| Backend::Pool(Box::new(pool)))
            }
        };
        let engine = self.into_engine(backend, capacity.into());
        Ok(Box::new(WriteQueue::new(Arc::new(engine), depth)))
    }

    /// The same, to look inside.
    #[cfg(test)]
    pub fn for_test(self, sync: bool) -> WriteQueue {
        let depth = super::tests::DEPTH;
        let files = self.chain.layers.iter().map(|layer| layer.file.as_raw_fd());
        let files: Vec<_> = files.collect();
        let backend = match Ring::new((depth + EXTRA_OPS).into(), &files, &ring::OPERATIONS) {
            Ok(ring) if !sync => Backend::Ring(Box::new(ring)),
            _ => Backend::Plain,
        };
        let engine = self.into_engine(backend, (depth + EXTRA_OPS).into());
        WriteQueue::new(Arc::new(engine), depth)
    }

    /// The same over the threads of a pool.
    #[cfg(test)]
    pub fn for_test_pooled(self) -> WriteQueue {
        let depth = super::tests::DEPTH;
        let seccomp = crate::sandbox::SeccompMode::Enforce;
        let threads = Threads::of_queue("write_io".into(), seccomp, 1);
        let files = self.chain.layers.iter().map(|layer| layer.file.clone());
        let pool = Pool::open(Some(&threads), depth, files.collect(), SYNC_SYSCALLS);
        let backend = Backend::Pool(Box::new(pool.unwrap().unwrap()));
        let engine = self.into_engine(backend, (depth + EXTRA_OPS).into());
        WriteQueue::new(Arc::new(engine), depth)
    }

    /// The engine, over whoever does its operations.
    pub fn into_engine(self, backend: Backend, capacity: usize) -> Engine {
        let file = |layer: &Layer| HostFile {
            file: layer.file.clone(),
            direct: layer.direct.map(|direct| direct.file),
        };
        let files = self.chain.layers.iter().map(file).collect();
        Engine {
            layout: self.layout,
            widths: self.widths,
            block_bytes: self.block_bytes,
            direct: self.chain.layers.first().and_then(|layer| layer.direct),
            external: self.external,
            has_backing: self.chain.images().len() > 1,
            io: Io::new(backend, files, capacity),
            tables: Mutex::new(self.tables),
            clusters: RangeLock::default(),
            allocating: RangeLock::default(),
            flushing: RangeLock::default(),
            copies: RangeLock::default(),
            bounces: RangeLock::default(),
            inflated: Mutex::default(),
            resizing: RangeLock::default(),
            control: self.control,
            snapshots: self.snapshots,
            stopping: AtomicBool::new(false),
            breathing: Mutex::default(),
            chain: self.chain,
        }
    }
}

fn block_bytes(layer: &Layer) -> u64 {
    layer.direct.map_or(SECTOR, |direct| direct.file.into())
}

fn check(header: &Header, layout: &Layout, layer: &Layer, path: &Path) -> Result<(), BuildError> {
    let no = |reason: &str| Err(refused(path, reason));
    if layer.block_device {
        return no("not supported yet: writing a qcow2 image on a block device");
    }
    if header.corrupt {
        return no(
            "it is marked as corrupt, and can only be read (`readonly`) until it is repaired",
        );
    }
    if header.writing.dirty {
        return no(
            "its refcounts are not up to date (dirty bit): somebody has opened and not closed it \
             meanwhile",
        );
    }
    check_blocks(header, layout, layer, path)
}

/// The same of its external data file.
fn check_data(header: &Header, layout: &Layout, data: &Layer) -> Result<(), BuildError> {
    let size_bytes = header.size_bytes;
    if size_bytes >= OFFSET_LIMIT {
        let reason = "the disk is too large for an external data file to be written to";
        return Err(refused(&data.path, reason));
    }
    let raw = header.data.as_ref().is_some_and(|data| data.raw);
    if raw && data.file_bytes < size_bytes {
        let reason = format!(
            "it is said to be all of the disk (data_file_raw), which has {size_bytes} bytes, and has \
             {} itself",
            data.file_bytes
        );
        return Err(refused(&data.path, reason));
    }
    check_blocks(header, layout, data, &data.path)
}

/// What O_DIRECT asks for.
fn check_blocks(
    header: &Header,
    layout: &Layout,
    layer: &Layer,
    path: &Path,
) -> Result<(), BuildError> {
    let block = block_bytes(layer);
    let error = match block {
        _ if layout.unit_bytes() < block => "has smaller clusters or subclusters",
        _ if !header.size_bytes.is_multiple_of(block) => "has a size that is no multiple of it",
        _ => return Ok(()),
    };
    let path = path.display();
    let reason = format!("the host disk transfers {block} bytes at a time, and {path} {error}");
    Err(Invalid::new("direct", reason).into())
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks();
    words.iter().copied().map(u64::from_be_bytes).collect()
}

/// Notes which clusters hold metadata. Fails with the offset of one that holds two tables: to change
/// one of them would change the other.
fn reserve(tables: &mut Tables, layout: &Layout, header: &Header) -> Result<(), u64> {
    let cluster = layout.cluster_bytes() as u64;
    let l1_bytes = tables.l1.len() as u64 * 8;
    let refcount_bytes = tables.refcounts.len() as u64 * 8;
    let areas = [
        (0, cluster),
        (tables.l1_offset, l1_bytes),
        (tables.refcounts_offset, refcount_bytes),
        (
            header.writing.snapshots_offset,
            u64::from(header.writing.snapshots_offset != 0),
        ),
    ];
    let areas = areas
        .into_iter()
        .flat_map(|(start, len)| (start..start + len).step_by(cluster as usize));
    let blocks = tables.refcounts.iter().copied().filter(|entry| *entry != 0);
    let l2 = tables
        .l1
        .iter()
        .filter_map(|entry| layout.l2_table(*entry).ok()?);
    for offset in areas.chain(blocks).chain(l2) {
        if !tables.reserved.insert(offset) {
            return Err(offset);
        }
    }
    Ok(())
}

/// Whether there is sense in a search for leaks: nothing may be in the file that we know nothing
/// of, and where all of it was closed cleanly it is not worth to read so much. The first write takes
/// bitmaps their meaning, and with it their clusters.
fn may_have_leaks(tables: &Tables, layout: &Layout, header: &Header, unclean: bool) -> bool {
    let count = tables.l1.iter().filter(|entry| **entry != 0).count();
    let bitmaps = header.writing.autoclear & AUTOCLEAR_BITMAPS != 0;
    let worth = unclean || bitmaps || count * layout.cluster_bytes() <= SEARCHED_ANYHOW;
    let known = AUTOCLEAR_BITMAPS
        | match header.data {
            Some(_) => AUTOCLEAR_RAW,
            None => 0,
        };
    let others = header.writing.autoclear & !known != 0;
    let known = !others && !header.writing.unknown_extensions;
    let bounded = count <= MAX_TABLES && tables.end >> layout.cluster_bits <= MAX_CLUSTERS;
    worth && known && bounded
}

/// Finds the end of the file, and what is free before it; whether it has more than is in use, as
/// one that was not closed.
fn find_end(
    tables: &mut Tables,
    layout: &Layout,
    widths: Widths,
    layer: &Layer,
    path: &Path,
) -> Result<bool, BuildError> {
    let bits = layout.cluster_bits;
    let mut used = None;
    let mut left = MAX_BYTES;
    let blocks = tables.refcounts.iter().enumerate().rev();
    for (block, &offset) in blocks.filter(|(_, offset)| **offset != 0) {
        let bytes = read_file(&layer.file, layer.direct, offset, layout.cluster_bytes());
        let bytes = bytes.map_err(|e| failed(path, e))?;
        left = left.saturating_sub(bytes.len().max(SECTOR as usize));
        // After so many it does not matter any more where exactly.
        let last = match left {
            0 => Some(layout.cluster_bytes() - 1),
            _ => bytes.iter().rposition(|byte| *byte != 0),
        };
        if let Some(byte) = last {
            // The last refcount that this byte has a part of.
            let index = widths.in_bytes(byte + 1).max(1) - 1;
            let index = index.max((byte as u64) << 3 >> widths.order);
            let first = (block as u64).saturating_mul(widths.per_block());
            used = first.checked_add(index + 1);
            break;
        }
    }
    let file_end = layer.file_bytes.div_ceil(1 << bits);
    // Whatever their refcounts say.
    let metadata = tables.reserved.iter().max();
    let metadata = metadata.map_or(0, |offset| (offset >> bits) + 1);
    let limit = OFFSET_LIMIT >> bits;
    let used = match used {
        Some(used) if used <= limit => used,
        _ => return Err(refused(path, "its refcounts say that nothing is in use")),
    };
    if metadata > file_end.max(used) {
        let offset = (metadata - 1) << bits;
        let reason = format!("it has a table at {offset:#x}, beyond the end of the file");
        return Err(refused(path, reason));
    }
    tables.end = file_end.max(used) << bits;
    let used = used.max(metadata);
    tables.free.insert(Run {
        first: used,
        count: file_end.saturating_sub(used),
        // Of what was written there before a crash nobody knows.
        zero: false,
    });
    Ok(file_end > used)
}
