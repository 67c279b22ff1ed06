//! A job for which the host has no space: it waits, as the guest's writes do ([`crate::block::hold`]),
//! under the same policy and for as long at most.
//!
//! ```text
//!   at work ── no space ─► waits ──── after a second, or told to ───► tries the same again ─┐
//!      ▲                    ▲ │ └─── cancelled ─► ends                                      │
//!      │                    │ └───── `report`, grace over, given up ─► fails                │
//!      │                    └───────────────────── no space ◄───────────────────────────────┤
//!      └─────────────────────────────────────────── done ◄─────────────────────────────────┘
//! ```
//!
//! Nobody waits for one that waits: where it is to come to its end while the disk stands still, the
//! disk goes on, and the end is for later.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::JobStatus;
use super::thread::{End, Unfinished, Work};
use crate::block::hold::Hold;
use crate::disk::space;

/// What a job waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Bytes that are to be written at once; no more than these are needed for them.
    pub needed_bytes: u64,
    /// Bytes that the host's file system had when it was tried last, where it says so.
    pub free_bytes: Option<u64>,
    /// What the host said.
    pub error: String,
}

/// Where space is wanted, and how long that is waited for.
pub struct Host {
    pub hold: Arc<Hold>,
    pub file: Arc<File>,
}

/// There was no space when something was tried last.
pub struct Lack {
    since: Instant,
    retry: bool,
    give_up: bool,
}

impl Lack {
    /// It is to be tried at once, and perhaps for the last time.
    pub fn retry(&mut self, give_up: bool) {
        self.retry = true;
        self.give_up |= give_up;
    }
}

impl Work {
    /// Something that writes up to so many bytes failed. Whether it is to be tried again: it is for
    /// lack of space, which was waited for.
    pub(super) fn lacks_space(&mut self, error: &io::Error, needed: u64) -> Result<bool, End> {
        let now = Instant::now();
        let since = self.lack.as_ref().map(|lack| lack.since);
        let give_up = self.lack.as_ref().is_some_and(|lack| lack.give_up);
        if give_up || !self.host.hold.wants(error, since, now) {
            return Ok(false);
        }
        let free = space::of_file_system(&self.host.file);
        let waiting = Waiting {
            needed_bytes: needed,
            free_bytes: free.ok().flatten().map(|space| space.free),
            error: error.to_string(),
        };
        *self.shared.status() = JobStatus::Running;
        *self.shared.waiting() = Some(waiting);
        self.not_finished();
        if since.is_none() {
            (self.wake)();
        }
        let since = since.unwrap_or(now);
        self.lack = Some(Lack {
            since,
            retry: false,
            give_up: false,
        });
        let until = now + self.host.hold.next_try(since, now);
        while !self.lack.as_ref().is_some_and(|lack| lack.retry) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.wait(left)?;
            self.not_finished();
        }
        Ok(true)
    }

    /// What was tried again, if it was, is done.
    pub(super) fn has_space(&mut self) {
        if self.lack.take().is_some() {
            *self.shared.waiting() = None;
            (self.wake)();
        }
    }

    /// The guest is not to wait for the host.
    fn not_finished(&mut self) {
        if let Some(reply) = self.finish.take() {
            self.finishing = false;
            // Nobody may be waiting any more.
            let _ = reply.send(Err(Unfinished::NoSpace));
        }
    }
}
