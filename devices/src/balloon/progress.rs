//! Watching the guest on its way to the target, once a second and only while it is on its way, and
//! telling of it: progress at most once a second, and where it ends, which is also told at most
//! once a second while the target is the same.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::shared::{Shared, State};
use crate::event::{BalloonNews, DeviceEvent, Reporter};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// What the worker remembers of the progress.
pub struct Watch {
    shared: Arc<Shared>,
    reporter: Reporter,
    /// The target that the driver was told of last.
    announced: Option<u64>,
    /// Where the balloon stood when that was last told.
    told: Option<State>,
    /// When it was last told that the present target is reached.
    reached: Option<Instant>,
    /// When the balloon was looked at last, and its size then.
    seen: Option<(Instant, u64)>,
}

impl Watch {
    /// Nothing was told yet.
    pub fn new(shared: Arc<Shared>, reporter: Reporter) -> Self {
        Self {
            // What a driver finds when it looks for the first time need not be told.
            announced: Some(0),
            shared,
            reporter,
            told: Some(State::Reached),
            reached: None,
            seen: None,
        }
    }

    /// Whether the target is another than the last time; the driver is to be told then.
    pub fn take_new_target(&mut self) -> bool {
        let target = Some(self.shared.target_bytes());
        if self.announced == target {
            return false;
        }
        self.announced = target;
        self.told = None;
        self.reached = None;
        true
    }

    /// There is a new driver, which may have looked at the target before it was changed.
    pub fn forget_target(&mut self) {
        if !self.shared.reached() {
            self.announced = None;
        }
    }

    /// Looks how things stand and tells it; says when to look again.
    pub fn look(&mut self) -> Option<Duration> {
        let state = self.shared.state();
        let now = Instant::now();
        let (target, actual) = (self.shared.target_bytes(), self.shared.actual_bytes());
        let since = self.seen.map(|(at, _)| now.saturating_duration_since(at));
        if state == State::InProgress
            && let Some(left) = since.and_then(|since| INTERVAL.checked_sub(since))
            && !left.is_zero()
        {
            // Woken in between.
            return Some(left);
        }
        if state == State::Reached
            && self.told != Some(state)
            && let Some(told) = self.reached
            && let Some(left) = INTERVAL.checked_sub(now.saturating_duration_since(told))
            && !left.is_zero()
        {
            // A guest that goes to and fro floods nobody.
            return Some(left);
        }
        let news = match state {
            State::Reached if self.told != Some(state) => Some(BalloonNews::Reached),
            State::Stalled if self.told != Some(state) => Some(BalloonNews::Stalled),
            State::InProgress if self.seen.is_some_and(|(_, before)| before != actual) => {
                Some(BalloonNews::Progress)
            }
            _ => None,
        };
        if news == Some(BalloonNews::Reached) {
            self.reached = Some(now);
        }
        self.told = Some(state);
        let rate = match (state, self.seen, since) {
            (State::InProgress, Some((_, before)), Some(since)) => {
                per_second(before, actual, since)
            }
            _ => 0,
        };
        self.shared.rate.store(rate, Ordering::Relaxed);
        if let Some(news) = news {
            self.reporter.report(DeviceEvent::Balloon {
                news,
                target_bytes: target,
                actual_bytes: actual,
            });
        }
        if state == State::InProgress {
            self.seen = Some((now, actual));
            self.shared.watched.store(true, Ordering::SeqCst);
            return Some(INTERVAL);
        }
        self.seen = None;
        self.shared.watched.store(false, Ordering::SeqCst);
        // The guest may have moved on just before that.
        if self.shared.state() != state || self.shared.actual_bytes() != actual {
            self.shared.wake();
        }
        None
    }
}

/// Bytes per second, negative where it became less.
fn per_second(before: u64, after: u64, time: Duration) -> i64 {
    let rate = u128::from(before.abs_diff(after)) * 1000 / time.as_millis().max(1);
    let rate = i64::try_from(rate).unwrap_or(i64::MAX);
    if after < before { -rate } else { rate }
}
