//! Chains that the host has no space for: held, and tried again when the timer or a client says so.
//! How long and how often is [`crate::block::hold`]'s to say.

use std::time::{Duration, Instant};

use super::active::{Active, Held, Pending};
use super::{MAX_IN_FLIGHT, QueueHandler};
use crate::disk::{Buffers, Operation};
use crate::worker::WorkerError;

impl QueueHandler {
    /// Holds a chain, or gives it back: a hint is not worth it, and what an engine has kept of the
    /// data can't be written again.
    pub(super) fn hold(
        &mut self,
        lane: usize,
        mut pending: Pending,
        mut buffers: Buffers,
        error: &std::io::Error,
        now: Instant,
    ) -> Option<(Pending, Buffers)> {
        buffers.rewind();
        let whole = match pending.operation {
            Operation::Read | Operation::Discard => false,
            Operation::Write { .. } => buffers.len_bytes() == pending.length,
            Operation::Flush | Operation::WriteZeroes { .. } => true,
        };
        let Some(active) = self.active.get_mut(lane).filter(|_| whole) else {
            return Some((pending, buffers));
        };
        let again = pending.held_since.is_some();
        let since = *pending.held_since.get_or_insert(now);
        let hold = &self.common.hold;
        hold.failed(pending.length, error, again);
        active.held.push(Held { pending, buffers });
        let wait = hold.next_try(since, now);
        self.arm_to_try_again(wait);
        None
    }

    /// Sets the timer, unless it runs out before that: whoever fails now must not put off what
    /// failed earlier.
    fn arm(&mut self, wait: Duration) -> std::io::Result<()> {
        let due = Instant::now() + wait;
        if self.retry_due.is_none_or(|earlier| due < earlier) {
            self.retry.set(wait)?;
            self.retry_due = Some(due);
        }
        Ok(())
    }

    fn arm_to_try_again(&mut self, wait: Duration) {
        if let Err(error) = self.arm(wait) {
            // There is still the client.
            tracing::error!(%error, "setting the timer to try again");
        }
    }

    /// Sees to it that what is held is tried again, where the timer ran out for something else.
    pub(super) fn rearm(&mut self) {
        if self.retry_due.is_some() {
            return;
        }
        // While some are still to be tried, the rest waits for the end of that.
        if self.active.iter().any(|a| !a.again.is_empty()) {
            return;
        }
        let held = self.active.iter().flat_map(|a| &a.held);
        let since = held.filter_map(|h| h.pending.held_since);
        if let Some(oldest) = since.min() {
            let wait = self.common.hold.next_try(oldest, Instant::now());
            self.arm_to_try_again(wait);
        }
    }

    /// Tries again all that is held.
    pub(super) fn retry(&mut self) -> Result<(), WorkerError> {
        for active in &mut self.active {
            active.again.extend(active.held.drain(..));
        }
        self.taken = 0;
        self.go_on_with_held()
    }

    /// Goes on with trying again, as much as may be in flight.
    pub(super) fn go_on_with_held(&mut self) -> Result<(), WorkerError> {
        while self.active.iter().any(Active::can_try_again) {
            if self.taken >= MAX_IN_FLIGHT {
                // Listen to orders first.
                self.going_on = true;
                let set = self.arm(Duration::ZERO);
                return set.map_err(|e| WorkerError::new("setting the timer to go on", e));
            }
            for lane in 0..self.active.len() {
                while let Some(active) = self.active.get_mut(lane)
                    && active.in_flight < active.share
                    && self.taken < MAX_IN_FLIGHT
                    && let Some(held) = active.again.pop_front()
                {
                    self.submit(lane, held.pending, held.buffers);
                }
            }
            self.engine
                .start()
                .map_err(|e| self.fail("submitting to the disk", e))?;
            self.collect()?;
        }
        Ok(())
    }
}
