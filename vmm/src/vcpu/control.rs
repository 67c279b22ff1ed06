//! What all vCPUs of a VM are told to do, and what they have done of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long vCPUs may take to obey. They only have to finish a register access.
const PATIENCE: Duration = Duration::from_secs(5);

/// What vCPUs are to do until told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Run,
    Pause,
    Stop,
}

/// What one vCPU is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Enter the guest.
    Run,
    /// Get ready to stand still, then ask again.
    Settle,
    /// Send itself an NMI, then say so and ask again.
    Nmi,
    /// End.
    Stop,
}

struct State {
    order: Order,
    /// Who stands still, one bit each.
    parked: u64,
    /// Who is to send itself an NMI.
    nmi: u64,
}

/// Shared by the VMM thread and the vCPU threads of a VM.
pub(super) struct Control {
    all: u64,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether there is more to do than to run; read before each entry without taking the lock.
    attention: AtomicBool,
}

impl Control {
    /// For `count` vCPUs, at most 64.
    pub(super) fn new(count: u32) -> Self {
        Self {
            all: u64::MAX.checked_shr(64 - count.clamp(1, 64)).unwrap_or(0),
            state: Mutex::new(State {
                order: Order::Pause,
                parked: 0,
                nmi: 0,
            }),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let attention = state.order != Order::Run || state.nmi != 0;
        self.attention.store(attention, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn wait_until(&self, reached: impl Fn(&State) -> bool) -> bool {
        let (_state, outcome) = self
            .changed
            .wait_timeout_while(self.lock(), PATIENCE, |state| !reached(state))
            .unwrap_or_else(PoisonError::into_inner);
        !outcome.timed_out()
    }

    /// Tells all what to do. Whoever is in the guest must be kicked out to hear it.
    pub(super) fn order(&self, order: Order) {
        self.update(|state| state.order = order);
    }

    /// Waits until all stand still; false where they don't in time.
    pub(super) fn all_parked(&self) -> bool {
        self.wait_until(|state| state.parked == self.all)
    }

    /// Asks all to send themselves an NMI.
    pub(super) fn request_nmi(&self) {
        self.update(|state| state.nmi = self.all);
    }

    /// Waits until they have; what they have not is forgotten.
    pub(super) fn all_nmi_sent(&self) -> bool {
        let sent = self.wait_until(|state| state.nmi == 0);
        if !sent {
            self.update(|state| state.nmi = 0);
        }
        sent
    }

    /// Whether a vCPU must ask what to do before it enters the guest.
    pub(super) fn attention(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// What vCPU `index` is to do; returns only when that is not to stand still. A vCPU that is
    /// `dead` can't run, whatever the order; one that is `settled` has obeyed [`Next::Settle`].
    pub(super) fn next(&self, index: u32, dead: bool, settled: bool) -> Next {
        let me = bit(index);
        let mut state = self.lock();
        loop {
            let next = match state.order {
                Order::Stop => Some(Next::Stop),
                _ if state.nmi & me != 0 => Some(Next::Nmi),
                Order::Run if !dead => Some(Next::Run),
                _ if !settled => Some(Next::Settle),
                _ => None,
            };
            if let Some(next) = next {
                state.parked &= !me;
                return next;
            }
            state.parked |= me;
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// vCPU `index` has sent itself an NMI.
    pub(super) fn nmi_sent(&self, index: u32) {
        self.update(|state| state.nmi &= !bit(index));
    }
}

fn bit(index: u32) -> u64 {
    1u64.checked_shl(index).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn vcpus_that_are_born_paused_stand_still_until_told_to_run() {
        for count in [1, 3, 64] {
            let control = Arc::new(Control::new(count));
            let (ran, running) = std::sync::mpsc::channel();
            let threads: Vec<_> = (0..count)
                .map(|index| {
                    let (control, ran) = (control.clone(), ran.clone());
                    std::thread::spawn(move || {
                        assert_eq!(control.next(index, false, false), Next::Settle);
                        assert_eq!(control.next(index, false, true), Next::Run);
                        ran.send(index).unwrap();
                        assert_eq!(control.next(index, true, true), Next::Stop);
                    })
                })
                .collect();
            assert!(control.all_parked());
            assert!(running.try_recv().is_err());
            control.order(Order::Run);
            assert_eq!(running.iter().take(count as usize).count(), count as usize);
            // Dead from now on, they stand still although they are told to run.
            assert!(control.all_parked());
            assert!(!control.attention());
            control.order(Order::Stop);
            for thread in threads {
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn an_nmi_is_sent_once_even_by_a_vcpu_that_stands_still() {
        let control = Control::new(1);
        control.request_nmi();
        assert_eq!(control.next(0, false, true), Next::Nmi);
        control.nmi_sent(0);
        assert!(control.all_nmi_sent());
        assert_eq!(control.next(0, false, false), Next::Settle);
    }
}
