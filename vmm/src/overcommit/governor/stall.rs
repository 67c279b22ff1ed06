//! Whether a guest gives too slowly, and for reasons of its own.
//!
//! What it is expected to give is cut by what is not its doing: the time its vCPUs waited for
//! CPUs, and the time in which whoever is on the host waited for memory. A guest that rested
//! because of that would leave a host that is short to its OOM killer, at just that moment.

use super::observe::Inflating;
use super::{Look, MIB, PAGE, part};

/// An inflation is looked at in windows of this length …
const WINDOW_MS: u64 = 5000;
/// … and has stalled where it moves less than this in a second.
const RATE: u64 = 4 * MIB;
/// All of the time, as PSI tells it.
const ALWAYS: u64 = 10_000;

impl Look<'_> {
    /// Whether the guest gives too slowly; begins the next window where it does not.
    pub(super) fn stalled(&mut self) -> bool {
        let Some(inflating) = self.next.inflating else {
            return false;
        };
        let balloon = &self.reading.balloon;
        let elapsed = self.reading.now_ms.saturating_sub(inflating.since_ms);
        if elapsed < WINDOW_MS {
            return false;
        }
        let moved = balloon.actual.saturating_sub(inflating.from);
        self.next.inflating = Some(Inflating {
            since_ms: self.reading.now_ms,
            from: balloon.actual,
            vcpus: self.reading.vcpus,
            ..inflating
        });
        moved < self.expected(&inflating, elapsed)
    }

    /// What the guest is to give in the window: something in any case.
    fn expected(&self, window: &Inflating, elapsed_ms: u64) -> u64 {
        let expected = part(RATE, elapsed_ms, 1000);
        let expected = part(expected, ALWAYS - self.waits_for_memory(), ALWAYS);
        let (now, then) = (&self.reading.vcpus, &window.vcpus);
        let ran = now.run_ns.saturating_sub(then.run_ns);
        let wanted = ran.saturating_add(now.delay_ns.saturating_sub(then.delay_ns));
        let expected = match wanted {
            0 => expected,
            _ => part(expected, ran, wanted),
        };
        expected.max(PAGE)
    }

    /// The part of the time in which somebody waited for memory, of [`ALWAYS`].
    fn waits_for_memory(&self) -> u64 {
        let host = &self.reading.host;
        let pressures = host.pressure.iter().chain(&host.cgroup_pressure);
        let waits = pressures.map(|pressure| u64::from(pressure.some)).max();
        waits.unwrap_or(0).min(ALWAYS)
    }
}
