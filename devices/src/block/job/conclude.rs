//! The end of a job, on the VMM thread.

use std::sync::Arc;

use super::{Job, JobKind, JobStatus};
use crate::block::Block;
use crate::block::frozen::{FreezeError, Frozen};
use crate::config::{BuildError, Invalid};
use crate::disk::Image;

/// Why a job that was ready could not be concluded.
#[derive(Debug, thiserror::Error)]
pub enum ConcludeError {
    /// It is at work, or has ended: one that was ready may have come to lack space since somebody
    /// looked.
    #[error("the job is not ready")]
    NotReady,
    /// The queue could not write out in time what it has; may be tried again.
    #[error("writing out what the disk holds took too long")]
    Timeout,
    /// The host has no space for the rest: the disk goes on as before, and the job with its work. It
    /// is ready again when there is.
    #[error("the host has no space for the rest of it")]
    NoSpace,
    /// It failed. The disk goes on as before, and all of it is in its image; the files below it
    /// stay open until it is opened anew.
    #[error("the image stands alone, but what was below it is still open: {0}")]
    StillOpen(BuildError),
    /// A commit failed at its end: the disk goes on with its image as before, which still has all
    /// that is not below it.
    #[error("the disk stays on its image: {0}")]
    NotMoved(BuildError),
}

impl From<BuildError> for ConcludeError {
    fn from(error: BuildError) -> Self {
        Self::StillOpen(error)
    }
}

impl FreezeError {
    /// At the end of a commit.
    pub(super) fn of_commit(self) -> ConcludeError {
        match self {
            Self::Disk(_, error) => ConcludeError::NotMoved(error),
            Self::Timeout => ConcludeError::Timeout,
        }
    }
}

impl Job {
    /// Has the disk, which the job was begun on, go on: after a stream with its image opened anew,
    /// and what was below is closed; after a commit with what was below, and the image is emptied
    /// and closed. `go_on` unless the VM is paused. Says what is to be known although it was
    /// concluded: the image could not be emptied. Called on the VMM thread once the job is ready.
    pub fn conclude(
        &mut self,
        block: &Block,
        go_on: bool,
    ) -> Result<Option<String>, ConcludeError> {
        let kind = self.kind;
        let refuse = |reason| {
            let error = Invalid::new("id", reason).into();
            Err(match kind {
                JobKind::Stream => ConcludeError::StillOpen(error),
                JobKind::Commit => ConcludeError::NotMoved(error),
            })
        };
        if *self.shared.status() != JobStatus::Ready {
            return Err(ConcludeError::NotReady);
        }
        if !Arc::ptr_eq(&self.on_disk.0, &block.job) {
            return refuse("the job is one of another disk");
        }
        if self.kind == JobKind::Commit {
            return self.move_down(block, go_on);
        }
        let old = block.opened().image.clone();
        // Closed only when the queue has let go of it.
        let image: Box<dyn Image>;
        {
            let frozen = Frozen::freeze_within(self.bounds.write_out, vec![block], go_on);
            let frozen = frozen.map_err(|e| match e {
                FreezeError::Disk(_, error) => ConcludeError::StillOpen(error),
                FreezeError::Timeout => ConcludeError::Timeout,
            })?;
            image = old.reopen_alone()?;
            if image.size_bytes() != old.size_bytes() {
                return refuse("the image has another size than the disk");
            }
            let failed = |e| BuildError::host("opening the disk's image anew", e);
            block.stage(image.as_ref()).map_err(failed)?;
            // Nothing fails any more.
            old.hand_over();
            // A worker that is gone has closed its engine.
            let commits = block.commit_staged();
            commits.iter().for_each(|commit| drop(commit.recv()));
            drop(frozen);
        }
        block.opened().image = image.into();
        Ok(None)
    }
}
