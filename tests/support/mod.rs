//! What the suites share: the real binary on a folder of its own, a client for its socket that
//! hides nothing, its events, its serial line, and its traces in /proc.
//!
//! Nothing here asserts how long something takes. [`PATIENCE`] only keeps a hang from lasting for
//! ever; a machine that emulates its processor needs a lot of it.

#![allow(dead_code, reason = "each suite uses its own part")]

use std::time::{Duration, Instant};

pub mod agent;
pub mod artifacts;
pub mod ballast;
pub mod balloon_guest;
pub mod events;
pub mod http;
pub mod payload;
pub mod procfs;

/// How long anything may take before it counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `condition` gives something, and panics with `what` when it never does.
#[track_caller]
pub fn eventually<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    match within(PATIENCE, condition) {
        Some(value) => value,
        None => panic!("this never happened: {what}"),
    }
}

/// Waits for at most `patience` until `condition` gives something.
pub fn within<T>(patience: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if start.elapsed() > patience {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
