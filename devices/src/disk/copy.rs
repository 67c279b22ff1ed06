//! Copying a disk into a new image: read in order, some requests ahead; what is zero is not
//! written, but has its place where the copy is preallocated (see `qcow2/fill.rs`). [`into`] writes
//! into an image that is there already, or that lies on top of another.

pub mod into;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;

use super::buffers::{AlignedBuffer, Buffers};
use super::qcow2::create::{CreateOptions, Preallocation, shape_for};
use super::qcow2::extents::Extents;
use super::qcow2::fill::{Filling, Zeroes};
use super::qcow2::new_image::{NewImage, settled};
use super::qcow2::writer::{ImageWriter, Shape};
use super::{Completion, Format, OpenOptions, Operation, Queue, Request, SECTOR, open};
use crate::config::{BuildError, Invalid};

/// Read at a time, unless a cluster is more.
const PIECE: u64 = 1 << 20;
/// What zeroes are looked for in, and the smallest stretch of them that becomes a hole.
const HOLE: usize = 4096;

/// The longest stretch of zeroes that gets its place in one go.
const STRETCH: u64 = 64 << 20;
/// All subclusters.
const WHOLE: u64 = u32::MAX as u64;

const ZEROES: [u8; HOLE] = [0; HOLE];

/// How a disk is copied.
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// So many pieces are read ahead; 1 to 16.
    pub ahead: u16,
    /// The smallest stretch of zeroes, in bytes, that becomes a hole of a raw copy; from 512 on.
    pub hole_bytes: usize,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            ahead: 4,
            hole_bytes: HOLE,
        }
    }
}

/// Whether there is nothing but zeroes.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(HOLE)
        .all(|chunk| *chunk == ZEROES[..chunk.len()])
}

/// Copies the disk of an image into a new one, whose size, if `target` has none, is the same; on
/// error nothing is left behind. `progress` is told what is done, and of how much.
pub fn convert(
    format: Format,
    source: &OpenOptions,
    target: &CreateOptions,
    how: CopyOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), BuildError> {
    let source = OpenOptions {
        readonly: true,
        ..source.clone()
    };
    let image = open(format, &source)?;
    let size = image.size_bytes();
    if target.backing.is_some() {
        return Err(Invalid::new("backing_file", "a copy has all of the disk").into());
    }
    let target = &settled(target);
    let shape = shape_for(target, size)?;
    let mut extents = Extents::open(format, &source, true)?;
    let reading = format!("reading {}", source.path.display());
    let new = NewImage::begin(target, true)?;
    let queue = image
        .open_queue(how.ahead)
        .map_err(|e| BuildError::host(&reading, e))?;
    let piece = PIECE.max(1 << shape.cluster_bits);
    let mut reader = Reader::new(queue, size, piece, how.ahead.into());
    let filling = Filling {
        options: target,
        size,
        file: new.file(),
        data: new.data(),
    };
    let mut sink = Sink::begin(filling, shape, how.hole_bytes, progress)?;
    loop {
        let piece = reader.next(&mut extents);
        let Some((position, buffer, len)) = piece.map_err(|e| BuildError::host(&reading, e))?
        else {
            break;
        };
        let bytes = buffer.bytes().get(..len).unwrap_or(&[]);
        sink.write(position, bytes)?;
        reader.spare.push(buffer);
    }
    sink.finish()?;
    new.finish()?;
    progress(size, size);
    Ok(())
}

/// Where the bytes go, and with preallocation what lies between them.
struct Sink<'a> {
    filling: Filling<'a>,
    /// Of an image that has any.
    tables: Option<Tables<'a>>,
    zeroes: Zeroes,
    /// What of the disk has come by.
    position: u64,
    /// The smallest hole.
    hole: usize,
    progress: &'a mut dyn FnMut(u64, u64),
}

struct Tables<'a> {
    writer: ImageWriter<'a>,
    cluster: u64,
    /// What can be left out: a cluster or a subcluster.
    unit: u64,
}

impl<'a> Sink<'a> {
    fn begin(
        filling: Filling<'a>,
        shape: Shape,
        hole: usize,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, BuildError> {
        let size = filling.size;
        let raw = filling.options.format == Format::Raw;
        if raw || filling.data.is_some() {
            filling.set_len()?;
        }
        match filling.options.preallocation {
            // How long the file will be is not known yet.
            Preallocation::Falloc if raw => filling.set_aside(size, &mut |_, _| Ok(()))?,
            Preallocation::Full => filling.set_aside_if_possible(size)?,
            _ => {}
        }
        let tables = match raw {
            true => None,
            false => {
                let cluster = 1_u64 << shape.cluster_bits;
                let unit = cluster / if shape.extended_l2 { 32 } else { 1 };
                let writer = ImageWriter::new(filling.file, shape);
                Some(Tables {
                    writer: writer.map_err(|e| filling.failed(e))?,
                    cluster,
                    unit,
                })
            }
        };
        Ok(Self {
            zeroes: Zeroes::new(size),
            filling,
            tables,
            position: 0,
            hole: hole.max(SECTOR as usize),
            progress,
        })
    }

    /// Takes what is at `position`, which is behind all that was before and begins a cluster.
    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), BuildError> {
        self.pass(position)?;
        let preallocation = self.filling.options.preallocation;
        let (file, hole) = (self.filling.data.unwrap_or(self.filling.file), self.hole);
        let place = |bytes: &[u8], offset| match preallocation {
            Preallocation::Full => file.write_all_at(bytes, offset),
            _ => write_sparsely(file, offset, bytes, hole),
        };
        let written = match &mut self.tables {
            None => place(bytes, position),
            Some(tables) if preallocation == Preallocation::Off => {
                tables.write(file, position, bytes)
            }
            Some(tables) => {
                let clusters = bytes.chunks(tables.cluster as usize);
                (position / tables.cluster..)
                    .zip(clusters)
                    .try_for_each(|(number, bytes)| place(bytes, tables.writer.map(number, WHOLE)?))
            }
        };
        written.map_err(|e| self.filling.failed(e))?;
        self.position = position + bytes.len() as u64;
        (self.progress)(self.position, self.filling.size);
        Ok(())
    }

    /// What comes before `to` is zero: gives it its place where that is wanted.
    fn pass(&mut self, to: u64) -> Result<(), BuildError> {
        let preallocation = self.filling.options.preallocation;
        let full = preallocation == Preallocation::Full;
        if preallocation == Preallocation::Off || (self.tables.is_none() && !full) {
            return Ok(());
        }
        while self.position < to {
            let (offset, len) = match &mut self.tables {
                None => (self.position, STRETCH.min(to - self.position)),
                Some(tables) => {
                    let row = tables.row(self.position, to);
                    row.map_err(|e| self.filling.failed(e))?
                }
            };
            if full {
                let quiet = &mut |_, _| Ok(());
                self.filling
                    .write_zeroes(&mut self.zeroes, offset, len, quiet)?;
            }
            self.position += len;
            (self.progress)(self.position.min(self.filling.size), self.filling.size);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), BuildError> {
        self.pass(self.filling.size)?;
        if let Some(tables) = self.tables {
            let end = tables.writer.finish();
            let end = end.map_err(|e| self.filling.failed(e))?;
            if self.filling.options.preallocation == Preallocation::Falloc {
                let end = self.filling.end(end);
                self.filling.set_aside(end, &mut |_, _| Ok(()))?;
            }
        }
        Ok(())
    }
}

impl Tables<'_> {
    /// Gives a place to what is not zero, and writes it there.
    fn write(&mut self, file: &File, position: u64, bytes: &[u8]) -> io::Result<()> {
        let clusters = bytes.chunks(self.cluster as usize);
        for (number, bytes) in (position / self.cluster..).zip(clusters) {
            let bitmap = bytes
                .chunks(self.unit as usize)
                .enumerate()
                .filter(|(_, piece)| !is_zero(piece))
                .fold(0, |bitmap, (index, _)| bitmap | 1_u64 << index);
            if bitmap != 0 {
                let offset = self.writer.map(number, bitmap)?;
                match self.cluster == self.unit {
                    true => file.write_all_at(bytes, offset)?,
                    false => write_sparsely(file, offset, bytes, self.unit as usize)?,
                }
            }
        }
        Ok(())
    }

    /// Gives places to clusters from `position` on that lie in a row, none of them at `to` or
    /// behind; where, and how many bytes.
    fn row(&mut self, position: u64, to: u64) -> io::Result<(u64, u64)> {
        let first = self.writer.map(position / self.cluster, WHOLE)?;
        let mut len = self.cluster;
        while position + len < to && len < STRETCH && self.writer.stays_in_table() {
            self.writer.map((position + len) / self.cluster, WHOLE)?;
            len += self.cluster;
        }
        Ok((first, len))
    }
}

/// Writes what is not zero, in whole units.
fn write_sparsely(file: &File, offset: u64, bytes: &[u8], unit: usize) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        let zero = |from: usize| is_zero(&bytes[from..(from + unit).min(bytes.len())]);
        let start = at;
        while at < bytes.len() && !zero(at) {
            at = (at + unit).min(bytes.len());
        }
        if at > start {
            file.write_all_at(&bytes[start..at], offset + start as u64)?;
        } else {
            at = (at + unit).min(bytes.len());
        }
    }
    Ok(())
}

/// A piece that has been asked for.
struct Pending {
    position: u64,
    len: usize,
    buffer: Arc<AlignedBuffer>,
    tag: u16,
    done: bool,
}

/// The pieces of a disk that are not known to be zero, in order.
struct Reader {
    pending: VecDeque<Pending>,
    completed: Vec<Completion>,
    spare: Vec<Arc<AlignedBuffer>>,
    size: u64,
    piece: u64,
    ahead: usize,
    /// What comes next to be asked for.
    position: u64,
    tag: u16,
    /// Last: its requests end before their memory goes.
    queue: Box<dyn Queue>,
}

impl Reader {
    fn new(queue: Box<dyn Queue>, size: u64, piece: u64, ahead: usize) -> Self {
        Self {
            pending: VecDeque::new(),
            completed: Vec::new(),
            spare: Vec::new(),
            size,
            piece,
            ahead,
            position: 0,
            tag: 0,
            queue,
        }
    }

    /// The next piece that may hold something, and how much of the buffer it is.
    fn next(
        &mut self,
        extents: &mut Extents,
    ) -> io::Result<Option<(u64, Arc<AlignedBuffer>, usize)>> {
        while self.pending.len() < self.ahead && self.skip(extents)? {
            self.ask()?;
        }
        self.queue.start()?;
        while self.pending.front().is_some_and(|first| !first.done) {
            self.queue.wait(&mut self.completed)?;
            for completion in self.completed.drain(..) {
                completion.result?;
                let of = self.pending.iter_mut().find(|p| p.tag == completion.tag);
                if let Some(pending) = of {
                    pending.done = true;
                }
            }
        }
        let first = self.pending.pop_front();
        Ok(first.map(|first| (first.position, first.buffer, first.len)))
    }

    /// Goes on to a piece that may hold something; false at the end.
    fn skip(&mut self, extents: &mut Extents) -> io::Result<bool> {
        while self.position < self.size {
            let extent = extents.next(self.position, self.size)?;
            if extent.data {
                return Ok(true);
            }
            let end = extent.start + extent.length;
            if end - self.position < self.piece && end < self.size {
                // Something begins within this piece.
                return Ok(true);
            }
            self.position = end - end % self.piece;
            if end == self.size {
                self.position = end;
            }
        }
        Ok(false)
    }

    fn ask(&mut self) -> io::Result<()> {
        let len = self.piece.min(self.size - self.position) as usize;
        let buffer = match self.spare.pop() {
            Some(buffer) => buffer,
            None => Arc::new(AlignedBuffer::zeroed(self.piece as usize, 4096)?),
        };
        let mut buffers = Buffers::default();
        buffers
            .push_own(&buffer, 0, len)
            .map_err(|_| io::Error::from(Errno::INVAL))?;
        self.tag = self.tag.wrapping_add(1);
        self.queue.push(Request {
            tag: self.tag,
            operation: Operation::Read,
            offset: self.position,
            length: len as u64,
            buffers,
        });
        self.pending.push_back(Pending {
            position: self.position,
            len,
            buffer,
            tag: self.tag,
            done: false,
        });
        self.position += len as u64;
        Ok(())
    }
}
