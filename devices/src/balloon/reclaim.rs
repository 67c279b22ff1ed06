//! Giving the pages of one driver's balloon back to the host: at once, or when that is cheaper or
//! possible at all; and counting what came of it.
//!
//! | guest RAM | driver promises to tell | discarded |
//! |---|---|---|
//! | any | no | before the request is used; parts of hugetlb's pages never |
//! | huge pages of hugetlb | yes | when the balloon has all of one ([`super::partial`]) |
//! | other | yes | when 2 MiB are whole, or soon ([`super::pending`]) |
//!
//! What is held off (see [`crate::guest_memory::discard::inhibit`]) is remembered where the driver
//! promises to tell, and discarded when nothing holds it off any more. Pages that were reported
//! free are not: the guest may have used them again since.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::features;
use super::page_set::PageSet;
use super::partial::Partials;
use super::pending::Pending;
use super::shared::Shared;
use crate::guest_memory::GuestRam;
use crate::guest_memory::discard::{Batching, Discarded, Discarder, PAGE};

/// Blocks of 2 MiB of what was held off that are tried again at once; more where the host's pages
/// are larger.
const RETRY_BLOCKS: usize = 32;

/// What is remembered of the pages in the balloon.
enum Memory {
    Nothing,
    Huge(Partials),
    Pending(Pending),
}

/// See the module. Made anew for each driver: at a reset all pages are the guest's again.
pub struct Reclaim {
    shared: Arc<Shared>,
    discarder: Discarder,
    memory: Memory,
    /// What the driver has sent and not taken back.
    given: PageSet,
    /// Of that, what was held off.
    held_off: PageSet,
    poisoned: bool,
    ranges: Vec<Range<u64>>,
}

impl Reclaim {
    /// For a driver that has accepted `features`.
    pub fn new(
        shared: Arc<Shared>,
        ram: &GuestRam,
        batching: Option<Batching>,
        features: u64,
    ) -> io::Result<Self> {
        let discarder = Discarder::new(ram, batching, shared.inhibitor.clone())?;
        let memory = match discarder.page() {
            _ if !features::told_of_deflation(features) => Memory::Nothing,
            PAGE => Memory::Pending(Pending::default()),
            huge => Memory::Huge(Partials::new(huge)),
        };
        Ok(Self {
            poisoned: features::poisoned(features) && shared.poison() != 0,
            shared,
            discarder,
            memory,
            given: PageSet::default(),
            held_off: PageSet::default(),
            ranges: Vec::new(),
        })
    }

    /// `ranges`, which ascend and do not overlap, have come into the balloon. Their requests may
    /// be used when this returns.
    pub fn inflate(&mut self, ranges: &mut Vec<Range<u64>>) {
        let counters = &self.shared.counters;
        // Only RAM is remembered: what is none would fill the tables.
        add(&counters.ignored, self.discarder.clip(ranges));
        self.given.insert(ranges);
        match &mut self.memory {
            Memory::Nothing => {}
            Memory::Huge(partials) => {
                let waiting = partials.inflate(ranges);
                add(&counters.inhibited_partial, waiting);
            }
            Memory::Pending(pending) => pending.inflate(ranges),
        }
        self.discard_inflated(ranges);
        self.shared.set_given(self.given.bytes());
    }

    /// `ranges` are leaving the balloon: the guest uses them when it hears of this.
    pub fn deflate(&mut self, ranges: &[Range<u64>]) {
        match &mut self.memory {
            Memory::Nothing => {}
            Memory::Huge(partials) => partials.deflate(ranges),
            Memory::Pending(pending) => pending.deflate(ranges),
        }
        self.held_off.remove(ranges);
        self.given.remove(ranges);
        self.show_pending();
        self.shared.set_given(self.given.bytes());
    }

    /// `ranges` are free, and are used again when the guest hears of this.
    pub fn report(&mut self, ranges: &[Range<u64>]) {
        if self.poisoned {
            // §5.5.6.7: a reported page keeps the pattern, which zeroes are not.
            let bytes = ranges.iter().map(|r| self.discarder.ram_in(r)).sum();
            add(&self.shared.counters.inhibited_poison, bytes);
            return;
        }
        let outcome = self.discarder.discard(ranges);
        add(&self.shared.counters.reported, outcome.bytes);
        self.count(outcome);
    }

    /// Discards what has waited for long; to be called now and then while [`Reclaim::waits`].
    pub fn tick(&mut self) {
        self.discard_pending(Pending::tick);
    }

    /// Discards all that waits.
    pub fn flush(&mut self) {
        self.discard_pending(Pending::flush);
    }

    /// Discards some of what was held off, where nothing holds it off any more; says whether there
    /// is more.
    pub fn retry(&mut self) -> bool {
        if self.held_off.is_empty() || self.shared.inhibitor.holds() {
            return false;
        }
        let mut ranges = std::mem::take(&mut self.ranges);
        self.held_off
            .take(RETRY_BLOCKS, self.discarder.page(), &mut ranges);
        let mut outcome = self.discarder.discard(&ranges);
        let held_off = outcome.inhibited.take().is_some();
        if held_off {
            // Just now again, and counted already.
            self.held_off.insert(&ranges);
        }
        let counters = &self.shared.counters;
        add(&counters.retried, outcome.bytes);
        add(&counters.inflated, outcome.bytes);
        self.count(outcome);
        self.ranges = ranges;
        self.show_pending();
        !held_off && !self.held_off.is_empty()
    }

    /// Whether something waits that will not wait for ever.
    pub fn waits(&self) -> bool {
        matches!(&self.memory, Memory::Pending(pending) if !pending.is_empty())
    }

    fn discard_pending(&mut self, choose: fn(&mut Pending, &mut Vec<Range<u64>>)) {
        let Memory::Pending(pending) = &mut self.memory else {
            return;
        };
        let mut ranges = std::mem::take(&mut self.ranges);
        choose(pending, &mut ranges);
        self.discard_inflated(&ranges);
        self.ranges = ranges;
    }

    fn discard_inflated(&mut self, ranges: &[Range<u64>]) {
        if !ranges.is_empty() {
            let outcome = self.discarder.discard(ranges);
            add(&self.shared.counters.inflated, outcome.bytes);
            if outcome.inhibited.is_none() {
                self.held_off.remove(ranges);
            } else if !matches!(self.memory, Memory::Nothing) {
                self.held_off.insert(ranges);
            }
            self.count(outcome);
        }
        self.show_pending();
    }

    fn show_pending(&self) {
        let held_off = &self.shared.held_off;
        held_off.store(self.held_off.bytes(), Ordering::Relaxed);
        if let Memory::Pending(pending) = &self.memory {
            self.shared
                .pending
                .store(pending.bytes(), Ordering::Relaxed);
        }
    }

    fn count(&self, outcome: Discarded) {
        let counters = &self.shared.counters;
        add(&counters.discards, outcome.calls);
        add(&counters.ignored, outcome.outside);
        add(&counters.inhibited_partial, outcome.partial);
        add(&counters.inhibited_locked, outcome.locked);
        add(&counters.failed, outcome.failed);
        if let Some((reason, bytes)) = outcome.inhibited {
            add(counters.held_off(reason), bytes);
        }
    }
}

impl Drop for Reclaim {
    fn drop(&mut self) {
        // The guest has it again.
        self.shared.pending.store(0, Ordering::Relaxed);
        self.shared.held_off.store(0, Ordering::Relaxed);
        self.shared.set_given(0);
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}
