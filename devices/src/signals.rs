//! What the guest does to the machine as a whole: reset, power off, eject.
//!
//! A guest may do these in an endless loop, so they are flags, not messages: the VMM is woken once
//! and then looks at all of them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Flags set on vCPU threads and taken by the VMM thread.
pub struct GuestSignals {
    reset: AtomicBool,
    power_off: AtomicBool,
    ejected: AtomicU32,
    vcpu_failed: AtomicBool,
    moved: AtomicBool,
    disk_full: AtomicBool,
    woken: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// What was signalled since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signalled {
    /// The guest asked for a reset, or met a triple fault.
    pub reset: bool,
    /// The guest powered itself off.
    pub power_off: bool,
    /// Slots whose device the guest ejected, one bit each.
    pub ejected: u32,
    /// A vCPU could not go on.
    pub vcpu_failed: bool,
    /// What is published of the devices is out of date.
    pub moved: bool,
    /// A disk holds writes for lack of space and wants the VM paused.
    pub disk_full: bool,
}

impl GuestSignals {
    /// Flags that call `wake` (which must not block) when the first of them is set.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            reset: AtomicBool::new(false),
            power_off: AtomicBool::new(false),
            ejected: AtomicU32::new(0),
            vcpu_failed: AtomicBool::new(false),
            moved: AtomicBool::new(false),
            disk_full: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            wake: Box::new(wake),
        }
    }

    /// The guest wants to be reset.
    pub fn reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        self.wake_once();
    }

    /// The guest wants to be powered off.
    pub fn power_off(&self) {
        self.power_off.store(true, Ordering::SeqCst);
        self.wake_once();
    }

    /// The guest has let go of the device in `slot` (0–31; others are ignored).
    pub fn eject(&self, slot: u8) {
        if let Some(bit) = 1u32.checked_shl(slot.into()) {
            self.ejected.fetch_or(bit, Ordering::SeqCst);
            self.wake_once();
        }
    }

    /// A vCPU can't go on.
    pub fn vcpu_failed(&self) {
        self.vcpu_failed.store(true, Ordering::SeqCst);
        self.wake_once();
    }

    /// A driver took or gave up a device, and may have placed its BARs elsewhere before.
    pub fn moved(&self) {
        self.moved.store(true, Ordering::SeqCst);
        self.wake_once();
    }

    /// A disk wants the VM paused until the host has space.
    pub fn disk_full(&self) {
        self.disk_full.store(true, Ordering::SeqCst);
        self.wake_once();
    }

    /// Takes all flags; those set from now on wake again. Called on the VMM thread.
    pub fn take(&self) -> Signalled {
        self.woken.store(false, Ordering::SeqCst);
        Signalled {
            reset: self.reset.swap(false, Ordering::SeqCst),
            power_off: self.power_off.swap(false, Ordering::SeqCst),
            ejected: self.ejected.swap(0, Ordering::SeqCst),
            vcpu_failed: self.vcpu_failed.swap(false, Ordering::SeqCst),
            moved: self.moved.swap(false, Ordering::SeqCst),
            disk_full: self.disk_full.swap(false, Ordering::SeqCst),
        }
    }

    fn wake_once(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            (self.wake)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_guest_that_signals_in_a_loop_wakes_the_vmm_once_per_look() {
        let wakes = Arc::new(AtomicUsize::new(0));
        let counter = wakes.clone();
        let signals = GuestSignals::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        for slot in 0..=255 {
            signals.eject(slot);
        }
        signals.reset();
        assert_eq!(wakes.load(Ordering::SeqCst), 1);
        let seen = signals.take();
        assert!(seen.reset && seen.ejected == u32::MAX && !seen.power_off);
        assert_eq!(signals.take(), Signalled::default());
        signals.power_off();
        assert_eq!(wakes.load(Ordering::SeqCst), 2);
    }
}
