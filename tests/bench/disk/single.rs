//! What is done once: opening a large image, and giving back the space of one.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use devices::disk::Operation;

use super::{MIB, ROUNDS, images, ours};

/// Opened and closed so often.
const OPENINGS: usize = 10;

/// Measures both.
pub fn measure(folder: &Path, wanted: &str) {
    if "open".contains(wanted) {
        open(folder);
    }
    if "discard".contains(wanted) {
        discard(folder);
    }
}

fn open(folder: &Path) {
    let image = folder.join("bench-open.qcow2");
    images::huge(&image);
    let mut times = Vec::new();
    for _ in 0..OPENINGS {
        let begun = Instant::now();
        let opened = ours::open(&image, true, true);
        let queue = opened.open_queue(128).expect("a queue");
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        drop(queue);
    }
    times.sort_by(f64::total_cmp);
    println!(
        "\nOpening an image of 1 TiB with all of its tables: {:.2} ms (gate ≤ 10).",
        times[OPENINGS / 2]
    );
    let _ = std::fs::remove_file(image);
}

/// 1 GiB of 2, in requests of 128 MiB, until it is durable and the host has it.
fn discard(folder: &Path) {
    let mut rates = Vec::new();
    let image = folder.join("bench-discard.qcow2");
    for _ in 0..ROUNDS {
        let _ = std::fs::remove_file(&image);
        let path = image.to_str().expect("UTF-8");
        images::qemu_img(&["create", "-q", "-f", "qcow2", path, "2G"]);
        images::fill(&image, "qcow2", 1 << 30);
        let opened = ours::open(&image, true, true);
        let mut queue = ours::Driven::new(opened.as_ref(), 8);
        let mut completed = Vec::new();
        let begun = Instant::now();
        for piece in 0..8 {
            let operation = Operation::Discard;
            queue.push(operation, piece * 128 * MIB, 128 * MIB);
            queue.finish(&mut completed);
        }
        queue.push(Operation::Flush, 0, 0);
        queue.finish(&mut completed);
        rates.push(1.0 / begun.elapsed().as_secs_f64());
        let left = std::fs::metadata(&image).expect("the image").blocks() * 512;
        assert!(left < 16 * MIB, "the host has it: {left}");
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "\nDiscarding 1 GiB of data: {:.1} GiB/s (gate ≥ 7).",
        rates[ROUNDS / 2]
    );
    let _ = std::fs::remove_file(image);
}
