//! A limit on log lines that a guest can provoke.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines let through per [`WINDOW`].
const LINES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// Lets a few lines through in ten seconds, and counts the rest.
pub(crate) struct Throttle(Mutex<State>);

struct State {
    window: Instant,
    passed: u32,
    suppressed: u64,
}

impl Default for Throttle {
    fn default() -> Self {
        Self(Mutex::new(State {
            window: Instant::now(),
            passed: 0,
            suppressed: 0,
        }))
    }
}

impl Throttle {
    /// `Some` when a line may be written: how many were suppressed since the last one.
    pub(crate) fn pass(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.window.elapsed() >= WINDOW {
            state.window = Instant::now();
            state.passed = 0;
        }
        if state.passed >= LINES {
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
    fn a_storm_of_lines_is_cut_to_a_few() {
        let throttle = Throttle::default();
        let passed = (0..1000).filter(|_| throttle.pass().is_some()).count();
        assert_eq!(passed, LINES as usize);
    }
}
