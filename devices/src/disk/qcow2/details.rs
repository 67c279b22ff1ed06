//! All that an image says about itself, for the offline tools: the header with what reading alone
//! does not need, internal snapshots and bitmaps (`docs/interop/qcow2.txt`, "Snapshots",
//! "Bitmaps").
//!
//! Every count and length is held against QEMU's caps and the file's size before anything is
//! allocated or read by it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::entry::Entries;
use super::header::{
    self, AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Header, MAX_CLUSTER, OFFSET_LIMIT, Unusable,
};

/// Incompatible feature bit 0: refcounts may be too low.
pub const DIRTY: u64 = 1;
/// Incompatible feature bit 1.
pub const CORRUPT: u64 = 2;
const LAZY_REFCOUNTS: u64 = 1;
/// Those whose meaning we keep up.
const AUTOCLEAR_KNOWN: u64 = 3;

const MAX_EXTRA: u32 = 1024;
const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
const MAX_BITMAPS: u32 = 65535;
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub id: String,
    pub name: String,
    pub date_sec: u32,
    pub date_nsec: u32,
    pub vm_clock_nsec: u64,
    pub vm_state_size: u64,
    /// Size that the disk had, where that is recorded.
    pub disk_size: Option<u64>,
    /// Guest instructions that had been executed.
    pub icount: Option<u64>,
    pub l1_offset: u64,
    pub l1_entries: u64,
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    pub name: String,
    pub in_use: bool,
    pub auto: bool,
    pub granularity: u64,
    pub table_offset: u64,
    pub table_entries: u64,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Details {
    pub header: Header,
    /// Size of the file.
    pub file_bytes: u64,
    pub incompatible: u64,
    pub autoclear: u64,
    pub lazy_refcounts: bool,
    /// A refcount has 2 to the power of this many bits.
    pub refcount_order: u32,
    pub refcount_table: u64,
    pub refcount_table_clusters: u64,
    /// Entries of the L1 table, needed or not.
    pub l1_entries: u64,
    pub snapshots: Vec<Snapshot>,
    /// Where the snapshot table is, and how long.
    pub snapshot_table: (u64, u64),
    pub bitmaps: Vec<Bitmap>,
    /// Where the directory of bitmaps is, and how long; 0 if there is none.
    pub bitmap_directory: (u64, u64),
}

/// A file could not be read, or is no image we can use.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Unusable(#[from] Unusable),
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn damaged(what: String) -> ReadError {
    Unusable::Damaged(what).into()
}

impl Details {
    /// Reads them from a file of `file_bytes` bytes.
    pub fn read(file: &File, file_bytes: u64) -> Result<Self, ReadError> {
        let start = read_up_to(file, 0, 512)?;
        let cluster = header::cluster_bytes(&start)?.min(MAX_CLUSTER);
        let bytes = read_up_to(file, 0, cluster)?;
        let header = Header::parse(&bytes)?;
        let field = Fields(&bytes);
        let v3 = header.version == 3;
        let optional = |offset| if v3 { field.u64(offset) } else { Ok(0) };
        let (incompatible, autoclear) = (optional(72)?, optional(88)?);
        let mut details = Self {
            file_bytes,
            incompatible,
            autoclear,
            lazy_refcounts: optional(80)? & LAZY_REFCOUNTS != 0,
            refcount_order: if v3 { field.u32(96)? } else { 4 },
            refcount_table: field.u64(48)?,
            refcount_table_clusters: field.u32(56)?.into(),
            l1_entries: field.u32(36)?.into(),
            snapshots: Vec::new(),
            snapshot_table: (field.u64(64)?, 0),
            bitmaps: Vec::new(),
            bitmap_directory: (0, 0),
            header,
        };
        details.read_snapshots(file, field.u32(60)?)?;
        if v3 && autoclear & AUTOCLEAR_BITMAPS != 0 {
            let length = field.u32(100)? as usize;
            details.read_bitmaps(file, &bytes, length)?;
        }
        Ok(details)
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// How its L2 entries are to be read.
    pub fn entries(&self) -> Entries {
        Entries {
            cluster_bits: self.header.cluster_bits,
            extended: self.header.extended_l2,
            version: self.header.version,
            external: self.header.data.is_some(),
        }
    }

    /// The autoclear bits that may stay set by one who writes.
    pub fn autoclear_kept(&self) -> u64 {
        self.autoclear & AUTOCLEAR_KNOWN
    }

    fn read_snapshots(&mut self, file: &File, count: u32) -> Result<(), ReadError> {
        let start = self.snapshot_table.0;
        let (snapshots, len) = snapshots(start, count, |bytes, offset| {
            read_exact(file, bytes, offset, "snapshot table")
        })?;
        self.snapshots = snapshots;
        self.snapshot_table = (start, len);
        // Tables that lie apart fit into the file together.
        let total: u64 = self.snapshots.iter().map(|s| s.l1_entries * 8).sum();
        if total > self.file_bytes {
            return Err(damaged("the L1 tables of its snapshots overlap".into()));
        }
        Ok(())
    }

    fn read_bitmaps(
        &mut self,
        file: &File,
        bytes: &[u8],
        header_length: usize,
    ) -> Result<(), ReadError> {
        let Some(extension) = extension(bytes, header_length, EXTENSION_BITMAPS) else {
            return Ok(());
        };
        let extension = Fields(extension);
        let (count, len, offset) = (extension.u32(0)?, extension.u64(8)?, extension.u64(16)?);
        let cluster = self.cluster_bytes();
        if count > MAX_BITMAPS
            || len > MAX_BITMAP_DIRECTORY
            || offset >= OFFSET_LIMIT
            || !offset.is_multiple_of(cluster)
        {
            return Err(damaged(format!(
                "its {count} bitmaps have a directory of {len} bytes at {offset:#x}"
            )));
        }
        if offset.saturating_add(len) > self.file_bytes {
            return Err(Unusable::TooShort("directory of bitmaps").into());
        }
        let mut directory = vec![0; len as usize];
        read_exact(file, &mut directory, offset, "directory of bitmaps")?;
        let mut rest = directory.as_slice();
        for _ in 0..count {
            let field = Fields(rest);
            let flags = field.u32(12)?;
            let (name_len, extra_len) = (usize::from(field.u16(18)?), field.u32(20)? as usize);
            let granularity_bits = *rest.get(17).ok_or(Unusable::TooShort("bitmaps"))?;
            let name = rest
                .get(24..)
                .and_then(|rest| rest.get(extra_len..))
                .and_then(|rest| rest.get(..name_len))
                .ok_or(Unusable::TooShort("directory of bitmaps"))?;
            self.bitmaps.push(Bitmap {
                name: String::from_utf8_lossy(name).into_owned(),
                in_use: flags & 1 != 0,
                auto: flags & 2 != 0,
                granularity: 1_u64.checked_shl(granularity_bits.into()).unwrap_or(0),
                table_offset: field.u64(0)?,
                table_entries: field.u32(8)?.into(),
            });
            let used = (24 + extra_len + name_len).next_multiple_of(8);
            rest = rest.get(used..).unwrap_or(&[]);
        }
        self.bitmap_directory = (offset, len);
        Ok(())
    }
}

/// The snapshots of a table of `count` that begins at `start`, and how many bytes it has. `read`
/// fills bytes from an offset of the file on.
pub fn snapshots(
    start: u64,
    count: u32,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), ReadError>,
) -> Result<(Vec<Snapshot>, u64), ReadError> {
    let mut snapshots = Vec::new();
    let mut at = start;
    for _ in 0..count {
        at = at.next_multiple_of(8);
        let mut fixed = [0; 40];
        read(&mut fixed, at)?;
        let field = Fields(&fixed);
        let (id_len, name_len) = (field.u16(12)?, field.u16(14)?);
        let extra_len = field.u32(36)?;
        if extra_len > MAX_EXTRA {
            return Err(damaged(format!("a snapshot has {extra_len} extra bytes")));
        }
        let rest_len = extra_len as usize + usize::from(id_len) + usize::from(name_len);
        let mut rest = vec![0; rest_len];
        read(&mut rest, at + 40)?;
        let (extra, names) = rest.split_at(extra_len as usize);
        let (id, name) = names.split_at(id_len.into());
        let extra = Fields(extra);
        snapshots.push(Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date_sec: field.u32(16)?,
            date_nsec: field.u32(20)?,
            vm_clock_nsec: field.u64(24)?,
            vm_state_size: match extra.u64(0) {
                Ok(large) => large,
                Err(_) => field.u32(32)?.into(),
            },
            disk_size: extra.u64(8).ok(),
            icount: extra.u64(16).ok().filter(|count| *count != u64::MAX),
            l1_offset: field.u64(0)?,
            l1_entries: field.u32(8)?.into(),
        });
        at += 40 + rest_len as u64;
        if at - start > MAX_SNAPSHOT_TABLE {
            return Err(damaged("its snapshot table is too long".into()));
        }
    }
    Ok((snapshots, at - start))
}

/// The data of a header extension.
fn extension(bytes: &[u8], header_length: usize, wanted: u32) -> Option<&[u8]> {
    let mut rest = bytes.get(header_length..)?;
    loop {
        let field = Fields(rest);
        let (kind, len) = (field.u32(0).ok()?, field.u32(4).ok()? as usize);
        let data = rest.get(8..)?.get(..len)?;
        match kind {
            0 => return None,
            kind if kind == wanted => return Some(data),
            _ => rest = rest.get(8 + len.next_multiple_of(8)..)?,
        }
    }
}

/// Big-endian fields by their offsets.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N], Unusable> {
        self.0
            .get(offset..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .ok_or(Unusable::TooShort("metadata"))
    }

    fn u16(&self, offset: usize) -> Result<u16, Unusable> {
        self.array(offset).map(u16::from_be_bytes)
    }

    fn u32(&self, offset: usize) -> Result<u32, Unusable> {
        self.array(offset).map(u32::from_be_bytes)
    }

    fn u64(&self, offset: usize) -> Result<u64, Unusable> {
        self.array(offset).map(u64::from_be_bytes)
    }
}

/// Fills `bytes` from `offset` on.
pub fn read_exact(
    file: &File,
    bytes: &mut [u8],
    offset: u64,
    what: &'static str,
) -> Result<(), ReadError> {
    match file.read_exact_at(bytes, offset) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(Unusable::TooShort(what).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Up to `len` bytes; fewer where the file ends.
pub fn read_up_to(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}
