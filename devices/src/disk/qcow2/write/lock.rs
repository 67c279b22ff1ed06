//! Waiting for one another, among the requests of one thread.
//!
//! A [`RangeLock`] is taken for a range of numbers (the clusters of a request, say), alone or
//! together with others who only look. Whoever came first goes first, so nobody starves. A guard
//! that is dropped gives up its place, whether or not it has been granted yet.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// See the module.
#[derive(Clone, Default)]
pub struct RangeLock {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// In the order in which they came.
    entries: Vec<Entry>,
    waiting: usize,
}

struct Entry {
    number: u64,
    first: u64,
    last: u64,
    alone: bool,
    granted: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn conflicts(&self, other: &Self) -> bool {
        (self.alone || other.alone) && self.first <= other.last && other.first <= self.last
    }
}

/// A place in a [`RangeLock`].
pub struct RangeGuard {
    state: Arc<Mutex<State>>,
    number: u64,
}

/// Locks what no panic can leave half done: a panic ends the process.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RangeLock {
    /// Waits for the range `first` to `last`.
    pub async fn lock(&self, first: u64, last: u64, alone: bool) -> RangeGuard {
        let guard = self.enqueue(first, last, alone);
        poll_fn(|context| {
            let mut state = locked(&guard.state);
            match state.entries.iter_mut().find(|e| e.number == guard.number) {
                Some(entry) if !entry.granted => {
                    entry.waker = Some(context.waker().clone());
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
        guard
    }

    /// Waits for the only place there is.
    pub async fn only(&self) -> RangeGuard {
        self.lock(0, 0, true).await
    }

    fn enqueue(&self, first: u64, last: u64, alone: bool) -> RangeGuard {
        let mut state = locked(&self.state);
        let number = state.next;
        state.next += 1;
        let mut entry = Entry {
            number,
            first,
            last,
            alone,
            granted: false,
            waker: None,
        };
        entry.granted = !state.entries.iter().any(|other| other.conflicts(&entry));
        state.waiting += usize::from(!entry.granted);
        state.entries.push(entry);
        RangeGuard {
            state: self.state.clone(),
            number,
        }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = locked(&self.state);
        let state = &mut *state;
        let Some(index) = state.entries.iter().position(|e| e.number == self.number) else {
            return;
        };
        let gone = state.entries.remove(index);
        state.waiting -= usize::from(!gone.granted);
        if state.waiting == 0 {
            return;
        }
        for index in 0..state.entries.len() {
            let (before, rest) = state.entries.split_at_mut(index);
            let Some(entry) = rest.first_mut() else { break };
            if !entry.granted
                && entry.conflicts(&gone)
                && !before.iter().any(|other| other.conflicts(entry))
            {
                entry.granted = true;
                state.waiting -= 1;
                if let Some(waker) = entry.waker.take() {
                    waker.wake();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    /// Polls once.
    fn take(lock: &RangeLock, first: u64, last: u64, alone: bool) -> Option<RangeGuard> {
        let future = pin!(lock.lock(first, last, alone));
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let lock = RangeLock::default();
        let one = take(&lock, 0, 9, false).unwrap();
        let two = take(&lock, 5, 15, false).unwrap();
        assert!(take(&lock, 9, 9, true).is_none());
        let beside = take(&lock, 16, 20, true).unwrap();
        assert!(take(&lock, 20, 30, false).is_none());
        drop((one, two, beside));
        assert!(take(&lock, 0, 30, true).is_some());
    }

    #[test]
    fn nobody_overtakes_one_who_waits_for_the_same() {
        let lock = RangeLock::default();
        let reader = take(&lock, 0, 9, false).unwrap();
        let mut writer = Box::pin(lock.lock(3, 4, true));
        let mut context = Context::from_waker(Waker::noop());
        assert!(writer.as_mut().poll(&mut context).is_pending());
        assert!(take(&lock, 4, 5, false).is_none(), "the writer came first");
        assert!(take(&lock, 5, 6, false).is_some());
        drop(reader);
        assert!(writer.as_mut().poll(&mut context).is_ready());
    }
}
