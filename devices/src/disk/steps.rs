//! What a job that goes through a whole disk has its queue do, a step at a time, while the guest
//! uses the disk ([`crate::block::job`]).
//!
//! The queue's thread takes a step as it takes a request: it waits for the host no longer than for
//! that, and requests of the guest go on beside it.

use std::io;
use std::sync::Arc;

use super::buffers::AlignedBuffer;

/// Bytes that are moved in a step, or a cluster.
pub const PIECE: u64 = 1 << 20;

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Have what is not in the image but in one below it come into it, from this byte of the disk
    /// on; some of it, and the answer says how far that went.
    Populate(u64),
    /// Find out whether [`Step::Detach`] can be done. Changes nothing.
    CheckDetach,
    /// Have the image forget what is below it, for good and durably. All must have come into it,
    /// of a disk of this many bytes.
    Detach(u64),
    /// Give out the next part of the disk that the image itself has, from the first of these bytes
    /// on and before the second.
    Take(u64, u64),
    /// Have the image have nothing of the disk any more, durably: all of it must be in the one
    /// below. Nothing else may be done with it, and afterwards it is to be closed; so it is where
    /// this fails, unless the image then is not handed over ([`super::Image::is_handed_over`]).
    Empty,
}

/// How far a step came.
#[derive(Debug, Default)]
pub struct Reached {
    /// This byte of the disk is the next.
    pub position: u64,
    /// So many bytes were read from what is below the image, or to give them out.
    pub read: u64,
    /// So many of them were written to it: not those that are zeroes.
    pub copied: u64,
    /// What was given out; it ends at `position`.
    pub taken: Taken,
}

/// A part of the disk as the image has it.
#[derive(Default)]
pub enum Taken {
    /// There was none, as far as it was looked for.
    #[default]
    Nothing,
    /// Zeroes, from this byte of the disk on.
    Zeroes(u64),
    /// From this byte of the disk on, so many of these bytes.
    Data(u64, Arc<AlignedBuffer>, usize),
}

impl std::fmt::Debug for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => write!(f, "Nothing"),
            Self::Zeroes(start) => write!(f, "Zeroes({start})"),
            Self::Data(start, _, len) => write!(f, "Data({start}, {len} bytes)"),
        }
    }
}

/// What comes of a step.
pub type Outcome = io::Result<Reached>;

/// Where the outcome is told, on the queue's thread. One that is dropped says that the queue is
/// gone.
pub struct Reply(Option<Box<dyn FnOnce(Outcome) + Send>>);

impl Reply {
    /// One that is told by calling this, which must not wait.
    pub fn new(tell: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self(Some(Box::new(tell)))
    }

    /// Tells it.
    pub fn tell(mut self, outcome: Outcome) {
        if let Some(tell) = self.0.take() {
            tell(outcome);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Err(io::Error::other("the disk's queue is gone")));
        }
    }
}

/// What takes steps, for the queue of an image.
pub trait Steps: Send + Sync {
    /// Leaves a step, for [`super::Queue::attend`] to find; a number for it.
    fn leave(&self, step: Step, reply: Reply) -> u64;
    /// Takes it back; whether it was still there. If not, it is being done.
    fn withdraw(&self, number: u64) -> bool;
}
