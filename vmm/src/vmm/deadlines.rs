//! How long the inbox is waited for, and what is due when that time has passed.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use super::Vmm;
use crate::command::Message;
use crate::created::Created;
use crate::disks;

impl Vmm {
    /// The next message, or `None` when a deadline has passed.
    pub(super) fn next_message(&mut self) -> Option<Message> {
        let removal = self.created.as_ref().and_then(Created::next_deadline);
        let deadlines = removal.into_iter().chain(self.next_look());
        let deadline = deadlines.chain(self.ledger_due()).min();
        receive(&self.endpoint.inbox, deadline, &mut self.expired)
    }

    pub(super) fn expire(&mut self) {
        self.govern();
        let Some(created) = &mut self.created else {
            return;
        };
        let now = Instant::now();
        let space = created.look_at_disks(now);
        let expired = created.expired(now);
        let jobs = created.look_at_jobs(now);
        if !expired.is_empty() || !jobs.is_empty() {
            self.tell_jobs(jobs);
        }
        for id in expired {
            self.emit("vm", "device-removal-timed-out", &[("id", &id)]);
        }
        for (id, passed) in space {
            disks::emit(&self.endpoint.events, &id, &passed);
        }
    }
}

/// The next message, or `None` when the deadline has passed, however many messages wait: a guest
/// can see to it that one always does. After a `None` (which `expired` remembers) messages come
/// first, however long the next deadline has passed: what is done then may take longer than it is
/// to the next one.
pub(super) fn receive(
    inbox: &Receiver<Message>,
    deadline: Option<Instant>,
    expired: &mut bool,
) -> Option<Message> {
    let before = std::mem::take(expired);
    let Some(deadline) = deadline else {
        return Some(inbox.recv().unwrap_or(Message::Terminate));
    };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() && !before {
        *expired = true;
        return None;
    }
    match inbox.recv_timeout(left) {
        Ok(message) => Some(message),
        Err(RecvTimeoutError::Timeout) => {
            *expired = true;
            None
        }
        Err(RecvTimeoutError::Disconnected) => Some(Message::Terminate),
    }
}
