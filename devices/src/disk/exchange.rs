//! Exchanging the engine under a disk's queue while the guest goes on using the disk.
//!
//! ```text
//!            Freeze          Stage            Commit
//!   serving ───────► frozen ───────► staged ──────────► serving, the new engine
//!      ▲               │               │
//!      └───────────────┴───────────────┘ Abort
//! ```
//!
//! The worker is paused for all of it. Between the steps the VMM thread does what a device thread
//! may not: it opens the files of the new engine, which it can do only when the old one has written
//! everything.

use std::io;
use std::sync::mpsc::Sender;

use super::Queue;

/// Where the end of a step is told. One that is dropped says that the worker is gone.
pub type Reply = Sender<io::Result<()>>;

/// A step.
pub enum Exchange {
    /// Have all that was done reach the disk, and do nothing more until the last step.
    Freeze(Reply),
    /// Take the engine that is to come, and make ready for it.
    Stage(Box<dyn Queue>, Reply),
    /// Close the old engine and go on with the new one; can't fail.
    Commit(Reply),
    /// Go on with the old one; one that was staged is closed before that is told.
    Abort(Reply),
}
