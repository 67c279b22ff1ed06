//! A disk against a model of one: many requests at a time, in pieces of every size and alignment.

use super::driver::BUFFERS;
use super::hostile::Random;
use super::*;

const REQUESTS: u64 = 20;
/// Each request has a part of the disk …
const REGION: u64 = SIZE / REQUESTS / 4096 * 4096;
/// … and a part of memory to itself: header, status and table, then room for the data.
const WINDOW: u64 = 0xa_0000;
const ROUNDS: usize = 4;

/// What one request of a round was, once it is done.
struct Request {
    kind: u32,
    offset: usize,
    pieces: Vec<(u64, u32, bool)>,
    length: usize,
}

fn window(index: u64) -> u64 {
    BUFFERS + index * WINDOW
}

fn noise() -> &'static [u8] {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    let mut random = Random(1);
    NOISE.get_or_init(|| (0..1 << 19).map(|_| random.next() as u8).collect())
}

/// Cuts `length` bytes into pieces with gaps between them.
fn pieces(random: &mut Random, at: u64, length: u64, writable: bool) -> Vec<(u64, u32, bool)> {
    let mut pieces = Vec::new();
    let (mut address, mut left) = (at, length);
    while left > 0 && pieces.len() < 40 {
        let len = match random.below(4) {
            0 => 1 + random.below(left.min(700)),
            1 => left.min(512 * (1 + random.below(8))),
            2 => left.min(4096),
            _ => 1 + random.below(left),
        };
        pieces.push((address, len as u32, writable));
        address += len + [0, 0, 1, 512 - len % 512][random.below(4) as usize];
        left -= len;
    }
    if left > 0 {
        pieces.push((address, left as u32, writable));
    }
    pieces
}

fn offer(disk: &mut Disk, random: &mut Random, index: u64) -> (u16, Request) {
    let base = window(index);
    let kind = match random.below(40) {
        0..14 => 0,
        14..34 => 1,
        34..39 => 13,
        _ => 4,
    };
    let first = random.below(REGION / 512);
    let sectors = 1 + random.below((REGION / 512 - first).min(if kind == 13 { 3000 } else { 700 }));
    let sector = index * REGION / 512 + first;
    let length = match kind {
        0 | 1 => sectors * 512,
        13 => 16,
        _ => 0,
    };
    let start = base + 0x2_0000 + random.below(4096);
    let data = pieces(random, start, length, kind == 0);
    if kind == 13 {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&(sectors as u32).to_le_bytes());
        segment[12] = random.below(2) as u8;
        let mut rest = &segment[..];
        for &(address, len, _) in &data {
            let (piece, others) = rest.split_at(len as usize);
            disk.driver.poke(address, piece);
            rest = others;
        }
    } else if kind == 1 {
        for &(address, len, _) in &data {
            let from = random.below(1 << 16) as usize;
            disk.driver
                .poke(address, &noise()[from..from + len as usize]);
        }
    }
    disk.header(base, kind, sector);
    disk.driver.poke(base + 0x100, &[0xee]);
    let mut chain = vec![(base, 16, false)];
    chain.extend(&data);
    chain.push((base + 0x100, 1, true));
    let head = disk.driver.indirect_chain(base + 0x1000, &chain);
    disk.driver.offer(head);
    let request = Request {
        kind,
        offset: sector as usize * 512,
        pieces: data,
        length: sectors as usize * 512,
    };
    (head, request)
}

fn check(disk: &Disk, model: &mut [u8], request: &Request) {
    let part = &mut model[request.offset..request.offset + request.length];
    let mut bytes = Vec::new();
    for &(address, len, _) in &request.pieces {
        bytes.extend(disk.driver.peek(address, len as usize));
    }
    match request.kind {
        0 => assert!(bytes == part, "read {:#x}", request.offset),
        1 => part.copy_from_slice(&bytes),
        13 => part.fill(0),
        _ => {}
    }
}

#[test]
fn a_disk_does_what_a_model_of_one_does() {
    for (seed, setup) in setups().enumerate() {
        let mut disk = Disk::new(setup);
        let mut model = expected(0, SIZE as usize);
        let mut random = Random(77 + seed as u64);
        for round in 0..ROUNDS {
            let mut requests: Vec<_> = (0..REQUESTS)
                .map(|index| {
                    let (head, request) = offer(&mut disk, &mut random, index);
                    if random.below(4) == 0 {
                        disk.driver.ring();
                    }
                    (head, index, request)
                })
                .collect();
            disk.driver.ring();
            while !requests.is_empty() {
                let (head, len) = disk.driver.wait_used();
                let done = requests.iter().position(|r| r.0 == head).unwrap();
                let (_, index, request) = requests.swap_remove(done);
                let case = format!("{setup:?} round {round} kind {}", request.kind);
                assert_eq!(disk.driver.peek(window(index) + 0x100, 1), [OK], "{case}");
                let read = if request.kind == 0 { request.length } else { 0 };
                assert_eq!(len as usize, read + 1, "{case}");
                check(&disk, &mut model, &request);
            }
            assert!(disk.on_host(0, SIZE as usize) == model, "{setup:?} {round}");
        }
        assert!(disk.io_errors().is_empty());
    }
}
