//! Writing.
//!
//! One thread owns the metadata of an image that is written to; its requests are futures ([`queue`])
//! that go on when the host has done what they wait for ([`io`], [`hostop`]).
//!
//! ```text
//!   request ── what a request does        lock ────── who waits for whom
//!   engine ─── tables in memory           allocate ── free space, refcounts
//!   flush ──── what is written when       open ────── what is found out before the first request
//!   tables ─── those that are made, move  transfer ── data
//!   grow ───── a larger disk              control ─── what the image asks of its queue
//!   leaks ──── what a killed process left behind
//!   populate ─ what is below comes into the image, which then needs it no more
//!   take ───── what is in the image is given out; emptying it
//!   keep ───── writing an image that is read as a backing file at the same time
//!   zero ───── discards and other zeroes
//!   external ─ data in a file of its own
//!   cluster, refcounts, extents, pages ── pure
//! ```
//!
//! The order in which things reach the disk is in [`flush`]; it holds at every moment, so an image
//! whose process was killed, or whose host lost its power, opens as if nothing had happened: what
//! was flushed is there, and at most some clusters leak.

mod allocate;
mod cluster;
mod control;
mod engine;
mod extents;
mod external;
mod flush;
mod grow;
mod hostop;
mod io;
mod keep;
mod leaks;
mod lock;
mod open;
mod pages;
mod populate;
mod queue;
mod refcounts;
mod request;
mod tables;
mod take;
#[cfg(test)]
mod tests;
mod transfer;
mod zero;

pub use control::{Control, GrowError};
pub use open::Writable;
pub use queue::{SYNC_SYSCALLS, URING_SYSCALLS};

/// The most bytes that go through memory of our own in one operation.
const BOUNCE: u64 = 256 << 10;
/// About so many bytes are copied at a time, to keep what a write does not cover.
const COPY_BYTES: u64 = 16 << 20;
