//! What is measured.
//!
//! "Scattered" requests are 68 KiB apart: each in a cluster of its own, in an order that no
//! read-ahead knows.

use super::{KIB, MIB};

/// On what image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Empty before each run.
    Empty,
    /// Written to before, all over.
    Filled,
    /// An empty overlay with subclusters over a full image.
    Overlay,
    /// 1 TiB, of which only the tables are there.
    Huge,
}

/// Beside what.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// QEMU with io_uring.
    Uring,
    /// QEMU with its thread pool; ours does without io_uring too.
    Threads,
    /// QEMU with io_uring and its filter that allocates 16 MiB ahead.
    Filter,
}

impl Peer {
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Threads => "threads",
            Self::Filter => "preallocate",
        }
    }
}

/// One row.
pub struct Case {
    pub name: &'static str,
    pub family: Family,
    pub peer: Peer,
    pub write: bool,
    /// Around the page cache.
    pub direct: bool,
    pub bytes: u64,
    pub step: u64,
    pub depth: u16,
    pub count: u64,
    /// Flush after each.
    pub flush: bool,
    /// The ratio that is wanted; 0 for none.
    pub gate: f64,
}

impl Case {
    /// Bytes of the disk.
    pub const fn size(&self) -> u64 {
        match self.family {
            Family::Huge => 1 << 40,
            _ => 2 << 30,
        }
    }
}

const SCATTERED: u64 = 68 * KIB;

const fn case(name: &'static str, family: Family, depth: u16, gate: f64) -> Case {
    Case {
        name,
        family,
        peer: Peer::Uring,
        write: true,
        direct: true,
        bytes: 4 * KIB,
        step: SCATTERED,
        depth,
        count: 15_000,
        flush: false,
        gate,
    }
}

const fn read(name: &'static str, depth: u16, gate: f64) -> Case {
    Case {
        write: false,
        ..case(name, Family::Filled, depth, gate)
    }
}

const fn each(step: u64, case: Case) -> Case {
    Case {
        bytes: step,
        step,
        count: if step == MIB { 1500 } else { case.count },
        ..case
    }
}

const fn beside(peer: Peer, case: Case) -> Case {
    Case { peer, ..case }
}

const fn cached(case: Case) -> Case {
    Case {
        direct: false,
        count: 100_000,
        ..case
    }
}

use Family::{Empty, Filled, Huge, Overlay};

pub const CASES: [Case; 29] = [
    read("read, scattered, depth 1", 1, 1.0),
    read("read, scattered, depth 16", 16, 1.0),
    read("read, scattered, depth 64", 64, 1.0),
    case("write, allocated, scattered, depth 1", Filled, 1, 1.0),
    case("write, allocated, scattered, depth 16", Filled, 16, 1.0),
    case("write, allocated, scattered, depth 64", Filled, 64, 1.0),
    each(4 * KIB, read("read, sequential, depth 16", 16, 1.0)),
    each(MIB, read("read 1 MiB, sequential, depth 8", 8, 1.0)),
    each(
        4 * KIB,
        case("write, allocated, sequential, depth 16", Filled, 16, 1.0),
    ),
    each(
        MIB,
        case(
            "write 1 MiB, allocated, sequential, depth 8",
            Filled,
            8,
            1.0,
        ),
    ),
    case("write, unallocated, scattered, depth 1", Empty, 1, 0.0),
    case("write, unallocated, scattered, depth 16", Empty, 16, 4.0),
    case("write, unallocated, scattered, depth 64", Empty, 64, 4.0),
    beside(
        Peer::Filter,
        case("write, unallocated, scattered, depth 16", Empty, 16, 1.1),
    ),
    beside(
        Peer::Filter,
        case("write, unallocated, scattered, depth 64", Empty, 64, 1.1),
    ),
    each(
        4 * KIB,
        case("write, unallocated, sequential, depth 16", Empty, 16, 1.4),
    ),
    each(
        MIB,
        case(
            "write 1 MiB, unallocated, sequential, depth 16",
            Empty,
            16,
            0.0,
        ),
    ),
    Case {
        flush: true,
        count: 1000,
        ..case("write, unallocated, scattered, flushed each", Empty, 1, 1.3)
    },
    Case {
        flush: true,
        count: 1000,
        ..case("write, allocated, scattered, flushed each", Filled, 1, 0.0)
    },
    beside(
        Peer::Filter,
        case(
            "write over a backing file, subclusters, depth 1",
            Overlay,
            1,
            1.0,
        ),
    ),
    beside(
        Peer::Filter,
        case(
            "write over a backing file, subclusters, depth 16",
            Overlay,
            16,
            1.0,
        ),
    ),
    Case {
        write: false,
        // Each in a table of its own.
        step: 515 * MIB + 68 * KIB,
        count: 8_000,
        ..case("read, 1 TiB, metadata not cached, depth 16", Huge, 16, 2.5)
    },
    cached(read("read, cached by the host, scattered, depth 1", 1, 2.5)),
    cached(read(
        "read, cached by the host, scattered, depth 16",
        16,
        2.5,
    )),
    cached(case(
        "write, through the host's cache, allocated, depth 16",
        Filled,
        16,
        0.0,
    )),
    cached(Case {
        count: 15_000,
        ..case(
            "write, through the host's cache, unallocated, depth 16",
            Empty,
            16,
            0.0,
        )
    }),
    beside(
        Peer::Threads,
        read("read, without io_uring, depth 1", 1, 1.0),
    ),
    beside(
        Peer::Threads,
        read("read, without io_uring, depth 16", 16, 1.0),
    ),
    beside(
        Peer::Threads,
        case(
            "write, without io_uring, unallocated, depth 16",
            Empty,
            16,
            1.0,
        ),
    ),
];
