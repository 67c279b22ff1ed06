//! `qemu-img bench`.

use std::path::Path;

use super::cases::{Case, Peer};
use super::images::qemu_img;
use super::{Run, processor_seconds};

/// Requests a second of QEMU's. Its start and end are not among the processor time: a run of one
/// request is taken off.
pub fn run(image: &Path, case: &Case) -> Run {
    let idle = bench(image, case, 1).1;
    let (seconds, processor) = bench(image, case, case.count);
    Run {
        rate: case.count as f64 / seconds,
        cpu: (processor - idle).max(0.0) * 1e6 / case.count as f64,
    }
}

/// How long it took, and of the processors.
fn bench(image: &Path, case: &Case, count: u64) -> (f64, f64) {
    let numbers = [count, case.bytes, case.step, u64::from(case.depth)].map(|n| n.to_string());
    let [count, bytes, step, depth] = numbers.each_ref().map(String::as_str);
    let cache = if case.direct { "none" } else { "writeback" };
    let aio = match case.peer {
        Peer::Threads => "threads",
        _ => "io_uring",
    };
    let mut arguments = vec![
        "bench", "-t", cache, "-i", aio, "-c", count, "-s", bytes, "-S", step, "-d", depth,
    ];
    if case.write {
        arguments.push("-w");
    }
    if case.flush {
        arguments.extend(["--flush-interval", "1"]);
    }
    let path = image.to_str().expect("UTF-8");
    let filter = format!(
        "driver=qcow2,file.driver=preallocate,file.prealloc-size=16M,file.file.driver=file,\
         file.file.filename={path}"
    );
    match case.peer {
        Peer::Filter => arguments.extend(["--image-opts", &filter]),
        _ => arguments.extend(["-f", "qcow2", path]),
    }
    let before = processor_seconds().1;
    let text = qemu_img(&arguments);
    let processor = processor_seconds().1 - before;
    let seconds = text
        .split_whitespace()
        .filter_map(|word| word.parse::<f64>().ok())
        .next_back()
        .expect("how long it took");
    (seconds, processor)
}
