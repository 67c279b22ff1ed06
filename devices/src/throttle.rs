//! A limit on what a guest can provoke: log lines, events.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets a few through per window of time, and counts the rest.
pub struct Throttle {
    most: u32,
    window: Duration,
    state: Mutex<State>,
}

struct State {
    since: Instant,
    passed: u32,
    suppressed: u64,
}

impl Default for Throttle {
    /// What suits log lines: five in ten seconds.
    fn default() -> Self {
        Self::new(5, Duration::from_secs(10))
    }
}

impl Throttle {
    /// Lets `most` through in each `window`.
    pub fn new(most: u32, window: Duration) -> Self {
        Self {
            most,
            window,
            state: Mutex::new(State {
                since: Instant::now(),
                passed: 0,
                suppressed: 0,
            }),
        }
    }

    /// `Some` when this one may pass: how many were suppressed since the last that did.
    pub fn pass(&self) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.since.elapsed() >= self.window {
            state.since = Instant::now();
            state.passed = 0;
        }
        if state.passed >= self.most {
            state.suppressed += 1;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_cut_to_a_few() {
        let throttle = Throttle::default();
        let passed = (0..1000).filter(|_| throttle.pass().is_some()).count();
        assert_eq!(passed, 5);
    }
}
