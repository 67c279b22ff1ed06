//! A guest of some hundred bytes that drives a balloon, for what needs a driver but no operating
//! system: see [`payload`](super::payload).
//!
//! It gives the pages from 16 MiB on, in ascending order, at most 256 a request, and takes them back
//! in the other; in between it sleeps until its timer wakes it, every 10 ms. Its statistics say that
//! what it has not given is available, and count a process killed for lack of memory each time
//! that it is asked while it has given more than it can bear.
//!
//! ```text
//!  ENTRY + 0x0000  code          + 0x8000  page numbers of a request
//!        + 0x1000  pokes         + 0x9000  statistics
//!        + 0x4000  queues        + 0xa000  most, bears
//!                                + 0xb000  GDT and IDT, and where they are
//! ```

use std::path::{Path, PathBuf};

use super::payload::{ENTRY, write};

/// The PCI slot in which the balloon is expected.
pub const SLOT: u32 = 9;
/// Bytes that the guest says are available while it has given nothing.
pub const AVAILABLE: u64 = 48 << 20;

/// How it behaves.
#[derive(Clone, Copy, Debug)]
pub struct Giver {
    /// Bytes that it gives at most, whatever it is asked for.
    pub most: u64,
    /// Bytes beyond which it suffers.
    pub bears: u64,
}

const BAR: u32 = 0xc000_0000 + SLOT * 0x1_0000;
const POKES: u32 = ENTRY + 0x1000;
const QUEUES: u32 = ENTRY + 0x4000;
const STATISTICS: u32 = ENTRY + 0x9000;
const PARAMETERS: u32 = ENTRY + 0xa000;
const TABLES: u32 = ENTRY + 0xb000;
/// Where the handler of the timer's interrupt, vector 0x40, is in the code. It comes while the guest
/// halts and nowhere else, so there is nothing to return to (and not every KVM emulates IRET).
const TIMER: u32 = ENTRY + TIMER_OFFSET;

/// The code, as `as --32` makes it; in ebx are the pages that it has given.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xbe, 0x00, 0x10, 0x10, 0x00, // start: mov POKES, esi
    0xad, // next: lodsl
    0x85, 0xc0, // test eax, eax
    0x74, 0x1d, // jz done
    0x89, 0xc7, // mov eax, edi
    0xad, // lodsl
    0x89, 0xc1, // mov eax, ecx
    0xad, // lodsl
    0x83, 0xf9, 0x01, // cmp 1, ecx
    0x74, 0x09, // je byte
    0x83, 0xf9, 0x02, // cmp 2, ecx
    0x74, 0x08, // je word
    0x89, 0x07, // mov eax, (edi)
    0xeb, 0xe7, // jmp next
    0x88, 0x07, // byte: mov al, (edi)
    0xeb, 0xe3, // jmp next
    0x66, 0x89, 0x07, // word: mov ax, (edi)
    0xeb, 0xde, // jmp next
    0xbc, 0x00, 0xc0, 0x10, 0x00, // done: mov 0x10c000, esp
    0x0f, 0x01, 0x15, 0x00, 0xb0, 0x10, 0x00, // lgdt GDTR
    0x0f, 0x01, 0x1d, 0x08, 0xb0, 0x10, 0x00, // lidt IDTR
    0xea, 0x41, 0x00, 0x10, 0x00, 0x08, 0x00, // ljmp 8, (ENTRY + flat - start)
    0xb8, 0x10, 0x00, 0x00, 0x00, // flat: mov 16, eax
    0x8e, 0xd8, // mov eax, ds
    0x8e, 0xc0, // mov eax, es
    0x8e, 0xd0, // mov eax, ss
    0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00, // movl 0x1ff, 0xfee000f0
    0xc7, 0x05, 0xe0, 0x03, 0xe0, 0xfe, 0x0b, 0x00, 0x00, 0x00, // movl 0xb, 0xfee003e0
    0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x40, 0x00, 0x02, 0x00, // movl 0x20040, 0xfee00320
    0xc7, 0x05, 0x80, 0x03, 0xe0, 0xfe, 0x80, 0x96, 0x98, 0x00, // movl 10000000, 0xfee00380
    0x66, 0xba, 0xf8, 0x03, // mov 0x3f8, dx
    0xb0, 0x21, // mov '!', al
    0xee, // out al, dx
    0x31, 0xdb, // xor ebx, ebx
    0x66, 0xa1, 0x02, 0x68, 0x10, 0x00, // loop: mov 0x106802, ax
    0x66, 0x3b, 0x05, 0x02, 0x64, 0x10, 0x00, // cmp 0x106402, ax
    0x75, 0x2d, // jne target
    0xb8, 0x00, 0x30, 0x00, 0x00, // mov 12288, eax
    0x29, 0xd8, // sub ebx, eax
    0xc1, 0xe0, 0x0c, // shl 12, eax
    0xa3, 0x02, 0x90, 0x10, 0x00, // mov eax, STATS+2
    0x3b, 0x1d, 0x04, 0xa0, 0x10, 0x00, // cmp PARAM+4, ebx
    0x76, 0x06, // jbe tell
    0xff, 0x05, 0x0c, 0x90, 0x10, 0x00, // incl STATS+12
    0x66, 0xff, 0x05, 0x02, 0x64, 0x10, 0x00, // tell: incw 0x106402
    0x66, 0xc7, 0x05, 0x08, 0x30, 0x09, 0xc0, 0x02, 0x00, // movw 2, BAR+0x3008
    0x8b, 0x0d, 0x00, 0x20, 0x09, 0xc0, // target: mov BAR+0x2000, ecx
    0x3b, 0x0d, 0x00, 0xa0, 0x10, 0x00, // cmp PARAM, ecx
    0x76, 0x06, // jbe wanted
    0x8b, 0x0d, 0x00, 0xa0, 0x10, 0x00, // mov PARAM, ecx
    0x89, 0xc8, // wanted: mov ecx, eax
    0x29, 0xd8, // sub ebx, eax
    0x77, 0x04, // ja inflate
    0x72, 0x0f, // jb deflate
    0xfb, // sti
    0xf4, // hlt
    0x31, 0xed, // inflate: xor ebp, ebp
    0xe8, 0x64, 0x00, 0x00, 0x00, // call bound
    0x89, 0xda, // mov ebx, edx
    0x01, 0xc3, // add eax, ebx
    0xeb, 0x10, // jmp send
    0xf7, 0xd8, // deflate: neg eax
    0xbd, 0x01, 0x00, 0x00, 0x00, // mov 1, ebp
    0xe8, 0x52, 0x00, 0x00, 0x00, // call bound
    0x29, 0xc3, // sub eax, ebx
    0x89, 0xda, // mov ebx, edx
    0x89, 0xee, // send: mov ebp, esi
    0xc1, 0xe6, 0x0c, // shl 12, esi
    0x81, 0xc6, 0x00, 0x40, 0x10, 0x00, // add 0x104000, esi
    0x89, 0xc1, // mov eax, ecx
    0xc1, 0xe0, 0x02, // shl 2, eax
    0x89, 0x46, 0x08, // mov eax, 8(esi)
    0xbf, 0x00, 0x80, 0x10, 0x00, // mov PFNS, edi
    0x8d, 0x82, 0x00, 0x10, 0x00, 0x00, // lea 4096(edx), eax
    0xab, // fill: stosl
    0x40, // inc eax
    0xe2, 0xfc, // loop fill
    0x66, 0xff, 0x86, 0x02, 0x04, 0x00, 0x00, // incw 0x402(esi)
    0x66, 0x89, 0x2c, 0xad, 0x00, 0x30, 0x09, 0xc0, // mov bp, BAR+0x3000(,ebp,4)
    0x66, 0x8b, 0x86, 0x02, 0x04, 0x00, 0x00, // mov 0x402(esi), ax
    0xf3, 0x90, // wait: pause
    0x66, 0x3b, 0x86, 0x02, 0x08, 0x00, 0x00, // cmp 0x802(esi), ax
    0x75, 0xf5, // jne wait
    0x89, 0x1d, 0x04, 0x20, 0x09, 0xc0, // mov ebx, BAR+0x2004
    0xe9, 0x3b, 0xff, 0xff, 0xff, // jmp loop
    0x3d, 0x00, 0x01, 0x00, 0x00, // bound: cmp 256, eax
    0x76, 0x05, // jbe bounded
    0xb8, 0x00, 0x01, 0x00, 0x00, // mov 256, eax
    0xc3, // bounded: ret
    0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x00, // timer: movl 0, 0xfee000b0
    0xbc, 0x00, 0xc0, 0x10, 0x00, // mov 0x10c000, esp
    0xe9, 0x1a, 0xff, 0xff, 0xff, // jmp loop
];
const TIMER_OFFSET: u32 = 0x14f;

/// Writes the guest into `folder`.
pub fn balloon_driver(folder: &Path, giver: Giver) -> PathBuf {
    let mut image = CODE.to_vec();
    let mut put = |address: u32, bytes: &[u8]| {
        let at = (address - ENTRY) as usize;
        image.resize(image.len().max(at + bytes.len()), 0);
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for (number, (address, bytes, value)) in (0u32..).zip(pokes()) {
        for (word, field) in (0u32..).zip([address, bytes, value]) {
            put(POKES + number * 12 + word * 4, &field.to_le_bytes());
        }
    }
    // The first descriptor of each queue, and in the third one the statistics from the beginning.
    let mut descriptor = |queue: u32, address: u32, len: u32| {
        let at = QUEUES + queue * 0x1000;
        put(at, &u64::from(address).to_le_bytes());
        put(at + 8, &len.to_le_bytes());
    };
    descriptor(0, ENTRY + 0x8000, 0);
    descriptor(1, ENTRY + 0x8000, 0);
    descriptor(2, STATISTICS, 20);
    put(QUEUES + 0x2402, &1u16.to_le_bytes());
    // VIRTIO_BALLOON_S_AVAIL, VIRTIO_BALLOON_S_OOM_KILL.
    put(STATISTICS, &6u16.to_le_bytes());
    put(STATISTICS + 2, &AVAILABLE.to_le_bytes());
    put(STATISTICS + 10, &10u16.to_le_bytes());
    put(STATISTICS + 12, &0u64.to_le_bytes());
    for (number, bytes) in (0u32..).zip([giver.most, giver.bears]) {
        let pages = u32::try_from(bytes / 4096).unwrap_or(u32::MAX);
        put(PARAMETERS + number * 4, &pages.to_le_bytes());
    }
    // Flat segments for code (8) and data (16); and a gate for the timer.
    let (gdt, idt) = (TABLES + 0x10, TABLES + 0x100);
    for (at, table, len) in [(TABLES, gdt, 24u16), (TABLES + 8, idt, 0x41 * 8)] {
        put(at, &(len - 1).to_le_bytes());
        put(at + 2, &table.to_le_bytes());
    }
    put(gdt + 8, &0x00cf_9a00_0000_ffff_u64.to_le_bytes());
    put(gdt + 16, &0x00cf_9200_0000_ffff_u64.to_le_bytes());
    put(idt + 0x40 * 8, &((TIMER & 0xffff) | 8 << 16).to_le_bytes());
    put(
        idt + 0x40 * 8 + 4,
        &((TIMER & 0xffff_0000) | 0x8e00).to_le_bytes(),
    );
    write(folder, "balloon-driver", &image)
}

/// Writes into the device that set it up: address, bytes and value.
fn pokes() -> Vec<(u32, u32, u32)> {
    let mut pokes = vec![(0xe800_0000 + (SLOT << 15) + 4, 2, 6)];
    // Reset, acknowledge, driver; VERSION_1 and STATS_VQ; features OK.
    pokes.extend([0, 1, 3].map(|status| (BAR + 0x14, 1, status)));
    pokes.extend([(BAR + 8, 4, 0), (BAR + 0xc, 4, 1 << 1)]);
    pokes.extend([(BAR + 8, 4, 1), (BAR + 0xc, 4, 1)]);
    pokes.push((BAR + 0x14, 1, 11));
    for queue in 0..3 {
        pokes.extend([(BAR + 0x16, 2, queue), (BAR + 0x18, 2, 4)]);
        let at = QUEUES + queue * 0x1000;
        for (register, address) in [(0x20, at), (0x28, at + 0x400), (0x30, at + 0x800)] {
            pokes.extend([(BAR + register, 4, address), (BAR + register + 4, 4, 0)]);
        }
        pokes.push((BAR + 0x1c, 2, 1));
    }
    // DRIVER_OK, and the doorbell of the statistics.
    pokes.extend([(BAR + 0x14, 1, 15), (BAR + 0x3008, 2, 2)]);
    pokes
}
