//! What the registers of a balloon (vCPU threads), its control (VMM thread) and its worker share.
//!
//! Configuration space (virtio 1.3 §5.5.4), little-endian:
//!
//! ```text
//!  0 num_pages                 the target: the host's, the driver can't write it
//!  4 actual                    what the driver says it has given; never trusted
//!  8 free_page_hint_cmd_id     0: hinting is not offered
//! 12 poison_val                the driver's, until DRIVER_OK
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use utoipa::ToSchema;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::pages::PAGE;
use super::stats::Statistics;
use crate::guest_memory::discard::inhibit::{Inhibitor, Reason};
use crate::virtio::config_space;

/// How long the guest may come no closer to the target before the balloon counts as stalled.
pub const STALL: Duration = Duration::from_secs(5);

const ACTUAL: u64 = 4;
const POISON: u64 = 12;
const SIZE: usize = 16;

/// Where a balloon stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = BalloonState)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The guest is on its way to the target.
    InProgress,
    /// It is there: it says so, and has sent as many pages.
    Reached,
    /// It has come no closer for five seconds: it has no driver, does not want to, or can't; or it
    /// says that it is there and has not sent the pages.
    Stalled,
}

/// Called with true when the guest has answered, with false when it has not in time.
pub type Asked = Box<dyn FnOnce(bool) + Send>;

/// Totals since the device was made, in bytes unless named otherwise.
#[derive(Default)]
pub struct Counters {
    /// Given back to the host by inflating.
    pub inflated: AtomicU64,
    /// Taken back by the guest, by its word.
    pub deflated: AtomicU64,
    /// Given back to the host by free page reporting.
    pub reported: AtomicU64,
    /// Not discarded: parts of a huge page whose rest is not in the balloon.
    pub inhibited_partial: AtomicU64,
    /// Not discarded: free pages the guest expects to keep a pattern other than zeroes.
    pub inhibited_poison: AtomicU64,
    /// Not discarded: locked into memory.
    pub inhibited_locked: AtomicU64,
    /// Not discarded: held off while a passed-through device has memory pinned.
    pub inhibited_vfio: AtomicU64,
    /// Not discarded: held off while writes are recorded.
    pub inhibited_dirty_log: AtomicU64,
    /// Not discarded: held off while memory comes from a snapshot as it is touched.
    pub inhibited_lazy_restore: AtomicU64,
    /// Of what was given back by inflating: had been held off before.
    pub retried: AtomicU64,
    /// Not discarded: the host failed.
    pub failed: AtomicU64,
    /// Not RAM, or too much for one request.
    pub ignored: AtomicU64,
    /// System calls that discarded.
    pub discards: AtomicU64,
}

impl Counters {
    /// What was held off for a reason.
    pub fn held_off(&self, reason: Reason) -> &AtomicU64 {
        match reason {
            Reason::Vfio => &self.inhibited_vfio,
            Reason::DirtyLog => &self.inhibited_dirty_log,
            Reason::LazyRestore => &self.inhibited_lazy_restore,
        }
    }
}

/// See the module.
pub struct Shared {
    epoch: Instant,
    /// Holds discards off, here and in the VM's other balloons.
    pub inhibitor: Inhibitor,
    target: AtomicU32,
    actual: AtomicU32,
    /// Pages that the driver has sent and not taken back: no more than RAM has.
    given: AtomicU32,
    poison: AtomicU32,
    live: AtomicBool,
    /// The least distance to the target, in pages, since the guest set out for it …
    best: AtomicU32,
    /// … and when it got there, in milliseconds since `epoch`.
    best_ms: AtomicU64,
    /// Bytes that are in the balloon and not discarded yet.
    pub pending: AtomicU64,
    /// Bytes that are in the balloon and were held off; they are discarded when nothing holds
    /// discards off any more.
    pub held_off: AtomicU64,
    /// Bytes per second, lately; negative while deflating.
    pub rate: AtomicI64,
    /// The worker looks at the progress by itself, and need not be told of it.
    pub watched: AtomicBool,
    /// Wakes the worker: the target, a question, or news of the progress.
    pub wake: Arc<EventFd>,
    questions: Mutex<Vec<Asked>>,
    /// The guest's statistics.
    pub statistics: Statistics,
    /// What was done.
    pub counters: Counters,
}

impl Shared {
    /// The state of a balloon that no driver has touched.
    pub fn new(target_bytes: u64, inhibitor: Inhibitor) -> io::Result<Self> {
        let target = to_pages(target_bytes);
        Ok(Self {
            epoch: Instant::now(),
            inhibitor,
            target: AtomicU32::new(target),
            actual: AtomicU32::new(0),
            given: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            live: AtomicBool::new(false),
            best: AtomicU32::new(target),
            best_ms: AtomicU64::new(0),
            pending: AtomicU64::new(0),
            held_off: AtomicU64::new(0),
            rate: AtomicI64::new(0),
            watched: AtomicBool::new(false),
            wake: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            questions: Mutex::default(),
            statistics: Statistics::default(),
            counters: Counters::default(),
        })
    }

    /// Milliseconds of the device's clock.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Bytes the guest is asked to give.
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.target.load(Ordering::SeqCst)) * PAGE
    }

    /// Bytes the guest says it has given.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.actual.load(Ordering::SeqCst)) * PAGE
    }

    /// Bytes of the pages that the driver has sent and not taken back.
    pub fn given_bytes(&self) -> u64 {
        u64::from(self.given.load(Ordering::SeqCst)) * PAGE
    }

    /// Whether the guest says that it has given neither more nor less than it is asked for, and has
    /// sent as many pages. It may have sent more: a driver that has not promised to tell takes
    /// pages back as it likes.
    pub fn reached(&self) -> bool {
        let actual = self.actual.load(Ordering::SeqCst);
        actual == self.target.load(Ordering::SeqCst) && actual <= self.given.load(Ordering::SeqCst)
    }

    /// What free pages hold, by the guest's word.
    pub fn poison(&self) -> u32 {
        self.poison.load(Ordering::SeqCst)
    }

    /// Whether a driver is running the device.
    pub fn live(&self) -> bool {
        self.live.load(Ordering::SeqCst)
    }

    /// The worker has got the queues, or given them up.
    pub fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::SeqCst);
    }

    /// Sets the target and wakes the worker, which tells the driver. Called on the VMM thread.
    pub fn set_target(&self, bytes: u64) {
        self.target.store(to_pages(bytes), Ordering::SeqCst);
        self.set_out();
        self.wake();
    }

    /// The time until the balloon counts as stalled begins anew.
    pub fn set_out(&self) {
        self.note_progress(self.distance());
    }

    /// Pages from the target, by what the guest says as far as it has sent the pages.
    fn distance(&self) -> u32 {
        let actual = self.actual.load(Ordering::SeqCst);
        let given = self.given.load(Ordering::SeqCst);
        self.target
            .load(Ordering::SeqCst)
            .abs_diff(actual.min(given))
    }

    fn note_progress(&self, distance: u32) {
        self.best.store(distance, Ordering::SeqCst);
        self.best_ms.store(self.now_ms(), Ordering::SeqCst);
    }

    /// Where the balloon stands.
    pub fn state(&self) -> State {
        let since_ms = self
            .now_ms()
            .saturating_sub(self.best_ms.load(Ordering::SeqCst));
        if self.reached() {
            State::Reached
        } else if u128::from(since_ms) >= STALL.as_millis() {
            State::Stalled
        } else {
            State::InProgress
        }
    }

    /// Wakes the worker.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then it wakes anyway.
        let _ = self.wake.write(1);
    }

    /// Has the worker ask the guest for fresh statistics; never blocks.
    pub fn ask(&self, asked: Asked) {
        self.questions().push(asked);
        if self.live() {
            self.wake();
            return;
        }
        // Nobody to ask. Looked at after the push, so that a driver that goes just now either
        // leaves it to this, or its end takes the question too.
        for asked in self.take_questions() {
            asked(false);
        }
    }

    /// Takes the questions that nobody has taken yet.
    pub fn take_questions(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.questions())
    }

    fn questions(&self) -> MutexGuard<'_, Vec<Asked>> {
        self.questions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space as it is now.
    pub fn image(&self) -> [u8; SIZE] {
        let mut image = [0; SIZE];
        let mut put = |offset: u64, value: u32| {
            config_space::write(&mut image, offset, &value.to_le_bytes());
        };
        put(0, self.target.load(Ordering::SeqCst));
        put(ACTUAL, self.actual.load(Ordering::SeqCst));
        put(POISON, self.poison());
        image
    }

    /// A driver's write to the configuration space. Called on vCPU threads.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut image = self.image();
        config_space::write(&mut image, offset, data);
        let field = |at: u64| {
            let mut bytes = [0; 4];
            config_space::read(&image, at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        if !self.live() {
            self.poison.store(field(POISON), Ordering::SeqCst);
        }
        self.set_actual(field(ACTUAL));
    }

    fn set_actual(&self, actual: u32) {
        self.change(&self.actual, actual);
    }

    /// The driver has sent or taken back pages: so many bytes are in the balloon now. Called on
    /// the worker.
    pub fn set_given(&self, bytes: u64) {
        self.change(&self.given, to_pages(bytes));
    }

    fn change(&self, value: &AtomicU32, new: u32) {
        let was_reached = self.reached();
        if value.swap(new, Ordering::SeqCst) == new {
            return;
        }
        let reached = self.reached();
        if was_reached && reached {
            return;
        }
        let distance = self.distance();
        if was_reached || distance < self.best.load(Ordering::SeqCst) {
            // It has left the target by itself, or come closer than ever.
            self.note_progress(distance);
        }
        // The worker is told of the start and of the end, and looks at what is between by itself.
        if reached || !self.watched.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// The device is reset: all pages are the guest's again (virtio 1.3 §2.1).
    pub fn reset(&self) {
        self.poison.store(0, Ordering::SeqCst);
        self.set_actual(0);
    }
}

/// Pages of `bytes`, which configuration and control have found to be countable.
fn to_pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(shared: &Shared, at: usize) -> u32 {
        u32::from_le_bytes(shared.image()[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_driver_can_write_actual_and_before_driver_ok_poison_val_and_nothing_else() {
        let shared = Shared::new(16 * PAGE, Inhibitor::default()).unwrap();
        shared.write(0, &[0xff; 12]);
        shared.write(8, &[0xee; 4]);
        shared.write(12, &[0xaa; 64]);
        shared.write(u64::MAX, &[1]);
        assert_eq!(word(&shared, 0), 16);
        assert_eq!(word(&shared, 4), u32::MAX);
        assert_eq!(word(&shared, 8), 0);
        assert_eq!(word(&shared, 12), 0xaaaa_aaaa);
        shared.set_live(true);
        shared.write(12, &[0x11; 4]);
        assert_eq!(shared.poison(), 0xaaaa_aaaa);
        shared.write(4, &[7]);
        assert_eq!(word(&shared, 4), 0xffff_ff07);
        shared.reset();
        assert_eq!((shared.actual_bytes(), shared.poison()), (0, 0));
        assert_eq!(shared.target_bytes(), 16 * PAGE);
    }

    #[test]
    fn coming_closer_is_progress_and_going_to_and_fro_is_not() {
        let shared = Shared {
            epoch: Instant::now() - 2 * STALL,
            ..Shared::new(100 * PAGE, Inhibitor::default()).unwrap()
        };
        assert_eq!(shared.state(), State::Stalled);
        shared.set_given(200 * PAGE);
        shared.set_out();
        assert_eq!(shared.state(), State::InProgress);
        let expire = || shared.best_ms.store(0, Ordering::SeqCst);
        let say = |pages: u32| shared.write(4, &pages.to_le_bytes());
        say(50);
        expire();
        for pages in [10, 50, 49, 151, u32::MAX] {
            say(pages);
            assert_eq!(shared.state(), State::Stalled, "{pages}");
        }
        say(51);
        assert_eq!(shared.state(), State::InProgress);
        expire();
        say(100);
        assert_eq!(shared.state(), State::Reached);
        // It takes some back: a new way to go.
        say(90);
        assert_eq!(shared.state(), State::InProgress);
    }

    #[test]
    fn the_target_is_reached_when_the_pages_have_come_and_not_by_word() {
        let shared = Shared::new(100 * PAGE, Inhibitor::default()).unwrap();
        let expire = || shared.best_ms.store(0, Ordering::SeqCst);
        let say = |pages: u32| shared.write(4, &pages.to_le_bytes());
        let shared_ = &shared;
        let stalls = |pages: u32| {
            std::thread::sleep(Duration::from_millis(2));
            expire();
            say(pages);
            // Nothing of this is progress.
            shared_.best_ms.load(Ordering::SeqCst) == 0
        };
        for pages in [100, 99, 100, 0, 100] {
            assert!(stalls(pages), "{pages}");
            assert!(!shared.reached());
        }
        shared.set_given(40 * PAGE);
        assert!(
            shared.best_ms.load(Ordering::SeqCst) > 0,
            "it gives after all"
        );
        assert_eq!(
            (shared.given_bytes(), shared.actual_bytes()),
            (40 * PAGE, 100 * PAGE)
        );
        assert_eq!(shared.state(), State::InProgress);
        shared.set_given(100 * PAGE);
        assert_eq!(shared.state(), State::Reached);
        // It takes some back, and tells of it before it says so; and then gives them again.
        expire();
        shared.set_given(90 * PAGE);
        assert_eq!(shared.state(), State::InProgress);
        say(90);
        expire();
        shared.set_given(95 * PAGE);
        assert!(!stalls(95), "closer than ever since");
    }
}
