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

use super::reading::{GuestReading, Limits, Own, Reading, claim};

mod observe;
mod stall;

pub use observe::State;
use observe::{available, ease, fresh, observe};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const MINUTE_MS: u64 = 60_000;

/// The buffer is at least this part of RAM, however little the guest uses.
const LEAST_BUFFER: u64 = 16;
/// PSI, in hundredths of a percent, at which pressure begins.
pub(super) const PSI_BEGIN: u32 = 1000;
/// Moves smaller than this are not worth a step.
const LEAST_MOVE: u64 = MIB;
/// What a guest that stalls gets back.
const STALL_RELEASE: u64 = 128 * MIB;
/// A guest that tells nothing for this long gets everything back.
const SILENCE_MS: u64 = 30_000;
/// How long there has to be ease before anything is given back for it …
const EASE_MS: u64 = 30_000;
/// … and the least time between two such steps.
const EASE_STEP_MS: u64 = 10_000;
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
