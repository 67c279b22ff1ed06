//! Which parts of a disk are where, in an image and what lies below it: for `disk map`, and for
//! whoever copies a disk and need not read its holes.
//!
//! It reads the files by itself, one slice at a time, and has nothing to do with queues. Answers
//! have the meaning of QEMU's `block_status`: *present* is what some image of the chain says
//! something about, *data* must be read, *zero* need not.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::super::lock::ImageLock;
use super::super::open::{HostFile, open_file, open_unlocked};
use super::super::{Format, OpenOptions};
use super::chain::backing_file;
use super::data_file;
use super::decompress::Inflated;
use super::details::{Details, read_up_to};
use super::entry::{Cluster, Entries, L1_RESERVED, OFFSET};
use super::header::Backing;
use super::map::{Layout, Mapping};
use crate::config::{BuildError, Invalid};

const MAX_DEPTH: usize = 64;
const MAX_L1_BYTES: usize = 64 << 20;
const SLICE: u64 = 4096;

/// A range of the disk, all of which is in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins on the disk.
    pub start: u64,
    /// How many bytes.
    pub length: u64,
    /// Index of the image in the chain that decides, 0 the topmost.
    pub depth: usize,
    /// That image has it; otherwise nothing in the chain does.
    pub present: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// It has to be read from the file.
    pub data: bool,
    /// It is compressed.
    pub compressed: bool,
    /// Where it is in the file of that image.
    pub offset: Option<u64>,
}

impl Extent {
    /// Whether `next` goes on where this ends, in the same way.
    fn continues(&self, next: &Self) -> bool {
        let offset = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        offset
            && self.start + self.length == next.start
            && (self.depth, self.present, self.zero) == (next.depth, next.present, next.zero)
            && (self.data, self.compressed) == (next.data, next.compressed)
    }
}

struct Layer {
    path: PathBuf,
    file: Arc<File>,
    size_bytes: u64,
    tables: Option<Tables>,
    _lock: Arc<ImageLock>,
}

struct Tables {
    entries: Entries,
    layout: Layout,
    backing: Option<Backing>,
    /// Where its data is, if not in its own file; that is not opened.
    data: Option<PathBuf>,
    l1: Box<[u64]>,
    file_bytes: u64,
    /// The slice that was read last, and where.
    slice: (u64, Vec<u8>),
    inflated: Inflated,
}

/// An image and what lies below it.
pub struct Extents {
    layers: Vec<Layer>,
}

/// What one image says of a range.
struct Said {
    length: u64,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Extents {
    /// Opens an image, and with `options.backing_files` those below it. Without, what only a
    /// backing file would tell counts as absent.
    ///
    /// `locked` is false for one who has the image open already.
    pub fn open(format: Format, options: &OpenOptions, locked: bool) -> Result<Self, BuildError> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut seen = Vec::new();
        let mut l1_bytes = 0;
        let mut next = Some((options.path.clone(), format));
        while let Some((path, format)) = next.take() {
            let top = layers.is_empty();
            let host = open_layer(&path, options, top, locked)?;
            if seen.contains(&host.identity) {
                return Err(refused(&path, "it is its own backing file"));
            }
            seen.push(host.identity);
            let (file, size_bytes) = (host.file, host.size_bytes);
            if layers.len() == MAX_DEPTH {
                return Err(refused(&path, "too many images lie one on top of another"));
            }
            let (size_bytes, tables) = match format {
                Format::Raw => (size_bytes, None),
                Format::Qcow2 => {
                    let details = Details::read(&file, size_bytes)
                        .map_err(|e| refused(&path, &e.to_string()))?;
                    l1_bytes += details.header.l1_entries * 8;
                    if l1_bytes > MAX_L1_BYTES {
                        return Err(refused(&path, "the L1 tables of the chain are too large"));
                    }
                    if let Some(backing) = &details.header.backing
                        && options.backing_files
                    {
                        next = Some(backing_file(backing, &path, options)?);
                    }
                    let data = details.header.data.as_ref();
                    let tables = Tables {
                        data: data.map(|d| data_file::place(d, &path)).transpose()?,
                        entries: details.entries(),
                        layout: Layout::new(&details.header),
                        backing: details.header.backing.clone(),
                        l1: read_l1(&file, &details).map_err(|e| failed(&path, e))?,
                        file_bytes: size_bytes,
                        slice: (u64::MAX, Vec::new()),
                        inflated: Inflated::default(),
                    };
                    (details.header.size_bytes, Some(tables))
                }
            };
            layers.push(Layer {
                path,
                file,
                size_bytes,
                tables,
                _lock: host.lock,
            });
        }
        Ok(Self { layers })
    }

    /// Opens only the topmost image.
    pub fn open_top(format: Format, options: &OpenOptions) -> Result<Self, BuildError> {
        let alone = OpenOptions {
            backing_files: false,
            ..options.clone()
        };
        Self::open(format, &alone, true)
    }

    /// The name of what lies below the topmost image, as its header has it.
    pub fn backing_name(&self) -> Option<&[u8]> {
        let tables = self.layers.first()?.tables.as_ref()?;
        tables.backing.as_ref().map(|backing| &*backing.name)
    }

    /// What lies below the topmost image, which need not have been opened.
    pub fn backing_file(
        &self,
        options: &OpenOptions,
    ) -> Result<Option<(PathBuf, Format)>, BuildError> {
        let tables = self.layers.first().and_then(|layer| layer.tables.as_ref());
        let backing = tables.and_then(|tables| tables.backing.as_ref());
        let found = backing.map(|backing| backing_file(backing, &options.path, options));
        found.transpose()
    }

    /// Reads from the topmost image what [`Extents::next`] called data there.
    pub fn read_top(&mut self, position: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let at = position + done as u64;
            let layer = self.layers.first_mut().ok_or(Errno::IO)?;
            if layer.data_path().is_some() {
                let what = "the data file of an image is not read in this way";
                return Err(io::Error::new(io::ErrorKind::Unsupported, what));
            }
            let said = said(layer, at, (len - done) as u64)?;
            let piece = &mut bytes[done..done + said.length as usize];
            match (said.data, said.offset) {
                // What is behind the end of the file reads as zeroes, as it does for a guest.
                (true, Some(offset)) => {
                    let found = read_up_to(&layer.file, offset, piece.len())?;
                    piece[..found.len()].copy_from_slice(&found);
                }
                (true, None) => layer.decompress(at, piece)?,
                // Within what was called data there is nothing else.
                (false, _) => return Err(Errno::IO.into()),
            }
            done += said.length as usize;
        }
        Ok(bytes)
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.size_bytes)
    }

    /// The file in which an image of the chain has its data.
    pub fn path(&self, depth: usize) -> &Path {
        self.layers.get(depth).map_or(Path::new(""), |layer| {
            layer.data_path().unwrap_or(&layer.path)
        })
    }

    /// The external data file of the topmost image.
    pub fn data_path(&self) -> Option<&Path> {
        self.layers.first()?.data_path()
    }

    /// Whether it has a backing file that was followed.
    pub fn has_backing(&self) -> bool {
        self.layers.len() > 1
    }

    /// The longest extent from `position` on, up to `end` (within the disk, beyond `position`).
    pub fn next(&mut self, position: u64, end: u64) -> io::Result<Extent> {
        let mut extent = self.piece(position, end - position)?;
        while extent.start + extent.length < end {
            let at = extent.start + extent.length;
            let piece = self.piece(at, end - at)?;
            if !extent.continues(&piece) {
                break;
            }
            extent.length += piece.length;
        }
        Ok(extent)
    }

    /// The longest range from `position` on that the topmost image has, or has not.
    pub fn allocated(&mut self, position: u64, end: u64) -> io::Result<(bool, u64)> {
        let mut found: Option<bool> = None;
        let mut at = position;
        while at < end {
            let (allocated, length) = match self.layers.first_mut() {
                Some(layer) if layer.tables.is_some() => {
                    let said = said(layer, at, end - at)?;
                    (said.data || said.zero, said.length)
                }
                _ => (true, end - at),
            };
            if *found.get_or_insert(allocated) != allocated {
                break;
            }
            at += length;
        }
        Ok((found.unwrap_or(false), at - position))
    }

    fn piece(&mut self, position: u64, mut length: u64) -> io::Result<Extent> {
        let count = self.layers.len();
        for depth in 0..count {
            let below = self.layers.get(depth + 1).map(|layer| layer.size_bytes);
            let said = said(&mut self.layers[depth], position, length)?;
            length = said.length;
            let present = said.zero || said.data;
            let ends = match below {
                None => true,
                Some(size) => position >= size,
            };
            if present || ends {
                return Ok(Extent {
                    start: position,
                    length,
                    depth,
                    present,
                    zero: said.zero || !present,
                    data: said.data,
                    compressed: said.compressed,
                    offset: said.offset,
                });
            }
            length = length.min(below.unwrap_or(u64::MAX) - position);
        }
        Err(Errno::IO.into())
    }
}

impl Layer {
    fn data_path(&self) -> Option<&Path> {
        self.tables.as_ref()?.data.as_deref()
    }

    /// Fills a piece of the disk that is in one compressed cluster, of the slice looked at last.
    fn decompress(&mut self, position: u64, piece: &mut [u8]) -> io::Result<()> {
        let tables = self.tables.as_mut().ok_or(Errno::IO)?;
        let place = tables.layout.place(position);
        let mapped = tables
            .layout
            .map(&tables.slice.1, &place, piece.len() as u64);
        let Ok((Mapping::Compressed(cluster, within), _)) = mapped else {
            return Err(Errno::IO.into());
        };
        if !tables.inflated.holds((0, cluster)) {
            let input = read_up_to(&self.file, cluster.offset, cluster.len)?;
            tables.inflated.fill((0, cluster), &tables.layout, &input)?;
        }
        tables.inflated.copy_to(within, piece);
        Ok(())
    }
}

/// What an image says about up to `length` bytes from `position` on.
fn said(layer: &mut Layer, position: u64, length: u64) -> io::Result<Said> {
    let length = length.min(layer.size_bytes.saturating_sub(position));
    if length == 0 {
        return Err(Errno::INVAL.into());
    }
    match &mut layer.tables {
        None => said_raw(&layer.file, position, length),
        Some(tables) => tables.said(&layer.file, position, length),
    }
}

/// In a raw image holes are zeroes.
fn said_raw(file: &File, position: u64, length: u64) -> io::Result<Said> {
    let (data, end) = match rustix::fs::seek(file, SeekFrom::Data(position)) {
        Ok(start) if start > position => (false, start),
        Ok(_) => match rustix::fs::seek(file, SeekFrom::Hole(position)) {
            Ok(end) if end > position => (true, end),
            _ => (true, u64::MAX),
        },
        Err(Errno::NXIO) => (false, u64::MAX),
        // The file system, or a block device, does not say.
        Err(_) => (true, u64::MAX),
    };
    Ok(Said {
        length: length.min(end - position),
        zero: !data,
        data,
        compressed: false,
        offset: Some(position),
    })
}

impl Tables {
    fn said(&mut self, file: &File, position: u64, length: u64) -> io::Result<Said> {
        let corrupt = |what: &str| {
            let message = format!("{what} for offset {position:#x} is corrupt");
            io::Error::new(io::ErrorKind::InvalidData, message)
        };
        let bits = self.entries.cluster_bits;
        let cluster = position >> bits;
        let within = position & ((1 << bits) - 1);
        let per_table = self.entries.per_table();
        let index = usize::try_from(cluster / per_table).unwrap_or(usize::MAX);
        let entry = *self.l1.get(index).ok_or_else(|| corrupt("the L1 table"))?;
        let table = entry & OFFSET;
        if entry & L1_RESERVED != 0 || table.trailing_zeros() < bits {
            return Err(corrupt("the L1 entry"));
        }
        if table == 0 {
            let rest = ((per_table - cluster % per_table) << bits) - within;
            return Ok(Said::nothing(length.min(rest), None));
        }
        let at = table + (cluster % per_table) * self.entries.bytes() as u64;
        let slice_bytes = SLICE.min(1 << bits);
        let start = at - at % slice_bytes;
        if self.slice.0 != start {
            if start + slice_bytes > self.file_bytes {
                return Err(corrupt("the L2 table"));
            }
            self.slice.0 = u64::MAX;
            self.slice.1.resize(slice_bytes as usize, 0);
            file.read_exact_at(&mut self.slice.1, start)?;
            self.slice.0 = start;
        }
        let number = (at - start) as usize / self.entries.bytes();
        let words = self.entries.words(&self.slice.1, number);
        let (entry, bitmap) = words.ok_or_else(|| corrupt("the L2 table"))?;
        let read = self.entries.read(entry, bitmap);
        let read = read.map_err(|_| corrupt("the L2 entry"))?;
        let rest = (1 << bits) - within;
        Ok(match read {
            Cluster::Compressed { .. } if self.data.is_some() => {
                return Err(corrupt("a compressed cluster beside a data file"));
            }
            Cluster::Compressed { .. } => Said {
                length: length.min(rest),
                zero: false,
                data: true,
                compressed: true,
                offset: None,
            },
            Cluster::Plain {
                offset,
                allocated,
                zero,
            } => {
                let unit = (1_u64 << bits) / 32;
                // Small clusters have no subclusters: all bits are equal.
                let first = within.checked_div(unit).unwrap_or(0).min(31);
                let kind = |bit: u64| (allocated >> bit & 1 != 0, zero >> bit & 1 != 0);
                let same = (first..32)
                    .take_while(|bit| kind(*bit) == kind(first))
                    .count() as u64;
                let span = match first + same {
                    32 => rest,
                    end => end * unit - within,
                };
                let offset = offset.map(|offset| offset + within);
                let (data, zero) = kind(first);
                if self.data.is_some() && data && offset != Some(position) {
                    return Err(corrupt("the place in the data file"));
                }
                Said {
                    zero,
                    data,
                    ..Said::nothing(length.min(span), offset)
                }
            }
        })
    }
}

impl Said {
    fn nothing(length: u64, offset: Option<u64>) -> Self {
        Self {
            length,
            zero: false,
            data: false,
            compressed: false,
            offset,
        }
    }
}

/// Opens an image of a chain for reading; the topmost without a lock where this process has one.
pub fn open_layer(
    path: &Path,
    options: &OpenOptions,
    top: bool,
    locked: bool,
) -> Result<HostFile, BuildError> {
    let as_reader = OpenOptions {
        path: path.into(),
        readonly: true,
        direct: false,
        ..options.clone()
    };
    if top {
        return match locked {
            true => open_file(&as_reader),
            false => open_unlocked(&as_reader),
        };
    }
    match open_file(&as_reader) {
        Ok(host) if host.block_device => {
            Err(refused(path, "a backing file must be a regular file"))
        }
        Err(BuildError::Invalid(wrong)) => {
            let reason = format!("backing file {}: {}", path.display(), wrong.reason);
            Err(Invalid::new(wrong.field, reason).into())
        }
        other => other,
    }
}

fn read_l1(file: &File, details: &Details) -> io::Result<Box<[u64]>> {
    let mut bytes = vec![0; details.header.l1_entries * 8];
    file.read_exact_at(&mut bytes, details.header.l1_offset)?;
    let (entries, _) = bytes.as_chunks();
    Ok(entries.iter().copied().map(u64::from_be_bytes).collect())
}

fn refused(path: &Path, reason: &str) -> BuildError {
    Invalid::new("path", format!("{}: {reason}", path.display())).into()
}

fn failed(path: &Path, error: io::Error) -> BuildError {
    BuildError::host(format!("reading {}", path.display()), error)
}
