//! What the governors of a host's VMs tell one another through the ledger: each decides under the
//! directory's lock, from what the others plan, and has told its own plans when it lets go.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::Coordinator;
use super::super::reading::{Neighbours, Own};
use super::{Ledger, Record, Reservation, boot_clock_ms, put};

/// For so long, what the others told is good enough to find that there is nothing to do.
pub(super) const RECENT_MS: u64 = 5000;
/// What a VM has told of its plans counts for so long.
pub(super) const PLANS_LAST_MS: u64 = 120_000;

/// The ledger in two hands, which are both on the VMM thread: the loop, and the governor.
#[derive(Clone)]
pub struct SharedLedger(Arc<Mutex<Ledger>>);

impl SharedLedger {
    /// Shares it.
    pub fn new(ledger: Ledger) -> Self {
        Self(Arc::new(Mutex::new(ledger)))
    }

    /// For as long as the guard lives.
    pub fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Coordinator for SharedLedger {
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own) {
        self.lock().exchange(decide);
    }

    fn recent(&self) -> Option<Neighbours> {
        self.lock().recent()
    }

    fn tell(&mut self, own: Own) {
        self.lock().tell(own);
    }
}

impl Coordinator for Ledger {
    fn exchange(&mut self, decide: &mut dyn FnMut(&Neighbours) -> Own) {
        let now = boot_clock_ms();
        let result = self.exchange_locked(now, decide);
        self.note(result.map_err(|error| error.to_string()));
    }

    fn recent(&self) -> Option<Neighbours> {
        let age = boot_clock_ms().saturating_sub(self.heard_ms?);
        // Whoever can't hear the others tries each time, until it works again.
        (age < RECENT_MS && self.degraded.is_none()).then_some(self.neighbours)
    }

    fn tell(&mut self, own: Own) {
        plan(&mut self.record, own, boot_clock_ms());
        self.write();
    }
}

impl Ledger {
    fn exchange_locked(
        &mut self,
        now_ms: u64,
        decide: &mut dyn FnMut(&Neighbours) -> Own,
    ) -> io::Result<()> {
        let locked = self.directory.lock(self.patience());
        self.stuck = locked.as_ref().err().map(ToString::to_string);
        let read = match &locked {
            Ok(_) => self.directory.snapshot(),
            Err(error) => Err(error.kind().into()),
        };
        let failure = match read {
            Ok(snapshot) => {
                let others = snapshot.records.iter().filter(|r| r.0 != self.name);
                self.neighbours = neighbours(others.map(|(_, record)| record), now_ms);
                self.heard_ms = Some(now_ms);
                None
            }
            // What they told last is still a better guess than that there are none.
            Err(error) => Some(error),
        };
        let own = decide(&self.neighbours);
        plan(&mut self.record, own, now_ms);
        // Before the lock goes, so that the next one sees it.
        put(&self.file, &self.record)?;
        failure.map_or(Ok(()), Err)
    }
}

/// Puts what the governor plans into the record.
fn plan(record: &mut Record, own: Own, now_ms: u64) {
    let measures = &mut record.measures;
    measures.claim = Some(own.claim);
    measures.pending = Some(own.pending);
    measures.told_at_ms = Some(now_ms);
    record.written_at_ms = now_ms;
}

/// The sums of what the others plan.
pub(super) fn neighbours<'a>(others: impl Iterator<Item = &'a Record>, now_ms: u64) -> Neighbours {
    let mut neighbours = Neighbours::default();
    for other in others.filter(|other| other.reservation != Reservation::default()) {
        neighbours.vms = neighbours.vms.saturating_add(1);
        let measures = &other.measures;
        let told = measures.told_at_ms.unwrap_or_default();
        if told.saturating_add(PLANS_LAST_MS) < now_ms {
            // It has stopped deciding: it neither gives nor takes.
            continue;
        }
        let claim = measures.claim.unwrap_or_default();
        let pending = measures.pending.unwrap_or_default();
        neighbours.claims = neighbours.claims.saturating_add(claim);
        neighbours.pending = neighbours.pending.saturating_add(pending);
    }
    neighbours
}
