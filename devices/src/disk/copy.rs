//! Copying a disk into a new image: read in order, some requests ahead; what is zero is not
//! written.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::io::Errno;

use super::buffers::{AlignedBuffer, Buffers};
use super::new_file::NewFile;
use super::qcow2::create::{CreateOptions, Preallocation, shape_for};
use super::qcow2::extents::Extents;
use super::qcow2::writer::ImageWriter;
use super::{Completion, Format, OpenOptions, Operation, Queue, Request, open};
use crate::config::{BuildError, Invalid};

/// Read at a time, unless a cluster is more.
const PIECE: u64 = 1 << 20;
/// So many ahead.
const AHEAD: usize = 4;
/// The smallest stretch of zeroes that becomes a hole.
const HOLE: usize = 4096;

const ZEROES: [u8; HOLE] = [0; HOLE];

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
    if !matches!(
        target.preallocation,
        Preallocation::Off | Preallocation::Falloc
    ) {
        let reason = "of a copy can be off or falloc";
        return Err(Invalid::new("preallocation", reason).into());
    }
    let shape = shape_for(target, size)?;
    let mut extents = Extents::open(format, &source, true)?;
    let reading = format!("reading {}", source.path.display());
    let writing = format!("writing {}", target.path.display());
    let new = NewFile::begin(&target.path)?;
    let queue = image
        .open_queue(AHEAD as u16)
        .map_err(|e| BuildError::host(&reading, e))?;
    let cluster = 1_u64 << shape.cluster_bits;
    let mut reader = Reader::new(queue, size, PIECE.max(cluster));
    let mut sink = match target.format {
        Format::Raw => {
            let file = new.file();
            file.set_len(size)
                .map_err(|e| BuildError::host(&writing, e))?;
            Sink::Raw(file)
        }
        Format::Qcow2 => {
            let unit = if shape.extended_l2 {
                cluster / 32
            } else {
                cluster
            };
            let writer = ImageWriter::new(new.file(), shape);
            Sink::Qcow2 {
                writer: writer.map_err(|e| BuildError::host(&writing, e))?,
                file: new.file(),
                cluster,
                unit,
            }
        }
    };
    loop {
        let piece = reader.next(&mut extents);
        let Some((position, buffer, len)) = piece.map_err(|e| BuildError::host(&reading, e))?
        else {
            break;
        };
        let bytes = buffer.bytes().get(..len).unwrap_or(&[]);
        sink.write(position, bytes)
            .map_err(|e| BuildError::host(&writing, e))?;
        reader.spare.push(buffer);
        progress(position + len as u64, size);
    }
    let end = match sink {
        Sink::Raw(_) => size,
        Sink::Qcow2 { writer, .. } => writer.finish().map_err(|e| BuildError::host(&writing, e))?,
    };
    if target.preallocation == Preallocation::Falloc {
        let mode = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(new.file(), mode, 0, end)
            .map_err(|e| BuildError::host(&writing, e))?;
    }
    new.finish()?;
    progress(size, size);
    Ok(())
}

/// Where the bytes go.
enum Sink<'a> {
    Raw(&'a File),
    Qcow2 {
        writer: ImageWriter<'a>,
        file: &'a File,
        cluster: u64,
        /// What can be left out: a cluster or a subcluster.
        unit: u64,
    },
}

impl Sink<'_> {
    fn write(&mut self, position: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Raw(file) => write_sparsely(file, position, bytes, HOLE).map(drop),
            Self::Qcow2 {
                writer,
                file,
                cluster,
                unit,
            } => {
                for (number, bytes) in (position / *cluster..).zip(bytes.chunks(*cluster as usize))
                {
                    let bitmap = bytes
                        .chunks(*unit as usize)
                        .enumerate()
                        .filter(|(_, piece)| !is_zero(piece))
                        .fold(0, |bitmap, (index, _)| bitmap | 1_u64 << index);
                    if bitmap != 0 {
                        let offset = writer.map(number, bitmap)?;
                        match cluster == unit {
                            true => file.write_all_at(bytes, offset)?,
                            false => write_sparsely(file, offset, bytes, *unit as usize)?,
                        }
                    }
                }
                Ok(())
            }
        }
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
    /// What comes next to be asked for.
    position: u64,
    tag: u16,
    /// Last: its requests end before their memory goes.
    queue: Box<dyn Queue>,
}

impl Reader {
    fn new(queue: Box<dyn Queue>, size: u64, piece: u64) -> Self {
        Self {
            pending: VecDeque::new(),
            completed: Vec::new(),
            spare: Vec::new(),
            size,
            piece,
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
        while self.pending.len() < AHEAD && self.skip(extents)? {
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
