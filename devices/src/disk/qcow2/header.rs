//! The header and its extensions (QEMU's `docs/interop/qcow2.txt`, "Header").
//!
//! Pure: from the bytes of the first cluster to what they say, every number checked against the
//! caps that QEMU has too, so that nothing is allocated or read by the word of a hostile image.

use thiserror::Error;

/// The longest cluster, and so the most of the file that a header can take.
pub const MAX_CLUSTER: usize = 2 << 20;

const MAGIC: &[u8] = b"QFI\xfb";
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// The longest L1 table.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest refcount table.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_BACKING_NAME: u32 = 1023;

/// Offsets in the image file have 56 bits.
pub const OFFSET_LIMIT: u64 = 1 << 56;

const DIRTY: u64 = 1 << 0;
/// Incompatible feature: the image contradicts itself.
pub const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// Where persistent bitmaps are.
pub const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Autoclear feature bit 0: the bitmaps know of all that was written.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// The name of the external data file.
pub const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Autoclear feature: the external data file, read as a raw image, is the disk.
pub const AUTOCLEAR_RAW: u64 = 1 << 1;

/// Why an image can't be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unusable {
    /// The magic is not there.
    #[error("it is not a qcow2 image")]
    NotQcow2,
    /// The file ends within its metadata.
    #[error("the file ends within its {0}")]
    TooShort(&'static str),
    /// Something contradicts the format.
    #[error("{0}")]
    Damaged(String),
    /// It uses something that we don't have.
    #[error("not supported: {0}")]
    Unsupported(String),
}

fn damaged(what: impl Into<String>) -> Unusable {
    Unusable::Damaged(what.into())
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// A zstd frame.
    Zstd,
}

/// The backing file that a header names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name, as it stands there.
    pub name: Vec<u8>,
    /// Its format, where that is recorded.
    pub format: Option<Vec<u8>>,
}

/// The external data file of an image, where the guest's data is instead of in the image itself:
/// at the same offset as on the disk, and without refcounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalData {
    /// Its name, as it stands in the header; not empty.
    pub name: Vec<u8>,
    /// The file, read as a raw image, is the disk, and whoever writes keeps it so.
    pub raw: bool,
}

/// What a header says that matters to a writer only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writing {
    /// Entries that the L1 table has.
    pub l1_table_entries: usize,
    /// A refcount has 2 to the power of this many bits: 0 to 6.
    pub refcount_order: u32,
    /// Where the refcount table begins.
    pub refcount_table_offset: u64,
    /// Clusters that it has.
    pub refcount_table_clusters: u32,
    /// Where the snapshot table begins; 0 where there are no snapshots.
    pub snapshots_offset: u64,
    /// How many there are.
    pub snapshots: u32,
    /// Whether the refcounts may be wrong: somebody who writes them lazily did not end well.
    pub dirty: bool,
    /// Features that a writer must clear where it does not keep them up.
    pub autoclear: u64,
    /// There are header extensions that we don't know. They may own clusters.
    pub unknown_extensions: bool,
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// A cluster has 2 to the power of this many bytes: 9 to 21.
    pub cluster_bits: u32,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Where the L1 table begins.
    pub l1_offset: u64,
    /// Entries of it that the disk's size needs; the table has at least as many.
    pub l1_entries: usize,
    /// L2 entries have 16 bytes and describe 32 subclusters.
    pub extended_l2: bool,
    /// The kind of compressed clusters.
    pub compression: Compression,
    /// Whether whoever wrote to it last found that it contradicts itself.
    pub corrupt: bool,
    /// What a writer needs to know beside.
    pub writing: Writing,
    /// What lies below it.
    pub backing: Option<Backing>,
    /// Where its data is, if not in its own file.
    pub data: Option<ExternalData>,
}

/// The cluster size that a header claims, checked; so much of the file it may take.
pub fn cluster_bytes(header: &[u8]) -> Result<usize, Unusable> {
    let fields = Fields(header);
    if header.get(..4) != Some(MAGIC) {
        return Err(Unusable::NotQcow2);
    }
    let bits = fields.u32(20)?;
    if !(9..=21).contains(&bits) {
        return Err(damaged(format!(
            "its clusters have 2^{bits} bytes; 2^9 to 2^21 are possible"
        )));
    }
    Ok(1 << bits)
}

impl Header {
    /// Reads it from the first cluster of the file (or less, where the file ends earlier).
    pub fn parse(bytes: &[u8]) -> Result<Self, Unusable> {
        let cluster = cluster_bytes(bytes)?;
        let bytes = &bytes[..bytes.len().min(cluster)];
        let fields = Fields(bytes);
        let version = fields.u32(4)?;
        let (features, length) = match version {
            2 => (0, V2_BYTES),
            3 => (fields.u64(72)?, fields.u32(100)? as usize),
            other => {
                return Err(Unusable::Unsupported(format!(
                    "qcow2 version {other} (only 2 and 3)"
                )));
            }
        };
        if version == 3 && (length < V3_BYTES || !length.is_multiple_of(8)) {
            return Err(damaged(format!("its header has {length} bytes")));
        }
        if length > bytes.len() {
            return Err(Unusable::TooShort("header"));
        }
        let name = backing_name(&fields, cluster)?;
        let end = match &name {
            Some((offset, _)) => *offset,
            None => bytes.len(),
        };
        let extensions = Extensions::parse(bytes, length, end)?;
        check_features(features, &extensions.feature_names)?;
        check_encryption(fields.u32(32)?)?;
        let compression = compression(&fields, features, length)?;
        let extended_l2 = features & EXTENDED_L2 != 0;
        if extended_l2 && cluster < 1 << 14 {
            return Err(damaged("subclusters need clusters of 16 KiB or more"));
        }
        let cluster = cluster as u64;
        check_refcounts(&fields, version, cluster)?;
        check_snapshots(&fields, cluster)?;
        let size_bytes = fields.u64(24)?;
        let (l1_offset, l1_entries) = l1_table(&fields, size_bytes, cluster, extended_l2)?;
        let snapshots_offset = match fields.u32(60)? {
            0 => 0,
            _ => fields.u64(64)?,
        };
        let writing = Writing {
            l1_table_entries: fields.u32(36)? as usize,
            refcount_order: if version == 3 { fields.u32(96)? } else { 4 },
            refcount_table_offset: fields.u64(48)?,
            refcount_table_clusters: fields.u32(56)?,
            snapshots_offset,
            snapshots: fields.u32(60)?,
            dirty: features & DIRTY != 0,
            autoclear: if version == 3 { fields.u64(88)? } else { 0 },
            unknown_extensions: extensions.unknown,
        };
        let data = match features & EXTERNAL_DATA_FILE {
            0 => None,
            _ => Some(external_data(
                &writing,
                extensions.data_file,
                name.is_some(),
            )?),
        };
        Ok(Self {
            version,
            cluster_bits: cluster.trailing_zeros(),
            size_bytes,
            l1_offset,
            l1_entries,
            extended_l2,
            compression,
            corrupt: features & CORRUPT != 0,
            writing,
            backing: name.map(|(_, name)| Backing {
                name,
                format: extensions.backing_format,
            }),
            data,
        })
    }
}

/// The bytes of a header by their offsets.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N], Unusable> {
        self.0
            .get(offset..)
            .and_then(|rest| rest.first_chunk())
            .copied()
            .ok_or(Unusable::TooShort("header"))
    }

    fn u32(&self, offset: usize) -> Result<u32, Unusable> {
        self.array(offset).map(u32::from_be_bytes)
    }

    fn u64(&self, offset: usize) -> Result<u64, Unusable> {
        self.array(offset).map(u64::from_be_bytes)
    }
}

/// Where the backing file's name stands, and the name.
fn backing_name(fields: &Fields<'_>, cluster: usize) -> Result<Option<(usize, Vec<u8>)>, Unusable> {
    let (offset, len) = (fields.u64(8)?, fields.u32(16)?);
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let end = offset.saturating_add(len.into());
    if len > MAX_BACKING_NAME || end > cluster as u64 || offset < V2_BYTES as u64 {
        return Err(damaged(
            "the name of its backing file is not in its first cluster, or too long",
        ));
    }
    let name = fields.0.get(offset as usize..end as usize);
    let name = name.ok_or(Unusable::TooShort("backing file's name"))?;
    Ok(Some((offset as usize, name.to_vec())))
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<Vec<u8>>,
    /// Entries of 48 bytes.
    feature_names: Vec<u8>,
    data_file: Option<Vec<u8>>,
    unknown: bool,
}

impl Extensions {
    /// Reads those from `start` on; those we don't know are none of a reader's business.
    fn parse(bytes: &[u8], start: usize, end: usize) -> Result<Self, Unusable> {
        let area = Fields(&bytes[..end.min(bytes.len())]);
        let mut found = Self::default();
        let mut at = start;
        // An area that is full has no end mark.
        while at + 8 <= area.0.len() {
            let (kind, len) = (area.u32(at)?, area.u32(at + 4)? as usize);
            if kind == EXTENSION_END {
                break;
            }
            let data = area
                .0
                .get(at + 8..)
                .and_then(|rest| rest.get(..len))
                .ok_or_else(|| damaged(format!("its header extension {kind:#x} is too long")))?;
            match kind {
                EXTENSION_BACKING_FORMAT => found.backing_format = Some(data.to_vec()),
                EXTENSION_FEATURE_NAMES => found.feature_names = data.to_vec(),
                // Without [`AUTOCLEAR_BITMAPS`] it says nothing, and owns nothing.
                EXTENSION_BITMAPS => {}
                EXTENSION_DATA_FILE => found.data_file = Some(data.to_vec()),
                _ => found.unknown = true,
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }
}

fn check_features(features: u64, names: &[u8]) -> Result<(), Unusable> {
    let known = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
    let unknown = features & !known;
    if unknown == 0 {
        return Ok(());
    }
    let bit = unknown.trailing_zeros();
    let name = names
        .chunks_exact(48)
        .find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)
        .map(|entry| {
            let text = entry[2..].split(|byte| *byte == 0).next().unwrap_or(&[]);
            format!(" `{}`", text.escape_ascii())
        });
    Err(Unusable::Unsupported(format!(
        "incompatible feature bit {bit}{}",
        name.unwrap_or_default()
    )))
}

/// What an image with an external data file must and must not have beside.
fn external_data(
    writing: &Writing,
    name: Option<Vec<u8>>,
    has_backing: bool,
) -> Result<ExternalData, Unusable> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Err(damaged(
            "its data is in an external data file, whose name it does not record",
        ));
    };
    if name.len() > MAX_BACKING_NAME as usize {
        return Err(damaged("the name of its external data file is too long"));
    }
    let raw = writing.autoclear & AUTOCLEAR_RAW != 0;
    if raw && has_backing {
        return Err(damaged(
            "its external data file is said to be all of the disk (data_file_raw), and yet it has a \
             backing file",
        ));
    }
    if writing.snapshots != 0 {
        return Err(damaged(
            "it has an external data file, and internal snapshots, which are not possible then",
        ));
    }
    Ok(ExternalData { name, raw })
}

fn check_encryption(method: u32) -> Result<(), Unusable> {
    let name = match method {
        0 => return Ok(()),
        1 => "AES".into(),
        2 => "LUKS".into(),
        other => format!("method {other}"),
    };
    Err(Unusable::Unsupported(format!("encryption ({name})")))
}

fn compression(
    fields: &Fields<'_>,
    features: u64,
    header_length: usize,
) -> Result<Compression, Unusable> {
    let kind = match header_length > V3_BYTES {
        true => fields.array::<1>(V3_BYTES)?[0],
        false => 0,
    };
    if (features & COMPRESSION_TYPE != 0) != (kind != 0) {
        return Err(damaged(
            "its compression type and incompatible feature bit 3 contradict one another",
        ));
    }
    match kind {
        0 => Ok(Compression::Zlib),
        1 => Ok(Compression::Zstd),
        other => Err(Unusable::Unsupported(format!("compression type {other}"))),
    }
}

/// Reading does not need the refcounts, but an image without them is not one.
fn check_refcounts(fields: &Fields<'_>, version: u32, cluster: u64) -> Result<(), Unusable> {
    if version == 3 && fields.u32(96)? > 6 {
        return Err(damaged("its refcounts have more than 64 bits"));
    }
    let (offset, clusters) = (fields.u64(48)?, fields.u32(56)?);
    if clusters == 0 || u64::from(clusters) * cluster > MAX_REFCOUNT_TABLE_BYTES {
        return Err(damaged(format!(
            "its refcount table has {clusters} clusters"
        )));
    }
    check_offset("refcount table", offset, cluster)
}

fn check_snapshots(fields: &Fields<'_>, cluster: u64) -> Result<(), Unusable> {
    let (count, offset) = (fields.u32(60)?, fields.u64(64)?);
    if count > MAX_SNAPSHOTS {
        return Err(damaged(format!("it has {count} snapshots")));
    }
    match count {
        0 => Ok(()),
        _ => check_offset("snapshot table", offset, cluster),
    }
}

fn check_offset(what: &str, offset: u64, cluster: u64) -> Result<(), Unusable> {
    if offset < cluster || !offset.is_multiple_of(cluster) || offset >= OFFSET_LIMIT {
        return Err(damaged(format!("its {what} is at {offset:#x}")));
    }
    Ok(())
}

fn l1_table(
    fields: &Fields<'_>,
    size_bytes: u64,
    cluster: u64,
    extended_l2: bool,
) -> Result<(u64, usize), Unusable> {
    let (entries, offset) = (u64::from(fields.u32(36)?), fields.u64(40)?);
    if entries * 8 > MAX_L1_BYTES {
        return Err(damaged(format!("its L1 table has {entries} entries")));
    }
    let per_table = cluster / if extended_l2 { 16 } else { 8 };
    let needed = size_bytes.div_ceil(cluster * per_table);
    if needed > entries {
        return Err(damaged(format!(
            "its L1 table of {entries} entries is too small for a disk of {size_bytes} bytes"
        )));
    }
    if needed > 0 {
        check_offset("L1 table", offset, cluster)?;
    }
    Ok((offset, needed as usize))
}

#[cfg(test)]
mod tests;
