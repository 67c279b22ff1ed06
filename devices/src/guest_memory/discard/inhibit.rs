//! Who may keep guest RAM from being discarded for a while, and why.
//!
//! Whoever depends on pages staying as they are takes an [`Inhibition`] and keeps it for as long.
//! Meanwhile nothing is discarded, and each byte that would have been is counted under the reason.
//! Who has something to discard afterwards is woken when the last one lets go. One [`Inhibitor`]
//! serves all balloons of a VM.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use serde::Serialize;
use utoipa::ToSchema;
use vmm_sys_util::eventfd::EventFd;

/// Why nothing may be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = InhibitReason)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A device passed through to the guest has its memory pinned: the device would go on using
    /// the old pages, the guest new ones.
    Vfio,
    /// Pages that are written are being recorded, and a discard is a write that nobody records.
    DirtyLog,
    /// Memory comes from a snapshot as it is touched, and what was discarded would come again.
    LazyRestore,
}

impl Reason {
    /// All of them; where several hold, the first is the one that bytes count under.
    pub const ALL: [Self; 3] = [Self::Vfio, Self::DirtyLog, Self::LazyRestore];
}

/// How many hold discards off for each reason.
#[derive(Debug, Default)]
struct Held {
    vfio: usize,
    dirty_log: usize,
    lazy_restore: usize,
}

impl Held {
    fn count(&mut self, reason: Reason) -> &mut usize {
        match reason {
            Reason::Vfio => &mut self.vfio,
            Reason::DirtyLog => &mut self.dirty_log,
            Reason::LazyRestore => &mut self.lazy_restore,
        }
    }

    fn reasons(&self) -> impl Iterator<Item = Reason> + use<> {
        let counts = [self.vfio, self.dirty_log, self.lazy_restore];
        let reasons = Reason::ALL.into_iter().zip(counts);
        reasons.filter_map(|(reason, count)| (count > 0).then_some(reason))
    }
}

/// Keeps guest RAM from being discarded, or lets it; clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Inhibitor(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    held: RwLock<Held>,
    /// Who is woken when nothing holds discards off any more.
    waiting: Mutex<Vec<Weak<EventFd>>>,
}

impl Inhibitor {
    /// Holds discards off until the result is dropped. What is being discarded just now is
    /// finished first, so that afterwards nothing is; that takes as long as the kernel needs for
    /// one batch. Called on the VMM thread.
    pub fn inhibit(&self, reason: Reason) -> Inhibition {
        self.change(|held| *held.count(reason) += 1);
        Inhibition {
            inhibitor: self.clone(),
            reason,
        }
    }

    /// From now on writes to `wake`, for as long as that is there, when nothing holds discards off
    /// any more.
    pub fn tell_of_release(&self, wake: &Arc<EventFd>) {
        let mut waiting = self
            .0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Balloons come and go.
        waiting.retain(|other| other.strong_count() > 0);
        waiting.push(Arc::downgrade(wake));
    }

    /// Whether discards are held off now.
    pub fn holds(&self) -> bool {
        self.held().reasons().next().is_some()
    }

    /// The reasons that hold now.
    pub fn reasons(&self) -> Vec<Reason> {
        self.held().reasons().collect()
    }

    /// Lets the caller discard for as long as it keeps the result, or says why not.
    pub(super) fn enter(&self) -> Result<Permit<'_>, Reason> {
        let held = self.held();
        let first = held.reasons().next();
        match first {
            Some(reason) => Err(reason),
            None => Ok(Permit(held)),
        }
    }

    fn held(&self) -> RwLockReadGuard<'_, Held> {
        self.0.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Held)) {
        let held = self.0.held.write();
        change(&mut held.unwrap_or_else(PoisonError::into_inner));
    }

    fn tell(&self) {
        let waiting = self.0.waiting.lock();
        for wake in waiting.unwrap_or_else(PoisonError::into_inner).iter() {
            // Fails only when the counter is full, and then it wakes anyway.
            let _ = wake.upgrade().map(|wake| wake.write(1));
        }
    }
}

/// While it lives nobody begins to hold discards off.
#[must_use]
pub(super) struct Permit<'a>(
    #[expect(dead_code, reason = "it is there to be dropped")] RwLockReadGuard<'a, Held>,
);

/// While it lives nothing is discarded.
#[must_use = "dropping it lets discards go on"]
#[derive(Debug)]
pub struct Inhibition {
    inhibitor: Inhibitor,
    reason: Reason,
}

impl Drop for Inhibition {
    fn drop(&mut self) {
        self.inhibitor.change(|held| {
            let count = held.count(self.reason);
            *count = count.saturating_sub(1);
        });
        if !self.inhibitor.holds() {
            self.inhibitor.tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn discards_go_on_when_the_last_of_those_who_hold_them_off_lets_go() {
        let inhibitor = Inhibitor::default();
        assert!(inhibitor.enter().is_ok());
        let first = inhibitor.inhibit(Reason::DirtyLog);
        let second = inhibitor.clone().inhibit(Reason::DirtyLog);
        let third = inhibitor.inhibit(Reason::Vfio);
        assert_eq!(inhibitor.reasons(), [Reason::Vfio, Reason::DirtyLog]);
        assert_eq!(inhibitor.enter().err(), Some(Reason::Vfio));
        drop(third);
        drop(first);
        assert_eq!(inhibitor.enter().err(), Some(Reason::DirtyLog));
        drop(second);
        assert_eq!(inhibitor.reasons(), []);
        assert!(inhibitor.enter().is_ok());
    }

    #[test]
    fn whoever_waits_is_woken_by_the_last_that_lets_go() {
        let inhibitor = Inhibitor::default();
        let new = || Arc::new(EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap());
        let (wake, gone) = (new(), new());
        inhibitor.tell_of_release(&gone);
        drop(gone);
        inhibitor.tell_of_release(&wake);
        assert_eq!(inhibitor.0.waiting.lock().unwrap().len(), 1);
        let first = inhibitor.inhibit(Reason::Vfio);
        let second = inhibitor.inhibit(Reason::DirtyLog);
        drop(first);
        assert!(wake.read().is_err() && inhibitor.holds());
        drop(second);
        assert_eq!(wake.read().unwrap(), 1);
        assert!(!inhibitor.holds());
    }

    #[test]
    fn who_holds_discards_off_waits_for_those_under_way() {
        let inhibitor = Inhibitor::default();
        let done = Arc::new(AtomicBool::new(false));
        let (entered, wait) = std::sync::mpsc::channel();
        let discarding = std::thread::spawn({
            let (inhibitor, done) = (inhibitor.clone(), done.clone());
            move || {
                let _permit = inhibitor.enter().unwrap_or_else(|_| panic!("held off"));
                entered.send(()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(50));
                done.store(true, Ordering::SeqCst);
            }
        });
        wait.recv().unwrap();
        let _inhibition = inhibitor.inhibit(Reason::LazyRestore);
        assert!(done.load(Ordering::SeqCst));
        discarding.join().unwrap();
    }
}
