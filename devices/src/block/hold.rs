//! Writes for which the host has no space, as all queues of a disk see them.
//!
//! ```text
//!            first write fails                    every write done,
//!   quiet ───────────────────► full ── retry… ──► reported or reset ──► quiet
//!            event disk-full     ▲ │ fails again         event disk-resumed
//!                                └─┘ pause-vm: event disk-full again
//! ```
//!
//! The requests themselves stay with the thread of their queue, which counts them here from the
//! first failure to the end of each. The lock is taken where a write fails for lack of space and
//! nowhere else.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::config::{DiskConfig, OnEnospc};
use crate::disk::space;
use crate::event::{DeviceEvent, HoldOutcome, Reporter};

/// Between two tries to do what is held.
const RETRY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Hold {
    policy: OnEnospc,
    grace: Option<Duration>,
    file: Mutex<Arc<File>>,
    reporter: Reporter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    requests: u64,
    bytes: u64,
    /// Somebody has heard of it, in this round.
    told: bool,
    /// Somebody has heard of it at all.
    ever_told: bool,
    outcome: Option<HoldOutcome>,
    /// What was held by then is not to be held any longer.
    given_up: Option<Instant>,
}

impl Hold {
    /// Nothing is held. `file` is where the space is wanted.
    pub fn new(config: &DiskConfig, file: Arc<File>, reporter: Reporter) -> Self {
        Self {
            policy: config.on_enospc,
            grace: config.enospc_grace_ms.map(Duration::from_millis),
            file: Mutex::new(file),
            reporter,
            state: Mutex::default(),
        }
    }

    /// Whether a request that failed with `error`, for the first time `since`, is to be held.
    pub fn wants(&self, error: &io::Error, since: Option<Instant>, now: Instant) -> bool {
        self.policy != OnEnospc::Report
            && is_no_space(error)
            && !self.is_over(since, now)
            && !since.is_some_and(|since| self.is_given_up(since))
    }

    /// What is held now is to fail if there is still no space when it is tried next. Called on the
    /// VMM thread.
    pub fn give_up(&self) {
        self.state().given_up = Some(Instant::now());
    }

    /// Whether that was said after `since`.
    pub fn is_given_up(&self, since: Instant) -> bool {
        self.state().given_up.is_some_and(|until| since <= until)
    }

    fn is_over(&self, since: Option<Instant>, now: Instant) -> bool {
        let held = since.map(|since| now.saturating_duration_since(since));
        self.grace
            .zip(held)
            .is_some_and(|(grace, held)| held >= grace)
    }

    /// When to try again what has been held since `since`.
    pub fn next_try(&self, since: Instant, now: Instant) -> Duration {
        let held = now.saturating_duration_since(since);
        let left = self.grace.map(|grace| grace.saturating_sub(held));
        left.map_or(RETRY, |left| left.min(RETRY))
    }

    /// A request of so many bytes failed, for the first time or `again`.
    pub fn failed(&self, bytes: u64, error: &io::Error, again: bool) {
        let mut state = self.state();
        if !again {
            state.requests += 1;
            state.bytes = state.bytes.saturating_add(bytes);
        }
        if state.told {
            return;
        }
        state.told = self.reporter.disk_full(|| DeviceEvent::DiskFull {
            pause: self.policy == OnEnospc::PauseVm,
            needed_bytes: bytes,
            free_bytes: self.free_bytes(),
            error: error.to_string(),
        });
        state.ever_told |= state.told;
    }

    /// A request that was held is done with.
    pub fn ended(&self, bytes: u64, outcome: HoldOutcome) {
        let mut state = self.state();
        state.requests = state.requests.saturating_sub(1);
        state.bytes = state.bytes.saturating_sub(bytes);
        state.outcome = state.outcome.max(Some(outcome));
        if state.requests == 0 {
            let ended = std::mem::take(&mut *state);
            if let Some(outcome) = ended.outcome.filter(|_| ended.ever_told) {
                self.reporter.disk_resumed(outcome);
            }
        }
    }

    /// The VM goes on after a pause: when the next try fails it is to be paused anew.
    pub fn vm_resumed(&self) {
        if self.policy == OnEnospc::PauseVm {
            self.state().told = false;
        }
    }

    /// Whether the VM is to stand still for it.
    pub fn wants_pause(&self) -> bool {
        self.policy == OnEnospc::PauseVm && self.state().requests > 0
    }

    /// How many requests are held, of how many bytes.
    pub fn held(&self) -> (u64, u64) {
        let state = self.state();
        (state.requests, state.bytes)
    }

    /// The image grows in another file from now on. Called on the VMM thread.
    pub fn set_file(&self, file: Arc<File>) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }

    fn free_bytes(&self) -> Option<u64> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let file = file.clone();
        Some(space::of_file_system(&file).ok()??.free)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the host has no space, or no more for us.
pub fn is_no_space(error: &io::Error) -> bool {
    rustix::io::Errno::from_io_error(error).is_some_and(space::is_no_space)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hold(more: serde_json::Value) -> (Hold, Arc<Mutex<Vec<DeviceEvent>>>) {
        let mut config = json!({"path": "/x"});
        for (name, value) in more.as_object().unwrap() {
            config[name] = value.clone();
        }
        let config: DiskConfig = serde_json::from_value(config).unwrap();
        let events = Arc::new(Mutex::new(Vec::new()));
        let sink = events.clone();
        let reporter = Reporter::new(
            "disk",
            Arc::new(move |_, event| sink.lock().unwrap().push(event)),
        );
        let file = Arc::new(tempfile::tempfile().unwrap());
        (Hold::new(&config, file, reporter), events)
    }

    fn full() -> io::Error {
        io::Error::from_raw_os_error(libc::EDQUOT)
    }

    #[test]
    fn only_lack_of_space_is_held_and_only_so_long() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let other = io::Error::from_raw_os_error(libc::EIO);
        let (forever, _) = hold(json!({}));
        assert!(forever.wants(&full(), None, now));
        assert!(forever.wants(&full(), Some(now), at(u64::from(u32::MAX))));
        assert!(!forever.wants(&other, None, now));
        assert_eq!(forever.next_try(now, at(5000)), RETRY);
        let (never, _) = hold(json!({"on_enospc": "report"}));
        assert!(!never.wants(&full(), None, now));
        let (short, _) = hold(json!({"enospc_grace_ms": 1500}));
        assert!(short.wants(&full(), None, now));
        assert!(short.wants(&full(), Some(now), at(1499)));
        assert!(!short.wants(&full(), Some(now), at(1500)));
        assert_eq!(short.next_try(now, at(1200)), Duration::from_millis(300));
        assert_eq!(short.next_try(now, at(9000)), Duration::ZERO);
    }

    #[test]
    fn however_many_requests_are_held_it_is_told_once_and_so_is_the_end() {
        let (hold, events) = hold(json!({}));
        for bytes in [512, 1024] {
            hold.failed(bytes, &full(), false);
            hold.failed(bytes, &full(), true);
        }
        assert_eq!(hold.held(), (2, 1536));
        assert!(!hold.wants_pause());
        hold.ended(512, HoldOutcome::Reported);
        assert_eq!(events.lock().unwrap().len(), 1);
        hold.ended(1024, HoldOutcome::Done);
        assert_eq!(hold.held(), (0, 0));
        let events = events.lock().unwrap();
        let [
            DeviceEvent::DiskFull {
                pause: false,
                needed_bytes: 512,
                free_bytes: Some(_),
                ..
            },
            end,
        ] = &events[..]
        else {
            panic!("{events:?}");
        };
        let outcome = HoldOutcome::Reported;
        assert_eq!(*end, DeviceEvent::DiskResumed { outcome });
    }

    #[test]
    fn what_is_given_up_is_held_no_longer_and_what_comes_later_is() {
        let (hold, _) = hold(json!({}));
        let before = Instant::now();
        hold.failed(512, &full(), false);
        hold.give_up();
        assert!(!hold.wants(&full(), Some(before), before));
        let later = Instant::now() + Duration::from_millis(1);
        assert!(hold.wants(&full(), None, later));
        assert!(hold.wants(&full(), Some(later), later));
        hold.ended(512, HoldOutcome::Reported);
        assert!(
            !hold.is_given_up(before),
            "with the last that was held it is over"
        );
    }

    #[test]
    fn a_vm_that_was_resumed_while_there_is_no_space_is_paused_anew() {
        let (hold, events) = hold(json!({"on_enospc": "pause-vm"}));
        hold.failed(512, &full(), false);
        hold.failed(512, &full(), true);
        assert_eq!(events.lock().unwrap().len(), 1);
        assert!(hold.wants_pause());
        hold.vm_resumed();
        hold.failed(512, &full(), true);
        assert_eq!(events.lock().unwrap().len(), 2);
        hold.vm_resumed();
        hold.ended(512, HoldOutcome::Done);
        assert!(!hold.wants_pause());
        let last = events.lock().unwrap().pop().unwrap();
        let outcome = HoldOutcome::Done;
        assert_eq!(last, DeviceEvent::DiskResumed { outcome });
    }
}
