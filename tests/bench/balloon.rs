//! How fast the balloon device takes memory, without a guest: a driver with its ring in memory
//! against the real device, its worker inside its real filter.
//!
//! Each figure stands beside what a loop of one call per 4 KiB page does to the same memory in
//! the same run (`madvise(MADV_DONTNEED)` on private memory; on shared memory a punched hole and
//! `madvise`, as other VMMs do). `scripts/bench balloon` runs it; only the ratios mean anything on
//! another machine.
#![expect(
    unsafe_code,
    reason = "the loop that the device is compared to takes raw addresses"
)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::balloon::{Balloon, BalloonConfig};
use devices::config::BuildContext;
use devices::event::Reporter;
use devices::guest_memory::GuestRam;
use devices::guest_memory::discard::inhibit::Inhibitor;
use devices::sandbox::SeccompMode;
use devices::virtio::testing::{Buffer, TestDriver, TestGuest, VERSION_1};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// What the driver's rings and buffers lie below.
const START: u64 = 64 * MIB;
/// What is ballooned.
const SIZE: u64 = 256 * MIB;
/// Page numbers in a request, and requests under way: Linux has one, the ring has room for more.
const NUMBERS: usize = 256;
const RUNS: usize = 7;
/// Where in the configuration space it tells how many it has given.
const ACTUAL: u64 = 4;
/// What Linux accepts: it does not use pages again before it has told.
const MUST_TELL_HOST: u64 = 1 << 0;

#[derive(Clone, Copy, PartialEq)]
enum Memory {
    Private,
    PrivateHuge,
    Shared,
}

impl Memory {
    fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::PrivateHuge => "private, THP",
            Self::Shared => "shared",
        }
    }

    fn map(self) -> GuestRam {
        let size = START + SIZE;
        if self != Self::Shared {
            let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)]);
            let ram = Arc::new(ram.expect("memory"));
            if self == Self::PrivateHuge {
                advise(&ram, 0, size, libc::MADV_HUGEPAGE);
            }
            return ram;
        }
        let file: File = rustix::fs::memfd_create("bench", rustix::fs::MemfdFlags::CLOEXEC)
            .expect("a memfd")
            .into();
        file.set_len(size).expect("a size");
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), size as usize);
        let region = GuestRegionMmap::new(mapping.expect("memory"), GuestAddress(0));
        let regions = vec![region.expect("memory")];
        Arc::new(GuestMemoryMmap::from_regions(regions).expect("memory"))
    }
}

/// The pages of one round: all of them, or every other one.
fn numbers(scattered: bool) -> Vec<u32> {
    let first = (START / PAGE) as u32;
    let pages = first..first + (SIZE / PAGE) as u32;
    pages.step_by(if scattered { 2 } else { 1 }).collect()
}

fn fill(ram: &GuestRam) {
    let piece = vec![0x5a; MIB as usize];
    for at in (START..START + SIZE).step_by(MIB as usize) {
        ram.write_slice(&piece, GuestAddress(at)).expect("memory");
    }
}

fn advise(ram: &GuestRam, at: u64, len: u64, advice: i32) {
    let host = ram.get_host_address(GuestAddress(at)).expect("memory");
    // SAFETY: the range is mapped, and nobody counts on what is in it.
    let result = unsafe { libc::madvise(host.cast(), len as usize, advice) };
    assert_eq!(result, 0, "madvise");
}

/// One call per page; two on shared memory.
fn loop_over_pages(ram: &GuestRam, numbers: &[u32]) {
    let file = ram
        .find_region(GuestAddress(START))
        .and_then(|region| region.file_offset().map(|file| file.file().as_raw_fd()));
    for number in numbers {
        let at = u64::from(*number) * PAGE;
        if let Some(file) = file {
            let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: takes no addresses.
            let result = unsafe { libc::fallocate(file, flags, at as i64, PAGE as i64) };
            assert_eq!(result, 0, "fallocate");
        }
        advise(ram, at, PAGE, libc::MADV_DONTNEED);
    }
}

/// Sends all numbers, `under_way` requests at a time.
fn inflate(driver: &mut TestDriver, at: u64, count: usize, under_way: usize) {
    let mut sent = 0;
    while sent < count {
        let mut waiting = 0;
        while waiting < under_way && sent < count {
            let len = NUMBERS.min(count - sent);
            let buffer = Buffer::Readable(at + sent as u64 * 4, len as u32 * 4);
            driver.add(0, &[buffer]);
            sent += len;
            waiting += 1;
        }
        driver.kick(0);
        while waiting > 0 {
            if driver.take_used(0).is_some() {
                waiting -= 1;
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// A thread that faults pages in all the time, as a vCPU does; ends when dropped.
struct Busy {
    end: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Busy {
    fn start() -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let size = 32 * MIB;
            let ram: GuestRam = Arc::new(
                GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)]).expect("memory"),
            );
            while !ended.load(Ordering::Relaxed) {
                for at in (0..size).step_by(PAGE as usize) {
                    let _ = ram.write_obj(1_u8, GuestAddress(at));
                }
                advise(&ram, 0, size, libc::MADV_DONTNEED);
            }
        });
        Self {
            end,
            thread: Some(thread),
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn measure(memory: Memory, scattered: bool, busy: bool) {
    let config = BalloonConfig::default();
    let context = BuildContext {
        reporter: Reporter::silent(),
        seccomp: SeccompMode::Enforce,
        discards: Inhibitor::default(),
    };
    let balloon = Arc::new(Balloon::new(&config, context).expect("a balloon"));
    let numbers = numbers(scattered);
    // All that the driver has: it has not reached more, whatever it says.
    let target = numbers.len() as u32;
    balloon.set_target(u64::from(target) * PAGE);
    let guest = TestGuest::with_memory(memory.map());
    let (slot, _transport) = guest.plug(balloon.clone());
    let mut driver = TestDriver::new(&guest, slot);
    driver.start(VERSION_1 | MUST_TELL_HOST, 128);
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let at = START - 32 * MIB;
    guest.poke(at, &bytes);
    let viewer = balloon.viewer();
    let mut round = |guest: &TestGuest, under_way: usize| {
        // As a driver does that has not reached its target yet, and has in the end: then the
        // device must have discarded all there is, or the time is not over.
        driver.device_write(ACTUAL, &0_u32.to_le_bytes());
        fill(&guest.memory);
        let all = viewer.info("").inflated + numbers.len() as u64 * PAGE;
        let begun = Instant::now();
        inflate(&mut driver, at, numbers.len(), under_way);
        driver.device_write(ACTUAL, &target.to_le_bytes());
        while viewer.info("").inflated < all {
            // Short against what is measured; the processor is the device's.
            std::thread::sleep(Duration::from_micros(100));
        }
        begun.elapsed()
    };
    let _busy = busy.then(Busy::start);
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    // In turn, so that what else the machine does hits all alike.
    for _ in 0..RUNS {
        fill(&guest.memory);
        let begun = Instant::now();
        loop_over_pages(&guest.memory, &numbers);
        times[0].push(begun.elapsed());
        for (times, under_way) in times[1..].iter_mut().zip([1, 64]) {
            times.push(round(&guest, under_way));
        }
    }
    let [by_page, single, deep] = times.map(median);
    let gib = (numbers.len() as u64 * PAGE) as f64 / (1 << 30) as f64;
    println!(
        "| {} | {} | {} | {:.2} | {:.2} | {:.1}× | {:.2} | {:.1}× |",
        memory.name(),
        if scattered {
            "every other page"
        } else {
            "contiguous"
        },
        if busy { "busy" } else { "idle" },
        gib / by_page,
        gib / single,
        by_page / single,
        gib / deep,
        by_page / deep,
    );
}

/// `cargo bench … -- shared` measures memory of that kind only.
fn main() {
    let only = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    println!(
        "| memory | pages | other thread | page by page, GiB/s | one request at a time | | 64 at a time | |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for memory in [Memory::Private, Memory::PrivateHuge, Memory::Shared] {
        if only.as_deref().is_some_and(|only| only != memory.name()) {
            continue;
        }
        for scattered in [false, true] {
            for busy in [false, true] {
                measure(memory, scattered, busy);
            }
        }
    }
}
