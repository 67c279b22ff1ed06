//! Ports for a guest that has no driver yet: the debug console and the POST code port.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::console::{ConsoleBackend, Shared};
use crate::bus::BusDevice;

/// What the debug console's port reads as, and its usual address: guests probe for it (Bochs).
const DEBUG_CONSOLE_MARK: u8 = 0xe9;

/// A port whose bytes go to the host.
pub struct DebugConsole(Arc<Shared>);

impl DebugConsole {
    /// A debug port that writes to `backend`.
    pub fn new(backend: &ConsoleBackend) -> Self {
        Self(backend.shared())
    }
}

impl BusDevice for DebugConsole {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(DEBUG_CONSOLE_MARK);
    }

    fn write(&self, _: u64, data: &[u8]) {
        self.0.push(data);
    }
}

/// Is told of each marker and of the time since the boot; called on vCPU threads, must not block.
pub type BootMarker = Arc<dyn Fn(u8, Duration) + Send + Sync>;

/// Markers reported per boot; a guest that writes more has lost interest in the figures, or wants
/// to flood us.
const BOOT_MARKERS: u32 = 256;

/// The POST code port: what the guest writes there marks how far it has come.
pub struct DebugPort {
    booted: Instant,
    reported: AtomicU32,
    report: BootMarker,
}

impl DebugPort {
    /// A port for one boot, which began at `booted`.
    pub fn new(booted: Instant, report: BootMarker) -> Self {
        Self {
            booted,
            reported: AtomicU32::new(0),
            report,
        }
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        let Some(&code) = data.first() else { return };
        let count = self.reported.load(Ordering::Relaxed);
        // Racing vCPUs may report a few more; the count never comes near to wrapping.
        if count >= BOOT_MARKERS {
            return;
        }
        self.reported.fetch_add(1, Ordering::Relaxed);
        let since = self.booted.elapsed();
        tracing::info!(
            code = format_args!("{code:#04x}"),
            ms = since.as_millis() as u64,
            "boot marker"
        );
        (self.report)(code, since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_floods_the_post_port_is_reported_a_bounded_number_of_times() {
        let seen = Arc::new(AtomicU32::new(0));
        let counter = seen.clone();
        let port = DebugPort::new(
            Instant::now(),
            Arc::new(move |code, _| {
                assert_eq!(code, 0x41);
                counter.fetch_add(1, Ordering::Relaxed);
            }),
        );
        for _ in 0..10_000 {
            port.write(0, &[0x41]);
        }
        port.write(0, &[]);
        assert_eq!(seen.load(Ordering::Relaxed), BOOT_MARKERS);
    }
}
