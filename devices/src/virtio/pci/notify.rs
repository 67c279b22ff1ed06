//! Doorbells (virtio 1.3 §4.1.4.4): an eventfd per queue, bound to the address of the queue's
//! notification register for as long as the BAR answers there.

use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::layout::{NOTIFY, NOTIFY_MULTIPLIER};
use crate::machine::Machine;
use crate::throttle::Throttle;

/// The doorbells of a device.
pub(super) struct Doorbells {
    machine: Arc<dyn Machine>,
    kicks: Vec<Arc<EventFd>>,
    placed: Mutex<Placed>,
    warnings: Throttle,
}

#[derive(Default)]
struct Placed {
    base: Option<u64>,
    /// Which of them the machine took; the others come by way of the BAR.
    bound: Vec<bool>,
    /// The device is on its way out: nothing is bound any more.
    retired: bool,
}

impl Doorbells {
    pub(super) fn new(machine: Arc<dyn Machine>, kicks: Vec<Arc<EventFd>>) -> Self {
        Self {
            machine,
            kicks,
            placed: Mutex::default(),
            warnings: Throttle::default(),
        }
    }

    /// The BAR answers at `base` now, or not at all. The caller serializes calls; what the lock
    /// guards is the end, which may come from another thread.
    pub(super) fn place(&self, base: Option<u64>) {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        if placed.base == base || placed.retired {
            return;
        }
        self.unbind(&mut placed);
        let Some(base) = base else { return };
        placed.bound = (self.kicks.iter().enumerate())
            .map(|(queue, kick)| {
                let result = self.machine.bind_doorbell(address(base, queue), kick);
                result.map_err(|error| self.warn(queue, &error)).is_ok()
            })
            .collect();
        placed.base = Some(base);
    }

    /// Unbinds all for good.
    pub(super) fn retire(&self) {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        self.unbind(&mut placed);
        placed.retired = true;
    }

    /// A write to the notification structure that came by way of the BAR.
    pub(super) fn write(&self, offset: u64) {
        let multiplier = u64::from(NOTIFY_MULTIPLIER);
        let queue = usize::try_from(offset / multiplier).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(queue)
            && offset.is_multiple_of(multiplier)
        {
            // Fails only when the counter is full, and then it wakes anyway.
            let _ = kick.write(1);
        }
    }

    fn unbind(&self, placed: &mut Placed) {
        let Some(base) = placed.base.take() else {
            return;
        };
        let bound = std::mem::take(&mut placed.bound);
        for (queue, (kick, _)) in self.kicks.iter().zip(bound).enumerate().filter(|x| x.1.1) {
            if let Err(error) = self.machine.unbind_doorbell(address(base, queue), kick) {
                self.warn(queue, &error);
            }
        }
    }

    fn warn(&self, queue: usize, error: &std::io::Error) {
        if let Some(suppressed) = self.warnings.pass() {
            tracing::warn!(queue, %error, suppressed, "a doorbell could not be (un)bound");
        }
    }
}

/// Where the driver writes to notify `queue`.
fn address(base: u64, queue: usize) -> u64 {
    base + NOTIFY + queue as u64 * u64::from(NOTIFY_MULTIPLIER)
}
