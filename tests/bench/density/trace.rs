//! Records what one governor sees and does, a line a second, in the format that the tests of
//! `vmm::overcommit::governor` replay.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{GUARANTEED_SIZE, MAX_SIZE, MIB};
use crate::support::http::Client;

/// A recording; it ends when this is dropped.
pub struct Recorder(Arc<AtomicBool>);

impl Recorder {
    /// Records the VM whose API is at `socket`.
    pub fn start(socket: PathBuf, file: &Path) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let mut file = File::create(file).expect("the trace's file");
        let (max, guaranteed) = (MAX_SIZE / MIB, GUARANTEED_SIZE / MIB);
        let step = max / 20;
        writeln!(
            file,
            "ram={max} guaranteed={guaranteed} step={step} begin=0 speed=0"
        )
        .expect("write");
        let over = end.clone();
        thread::spawn(move || {
            let epoch = Instant::now();
            while !over.load(Ordering::Relaxed) {
                if let Some(line) = look(&socket, epoch) {
                    writeln!(file, "{line}").expect("write");
                }
                thread::sleep(Duration::from_secs(1));
            }
        });
        Self(end)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn look(socket: &Path, epoch: Instant) -> Option<String> {
    let mut api = Client::connect(socket).ok()?;
    let mut get = |path: &str| -> Option<Value> {
        let answer = api.try_request("GET", path, None, "").ok()?;
        serde_json::from_slice(&answer.body).ok()
    };
    let balloons = get("vm.balloons")?;
    let balloon = &balloons[0];
    let statistic = |name: &str| {
        let value = &balloon["statistics"][name]["value"];
        value.as_u64().unwrap_or_default()
    };
    let host = |name: &str| super::meminfo(name) / MIB;
    let [some, full] = pressure();
    let has = MAX_SIZE.saturating_sub(balloon["actual"].as_u64()?);
    let used = has.saturating_sub(statistic("available_memory")) / MIB;
    let (target, actual) = (
        balloon["target"].as_u64()? / MIB,
        balloon["actual"].as_u64()? / MIB,
    );
    Some(format!(
        "{:>7} {} {:>5} {some:>5} {full:>5} {used:>4} {} {:>6} {:>7} {:>6} => {target} ({actual})",
        epoch.elapsed().as_millis(),
        host("MemTotal:"),
        host("MemAvailable:"),
        statistic("oom_kills"),
        statistic("alloc_stalls"),
        statistic("direct_reclaims"),
        statistic("major_faults"),
    ))
}

/// `some` and `full` of the host's memory pressure, of ten seconds, in percent.
fn pressure() -> [String; 2] {
    let text = std::fs::read_to_string("/proc/pressure/memory").unwrap_or_default();
    ["some", "full"].map(|kind| {
        let line = text.lines().find(|line| line.starts_with(kind));
        let field = line.and_then(|line| line.split_whitespace().nth(1)?.strip_prefix("avg10="));
        field.unwrap_or("0.00").to_owned()
    })
}
