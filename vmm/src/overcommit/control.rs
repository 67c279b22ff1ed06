//! Between the governor and the world: gathers a [`Reading`], asks [`governor::decide`], counts
//! what it said. Owned by the VMM thread, which looks when it is time and does what comes of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::balloon::{Balloon, Sample};

use super::Coordinator;
use super::governor::{self, Level, Reason, State};
use super::psi::Sources;
use super::reading::{BalloonReading, CpuTime, GuestReading, Limits, Neighbours, Own, Reading};
use super::triggers::{Pressed, Refused, Triggers, Watcher};
use super::view::{Governor, vcpu_time};

/// The name of the governor's counters among those of the devices.
pub const COUNTERS_ID: &str = "__overcommit";

/// The governor with all it needs.
pub struct Control {
    sources: Sources,
    coordinator: Box<dyn Coordinator>,
    epoch: Instant,
    /// Where pressure between two looks is to be told, until that is set up.
    triggers: Option<Triggers>,
    watcher: Option<Watcher>,
    /// What was told since the last look.
    pressed: Pressed,
    looked: Option<Instant>,
    /// When something was last taken.
    took: Option<Instant>,
    /// What the others were told last, if that is not that this VM takes no part.
    told: Option<Own>,
    /// The balloon it drives, while it drives one.
    driven: Option<String>,
    state: State,
    last: Option<Reason>,
    /// The guest has been asked for statistics and neither it nor the time has answered.
    asking: Arc<AtomicBool>,
    counters: Counters,
}

/// Totals since the VM was booted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    looks: u64,
    inflate_steps: u64,
    deflate_steps: u64,
    inflated_bytes: u64,
    deflated_bytes: u64,
    stalls: u64,
    distress_releases: u64,
    held_for_statistics: u64,
    held_for_reserve: u64,
    pressure_triggers: u64,
}

/// The balloon to drive, with what the configuration says of the VM.
#[derive(Clone)]
pub struct Driven<'a> {
    /// Its id.
    pub id: &'a str,
    /// The device.
    pub balloon: &'a Balloon,
    /// The limits.
    pub limits: Limits,
    /// The threads of the vCPUs.
    pub vcpu_threads: Vec<u32>,
}

/// What is to be done, and told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The balloon's id.
    pub id: String,
    /// Bytes it asked for so far.
    pub from: u64,
    /// Bytes it is to ask for.
    pub to: u64,
    /// Why.
    pub reason: Reason,
    /// How long nothing will be taken, if trouble has just begun.
    pub rest_ms: Option<u64>,
}

impl Step {
    /// What it is called in events.
    pub fn action(&self) -> &'static str {
        match self.to.cmp(&self.from) {
            std::cmp::Ordering::Greater => "inflate",
            std::cmp::Ordering::Less => "deflate",
            std::cmp::Ordering::Equal => "hold",
        }
    }
}

impl Control {
    /// A governor that reads these files and knows the others by `coordinator`.
    pub fn new(sources: Sources, coordinator: Box<dyn Coordinator>) -> Self {
        Self {
            sources,
            coordinator,
            epoch: Instant::now(),
            triggers: None,
            watcher: None,
            pressed: Pressed::default(),
            looked: None,
            took: None,
            told: None,
            driven: None,
            state: State::default(),
            last: None,
            asking: Arc::default(),
            counters: Counters::default(),
        }
    }

    /// Has it told of pressure between two looks, from when it is first to look.
    pub fn with_triggers(mut self, triggers: Triggers) -> Self {
        self.triggers = Some(triggers);
        self
    }

    /// Sets the triggers, if that was not done yet; says which the kernel refused. `wake` is
    /// called on a thread of theirs, and is to have [`Control::press`] called on this one.
    pub fn arm(&mut self, wake: impl Fn() + Send + 'static) -> Vec<Refused> {
        let Some(triggers) = self.triggers.take() else {
            return Vec::new();
        };
        let (watcher, refused) = triggers.arm(wake);
        self.watcher = watcher;
        for Refused { scope, reason } in &refused {
            let scope = scope.name();
            tracing::warn!(scope, %reason, "the overcommit policy looks for pressure at its interval only");
        }
        refused
    }

    /// A trigger has gone off.
    pub fn press(&mut self) {
        if let Some(watcher) = &self.watcher {
            let more = watcher.take();
            self.counters.pressure_triggers += u64::from(more.any());
            // The next look may not be due yet.
            self.pressed = self.pressed.and(more);
        }
    }

    /// The VM is a new machine: forgets what it knew of the last.
    pub fn restart(&mut self) {
        self.pressed = Pressed::default();
        self.looked = None;
        self.took = None;
        self.driven = None;
        self.state = State::default();
        self.last = None;
        self.asking = Arc::default();
        self.counters = Counters::default();
    }

    /// When to look next, where it is done every `interval_ms`.
    pub fn due(&self, interval_ms: u32) -> Instant {
        let interval = Duration::from_millis(interval_ms.into());
        let regular = self.looked.map_or(self.epoch, |looked| looked + interval);
        if !self.pressed.any() {
            return regular;
        }
        // At once, but for that no more than a step is taken in an interval.
        let soonest = self.took.map_or(self.epoch, |took| took + interval);
        regular.min(soonest)
    }

    /// Looks, and decides.
    pub fn look(&mut self, driven: Driven<'_>) -> Option<Step> {
        let elapsed = self.epoch.elapsed().as_millis();
        let now_ms = u64::try_from(elapsed).unwrap_or(u64::MAX);
        if self.driven.as_deref() != Some(driven.id) {
            // What was known is of another balloon; that its guest had trouble still holds.
            self.driven = Some(driven.id.to_owned());
            self.asking = Arc::default();
        }
        let mut reading = Reading {
            now_ms,
            limits: driven.limits,
            balloon: BalloonReading::default(),
            guest: None,
            host: self.sources.read(now_ms),
            neighbours: Neighbours::default(),
            vcpus: CpuTime::default(),
        };
        std::mem::take(&mut self.pressed).raise(&mut reading.host);
        (reading.balloon, reading.guest) = view(&driven, now_ms);
        if reading.balloon.actual < reading.balloon.target {
            reading.vcpus = vcpu_time(&driven.vcpu_threads);
        }
        let state = self.state;
        let mut decided = None;
        // On a host with many VMs the lock is short: most looks come to nothing, and those are
        // made without it.
        if let Some(neighbours) = self.coordinator.recent() {
            reading.neighbours = neighbours;
            let (decision, next) = governor::decide(&reading, &state);
            if decision.target == reading.balloon.target && decision.trouble.is_none() {
                self.coordinator.tell(decision.own);
                decided = Some((decision, next));
            }
        }
        if decided.is_none() {
            self.coordinator.exchange(&mut |neighbours| {
                reading.neighbours = *neighbours;
                let (decision, next) = governor::decide(&reading, &state);
                decided = Some((decision, next));
                decision.own
            });
        }
        self.told = decided.as_ref().map(|(decision, _)| decision.own);
        // Not before: whoever keeps the others' lock may have kept us longer than the interval.
        self.looked = Some(Instant::now());
        self.ask(driven.balloon);
        let (decision, next) = decided?;
        self.state = next;
        self.last = Some(decision.reason);
        let step = Step {
            id: driven.id.to_owned(),
            from: reading.balloon.target,
            to: decision.target,
            reason: decision.trouble.unwrap_or(decision.reason),
            rest_ms: decision.trouble.and(next.back_off_ms(now_ms)),
        };
        if step.to > step.from {
            self.took = self.looked;
        }
        self.count(&step, &decision);
        (step.from != step.to || decision.trouble.is_some()).then_some(step)
    }

    /// Tells the others, if they were told otherwise, that this VM takes no part for now: it is
    /// paused, or drives no balloon. They would wait for it to give what it does not. What its guest
    /// was given lately it may still touch, or when it goes on.
    pub fn rest(&mut self) {
        self.pressed = Pressed::default();
        let Some(told) = self.told.take() else {
            return;
        };
        let pending = told.pending;
        self.coordinator
            .exchange(&mut |_| Own { claim: 0, pending });
    }

    /// The machine is off; what the others were told of it is gone with what was set aside.
    pub fn gone(&mut self) {
        self.told = None;
    }

    /// What the last look found; `None` before the first and while it drives no balloon.
    pub fn shown(&self) -> Option<Governor> {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let looked = self.looked?;
        Some(Governor {
            balloon: self.driven.clone()?,
            host: match self.state.level() {
                Level::Ease => "ease",
                Level::Pressure => "pressure",
                Level::Critical => "critical",
            },
            reason: self.last?.name(),
            pressure_triggers: self
                .watcher
                .as_ref()
                .map(Watcher::scopes)
                .unwrap_or_default(),
            back_off_ms: self.state.back_off_ms(milliseconds(self.epoch.elapsed())),
            age_ms: milliseconds(looked.elapsed()),
        })
    }

    /// The totals, by name.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let counters = &self.counters;
        [
            ("looks", counters.looks),
            ("inflate_steps", counters.inflate_steps),
            ("deflate_steps", counters.deflate_steps),
            ("inflated_bytes", counters.inflated_bytes),
            ("deflated_bytes", counters.deflated_bytes),
            ("stalls", counters.stalls),
            ("distress_releases", counters.distress_releases),
            ("held_for_statistics", counters.held_for_statistics),
            ("held_for_reserve", counters.held_for_reserve),
            ("pressure_triggers", counters.pressure_triggers),
        ]
        .into_iter()
        .map(|(name, total)| (name.to_owned(), total))
        .collect()
    }

    /// Has the guest asked for statistics, for the next look.
    fn ask(&self, balloon: &Balloon) {
        if self.asking.swap(true, Ordering::SeqCst) {
            return;
        }
        let asking = Asking(self.asking.clone());
        balloon.ask_for_statistics(Box::new(move |_| drop(asking)));
    }

    fn count(&mut self, step: &Step, decision: &governor::Decision) {
        let counters = &mut self.counters;
        counters.looks += 1;
        if step.to > step.from {
            counters.inflate_steps += 1;
            counters.inflated_bytes += step.to - step.from;
        } else if step.to < step.from {
            counters.deflate_steps += 1;
            counters.deflated_bytes += step.from - step.to;
        }
        match decision.trouble {
            Some(Reason::Distress) => counters.distress_releases += 1,
            Some(_) => counters.stalls += 1,
            None => {}
        }
        match decision.reason {
            Reason::NoStatistics if step.to == step.from => counters.held_for_statistics += 1,
            Reason::Reserve => counters.held_for_reserve += 1,
            _ => {}
        }
    }
}

/// Lets the next question be asked when this one is answered, or can't be any more.
struct Asking(Arc<AtomicBool>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The balloon and its guest as they are now.
fn view(driven: &Driven<'_>, now_ms: u64) -> (BalloonReading, Option<GuestReading>) {
    let info = driven.balloon.viewer().info(driven.id);
    let balloon = BalloonReading {
        target: info.target,
        // As far as it has sent the pages.
        actual: info.actual.min(info.given),
        driver: info.driver,
    };
    let sample = |name: &str| info.statistics.get(name).copied();
    let value = |name: &str| sample(name).map_or(0, |sample: Sample| sample.value);
    // Before Linux 4.6 there was but the memory that nothing uses.
    let available = sample("available_memory").or_else(|| sample("free_memory"));
    let guest = available.map(|available| GuestReading {
        at_ms: now_ms.saturating_sub(available.age_ms),
        available: available.value,
        oom_kills: value("oom_kills"),
        alloc_stalls: value("alloc_stalls"),
        direct_reclaims: value("direct_reclaims"),
        major_faults: value("major_faults"),
    });
    (balloon, guest)
}

#[cfg(test)]
mod tests;
