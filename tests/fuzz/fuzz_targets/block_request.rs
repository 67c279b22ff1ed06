//! The parser of virtio-blk requests by itself, without threads and so many times faster than
//! `block_queue`: whatever lies in the descriptor table, what the parser lets through is within
//! the disk, within guest memory, and allowed.
#![no_main]

use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::block::request::{Action, Limits, Parser};
use devices::disk::{Buffers, Operation};
use fuzz::bench::{BUFFERS, MEMORY, RINGS};
use fuzz::input::{Entry, Kind, Sector, header};
use fuzz::memory::Memory;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const SIZE: u16 = 16;
const AVAILABLE: u64 = RINGS + 0x8000;
const USED: u64 = RINGS + 0xa000;

#[derive(Arbitrary, Debug)]
struct Input {
    readonly: bool,
    sparse: bool,
    writethrough: bool,
    small: bool,
    table: Vec<Entry>,
    indirect: Vec<Entry>,
    indirect_at: u16,
    /// Each where a buffer of the table begins.
    headers: Vec<(u8, Kind, Sector)>,
    segments: Vec<(u8, [u32; 4])>,
    heads: Vec<u16>,
}

static WATCHED: LazyLock<Memory> = LazyLock::new(|| Memory::new(MEMORY as usize));

fn lay_out(memory: &Memory, input: &Input) {
    memory.clear();
    let poke = |at: u64, bytes: &[u8]| {
        // There need not be memory there.
        let _ = memory.ram.write_slice(bytes, GuestAddress(at));
    };
    let tables = [&input.table, &input.indirect];
    let buffer = |index: u8| {
        let [table, indirect] = tables;
        let mut entries = table.iter().chain(indirect).cycle();
        let entry = entries.nth(index.into());
        entry.map_or(BUFFERS, |entry| entry.at.address())
    };
    for (index, kind, sector) in &input.headers {
        poke(buffer(*index), &header(*kind, sector.number()));
    }
    for (index, words) in &input.segments {
        poke(buffer(*index), &words.map(u32::to_le_bytes).concat());
    }
    for (entries, at) in [
        (&input.indirect, BUFFERS + u64::from(input.indirect_at)),
        (&input.table, RINGS),
    ] {
        for (index, entry) in entries.iter().take(64).enumerate() {
            let descriptor = entry.descriptor(index as u16);
            poke(at + index as u64 * 16, &descriptor.bytes());
        }
    }
    for (index, head) in input.heads.iter().take(SIZE.into()).enumerate() {
        let at = AVAILABLE + 4 + index as u64 * 2;
        poke(at, &head.to_le_bytes());
    }
    let count = input.heads.len().min(SIZE.into()) as u16;
    poke(AVAILABLE + 2, &count.to_le_bytes());
}

fn check(memory: &Memory, limits: &Limits, action: Action, buffers: &Buffers) {
    let start = memory.ram.get_host_address(GuestAddress(0)).expect("RAM") as usize;
    for part in buffers.parts() {
        let from = (part.start() as usize)
            .checked_sub(start)
            .expect("below RAM");
        assert!(from + part.len_bytes() <= MEMORY as usize, "beyond RAM");
    }
    match action {
        Action::Submit {
            operation,
            offset,
            length,
        } => {
            let end = offset.checked_add(length).expect("no overflow");
            assert!(end <= limits.capacity_sectors * 512, "beyond the disk");
            assert!(offset % 512 == 0 && length % 512 == 0, "not whole sectors");
            let moves = matches!(operation, Operation::Read | Operation::Write { .. });
            let bytes = if moves { length } else { 0 };
            assert_eq!(buffers.len_bytes(), bytes);
            assert!(length > 0 || operation == Operation::Flush);
            assert!(!limits.readonly || matches!(operation, Operation::Read | Operation::Flush));
            match operation {
                Operation::Discard => assert!(limits.sparse),
                Operation::WriteZeroes { unmap, durable } => {
                    assert!(limits.sparse || !unmap);
                    assert_eq!(durable, limits.writethrough);
                }
                Operation::Write { durable } => assert_eq!(durable, limits.writethrough),
                Operation::Read | Operation::Flush => {}
            }
        }
        Action::GetId => assert!(buffers.len_bytes() > 0),
        Action::Refuse(_) => assert_eq!(buffers.len_bytes(), 0),
    }
}

fuzz_target!(|input: Input| {
    let memory = &*WATCHED;
    lay_out(memory, &input);
    let limits = Limits {
        capacity_sectors: if input.small { 8 } else { 512 },
        readonly: input.readonly,
        sparse: input.sparse,
        writethrough: input.writethrough,
        max_descriptors: usize::from(SIZE) + 17,
        max_discard_sectors: 1 << 22,
        max_write_zeroes_sectors: 1 << 19,
    };
    let mut queue = Queue::new(SIZE).expect("a queue");
    queue.set_desc_table_address(Some(RINGS as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    let mut parser = Parser::default();
    let mut buffers = Buffers::default();
    let Ok(chains) = queue.iter(memory.ram.clone()) else {
        return;
    };
    for chain in chains {
        if let Ok(parsed) = parser.parse(chain, &memory.ram, &limits, &mut buffers) {
            assert!(
                memory.ram.address_in_range(parsed.status),
                "status beyond RAM"
            );
            check(memory, &limits, parsed.action, &buffers);
        }
        buffers.clear();
    }
});
