//! What a look at the VM and its host says, and what is remembered of it until the next one.

use super::super::reading::{CpuTime, GuestReading, HostReading, Pressure, Reading};
use super::{Level, MINUTE_MS, PSI_BEGIN, Reason, part};

/// PSI, in hundredths of a percent, below which pressure ends.
const PSI_END: u32 = 200;
/// Statistics are fresh for this long, or for three looks.
pub(super) const FRESH_MS: u64 = 5000;
/// How long what was given back counts as not touched yet, and then falls to nothing.
const PENDING_MS: u64 = 15_000;
/// The first and the longest rest after trouble, and how long it has to go well for the next one
/// to count as the first.
pub(super) const BACK_OFF_MS: u64 = 10 * MINUTE_MS;
const BACK_OFF_MAX_MS: u64 = 60 * MINUTE_MS;

/// What the governor remembers from one look to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub(super) level: Level,
    /// Since when there has been ease.
    pub(super) eased_ms: Option<u64>,
    pub(super) looked_ms: Option<u64>,
    pub(super) sample: Option<GuestReading>,
    /// What the balloon had then, and by how much it had grown in the two times before that.
    pub(super) sample_actual: u64,
    pub(super) grown: [u64; 2],
    pub(super) silent_ms: Option<u64>,
    pub(super) settled: Option<Settled>,
    pub(super) inflating: Option<Inflating>,
    pub(super) back_off: Option<BackOff>,
    pub(super) troubles: u32,
    pub(super) pending: u64,
    pub(super) pending_ms: u64,
    pub(super) ease_step_ms: Option<u64>,
}

/// The guest has done what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Settled {
    pub(super) target: u64,
    pub(super) since_ms: u64,
}

/// The window in which an inflation is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inflating {
    pub(super) target: u64,
    pub(super) since_ms: u64,
    pub(super) from: u64,
    pub(super) vcpus: CpuTime,
}

/// The rest after trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BackOff {
    pub(super) until_ms: u64,
    /// The target goes no higher meanwhile.
    pub(super) ceiling: u64,
    pub(super) cause: Reason,
}

impl State {
    /// How the host was found.
    pub fn level(&self) -> Level {
        self.level
    }

    /// How long nothing will be taken, because of trouble.
    pub fn back_off_ms(&self, now_ms: u64) -> Option<u64> {
        let left = self.back_off?.until_ms.saturating_sub(now_ms);
        (left > 0).then_some(left)
    }

    /// Bytes given back lately that the guest may be about to touch.
    pub(super) fn pending(&self, now_ms: u64) -> u64 {
        let falling = now_ms
            .saturating_sub(self.pending_ms)
            .saturating_sub(PENDING_MS);
        part(self.pending, PENDING_MS.saturating_sub(falling), PENDING_MS)
    }

    pub(super) fn trouble(&mut self, now_ms: u64, cause: Reason, ceiling: u64) {
        let last = self.back_off.map(|back_off| back_off.until_ms);
        if last.is_none_or(|until| now_ms >= until.saturating_add(BACK_OFF_MAX_MS)) {
            self.troubles = 0;
        }
        let rest = BACK_OFF_MS << self.troubles.min(8);
        self.troubles = self.troubles.saturating_add(1);
        self.back_off = Some(BackOff {
            until_ms: now_ms.saturating_add(rest.min(BACK_OFF_MAX_MS)),
            ceiling,
            cause,
        });
    }
}

/// The next state, as far as it follows from what is seen alone.
pub(super) fn observe(reading: &Reading, state: &State) -> State {
    let mut next = *state;
    let now_ms = reading.now_ms;
    let balloon = &reading.balloon;
    next.level = level(reading, state.level);
    next.eased_ms = match next.level {
        Level::Ease => Some(state.eased_ms.unwrap_or(now_ms)),
        _ => None,
    };
    next.looked_ms = Some(now_ms);
    if !balloon.driver {
        next.sample = None;
        next.silent_ms = None;
        next.settled = None;
        next.inflating = None;
        return next;
    }
    let fresh = fresh(reading);
    if let Some(told) = fresh
        && state.sample.is_none_or(|last| told.at_ms > last.at_ms)
    {
        next.sample = Some(*told);
        next.sample_actual = balloon.actual;
        let grown = balloon.actual.saturating_sub(state.sample_actual);
        next.grown = [state.grown[1], grown];
    }
    next.silent_ms = match fresh {
        Some(_) => None,
        None => Some(state.silent_ms.unwrap_or(now_ms)),
    };
    let settled = state.settled.filter(|s| s.target == balloon.target);
    next.settled = (balloon.actual == balloon.target).then_some(settled.unwrap_or(Settled {
        target: balloon.target,
        since_ms: now_ms,
    }));
    // Time in which nobody looked, as the VM was paused, is not held against the guest.
    let gap = now_ms.saturating_sub(state.looked_ms.unwrap_or(now_ms));
    let patience = u64::from(reading.limits.interval_ms).saturating_mul(3);
    let window = state
        .inflating
        .filter(|window| window.target == balloon.target && gap <= patience);
    next.inflating = (balloon.actual < balloon.target).then_some(window.unwrap_or(Inflating {
        target: balloon.target,
        since_ms: now_ms,
        from: balloon.actual,
        vcpus: reading.vcpus,
    }));
    next
}

fn level(reading: &Reading, before: Level) -> Level {
    let host = &reading.host;
    if host.total == 0 {
        return Level::Ease;
    }
    let percent = u64::from(reading.limits.host_free_percent);
    let available = available(reading);
    let pressures = || host.pressure.into_iter().chain(host.cgroup_pressure);
    let stalls = |least: u32, kind: fn(&Pressure) -> u32| pressures().any(|p| kind(&p) >= least);
    let (least, stall) = match before {
        Level::Ease => (part(host.total, percent, 100), PSI_BEGIN),
        _ => (ease(host, percent), PSI_END),
    };
    if available < part(host.total, percent, 400) || stalls(PSI_BEGIN, |p| p.full) {
        Level::Critical
    } else if available < least || stalls(stall, |p| p.some) {
        Level::Pressure
    } else {
        Level::Ease
    }
}

/// What the host has to have available for pressure to end.
pub(super) fn ease(host: &HostReading, percent: u64) -> u64 {
    part(host.total, percent * 5, 400)
}

/// What the host could hand out, less what others have been given and have not touched.
pub(super) fn available(reading: &Reading) -> u64 {
    let host = &reading.host;
    host.available
        .min(host.total)
        .saturating_sub(reading.neighbours.pending)
}

/// The guest's statistics, unless they are old.
pub(super) fn fresh(reading: &Reading) -> Option<&GuestReading> {
    let limit = FRESH_MS.max(u64::from(reading.limits.interval_ms).saturating_mul(3));
    let guest = reading.guest.as_ref()?;
    (reading.now_ms.saturating_sub(guest.at_ms) <= limit).then_some(guest)
}
