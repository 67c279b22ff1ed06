//! An in-memory machine, guest and driver for tests and fuzz targets of virtio devices: real
//! devices with real workers inside their real filters, behind a real bus, without KVM.
//!
//! ```text
//! TestDriver ─ registers ─► TestGuest ─► PciBus ─► VirtioPciDevice ─► your device
//!     └────── rings ──────► guest memory ◄───────────────────────────────┘
//! ```
//!
//! Everything here panics when the test is wrong; a device never may.

mod driver;
mod echo;
mod guest;
mod machine;

use std::time::{Duration, Instant};

pub use driver::{Buffer, Capability, Descriptor, Ring, TestDriver, VERSION_1};
pub use echo::EchoDevice;
pub use guest::{TestGuest, WINDOW_BASE};
pub use machine::{TestMachine, TestVector};

/// How long a test waits for what must happen; far longer than it takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds, or [`PATIENCE`] runs out; whether it held.
pub fn eventually(condition: impl FnMut() -> bool) -> bool {
    within(PATIENCE, condition)
}

/// Waits until `condition` holds, or `limit` runs out; whether it held.
pub fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}
