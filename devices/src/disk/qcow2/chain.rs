//! An image and what lies below it.
//!
//! The format of each image is told, by the configuration or by the header of the one above it,
//! and never guessed. Names in headers are followed only where the configuration says so, and only
//! to regular files: no protocols, no `json:`, no devices, not back to an image of the same chain.
//! That goes for backing files and for external data files (`data_file`).

mod open;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::buffers::{AlignedBuffer, Buffers, read_at};
use super::super::lock::ImageLock;
use super::super::open::HostFile;
use super::cache::{Lookups, SliceCache, SliceKey};
use super::details::Snapshot;
use super::header::Header;
use super::map::{Compressed, Layout, Mapping};

pub use open::{Opening, backing_file, beside, failed, open_file_as, refused};

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
    /// The images, the topmost first.
    pub fn images(&self) -> &[Layer] {
        self.layers.get(..self.images).unwrap_or(&[])
    }

    /// The files of one image: its own, and the external one that has its data.
    pub fn files_of(&self, image: usize) -> impl Iterator<Item = &Arc<File>> {
        let own = self.images().get(image);
        let data = self.data_of(image).map(|(_, layer)| layer);
        [own, data].into_iter().flatten().map(|layer| &layer.file)
    }

    /// The external data file of an image, and its number.
    pub fn data_of(&self, image: usize) -> Option<(u16, &Layer)> {
        let number = self.images().get(image)?.tables.as_ref()?.data?;
        Some((number, self.layers.get(usize::from(number))?))
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

fn alignment(host: &HostFile) -> Option<Alignment> {
    host.direct_memory_align.map(|memory| Alignment {
        memory,
        file: host.geometry.logical_block,
    })
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
