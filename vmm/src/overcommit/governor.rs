//! The governor of mode auto: one pure function from a [`Reading`] and its own small [`State`] to
//! a balloon's target with the reason for it. No I/O, no clock.
//!
//! ```text
//!  target  0 ··· base = RAM − max_size ··················· most = RAM − guaranteed_size
//!                  ▲ trouble: straight here                 ▲ never beyond
//! ```
//! What is looked at, in this order; the first that has something to say decides:
//!
//! 1. **The guarantee**: more than `most` is given back at once.
//! 2. **Distress** of the guest (an OOM kill, allocations that stall, direct reclaim, thrashing, a
//!    balloon it empties by itself): straight to `base`, and nothing is taken for 10 minutes; for
//!    20, 40, 60 if it happens again. By steps it would come too late.
//! 3. **A stall**: the guest gives less than 4 MiB/s for five seconds, or than that part of it
//!    which its vCPUs had of the time they wanted and in which nobody waited for the host's
//!    memory; it gets 128 MiB back, and the same rest.
//! 4. **No fresh statistics**: nothing is taken; after half a minute all is given back.
//! 5. **The guest's need**: available memory has fallen below three quarters of the buffer; the
//!    buffer is filled, unless the host's memory is nearly gone.
//! 6. **Above `max_size`**: taken in steps.
//! 7. **Pressure on the host**, by available memory or PSI: this VM's part of what is missing, by
//!    idle memory and weight, at most a step.
//! 8. **Ease**, for half a minute: a step is given back every ten seconds, as far as that brings
//!    no pressure.
//!
//! Pressure begins below `host_free_percent` or at 10 % PSI and ends a quarter above it and below
//! 2 %; a threshold at which something begins is never the one at which it ends.
//!
//! What is given back is the host's available memory until the guest touches it, so for half a
//! minute it is *pending*: nobody gives it away again, and a reserve (a twentieth of the host, of
//! which distress may use three quarters) stays. Give-backs that come together thus cannot exhaust
//! the host; what the reserve does not allow now is given as soon as it does.

use super::reading::{CpuTime, GuestReading, HostReading, Limits, Own, Pressure, Reading, claim};

mod stall;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const MINUTE_MS: u64 = 60_000;

/// The buffer is at least this part of RAM, however little the guest uses.
const LEAST_BUFFER: u64 = 16;
/// PSI, in hundredths of a percent, at which pressure begins and below which it ends.
pub(super) const PSI_BEGIN: u32 = 1000;
const PSI_END: u32 = 200;
/// Moves smaller than this are not worth a step.
const LEAST_MOVE: u64 = MIB;
/// What a guest that stalls gets back.
const STALL_RELEASE: u64 = 128 * MIB;
/// Statistics are fresh for this long, or for three looks.
const FRESH_MS: u64 = 5000;
/// A guest that tells nothing for this long gets everything back.
const SILENCE_MS: u64 = 30_000;
/// How long there has to be ease before anything is given back for it …
const EASE_MS: u64 = 30_000;
/// … and the least time between two such steps.
const EASE_STEP_MS: u64 = 10_000;
/// How long what was given back counts as not touched yet, and then falls to nothing.
const PENDING_MS: u64 = 15_000;
/// The first and the longest rest after trouble, and how long it has to go well for the next one
/// to count as the first.
const BACK_OFF_MS: u64 = 10 * MINUTE_MS;
const BACK_OFF_MAX_MS: u64 = 60 * MINUTE_MS;
/// Distress, per second: allocations that stall, pages of direct reclaim, and major faults of a
/// guest that has little left.
const STALLED_ALLOCATIONS: u64 = 20;
const RECLAIMED_PAGES: u64 = 2560;
const MAJOR_FAULTS: u64 = 200;
/// Rates are not taken over less than this.
const RATE_MS: u64 = 250;

/// How the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing is missing.
    #[default]
    Ease,
    /// Memory is short.
    Pressure,
    /// Memory is nearly gone: only a guest in distress gets any back.
    Critical,
}

/// Why the target is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing speaks for a change.
    Steady,
    /// The balloon has no driver.
    NoDriver,
    /// The last step is not done, or the guest has not told what it did to it.
    InProgress,
    /// The target was beyond what the guarantee leaves.
    Guarantee,
    /// The guest suffers.
    Distress,
    /// The guest came too slowly.
    Stalled,
    /// There was trouble, and it is not forgotten.
    BackingOff,
    /// The guest tells nothing of its memory.
    NoStatistics,
    /// The guest has less left than its buffer.
    GuestNeeds,
    /// The guest should get memory back, and the host has none to give.
    Reserve,
    /// The guest has more than `max_size`.
    AboveMax,
    /// The host is short of memory.
    HostPressure,
    /// The host has plenty.
    HostEase,
}

impl Reason {
    /// Its name in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::NoDriver => "no-driver",
            Self::InProgress => "in-progress",
            Self::Guarantee => "guarantee",
            Self::Distress => "guest-distress",
            Self::Stalled => "stalled",
            Self::BackingOff => "backing-off",
            Self::NoStatistics => "no-statistics",
            Self::GuestNeeds => "guest-needs",
            Self::Reserve => "host-reserve",
            Self::AboveMax => "above-max",
            Self::HostPressure => "host-pressure",
            Self::HostEase => "host-ease",
        }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Bytes to ask of the guest; a step where it is not what it was.
    pub target: u64,
    /// Why.
    pub reason: Reason,
    /// Whether trouble has just begun: [`Reason::Distress`] or [`Reason::Stalled`].
    pub trouble: Option<Reason>,
    /// What the other VMs are told.
    pub own: Own,
}

/// What the governor remembers from one look to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    level: Level,
    /// Since when there has been ease.
    eased_ms: Option<u64>,
    looked_ms: Option<u64>,
    sample: Option<GuestReading>,
    /// What the balloon had then, and by how much it had grown in the two times before that.
    sample_actual: u64,
    grown: [u64; 2],
    silent_ms: Option<u64>,
    settled: Option<Settled>,
    inflating: Option<Inflating>,
    back_off: Option<BackOff>,
    troubles: u32,
    pending: u64,
    pending_ms: u64,
    ease_step_ms: Option<u64>,
}

/// The guest has done what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Settled {
    target: u64,
    since_ms: u64,
}

/// The window in which an inflation is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inflating {
    target: u64,
    since_ms: u64,
    from: u64,
    vcpus: CpuTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BackOff {
    until_ms: u64,
    /// The target goes no higher meanwhile.
    ceiling: u64,
    cause: Reason,
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
    fn pending(&self, now_ms: u64) -> u64 {
        let falling = now_ms
            .saturating_sub(self.pending_ms)
            .saturating_sub(PENDING_MS);
        part(self.pending, PENDING_MS.saturating_sub(falling), PENDING_MS)
    }

    fn trouble(&mut self, now_ms: u64, cause: Reason, ceiling: u64) {
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

impl Limits {
    /// The highest target there may be.
    pub fn most(&self) -> u64 {
        let left = self.ram.saturating_sub(self.guaranteed);
        whole_pages(left.saturating_sub(self.others_target))
    }

    /// The lowest target the governor goes to.
    pub fn base(&self) -> u64 {
        let above = self.ram.saturating_sub(self.max);
        whole_pages(above.saturating_sub(self.others_target)).min(self.most())
    }
}

/// Decides; see the module. `state` is what the last call returned, or the default.
pub fn decide(reading: &Reading, state: &State) -> (Decision, State) {
    let mut look = Look {
        reading,
        next: observe(reading, state),
        trouble: None,
    };
    let (target, reason) = look.choose(state);
    let now_ms = reading.now_ms;
    let given = reading.balloon.target.saturating_sub(target);
    if given > 0 {
        look.next.pending = look.next.pending(now_ms).saturating_add(given);
        look.next.pending_ms = now_ms;
    }
    let decision = Decision {
        target,
        reason,
        trouble: look.trouble,
        own: Own {
            claim: claim(look.idle(), reading.limits.weight),
            pending: look.next.pending(now_ms),
        },
    };
    (decision, look.next)
}

/// The next state, as far as it follows from what is seen alone.
fn observe(reading: &Reading, state: &State) -> State {
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
fn ease(host: &HostReading, percent: u64) -> u64 {
    part(host.total, percent * 5, 400)
}

/// What the host could hand out, less what others have been given and have not touched.
fn available(reading: &Reading) -> u64 {
    let host = &reading.host;
    host.available
        .min(host.total)
        .saturating_sub(reading.neighbours.pending)
}

/// The guest's statistics, unless they are old.
fn fresh(reading: &Reading) -> Option<&GuestReading> {
    let limit = FRESH_MS.max(u64::from(reading.limits.interval_ms).saturating_mul(3));
    let guest = reading.guest.as_ref()?;
    (reading.now_ms.saturating_sub(guest.at_ms) <= limit).then_some(guest)
}

/// One look: what it sees, and what will be remembered of it.
struct Look<'a> {
    reading: &'a Reading,
    next: State,
    trouble: Option<Reason>,
}

impl Look<'_> {
    fn choose(&mut self, before: &State) -> (u64, Reason) {
        let now_ms = self.reading.now_ms;
        let target = self.reading.balloon.target;
        let (base, most) = (self.reading.limits.base(), self.reading.limits.most());
        if target > most {
            return (most, Reason::Guarantee);
        }
        if !self.reading.balloon.driver {
            return (target, Reason::NoDriver);
        }
        let at_rest = self.next.back_off_ms(now_ms).is_some();
        if target > base && self.distressed(before) {
            let known = self.next.back_off.filter(|b| at_rest && b.ceiling == base);
            if known.is_none() {
                self.begin_trouble(Reason::Distress, base);
            }
        } else if self.stalled() {
            let left = self.reading.balloon.actual.saturating_sub(STALL_RELEASE);
            let lowest = if target > base { base } else { 0 };
            self.begin_trouble(Reason::Stalled, whole_pages(left).max(lowest));
        }
        let back_off = self.next.back_off.filter(|b| now_ms < b.until_ms);
        if let Some(back_off) = back_off
            && target > back_off.ceiling
        {
            return self.release(target - back_off.ceiling, 4, back_off.cause);
        }
        let Some(guest) = fresh(self.reading) else {
            return self.silence(base);
        };
        // What the guest told before it had settled says nothing of how it is now.
        let settled = self.next.settled.filter(|s| guest.at_ms >= s.since_ms);
        if settled.is_none() {
            return (target, Reason::InProgress);
        }
        let buffer = self.buffer(guest);
        if target > base && guest.available < part(buffer, 3, 4) {
            if self.next.level == Level::Critical {
                return (target, Reason::Reserve);
            }
            let missing = (buffer - guest.available).min(target - base);
            return self.release(missing, 1, Reason::GuestNeeds);
        }
        if back_off.is_some() {
            return self.at_ease(base).unwrap_or((target, Reason::BackingOff));
        }
        if target < base {
            return self.take(base - target, Reason::AboveMax);
        }
        if self.next.level == Level::Ease {
            return self.at_ease(base).unwrap_or((target, Reason::Steady));
        }
        self.take(self.share(), Reason::HostPressure)
    }

    fn begin_trouble(&mut self, cause: Reason, ceiling: u64) {
        self.next.trouble(self.reading.now_ms, cause, ceiling);
        self.trouble = Some(cause);
        self.next.inflating = None;
    }

    /// Whether the guest suffers from what it was asked to give.
    fn distressed(&self, before: &State) -> bool {
        let balloon = &self.reading.balloon;
        // With DEFLATE_ON_OOM it helps itself before it has to kill.
        let helped_itself = before.settled.is_some_and(|settled| {
            settled.target == balloon.target
                && balloon.actual.saturating_add(LEAST_MOVE) <= balloon.target
        });
        if helped_itself {
            return true;
        }
        let (Some(last), Some(now)) = (before.sample, fresh(self.reading)) else {
            return false;
        };
        let elapsed = now.at_ms.saturating_sub(last.at_ms);
        if elapsed == 0 {
            return false;
        }
        let rate = |counter: fn(&GuestReading) -> u64, own: u64| {
            // A counter that falls is another boot of the guest, or a lie.
            let more = counter(now).saturating_sub(counter(&last));
            part(more.saturating_sub(own), 1000, elapsed.max(RATE_MS))
        };
        // The balloon's driver reclaims, too, for pages it takes: at least 32 at a time.
        let grown = self.next.grown[0].saturating_add(self.next.grown[1]) / PAGE;
        let thrashes = rate(|g| g.major_faults, 0) >= MAJOR_FAULTS;
        now.oom_kills > last.oom_kills
            || rate(|g| g.alloc_stalls, grown / 16) >= STALLED_ALLOCATIONS
            || rate(|g| g.direct_reclaims, grown.saturating_mul(2)) >= RECLAIMED_PAGES
            || thrashes && now.available < self.buffer(now)
    }

    fn silence(&self, base: u64) -> (u64, Reason) {
        let target = self.reading.balloon.target;
        let since = self.next.silent_ms.unwrap_or(self.reading.now_ms);
        if target > base && self.reading.now_ms.saturating_sub(since) >= SILENCE_MS {
            return self.release(target - base, 1, Reason::NoStatistics);
        }
        (target, Reason::NoStatistics)
    }

    /// What the guest is to keep beyond what it uses.
    fn buffer(&self, guest: &GuestReading) -> u64 {
        let limits = &self.reading.limits;
        let given = self.reading.balloon.actual;
        let has = limits
            .ram
            .saturating_sub(given)
            .saturating_sub(limits.others_actual);
        let used = has.saturating_sub(guest.available);
        part(used, limits.buffer_percent.into(), 100).max(limits.ram / LEAST_BUFFER)
    }

    /// What could be taken from the guest: beyond its buffer, with a quarter of that between
    /// taking and giving back.
    fn idle(&self) -> u64 {
        let limits = &self.reading.limits;
        let resting = self.next.back_off_ms(self.reading.now_ms).is_some();
        let Some(guest) = fresh(self.reading).filter(|_| !resting) else {
            return 0;
        };
        let keep = part(self.buffer(guest), 5, 4);
        let takeable = limits.most().saturating_sub(self.reading.balloon.target);
        guest.available.saturating_sub(keep).min(takeable)
    }

    /// This VM's part of what the host is short of.
    fn share(&self) -> u64 {
        let (host, limits) = (&self.reading.host, &self.reading.limits);
        let missing = ease(host, limits.host_free_percent.into());
        let missing = missing.saturating_sub(available(self.reading));
        let stalls = host.pressure.into_iter().chain(host.cgroup_pressure);
        // Pressure that free memory does not show is answered step by step.
        let missing = match stalls.max() {
            Some(pressure) if pressure.some >= PSI_BEGIN => missing.max(limits.step),
            _ => missing,
        };
        let own = claim(self.idle(), limits.weight);
        part(
            missing,
            own,
            own.saturating_add(self.reading.neighbours.claims),
        )
    }

    /// Takes at most so much, and at most a step, of what is idle.
    fn take(&self, most: u64, reason: Reason) -> (u64, Reason) {
        let target = self.reading.balloon.target;
        let taken = whole_pages(most.min(self.idle()).min(self.reading.limits.step));
        if taken < LEAST_MOVE {
            return (target, Reason::Steady);
        }
        (target + taken, reason)
    }

    /// Gives a step back, if there has been ease for long enough and that brings no pressure.
    fn at_ease(&mut self, base: u64) -> Option<(u64, Reason)> {
        let (now_ms, limits) = (self.reading.now_ms, &self.reading.limits);
        let host = &self.reading.host;
        let long = |since: u64, wait: u64| now_ms.saturating_sub(since) >= wait;
        let eased = self.next.eased_ms.is_some_and(|at| long(at, EASE_MS));
        let due = self
            .next
            .ease_step_ms
            .is_none_or(|at| long(at, EASE_STEP_MS));
        if host.total == 0 || !eased || !due {
            return None;
        }
        let spare = available(self.reading)
            .saturating_sub(self.next.pending(now_ms))
            .saturating_sub(ease(host, limits.host_free_percent.into()));
        let target = self.reading.balloon.target;
        let all = target.saturating_sub(base);
        let given = whole_pages(spare.min(limits.step).min(all));
        if given == 0 || given < LEAST_MOVE.min(all) {
            return None;
        }
        self.next.ease_step_ms = Some(now_ms);
        Some((target - given, Reason::HostEase))
    }

    /// Gives back so much, or what the host can give beyond a `part` of its reserve.
    fn release(&self, wanted: u64, part_of_reserve: u64, reason: Reason) -> (u64, Reason) {
        let host = &self.reading.host;
        let target = self.reading.balloon.target;
        let mut given = wanted.div_ceil(PAGE).saturating_mul(PAGE).min(target);
        if host.total > 0 {
            let reserve = (host.total / 20).max(64 * MIB) / part_of_reserve;
            let free = available(self.reading)
                .saturating_sub(self.next.pending(self.reading.now_ms))
                .saturating_sub(reserve);
            given = given.min(whole_pages(free));
        }
        if given == 0 {
            return (target, Reason::Reserve);
        }
        (target - given, reason)
    }
}

fn whole_pages(bytes: u64) -> u64 {
    bytes / PAGE * PAGE
}

/// `number × numerator / denominator`, without overflow; 0 of nothing.
fn part(number: u64, numerator: u64, denominator: u64) -> u64 {
    let product = u128::from(number) * u128::from(numerator);
    let quotient = product / u128::from(denominator.max(1));
    u64::try_from(quotient).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
