//! From a descriptor chain to a request (virtio 1.3 §5.2.6).
//!
//! ```text
//!   device-readable                  device-writable
//!   ┌──────────────────────┬──────┐  ┌──────┬────────┐
//!   │ type, 0, sector (16) │ data │  │ data │ status │   split over descriptors in any way (§2.7.4)
//!   └──────────────────────┴──────┘  └──────┴────────┘
//! ```
//!
//! Pure but for reading guest memory. A chain is either answered with a status byte or, where it
//! has no place for one, [`Malformed`]. Nothing the guest writes can make this loop, panic or
//! allocate more than [`Limits::max_descriptors`] asks for.

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::disk::{Buffers, Operation, SECTOR};
use crate::guest_memory::GuestRam;
use crate::virtio::queue::Chain;

/// Bytes of the request's header.
const HEADER: usize = 16;
/// Bytes of the one segment of a DISCARD or WRITE_ZEROES.
const SEGMENT: usize = 16;
/// Bytes of the answer to GET_ID.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// It failed, or makes no sense.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not know it.
    Unsupp = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What the device offers, as far as requests are checked against it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk.
    pub capacity_sectors: u64,
    /// Writes are refused.
    pub readonly: bool,
    /// DISCARD is offered, and WRITE_ZEROES may free space.
    pub sparse: bool,
    /// The driver wants writes to survive a power cut before they are completed.
    pub writethrough: bool,
    /// A chain has at most so many descriptors.
    pub max_descriptors: usize,
    /// One DISCARD covers at most so much.
    pub max_discard_sectors: u32,
    /// One WRITE_ZEROES covers at most so much.
    pub max_write_zeroes_sectors: u32,
}

/// A chain without a place for a status byte: all that can be done is to give it back.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Malformed {
    /// It has no descriptors, or leads out of the table, out of memory or round in a circle.
    #[error("the chain is broken or endless")]
    Broken,
    /// It has more descriptors than any request needs.
    #[error("the chain has too many descriptors")]
    TooLong,
    /// A device-readable descriptor follows a device-writable one.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// There is no writable byte at its end, or it is not in guest memory.
    #[error("the chain has no place for a status byte")]
    NoStatus,
}

/// What the driver asks for, or how to answer it at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To be done by the disk engine. The buffers that [`Parser::parse`] filled belong to it.
    Submit {
        /// What.
        operation: Operation,
        /// Where, in bytes; within the capacity.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// The device's serial number, to be put into the buffers.
    GetId,
    /// Answered with this status.
    Refuse(Status),
}

/// A chain that can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Where the status byte goes; in guest memory.
    pub status: GuestAddress,
    /// What to do.
    pub action: Action,
}

/// A piece of guest memory that a descriptor names; not yet known to exist.
#[derive(Clone, Copy)]
struct Piece {
    address: GuestAddress,
    len: u32,
}

/// Parses chains; keeps its allocations between them.
#[derive(Default)]
pub struct Parser {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
}

impl Parser {
    /// Parses one chain. `buffers` must be empty; what is left in them is for the action.
    pub fn parse(
        &mut self,
        chain: Chain,
        memory: &GuestRam,
        limits: &Limits,
        buffers: &mut Buffers,
    ) -> Result<Parsed, Malformed> {
        self.split(chain, limits.max_descriptors)?;
        let status = self.take_status(memory)?;
        let action = match self.action(memory, limits, buffers) {
            Ok(action) => action,
            Err(status) => {
                buffers.clear();
                Action::Refuse(status)
            }
        };
        Ok(Parsed { status, action })
    }

    /// Sorts the descriptors, and checks their number and order.
    fn split(&mut self, chain: Chain, max_descriptors: usize) -> Result<(), Malformed> {
        self.readable.clear();
        self.writable.clear();
        // The iterator ends silently at whatever it can't follow; only the last descriptor's flag
        // tells whether that was the end.
        let mut open = true;
        for (count, descriptor) in chain.enumerate() {
            if count >= max_descriptors {
                return Err(Malformed::TooLong);
            }
            open = descriptor.has_next();
            let piece = Piece {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if descriptor.is_write_only() {
                self.writable.push(piece);
            } else if self.writable.is_empty() {
                self.readable.push(piece);
            } else {
                return Err(Malformed::Order);
            }
        }
        if open { Err(Malformed::Broken) } else { Ok(()) }
    }

    /// The last writable byte.
    fn take_status(&mut self, memory: &GuestRam) -> Result<GuestAddress, Malformed> {
        while self.writable.pop_if(|piece| piece.len == 0).is_some() {}
        let last = self.writable.last_mut().ok_or(Malformed::NoStatus)?;
        last.len -= 1;
        let status = last.address.checked_add(last.len.into());
        status
            .filter(|&status| memory.address_in_range(status))
            .ok_or(Malformed::NoStatus)
    }

    fn action(
        &mut self,
        memory: &GuestRam,
        limits: &Limits,
        buffers: &mut Buffers,
    ) -> Result<Action, Status> {
        let header: [u8; HEADER] = take(&mut self.readable, memory).ok_or(Status::IoErr)?;
        let kind = u32_at(&header, 0);
        let sector = u64::from(u32_at(&header, 8)) | u64::from(u32_at(&header, 12)) << 32;
        match kind {
            VIRTIO_BLK_T_IN => {
                if length(&self.readable) != 0 {
                    return Err(Status::IoErr);
                }
                self.transfer(Operation::Read, sector, memory, limits, buffers)
            }
            VIRTIO_BLK_T_OUT if limits.readonly => Err(Status::IoErr),
            VIRTIO_BLK_T_OUT => {
                let operation = Operation::Write {
                    durable: limits.writethrough,
                };
                self.transfer(operation, sector, memory, limits, buffers)
            }
            VIRTIO_BLK_T_FLUSH => Ok(Action::Submit {
                operation: Operation::Flush,
                offset: 0,
                length: 0,
            }),
            VIRTIO_BLK_T_GET_ID => {
                if length(&self.writable) == 0 {
                    return Err(Status::IoErr);
                }
                fill(&self.writable, memory, buffers)?;
                Ok(Action::GetId)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.range(kind == VIRTIO_BLK_T_DISCARD, memory, limits)
            }
            _ => Err(Status::Unsupp),
        }
    }

    fn transfer(
        &self,
        operation: Operation,
        sector: u64,
        memory: &GuestRam,
        limits: &Limits,
        buffers: &mut Buffers,
    ) -> Result<Action, Status> {
        let pieces = match operation {
            Operation::Read => &self.writable,
            _ => &self.readable,
        };
        let length = length(pieces);
        if length == 0 || !length.is_multiple_of(SECTOR) {
            return Err(Status::IoErr);
        }
        let offset = within(sector, length / SECTOR, limits)?;
        fill(pieces, memory, buffers)?;
        Ok(Action::Submit {
            operation,
            offset,
            length,
        })
    }

    /// The one segment of a DISCARD or WRITE_ZEROES.
    fn range(
        &mut self,
        discard: bool,
        memory: &GuestRam,
        limits: &Limits,
    ) -> Result<Action, Status> {
        if discard && !limits.sparse {
            return Err(Status::Unsupp);
        }
        if limits.readonly {
            return Err(Status::IoErr);
        }
        let segment: [u8; SEGMENT] = take(&mut self.readable, memory).ok_or(Status::IoErr)?;
        match length(&self.readable) {
            0 => {}
            // More segments than `max_*_seg` says.
            rest if rest % SEGMENT as u64 == 0 => return Err(Status::Unsupp),
            _ => return Err(Status::IoErr),
        }
        let sector = u64::from(u32_at(&segment, 0)) | u64::from(u32_at(&segment, 4)) << 32;
        let sectors = u32_at(&segment, 8);
        let flags = u32_at(&segment, 12);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        // §5.2.6.2: unknown flags, and UNMAP with DISCARD.
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (discard && unmap) {
            return Err(Status::Unsupp);
        }
        let max = match discard {
            true => limits.max_discard_sectors,
            false => limits.max_write_zeroes_sectors,
        };
        if sectors == 0 || sectors > max {
            return Err(Status::IoErr);
        }
        let offset = within(sector, sectors.into(), limits)?;
        let operation = match discard {
            true => Operation::Discard,
            false => Operation::WriteZeroes {
                unmap: unmap && limits.sparse,
                durable: limits.writethrough,
            },
        };
        Ok(Action::Submit {
            operation,
            offset,
            length: u64::from(sectors) * SECTOR,
        })
    }
}

/// The offset in bytes of a range that lies within the disk.
fn within(sector: u64, sectors: u64, limits: &Limits) -> Result<u64, Status> {
    let end = sector.checked_add(sectors).ok_or(Status::IoErr)?;
    if end > limits.capacity_sectors {
        return Err(Status::IoErr);
    }
    sector.checked_mul(SECTOR).ok_or(Status::IoErr)
}

fn length(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.len)).sum()
}

fn fill(pieces: &[Piece], memory: &GuestRam, buffers: &mut Buffers) -> Result<(), Status> {
    pieces.iter().try_for_each(|piece| {
        buffers
            .push(memory, piece.address, piece.len as usize)
            .map_err(|_| Status::IoErr)
    })
}

/// Takes the first bytes off the pieces; `None` where there are too few or they are not in memory.
fn take<const N: usize>(pieces: &mut Vec<Piece>, memory: &GuestRam) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut have = 0;
    let mut used_up = 0;
    for piece in pieces.iter_mut() {
        if have == N {
            break;
        }
        let len = (N - have).min(piece.len as usize);
        if len > 0 {
            let target = bytes.get_mut(have..have + len)?;
            memory.read_slice(target, piece.address).ok()?;
        }
        have += len;
        piece.len -= len as u32;
        piece.address = piece.address.checked_add(len as u64)?;
        if piece.len == 0 {
            used_up += 1;
        }
    }
    pieces.drain(..used_up);
    (have == N).then_some(bytes)
}

fn u32_at(bytes: &[u8; 16], offset: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(field)
}
