//! An image and what lies below it.
//!
//! The format of each image is told, by the configuration or by the header of the one above it,
//! and never guessed. Names in headers are followed only where the configuration says so, and only
//! to regular files: no protocols, no `json:`, no devices, not back to an image of the same chain.
//! That goes for backing files and for external data files (`data_file`).

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::buffers::{AlignedBuffer, Buffers, read_at};
use super::super::lock::ImageLock;
use super::super::open::{HostFile, open_beside_own, open_file};
use super::super::{DEFAULT_CACHE_BYTES, Format, OpenOptions, SECTOR};
use super::cache::{Lookups, SliceCache, SliceKey};
use super::data_file;
use super::details::{self, ReadError, Snapshot};
use super::header::{self, Backing, Header, MAX_CLUSTER, Unusable};
use super::map::{Compressed, Layout, Mapping};
use crate::config::{BuildError, Invalid};

/// The most images one on top of another.
const MAX_DEPTH: usize = 64;
/// The most bytes of L1 tables in a chain: twice what the largest image has.
const MAX_L1_BYTES: usize = 64 << 20;
/// Bytes of a table of snapshots that are read at a time: more than any of them has.
const SNAPSHOT_PIECE: usize = 256 << 10;

/// What O_DIRECT asks for.
#[derive(Clone, Copy, Debug)]
pub struct Alignment {
    /// Of addresses in memory.
    pub memory: u32,
    /// Of offsets and lengths.
    pub file: u32,
}

/// One file of a chain.
pub struct Layer {
    pub path: PathBuf,
    pub file: Arc<File>,
    /// With O_DIRECT.
    pub direct: Option<Alignment>,
    /// Size of the disk.
    size_bytes: u64,
    /// Size of the file when it was opened.
    pub file_bytes: u64,
    /// `None` for a raw image.
    tables: Option<Tables>,
    pub block_device: bool,
    lock: Arc<ImageLock>,
}

struct Tables {
    layout: Layout,
    l1: Box<[u64]>,
    /// The number of the file that has its data, if not its own.
    data: Option<u16>,
}

impl Layer {
    /// A file that is nothing but data.
    fn of_data(path: PathBuf, host: &HostFile) -> Self {
        Self {
            path,
            direct: alignment(host),
            file: host.file.clone(),
            size_bytes: host.size_bytes,
            file_bytes: host.size_bytes,
            tables: None,
            block_device: host.block_device,
            lock: host.lock.clone(),
        }
    }

    /// Size of the disk that it is.
    pub fn disk_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Its place among those who use the file.
    pub fn lock(&self) -> &Arc<ImageLock> {
        &self.lock
    }

    /// How the image divides the disk; `None` for a raw image.
    pub fn layout(&self) -> Option<&Layout> {
        self.tables.as_ref().map(|tables| &tables.layout)
    }
}

/// Where the bytes of a range are, in the whole chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// In the file of a layer, or one of data, at an offset.
    Data(u16, u64),
    /// Nowhere: they are zeroes.
    Zero,
    /// In a compressed cluster of a layer, from this byte of it on.
    Compressed(u16, Compressed, usize),
}

/// The answer to [`Chain::look_up`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Found; it holds for this many bytes.
    Found(Found, u64),
    /// This slice must be read first.
    Missing(SliceKey),
    /// The metadata of this layer contradicts itself.
    Corrupt(u16),
}

/// An image and what lies below it, the topmost first.
pub struct Chain {
    /// The files: those of the images, and then the external data files of some of them.
    pub layers: Vec<Layer>,
    /// How many of them are images.
    images: usize,
    cache: Mutex<SliceCache>,
    /// Of this cache, and of the one that the topmost image has if it is written to.
    pub lookups: Lookups,
    /// How many bytes that other one may have.
    pub pages_bytes: usize,
}

/// What opening found out about the topmost image.
pub struct Top {
    pub host: HostFile,
    /// Its external data file.
    pub data: Option<HostFile>,
    pub header: Header,
    pub snapshots: Vec<Snapshot>,
    pub snapshot_table_bytes: u64,
}

impl Chain {
    /// Opens and locks all of them; those below the topmost for reading.
    pub fn open(options: &OpenOptions) -> Result<(Self, Top), BuildError> {
        Self::open_as(options, Start::Path)
    }

    /// The same for an overlay of an image that this process is writing to.
    pub fn open_over_own(options: &OpenOptions) -> Result<(Self, Top), BuildError> {
        Self::open_as(options, Start::OverOwn)
    }

    /// Opens an image anew that this process has open, and has written to, under the same lock.
    /// So with its external data file.
    pub fn open_again(
        options: &OpenOptions,
        host: &HostFile,
        data: Option<&HostFile>,
    ) -> Result<(Self, Top), BuildError> {
        let again = |host: &HostFile| {
            let stat = rustix::fs::fstat(&host.file);
            let stat = stat.map_err(|e| failed(&options.path, e.into()))?;
            Ok::<_, BuildError>(HostFile {
                size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
                ..host.clone()
            })
        };
        let data = data.map(again).transpose()?;
        Self::open_as(options, Start::Again(again(host)?, data))
    }

    fn open_as(options: &OpenOptions, start: Start) -> Result<(Self, Top), BuildError> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut seen = Vec::new();
        let mut data_files: Vec<(usize, Layer)> = Vec::new();
        let mut l1_bytes = 0;
        let mut top = None;
        let mut next = Some((options.path.clone(), Format::Qcow2));
        while let Some((path, format)) = next.take() {
            let host = match (layers.len(), &start) {
                (0, Start::Again(host, _)) => host.clone(),
                (0, _) => open_host(options, &path, Opening::Top)?,
                (1, Start::OverOwn) => open_host(options, &path, Opening::Own)?,
                _ => open_host(options, &path, Opening::Below)?,
            };
            if seen.contains(&host.identity) {
                return Err(refused(&path, "it is its own backing file"));
            }
            if layers.len() == MAX_DEPTH {
                let reason = format!("more than {MAX_DEPTH} images lie one on top of another");
                return Err(refused(&options.path, reason));
            }
            seen.push(host.identity);
            let (size_bytes, tables) = match format {
                Format::Raw => (host.size_bytes, None),
                Format::Qcow2 => {
                    let header = read_header(&host, &path)?;
                    let mut data = None;
                    if let Some(external) = &header.data {
                        let data_path = data_file::path(external, &path, options)?;
                        let found = match (layers.len(), &start) {
                            (0, Start::Again(_, Some(found))) => found.clone(),
                            (0, _) => data_file::open(options, &data_path, Opening::Top, &seen)?,
                            (1, Start::OverOwn) => {
                                data_file::open(options, &data_path, Opening::Own, &seen)?
                            }
                            _ => data_file::open(options, &data_path, Opening::Below, &seen)?,
                        };
                        seen.push(found.identity);
                        data_files.push((layers.len(), Layer::of_data(data_path, &found)));
                        data = Some(found);
                    }
                    if top.is_none() {
                        let (snapshots, snapshot_table_bytes) =
                            read_snapshots(&host, &header, &path)?;
                        top = Some(Top {
                            host: host.clone(),
                            data,
                            snapshots,
                            snapshot_table_bytes,
                            header: header.clone(),
                        });
                    }
                    l1_bytes += header.l1_entries * 8;
                    if l1_bytes > MAX_L1_BYTES {
                        return Err(refused(&path, "the L1 tables of the chain are too large"));
                    }
                    next = match &header.backing {
                        Some(backing) => Some(backing_file(backing, &path, options)?),
                        None => None,
                    };
                    let tables = Tables {
                        layout: Layout::new(&header),
                        l1: read_l1(&host, &header, &path)?,
                        data: None,
                    };
                    (header.size_bytes, Some(tables))
                }
            };
            layers.push(Layer {
                size_bytes,
                tables,
                ..Layer::of_data(path, &host)
            });
        }
        let images = layers.len();
        for (of, file) in data_files {
            let number = u16::try_from(layers.len()).ok();
            if let Some(tables) = layers.get_mut(of).and_then(|layer| layer.tables.as_mut()) {
                tables.data = number;
            }
            layers.push(file);
        }
        let (chain_bytes, pages_bytes) = divide(&layers, options);
        let slice_bytes = layers
            .iter()
            .filter_map(Layer::layout)
            .map(Layout::slice_bytes);
        let capacity = chain_bytes / slice_bytes.max().unwrap_or(SECTOR as usize).max(1);
        let chain = Self {
            layers,
            images,
            cache: Mutex::new(SliceCache::new(capacity)),
            lookups: Lookups::default(),
            pages_bytes,
        };
        let top = top.ok_or_else(|| refused(&options.path, "there is no image"))?;
        Ok((chain, top))
    }

    /// The images, the topmost first.
    pub fn images(&self) -> &[Layer] {
        self.layers.get(..self.images).unwrap_or(&[])
    }

    /// The files of one image: its own, and the external one that has its data.
    pub fn files_of(&self, image: usize) -> impl Iterator<Item = &Arc<File>> {
        let own = self.images().get(image);
        let data = own.and_then(|own| own.tables.as_ref()?.data);
        let data = data.and_then(|number| self.layers.get(usize::from(number)));
        [own, data].into_iter().flatten().map(|layer| &layer.file)
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.size_bytes)
    }

    /// Where up to `len` bytes from `position` of the disk on are; `len` is not 0.
    pub fn look_up(&self, position: u64, len: u64) -> Lookup {
        self.look_up_from(0, position, len)
    }

    /// As [`Chain::look_up`], but in what lies below the topmost `first` layers.
    pub fn look_up_from(&self, first: u16, position: u64, len: u64) -> Lookup {
        let mut answers = 0;
        let result = self.find(first, position, len, &mut answers);
        match result {
            // The whole question is put again when the slice is there.
            Lookup::Missing(_) => self.lookups.missed(),
            Lookup::Found(..) | Lookup::Corrupt(_) => self.lookups.answered(answers),
        }
        result
    }

    fn find(&self, first: u16, position: u64, mut len: u64, answers: &mut u64) -> Lookup {
        for (number, layer) in (0_u16..).zip(self.images()).skip(first.into()) {
            let left = layer.size_bytes.saturating_sub(position);
            if left == 0 {
                // Not in anything below it either: what is beyond its end can't be seen through it.
                return Lookup::Found(Found::Zero, len);
            }
            len = len.min(left);
            let Some(tables) = &layer.tables else {
                return Lookup::Found(Found::Data(number, position), len);
            };
            let mapping = match self.look_up_in(number, tables, position, len, answers) {
                Ok((mapping, span)) => {
                    len = span;
                    mapping
                }
                Err(other) => return other,
            };
            let found = match mapping {
                Mapping::Unallocated => continue,
                Mapping::Zero => Found::Zero,
                Mapping::Data(offset) => match tables.data {
                    None => Found::Data(number, offset),
                    Some(data) if offset == position => Found::Data(data, offset),
                    // Nowhere else than on the disk (as QEMU has it).
                    Some(_) => return Lookup::Corrupt(number),
                },
                Mapping::Compressed(..) if tables.data.is_some() => {
                    return Lookup::Corrupt(number);
                }
                Mapping::Compressed(cluster, within) => Found::Compressed(number, cluster, within),
            };
            return Lookup::Found(found, len);
        }
        Lookup::Found(Found::Zero, len)
    }

    fn look_up_in(
        &self,
        layer: u16,
        tables: &Tables,
        position: u64,
        len: u64,
        answers: &mut u64,
    ) -> Result<(Mapping, u64), Lookup> {
        let place = tables.layout.place(position);
        let entry = tables.l1.get(place.l1_index);
        let table = entry.and_then(|entry| tables.layout.l2_table(*entry).ok());
        let len = len.min(place.span);
        let offset = match table {
            None => return Err(Lookup::Corrupt(layer)),
            Some(None) => return Ok((Mapping::Unallocated, len)),
            Some(Some(table)) => table + place.slice_offset,
        };
        let key = SliceKey { layer, offset };
        let mut cache = self.cache();
        let slice = cache.get(key).ok_or(Lookup::Missing(key))?;
        *answers += 1;
        let mapped = tables.layout.map(slice, &place, len);
        mapped.map_err(|_| Lookup::Corrupt(layer))
    }

    /// Bytes of the slices of a layer.
    pub fn slice_bytes(&self, layer: u16) -> usize {
        let layout = self.layers.get(usize::from(layer)).and_then(Layer::layout);
        layout.map_or(0, Layout::slice_bytes)
    }

    /// Takes in a slice that was read.
    pub fn slice_read(&self, key: SliceKey, bytes: &[u8]) {
        self.cache().insert(key, bytes.into());
    }

    /// Held only to look at a slice or to put one in.
    fn cache(&self) -> std::sync::MutexGuard<'_, SliceCache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the memory for tables is divided: what the chain's cache has of it, and what is left for the
/// one of a topmost image that is written to.
fn divide(layers: &[Layer], options: &OpenOptions) -> (usize, usize) {
    let all = options.cache_bytes.unwrap_or(DEFAULT_CACHE_BYTES);
    let all = usize::try_from(all).unwrap_or(usize::MAX);
    if options.readonly {
        return (all, 0);
    }
    let tables_below = layers.iter().skip(1).any(|layer| layer.tables.is_some());
    let chain = if tables_below { all / 2 } else { 0 };
    (chain, all - chain)
}

fn alignment(host: &HostFile) -> Option<Alignment> {
    host.direct_memory_align.map(|memory| Alignment {
        memory,
        file: host.geometry.logical_block,
    })
}

/// How the topmost image comes to be open.
enum Start {
    /// By its path.
    Path,
    /// The same, and the image below it is one that this process is writing to.
    OverOwn,
    /// It is, and so is its external data file.
    Again(HostFile, Option<HostFile>),
}

/// What an image is in its chain.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    Top,
    /// Below, and this process is still writing to it.
    Own,
    Below,
}

/// Opens a file of a chain as what it is in it; only what is at the top is written to.
pub fn open_file_as(
    options: &OpenOptions,
    path: &Path,
    how: Opening,
) -> Result<HostFile, BuildError> {
    let options = OpenOptions {
        path: path.into(),
        readonly: options.readonly || how != Opening::Top,
        ..options.clone()
    };
    match how {
        Opening::Own => open_beside_own(&options),
        Opening::Top | Opening::Below => open_file(&options),
    }
}

fn open_host(options: &OpenOptions, path: &Path, how: Opening) -> Result<HostFile, BuildError> {
    let host = open_file_as(options, path, how);
    if how == Opening::Top {
        return host;
    }
    match host {
        Ok(host) if host.block_device => {
            Err(refused(path, "a backing file must be a regular file"))
        }
        Err(BuildError::Invalid(invalid)) => Err(Invalid::new(
            invalid.field,
            format!("backing file {}: {}", path.display(), invalid.reason),
        )
        .into()),
        other => other,
    }
}

fn read_header(host: &HostFile, path: &Path) -> Result<Header, BuildError> {
    let read = |len| read(host, 0, len).map_err(|e| failed(path, e));
    let unusable = |unusable: Unusable| refused(path, unusable.to_string());
    if host.size_bytes == 0 {
        // Files of /proc have no size either, and reading them can fail in odd ways.
        return Err(unusable(Unusable::TooShort("header")));
    }
    let start = read(512)?;
    let cluster = header::cluster_bytes(&start).map_err(unusable)?;
    let header = Header::parse(&read(cluster.min(MAX_CLUSTER))?).map_err(unusable)?;
    if header.corrupt {
        let path = path.display();
        tracing::warn!("{path} is marked as corrupt");
    }
    Ok(header)
}

fn read_l1(host: &HostFile, header: &Header, path: &Path) -> Result<Box<[u64]>, BuildError> {
    let bytes = read(host, header.l1_offset, header.l1_entries * 8).map_err(|e| failed(path, e))?;
    if bytes.len() < header.l1_entries * 8 {
        return Err(refused(path, Unusable::TooShort("L1 table").to_string()));
    }
    let (entries, _) = bytes.as_chunks();
    Ok(entries.iter().copied().map(u64::from_be_bytes).collect())
}

/// Those inside an image, as its table has them; the table is read in pieces.
fn read_snapshots(
    host: &HostFile,
    header: &Header,
    path: &Path,
) -> Result<(Vec<Snapshot>, u64), BuildError> {
    let (mut start, mut piece) = (0, Vec::new());
    let fill = |bytes: &mut [u8], offset: u64| {
        let within = |piece: &[u8], start: u64| {
            let at = usize::try_from(offset.checked_sub(start)?).ok()?;
            let found = piece.get(at..)?.get(..bytes.len())?;
            Some(found.to_vec())
        };
        let found = match within(&piece, start) {
            Some(found) => found,
            None => {
                (start, piece) = (offset, read(host, offset, SNAPSHOT_PIECE)?);
                within(&piece, start).ok_or(Unusable::TooShort("snapshot table"))?
            }
        };
        bytes.copy_from_slice(&found);
        Ok(())
    };
    let writing = &header.writing;
    match details::snapshots(writing.snapshots_offset, writing.snapshots, fill) {
        Ok(found) => Ok(found),
        Err(ReadError::Unusable(unusable)) => Err(refused(path, unusable.to_string())),
        Err(ReadError::Io(error)) => Err(failed(path, error)),
    }
}

fn read(host: &HostFile, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    read_file(&host.file, alignment(host), offset, len)
}

/// Up to `len` bytes of a file from `offset` on; fewer where it ends.
pub fn read_file(
    file: &File,
    direct: Option<Alignment>,
    offset: u64,
    len: usize,
) -> io::Result<Vec<u8>> {
    let (start, skip, total) = enclosing(direct, offset, len);
    let buffer = Arc::new(AlignedBuffer::zeroed(total, 4096)?);
    let mut buffers = Buffers::default();
    buffers
        .push_own(&buffer, 0, total)
        .map_err(io::Error::other)?;
    let mut done = 0;
    while done < total {
        match read_at(file.as_fd(), buffers.parts(), start + done as u64, false) {
            Ok(0) => break,
            Ok(count) => {
                buffers.advance(count as u64);
                done += count;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The end of a file whose size is no multiple of what O_DIRECT transfers.
            Err(error) if done > 0 && error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    let end = done.min(skip + len);
    Ok(buffer.bytes().get(skip..end).unwrap_or(&[]).to_vec())
}

/// The range to read for one that need not be aligned: where it begins, how many bytes of it come
/// before those that were asked for, and how many it has.
pub fn enclosing(direct: Option<Alignment>, offset: u64, len: usize) -> (u64, usize, usize) {
    let unit = direct.map_or(1, |direct| u64::from(direct.file.max(1)));
    let skip = offset % unit;
    let total = (skip + len as u64).next_multiple_of(unit);
    (offset - skip, skip as usize, total as usize)
}

/// Path and format of the backing file that the header of `overlay` names.
pub fn backing_file(
    backing: &Backing,
    overlay: &Path,
    options: &OpenOptions,
) -> Result<(PathBuf, Format), BuildError> {
    let name = backing.name.escape_ascii();
    if !options.backing_files {
        return Err(Invalid::new(
            "backing_files",
            format!(
                "must be true for {}, which has the backing file `{name}`",
                overlay.display()
            ),
        )
        .into());
    }
    let format = match backing.format.as_deref() {
        Some(b"raw") => Format::Raw,
        Some(b"qcow2") => Format::Qcow2,
        Some(other) => {
            let reason = format!(
                "its backing file `{name}` has the format `{}`; only raw and qcow2 are supported",
                other.escape_ascii()
            );
            return Err(refused(overlay, reason));
        }
        None => {
            let reason = format!(
                "it does not record the format of its backing file `{name}`, and a format is never \
                 guessed (`qemu-img rebase -u -F` records it)"
            );
            return Err(refused(overlay, reason));
        }
    };
    match beside(overlay, &backing.name) {
        Some(path) => Ok((path, format)),
        None => {
            let reason = format!("the name of its backing file, `{name}`, is not that of a file");
            Err(refused(overlay, reason))
        }
    }
}

/// Where the file is that the header of `image` names, relative to its folder; `None` where that is
/// not the name of a file.
pub fn beside(image: &Path, name: &[u8]) -> Option<PathBuf> {
    let is_protocol = name
        .iter()
        .find(|byte| matches!(byte, b':' | b'/'))
        .is_some_and(|byte| *byte == b':');
    if is_protocol || name.contains(&0) {
        return None;
    }
    // An absolute name replaces the folder.
    let folder = image.parent().unwrap_or(Path::new(""));
    Some(folder.join(OsStr::from_bytes(name)))
}

pub fn refused(path: &Path, reason: impl AsRef<str>) -> BuildError {
    let reason = format!("{}: {}", path.display(), reason.as_ref());
    Invalid::new("path", reason).into()
}

pub fn failed(path: &Path, error: io::Error) -> BuildError {
    BuildError::host(format!("reading {}", path.display()), error)
}
