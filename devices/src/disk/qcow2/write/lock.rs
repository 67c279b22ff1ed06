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
    /// In the order in which they came, and of their numbers.
    entries: Vec<Entry>,
    waiting: usize,
}

impl State {
    fn find(&self, number: u64) -> Option<usize> {
        self.entries
            .binary_search_by_key(&number, |e| e.number)
            .ok()
    }
}

struct Entry {
    number: u64,
    first: u64,
    last: u64,
    alone: bool,
    /// Those before it that it waits for: a queue may be thousands of requests deep, and nobody is
    /// to look at each pair of them again and again.
    waits_for: usize,
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
            let state = &mut *state;
            let place = state.find(guard.number);
            match place.and_then(|place| state.entries.get_mut(place)) {
                Some(entry) if entry.waits_for > 0 => {
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
            waits_for: 0,
            waker: None,
        };
        let before = state.entries.iter();
        entry.waits_for = before.filter(|other| other.conflicts(&entry)).count();
        state.waiting += usize::from(entry.waits_for > 0);
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
        let Some(index) = state.find(self.number) else {
            return;
        };
        let gone = state.entries.remove(index);
        state.waiting -= usize::from(gone.waits_for > 0);
        if state.waiting == 0 {
            return;
        }
        for entry in state.entries.iter_mut().skip(index) {
            if entry.conflicts(&gone) {
                entry.waits_for -= 1;
                if entry.waits_for == 0 {
                    state.waiting -= 1;
                    if let Some(waker) = entry.waker.take() {
                        waker.wake();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::pin::pin;
    use std::task::Context;
    use std::time::{Duration, Instant};

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

    #[test]
    fn thousands_behind_one_another_and_behind_others_are_soon_through() {
        const EACH: u64 = 3000;
        let begun = Instant::now();
        let lock = RangeLock::default();
        let readers: Vec<_> = (1..=EACH).map(|n| take(&lock, n, n, false)).collect();
        let mut writer = take(&lock, 0, 0, true);
        let lock_it = |_| Box::pin(lock.lock(0, 0, true));
        let mut waiting: VecDeque<_> = (0..EACH).map(lock_it).collect();
        let mut context = Context::from_waker(Waker::noop());
        for other in &mut waiting {
            assert!(other.as_mut().poll(&mut context).is_pending());
        }
        while let Some(mut next) = waiting.pop_front() {
            drop(writer);
            writer = match next.as_mut().poll(&mut context) {
                Poll::Ready(guard) => Some(guard),
                Poll::Pending => panic!("its turn, with {} behind it", waiting.len()),
            };
            let behind = waiting.front_mut();
            assert!(behind.is_none_or(|b| b.as_mut().poll(&mut context).is_pending()));
        }
        drop(writer);
        drop(readers);
        assert!(take(&lock, 0, EACH, true).is_some());
        // A fraction of a second, or half a minute where each looks at all pairs.
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
}
