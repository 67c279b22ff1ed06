//! What is only below the image comes into it, while the disk is in use; then the image forgets
//! what was below it.
//!
//! ```text
//!   look ahead, nothing locked ─► something below ─► clusters alone ─► read ─► write what is
//!      (zero, in the image, or a                                               not all zeroes
//!       hole of a raw file: on)
//!
//!   … the end ─► flush ─► the header without a backing file, in one write ─► sync
//! ```
//!
//! A unit (a cluster or subcluster) that was passed is in the image, or reads as zeroes below; and
//! so it stays, whatever the guest does: nothing that is in an overlay becomes transparent again.
//! That is why one pass is enough, and looking ahead needs no lock. What is written goes the way
//! of the guest's writes, so a power cut does no harm at any moment. In the end the disk is the
//! same with and without what is below, on the disk as in memory, so it does not matter for whom
//! the header has changed and for whom not yet.
//!
//! Name and length of the backing file stand in 12 bytes of the header's first sector. The
//! extension with its format stays: it says nothing where there is no name.

use std::io;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::super::super::buffers::Buffers;
use super::super::super::steps::{Outcome, PIECE, Reached, Step};
use super::super::chain::Found;
use super::super::header::Header;
use super::engine::{Engine, own};
use super::io::Kind as Do;
use super::lock::locked;

/// Places that are looked at in a row: somebody may want the job to end.
const LOOKS: usize = 256;
/// Offset and length of the backing file's name, in the header.
const BACKING: std::ops::Range<usize> = 8..20;

impl Engine {
    /// Does a step of a job.
    pub async fn step(&self, step: Step) -> Outcome {
        match step {
            Step::Populate(from) => self.populate(from).await,
            Step::CheckDetach => {
                let _baton = self.allocating.only().await;
                self.check_detach().await?;
                Ok(Reached::default())
            }
            Step::Detach(size_bytes) => {
                self.detach(size_bytes).await?;
                Ok(Reached::default())
            }
            Step::Take(from, end) => self.take(from, end).await,
            Step::Empty => {
                self.empty().await?;
                Ok(Reached::default())
            }
        }
    }

    async fn populate(&self, from: u64) -> Outcome {
        self.alive()?;
        let end = locked(&self.tables).size_bytes;
        let mut position = from.min(end);
        for _ in 0..LOOKS {
            if position == end {
                break;
            }
            let (found, span) = self.look_up(position, end - position).await?;
            let nothing = match self.is_below(&found) {
                true => self.hole(&found, span),
                false => span,
            };
            if nothing == 0 {
                return self.fetch(position, end).await;
            }
            position += nothing;
        }
        Ok(Reached {
            position,
            ..Reached::default()
        })
    }

    /// Whether it is in an image below.
    fn is_below(&self, found: &Found) -> bool {
        match found {
            Found::Zero => false,
            Found::Data(file, _) | Found::Compressed(file, ..) => !self.is_own(*file),
        }
    }

    /// How many of `len` bytes that are below are zeroes for certain, as they begin a hole of a raw
    /// file. It is not asked for any that is shorter than it was: reading it is to fail.
    fn hole(&self, found: &Found, len: u64) -> u64 {
        let Found::Data(number, offset) = *found else {
            return 0;
        };
        let layer = self.chain.layers.get(usize::from(number));
        let Some(layer) = layer.filter(|layer| layer.layout().is_none()) else {
            return 0;
        };
        let data = rustix::fs::seek(&layer.file, SeekFrom::Data(offset));
        // Asked last, so that it holds for what was told before.
        let whole = rustix::fs::seek(&layer.file, SeekFrom::End(0));
        match data {
            _ if !whole.is_ok_and(|bytes| bytes >= layer.file_bytes) => 0,
            Ok(data) => data.saturating_sub(offset).min(len),
            Err(Errno::NXIO) => len,
            // The file system does not say.
            Err(_) => 0,
        }
    }

    /// Copies what is at `position` and, in a row with it, behind.
    async fn fetch(&self, position: u64, end: u64) -> Outcome {
        self.prepare().await?;
        let (unit, bits) = (self.layout.unit_bytes(), self.layout.cluster_bits);
        let start = position - position % unit;
        let most = (start + PIECE.max(unit)).min(end);
        let _alone = self
            .clusters
            .lock(start >> bits, (most - 1) >> bits, true)
            .await;
        // Somebody may have been faster.
        let mut stop = position;
        while stop < most {
            let (found, span) = self.look_up(stop, most - stop).await?;
            if self.is_below(&found) {
                stop = (stop + span).next_multiple_of(unit).min(most);
            } else if stop == position {
                return Ok(Reached {
                    position: position + span,
                    ..Reached::default()
                });
            } else {
                break;
            }
        }
        // No unit of it is in the image. What is beyond the end of the disk becomes zeroes: nothing
        // of what is below is to come to light where somebody makes the disk larger.
        let len = stop - start;
        let (memory, mut buffers) = own(len.next_multiple_of(unit) as usize)?;
        let mut inside = Buffers::default();
        buffers.split_to(len, &mut inside);
        self.read(start, &mut inside).await?;
        let mut copied = 0;
        for (from, to) in data_runs(memory.bytes(), unit as usize) {
            let mut piece = Buffers::default();
            piece
                .push_own(&memory, from, to - from)
                .map_err(io::Error::other)?;
            self.write_alone(start + from as u64, &mut piece).await?;
            copied += len.min(to as u64) - from as u64;
        }
        Ok(Reached {
            position: stop,
            read: len,
            copied,
            ..Reached::default()
        })
    }

    /// Whether the header would say the same without a backing file; with `allocating` held.
    async fn check_detach(&self) -> io::Result<()> {
        let (memory, buffers) = own(self.cluster_bytes() as usize)?;
        self.host(Do::Read, 0, 0, buffers).await?;
        let mut bytes = memory.bytes().to_vec();
        let parse = |bytes: &[u8]| Header::parse(bytes).map_err(io::Error::other);
        let expected = Header {
            backing: None,
            ..parse(&bytes)?
        };
        if let Some(name) = bytes.get_mut(BACKING) {
            name.fill(0);
        }
        // With no name behind it the area of the extensions is longer.
        match Header::parse(&bytes) {
            Ok(found) if found == expected => Ok(()),
            _ => Err(io::Error::other(
                "its header would not make sense without the name of the backing file",
            )),
        }
    }

    async fn detach(&self, size_bytes: u64) -> io::Result<()> {
        let _size = self.resizing.only().await;
        if locked(&self.tables).size_bytes != size_bytes {
            return Err(io::Error::other(
                "the disk's size has changed in the meantime",
            ));
        }
        self.prepare().await?;
        self.flush().await?;
        let _baton = self.allocating.only().await;
        self.alive()?;
        self.check_detach().await?;
        let header = self.patch_header(|header| {
            if let Some(name) = header.get_mut(BACKING) {
                name.fill(0);
            }
        });
        self.write_header(header).await?;
        self.sync().await
    }
}

/// Units in a row that are not all zeroes, from and to which byte.
fn data_runs(bytes: &[u8], unit: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (number, data) in bytes.chunks(unit.max(1)).enumerate() {
        if is_zero(data) {
            continue;
        }
        let (from, to) = (number * unit, number * unit + data.len());
        match runs.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => runs.push((from, to)),
        }
    }
    runs
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_zeroes_are_left_out() {
        assert_eq!(data_runs(&[0; 4096], 512), []);
        assert_eq!(data_runs(&[1; 1300], 512), [(0, 1300)]);
        let mut bytes = [0; 2048];
        bytes[511] = 1;
        bytes[1536] = 1;
        assert_eq!(data_runs(&bytes, 512), [(0, 512), (1536, 2048)]);
        assert_eq!(data_runs(&bytes, 1024), [(0, 2048)]);
        assert!(!is_zero(&[0, 0, 0, 0, 0, 0, 0, 0, 1]));
    }
}
