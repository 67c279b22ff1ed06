//! What inputs are made of: values that mostly mean something.

use arbitrary::{Arbitrary, Unstructured};
use devices::virtio::testing::Descriptor;

use crate::bench::{BUFFERS, MEMORY, RINGS};

/// Something that is out of order now and then; were it so always, nothing behind it was tried.
#[derive(Debug)]
pub struct Rarely<T>(pub Option<T>);

impl<'a, T: Arbitrary<'a>> Arbitrary<'a> for Rarely<T> {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let rare = u.ratio(1, 8)?;
        Ok(Self(rare.then(|| T::arbitrary(u)).transpose()?))
    }
}

/// An address: mostly one that means something.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    Buffer(u16),
    Ring(u16),
    OtherRing(u16),
    End(i16),
    Anywhere(u64),
}

impl Place {
    pub fn address(self) -> u64 {
        match self {
            Self::Buffer(at) => BUFFERS + u64::from(at),
            Self::Ring(at) => RINGS + u64::from(at),
            Self::OtherRing(at) => RINGS + 0x1_0000 + u64::from(at),
            Self::End(by) => MEMORY.wrapping_add_signed(by.into()),
            Self::Anywhere(address) => address,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    Nothing,
    Header,
    Sectors(u8),
    Bytes(u16),
    Any(u32),
}

impl Length {
    pub fn bytes(self) -> u32 {
        match self {
            Self::Nothing => 0,
            Self::Header => 16,
            Self::Sectors(sectors) => u32::from(sectors) * 512,
            Self::Bytes(bytes) => bytes.into(),
            Self::Any(bytes) => bytes,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Other(u32),
}

impl Kind {
    pub fn number(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 4,
            Self::GetId => 8,
            Self::Discard => 11,
            Self::WriteZeroes => 13,
            Self::Other(number) => number,
        }
    }
}

#[derive(Arbitrary, Debug)]
pub struct Entry {
    pub at: Place,
    pub len: Length,
    pub flags: Flags,
    pub next: Next,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Flags {
    Readable,
    Writable,
    LastReadable,
    LastWritable,
    Any(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Next {
    Following,
    Near(u8),
    Any(u16),
}

impl Entry {
    /// As it is at this place in a table.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        Descriptor {
            address: self.at.address(),
            len: self.len.bytes(),
            flags: match self.flags {
                Flags::Readable => Descriptor::NEXT,
                Flags::Writable => Descriptor::NEXT | Descriptor::WRITE,
                Flags::LastReadable => 0,
                Flags::LastWritable => Descriptor::WRITE,
                Flags::Any(flags) => flags,
            },
            next: match self.next {
                Next::Following => index.wrapping_add(1),
                Next::Near(next) => next.into(),
                Next::Any(next) => next,
            },
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Sector {
    Near(u8),
    Any(u64),
}

impl Sector {
    pub fn number(self) -> u64 {
        match self {
            Self::Near(sector) => sector.into(),
            Self::Any(sector) => sector,
        }
    }
}

/// The header of a request, as it lies in memory.
pub fn header(kind: Kind, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.number().to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}
