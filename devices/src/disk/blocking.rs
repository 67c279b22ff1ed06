//! An image that is read and written one request at a time, by whoever can wait.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::buffers::{AlignedBuffer, Buffers};
use super::copy::is_zero;
use super::{Completion, Format, Image, OpenOptions, Operation, Queue, Request, SECTOR, open};
use crate::config::BuildError;
use crate::sandbox::Allow;

/// So many requests at a time.
const DEPTH: u16 = 64;
/// Tag of the request that is waited for; those of others have smaller ones.
const WAITED: u16 = u16::MAX;

/// See the module. Ranges need not be aligned to anything: what lies around them in their sectors
/// is read and written back. Whoever has requests of their own under way (see [`Blocking::push`])
/// sees to it that these do not touch the same sectors.
pub struct Blocking {
    queue: Box<dyn Queue>,
    image: Arc<dyn Image>,
    size_bytes: u64,
    /// So many bytes behind the beginning of a page the memory of requests begins.
    skew: usize,
    /// What others' requests came to.
    completed: Vec<Completion>,
    scratch: Vec<Completion>,
}

impl Blocking {
    /// Opens an image.
    pub fn open(format: Format, options: &OpenOptions) -> Result<Self, BuildError> {
        Self::over(open(format, options)?.into())
            .map_err(|error| BuildError::host(format!("opening {}", options.path.display()), error))
    }

    /// The same over an image that is open.
    pub fn over(image: Arc<dyn Image>) -> io::Result<Self> {
        Ok(Self {
            size_bytes: image.size_bytes(),
            queue: image.open_queue(DEPTH)?,
            image,
            skew: 0,
            completed: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Has the memory of requests begin so many bytes behind the beginning of a page, as that of a
    /// guest may: fewer than a page has.
    pub fn set_skew(&mut self, bytes: usize) {
        self.skew = bytes.min(4095);
    }

    /// What was set by [`Blocking::set_skew`]; for those who push requests of their own.
    pub fn skew(&self) -> usize {
        self.skew
    }

    /// What whoever uses it calls.
    pub fn syscalls(&self) -> &'static [Allow] {
        self.queue.syscalls()
    }

    /// Size of the disk.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The file in which the image grows.
    pub fn host_file(&self) -> Arc<File> {
        self.image.host_file()
    }

    /// Makes the disk larger, as [`Image::grow`]; nothing of others may be under way.
    pub fn grow(&mut self, size_bytes: u64) -> Result<(), BuildError> {
        let queue = RefCell::new(&mut self.queue);
        let attend = || {
            let mut queue = queue.borrow_mut();
            let mut completed = Vec::new();
            let mut result = queue.attend();
            while result.is_ok() && queue.held() > 0 {
                let held = queue.held();
                result = queue.wait(&mut completed);
                if queue.held() >= held {
                    // It comes no further; whoever waits for it is told that it took too long.
                    break;
                }
            }
        };
        self.image.grow(size_bytes, &attend)?;
        self.size_bytes = self.image.size_bytes();
        Ok(())
    }

    /// Whether there are as many requests under way as there may be.
    pub fn is_full(&self) -> bool {
        self.queue.held() + 1 >= usize::from(DEPTH)
    }

    /// Whether a range is one of whole sectors, for [`Blocking::push`], and not empty.
    pub fn is_whole(&self, offset: u64, length: usize) -> bool {
        let unit = self.unit();
        length > 0 && offset.is_multiple_of(unit) && (length as u64).is_multiple_of(unit)
    }

    /// Begins a request whose range is whole [units](Blocking::unit); its completion is among those that
    /// [`Blocking::completed`] gives. Fails with EBUSY when there are too many.
    pub fn push(&mut self, request: Request) -> io::Result<()> {
        if self.is_full() {
            return Err(Errno::BUSY.into());
        }
        self.queue.push(request);
        self.queue.start()
    }

    /// What has been completed; with `wait`, after at least one if there is any under way.
    pub fn completed(&mut self, wait: bool) -> io::Result<Vec<Completion>> {
        if wait && self.completed.is_empty() && self.queue.held() > 0 {
            self.queue.wait(&mut self.completed)?;
        } else {
            self.queue.acknowledge();
            self.queue.poll(&mut self.completed)?;
        }
        Ok(std::mem::take(&mut self.completed))
    }

    fn run(
        &mut self,
        operation: Operation,
        offset: u64,
        length: u64,
        buffers: Buffers,
    ) -> io::Result<()> {
        self.queue.push(Request {
            tag: WAITED,
            operation,
            offset,
            length,
            buffers,
        });
        self.queue.start()?;
        loop {
            self.queue.wait(&mut self.scratch)?;
            let mut result = None;
            for completion in self.scratch.drain(..) {
                match completion.tag {
                    WAITED => result = Some(completion.result),
                    _ => self.completed.push(completion),
                }
            }
            if let Some(result) = result {
                return result;
            }
            if self.queue.held() == 0 {
                return Err(Errno::IO.into());
            }
        }
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Errno::IO.into()),
        }
    }

    /// The unit in which requests that are pushed must be.
    pub fn unit(&self) -> u64 {
        u64::from(self.image.geometry().logical_block).max(SECTOR)
    }

    /// Reads `length` bytes.
    pub fn read(&mut self, offset: u64, length: usize) -> io::Result<Bytes> {
        self.check(offset, length as u64)?;
        let unit = self.unit();
        let skip = (offset % unit) as usize;
        let total = (skip + length).next_multiple_of(unit as usize);
        let memory = Arc::new(AlignedBuffer::zeroed(self.skew + total, 4096)?);
        if length > 0 {
            let mut buffers = Buffers::default();
            buffers
                .push_own(&memory, self.skew, total)
                .map_err(io::Error::other)?;
            self.run(Operation::Read, offset - skip as u64, total as u64, buffers)?;
        }
        Ok(Bytes {
            memory,
            skip: self.skew + skip,
            length,
        })
    }

    /// Writes bytes; `durable` as in [`Operation::Write`].
    pub fn write(&mut self, offset: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let unit = self.unit();
        let skip = (offset % unit) as usize;
        let total = (skip + bytes.len()).next_multiple_of(unit as usize);
        let start = offset - skip as u64;
        let mut memory = AlignedBuffer::zeroed(self.skew + total, 4096)?;
        let unit = unit as usize;
        let whole = &mut memory.bytes_mut()[self.skew..];
        if skip > 0 {
            let around = self.read(start, unit)?;
            whole[..unit].copy_from_slice(around.get());
        }
        if skip + bytes.len() < total {
            let around = self.read(start + (total - unit) as u64, unit)?;
            whole[total - unit..].copy_from_slice(around.get());
        }
        whole[skip..skip + bytes.len()].copy_from_slice(bytes);
        let mut buffers = Buffers::default();
        buffers
            .push_own(&Arc::new(memory), self.skew, total)
            .map_err(io::Error::other)?;
        self.run(Operation::Write { durable }, start, total as u64, buffers)
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(
        &mut self,
        offset: u64,
        length: u64,
        unmap: bool,
        durable: bool,
    ) -> io::Result<()> {
        self.check(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let unit = self.unit();
        let end = offset + length;
        let (mut start, mut stop) = (offset - offset % unit, end.next_multiple_of(unit));
        // A unit whose other bytes are zero already is made zero as a whole: to write it would take
        // space.
        let before = is_zero(self.read(start, (offset - start) as usize)?.get());
        let behind = is_zero(self.read(end, (stop - end) as usize)?.get());
        if stop - start == unit && !(before && behind) {
            return self.write(offset, &vec![0; length as usize], durable);
        }
        if !before {
            start += unit;
            self.write(offset, &vec![0; (start - offset) as usize], durable)?;
        }
        if !behind {
            stop -= unit;
            self.write(stop, &vec![0; (end - stop) as usize], durable)?;
        }
        if start == stop {
            return Ok(());
        }
        let operation = Operation::WriteZeroes { unmap, durable };
        self.run(operation, start, stop - start, Buffers::default())
    }

    /// Gives space back to the host: that of whole units within the range.
    pub fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let unit = self.unit();
        let start = offset.next_multiple_of(unit);
        let end = offset + length;
        let end = end - end % unit;
        match start < end {
            true => self.run(Operation::Discard, start, end - start, Buffers::default()),
            false => Ok(()),
        }
    }

    /// Makes all that was written survive a power cut.
    pub fn flush(&mut self) -> io::Result<()> {
        self.run(Operation::Flush, 0, 0, Buffers::default())
    }
}

/// What was read.
pub struct Bytes {
    memory: Arc<AlignedBuffer>,
    skip: usize,
    length: usize,
}

impl Bytes {
    /// It.
    pub fn get(&self) -> &[u8] {
        self.memory
            .bytes()
            .get(self.skip..self.skip + self.length)
            .unwrap_or(&[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_are_aligned_to_nothing_are_read_and_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 10).unwrap();
        let options = OpenOptions::new(file.path());
        let mut disk = Blocking::open(Format::Raw, &options).unwrap();
        let mut model = vec![0; 64 << 10];
        for step in 0..300_usize {
            let offset = step * 7919 % 60_000;
            let length = step * 31 % 3000;
            let range = offset..offset + length;
            match step % 5 {
                0 => {
                    disk.write_zeroes(offset as u64, length as u64, step % 2 == 0, false)
                        .unwrap();
                    model[range].fill(0);
                }
                _ => {
                    model[range.clone()].fill(step as u8);
                    disk.write(offset as u64, &model[range], false).unwrap();
                }
            }
            let (from, length) = (step * 131 % 50_000, step * 17 % 5000);
            let read = disk.read(from as u64, length).unwrap();
            assert!(read.get() == &model[from..from + length], "step {step}");
        }
        disk.flush().unwrap();
        assert!(std::fs::read(file.path()).unwrap() == model);
        disk.discard(1000, 20_000).unwrap();
        let kept = disk.read(0, 1000).unwrap();
        assert!(kept.get() == &model[..1000]);
        let kept = disk.read(21_000, 1000).unwrap();
        assert!(kept.get() == &model[21_000..22_000]);
        for (offset, length) in [(65_536, 1), (65_535, 2), (u64::MAX, 1)] {
            assert!(disk.read(offset, length).is_err());
            assert!(
                disk.write_zeroes(offset, length as u64, false, false)
                    .is_err()
            );
        }
        assert!(disk.read(65_536, 0).unwrap().get().is_empty());
    }

    #[test]
    fn zeroes_that_end_within_sectors_of_zeroes_take_no_space() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let options = OpenOptions::new(path);
        let mut disk = Blocking::open(Format::Raw, &options).unwrap();
        for (offset, length) in [(1, 200_000), (300_001, 10), (400_000, 1000), (1_048_575, 1)] {
            disk.write_zeroes(offset, length, true, false).unwrap();
        }
        disk.flush().unwrap();
        assert_eq!(blocks(), 0);
        // What is around them stays.
        let mut model = vec![7; 8192];
        disk.write(0, &model, false).unwrap();
        for (offset, length) in [(10, 20), (500, 20), (511, 1025), (2048, 100), (3000, 72)] {
            disk.write_zeroes(offset as u64, length as u64, true, false)
                .unwrap();
            model[offset..offset + length].fill(0);
            let read = disk.read(0, 8192).unwrap();
            assert!(read.get() == &model[..], "{offset}");
        }
    }
}
