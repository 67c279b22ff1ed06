//! How fast the qcow2 engine is, by itself, beside `qemu-img bench` on the same file system, in
//! turn: requests a second, medians, their ratio, and the processor time that each took.
//! `scripts/bench disk` runs it; only the ratios mean anything on another machine.
//!
//! Beside that, in time: opening an image of 1 TiB, and giving back space.

mod cases;
mod images;
mod ours;
mod peer;
mod single;

use std::path::PathBuf;

use cases::{CASES, Case, Family};

const ROUNDS: usize = 5;
/// Bytes of a KiB.
pub const KIB: u64 = 1 << 10;
/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// What a run of many requests came to.
#[derive(Clone, Copy)]
pub struct Run {
    /// Requests a second.
    pub rate: f64,
    /// Processor time of a request, in µs, the kernel's threads for it included.
    pub cpu: f64,
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let folder = PathBuf::from(arguments.next().unwrap_or_else(|| ".".into()));
    // An image below is looked for from where the overlay is.
    let folder = folder.canonicalize().expect("the folder");
    // Part of the names of the cases to be measured.
    let wanted = arguments.next().unwrap_or_default();
    println!(
        "| 4 KiB unless said | ballast, 1/s | beside it, 1/s | ratio | gate | met | CPU µs | CPU µs beside it | raw, ballast, 1/s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for case in CASES.iter().filter(|case| case.name.contains(&wanted)) {
        row(case, &folder);
    }
    single::measure(&folder, &wanted);
    images::remove(&folder);
}

fn row(case: &Case, folder: &std::path::Path) {
    let (mut ours, mut theirs, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let image = images::make(folder, case);
        theirs.push(peer::run(&image, case));
        let image = images::make(folder, case);
        ours.push(ours::run(&image, case));
        if case.family == Family::Filled {
            let image = images::make_raw(folder);
            raw.push(ours::run(&image, case));
        }
    }
    images::check(folder, case);
    let (a, b) = (median(&ours), median(&theirs));
    let ratio = a.rate / b.rate;
    let met = match ratio >= case.gate {
        _ if case.gate == 0.0 => "",
        true => "yes",
        false => "no",
    };
    let gate = match case.gate {
        0.0 => "—".to_owned(),
        gate => format!("≥ {gate}"),
    };
    let raw = match raw.is_empty() {
        true => "—".to_owned(),
        false => format!("{:.0}", median(&raw).rate),
    };
    println!(
        "| {} | {:.0} | {:.0} ({}) | {ratio:.2} | {gate} | {met} | {:.1} | {:.1} | {raw} |",
        case.name,
        a.rate,
        b.rate,
        case.peer.name(),
        a.cpu,
        b.cpu
    );
}

/// The median of the rates, and of the processor times.
fn median(runs: &[Run]) -> Run {
    let middle = |figure: fn(&Run) -> f64| {
        let mut figures: Vec<f64> = runs.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    Run {
        rate: middle(|run| run.rate),
        cpu: middle(|run| run.cpu),
    }
}

/// Processor time in seconds, of this process and of those it has waited for.
pub fn processor_seconds() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc");
    let fields: Vec<f64> = stat
        .rsplit(')')
        .next()
        .expect("fields")
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0.0))
        .collect();
    // Behind the name: utime is the 12th, in ticks of 10 ms.
    (
        (fields[11] + fields[12]) / 100.0,
        (fields[13] + fields[14]) / 100.0,
    )
}
