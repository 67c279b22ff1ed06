//! How fast the qcow2 engine is, by itself, beside `qemu-img bench` with io_uring on the same file
//! system, in turn: requests a second, medians, and their ratio. `scripts/bench disk` runs it; only
//! the ratios mean anything on another machine.
//!
//! "Scattered" requests are 68 KiB apart: each in a cluster of its own, in an order that no
//! read-ahead knows.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use devices::disk::{self, Buffers, Format, LockGranularity, OpenOptions, Operation, Request};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const ROUNDS: usize = 5;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Of the disk.
const SIZE: u64 = 2 << 30;

struct Case {
    name: &'static str,
    write: bool,
    /// The image is written to before, all over.
    filled: bool,
    bytes: u64,
    step: u64,
    depth: u16,
    count: u64,
    /// Flush after so many; 0 for never.
    flush: u64,
}

const fn case(name: &'static str, write: bool, filled: bool, step: u64, depth: u16) -> Case {
    Case {
        name,
        write,
        filled,
        bytes: 4 * KIB,
        step,
        depth,
        count: 15_000,
        flush: 0,
    }
}

const SCATTERED: u64 = 68 * KIB;

const CASES: [Case; 10] = [
    case("read, scattered, depth 1", false, true, SCATTERED, 1),
    case("read, scattered, depth 64", false, true, SCATTERED, 64),
    case(
        "write, allocated, scattered, depth 1",
        true,
        true,
        SCATTERED,
        1,
    ),
    case(
        "write, allocated, scattered, depth 16",
        true,
        true,
        SCATTERED,
        16,
    ),
    case(
        "write, allocated, scattered, depth 64",
        true,
        true,
        SCATTERED,
        64,
    ),
    case(
        "write, unallocated, scattered, depth 1",
        true,
        false,
        SCATTERED,
        1,
    ),
    case(
        "write, unallocated, scattered, depth 16",
        true,
        false,
        SCATTERED,
        16,
    ),
    case(
        "write, unallocated, scattered, depth 64",
        true,
        false,
        SCATTERED,
        64,
    ),
    case(
        "write, unallocated, sequential, depth 16",
        true,
        false,
        4 * KIB,
        16,
    ),
    Case {
        name: "write 1 MiB, unallocated, sequential, depth 16",
        write: true,
        filled: false,
        bytes: MIB,
        step: MIB,
        depth: 16,
        count: 512,
        flush: 0,
    },
];

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let folder = PathBuf::from(arguments.next().unwrap_or_else(|| ".".into()));
    // Part of the names of the cases to be measured.
    let wanted = arguments.next().unwrap_or_default();
    let image = folder.join("bench.qcow2");
    println!("| 4 KiB unless said, O_DIRECT | ballast, 1/s | qemu-img bench, 1/s | ratio |");
    println!("|---|---|---|---|");
    for case in CASES.iter().filter(|case| case.name.contains(&wanted)) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            make(&image, case.filled);
            theirs.push(qemu(&image, case));
            make(&image, case.filled);
            ours.push(ballast(&image, case));
        }
        check(&image);
        let (ours, theirs) = (median(ours), median(theirs));
        let ratio = ours / theirs;
        println!("| {} | {ours:.0} | {theirs:.0} | {ratio:.2} |", case.name);
    }
    let _ = std::fs::remove_file(&image);
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn run(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

fn make(image: &Path, filled: bool) {
    let path = image.to_str().expect("a path in UTF-8");
    // A filled one stays as it is: to write over it changes nothing about it.
    let known = filled && std::fs::metadata(image).is_ok_and(|m| m.len() > SIZE);
    if known {
        return;
    }
    let _ = std::fs::remove_file(image);
    run(&["create", "-q", "-f", "qcow2", path, &SIZE.to_string()]);
    if filled {
        let count = (SIZE / MIB).to_string();
        run(&[
            "bench", "-q", "-w", "-t", "none", "-i", "io_uring", "-f", "qcow2", "-c", &count, "-s",
            "1M", "-d", "8", path,
        ]);
    }
}

fn check(image: &Path) {
    run(&["check", "-q", "-f", "qcow2", image.to_str().expect("UTF-8")]);
}

/// Requests a second of QEMU's.
fn qemu(image: &Path, case: &Case) -> f64 {
    let numbers = [
        case.count.to_string(),
        case.bytes.to_string(),
        case.step.to_string(),
        case.depth.to_string(),
        case.flush.to_string(),
    ];
    let [count, bytes, step, depth, flush] = numbers.each_ref().map(String::as_str);
    let mut arguments = vec![
        "bench", "-t", "none", "-i", "io_uring", "-f", "qcow2", "-c", count, "-s", bytes, "-S",
        step, "-d", depth,
    ];
    if case.write {
        arguments.push("-w");
    }
    if case.flush > 0 {
        arguments.extend(["--flush-interval", flush]);
    }
    arguments.push(image.to_str().expect("UTF-8"));
    let text = run(&arguments);
    let seconds = text
        .split_whitespace()
        .filter_map(|word| word.parse::<f64>().ok())
        .next_back()
        .expect("how long it took");
    case.count as f64 / seconds
}

/// Requests a second of ours.
fn ballast(image: &Path, case: &Case) -> f64 {
    let options = OpenOptions {
        path: image.into(),
        readonly: false,
        direct: true,
        disable_io_uring: false,
        lock: LockGranularity::ByteRange,
        backing_files: false,
        cache_bytes: None,
    };
    let opened = disk::open(Format::Qcow2, &options).expect("the image");
    let mut queue = opened.open_queue(case.depth).expect("a queue");
    let bytes = u64::from(case.depth) * case.bytes;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)]);
    let memory = Arc::new(memory.expect("memory"));
    let mut free: Vec<u16> = (0..case.depth).collect();
    let (mut begun, mut ended, mut offset) = (0, 0, 0);
    let mut completed = Vec::new();
    let start = Instant::now();
    while ended < case.count {
        while begun < case.count
            && let Some(tag) = free.pop()
        {
            let mut buffers = Buffers::default();
            let address = GuestAddress(u64::from(tag) * case.bytes);
            buffers
                .push(&memory, address, case.bytes as usize)
                .expect("memory");
            let operation = match case.write {
                true => Operation::Write { durable: false },
                false => Operation::Read,
            };
            queue.push(Request {
                tag,
                operation,
                offset,
                length: case.bytes,
                buffers,
            });
            offset = (offset + case.step) % (SIZE - case.bytes);
            offset = offset / (4 * KIB) * (4 * KIB);
            begun += 1;
        }
        queue.start().expect("a start");
        queue.wait(&mut completed).expect("a completion");
        for completion in completed.drain(..) {
            completion.result.expect("a request that is done");
            free.push(completion.tag);
            ended += 1;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(queue);
    case.count as f64 / seconds
}
