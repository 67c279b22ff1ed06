//! Which command is legal in which state: a pure table.
//!
//! ```text
//!              create            boot              pause
//!  NotCreated ───────► Created ───────► Running ─────────► Paused
//!       ▲                │  ▲             │  ▲               │
//!       └─── delete ─────┘  └─ shutdown ──┘  └─── resume ────┘
//! ```
//! `delete` is legal everywhere (it shuts a running VM down first, and does nothing where there is
//! none). `shutdown` and `reboot` work from Running and Paused; a reboot ends in Running.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::Error;

/// What the VM is doing, by Cloud Hypervisor's names. That there is no VM is not among them:
/// `vm.info` answers 404 then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = VmState)]
pub enum State {
    /// Configured, not booted, or shut down again.
    Created,
    /// Booted; vCPUs run.
    Running,
    /// Booted; vCPUs and devices stand still.
    Paused,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "Created (not running)",
            Self::Running => "Running",
            Self::Paused => "Paused",
        })
    }
}

/// The commands whose legality depends on the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Create,
    Boot,
    Shutdown,
    Reboot,
    Pause,
    Resume,
    PowerButton,
    Nmi,
    Counters,
    AddDevice,
    RemoveDevice,
    Resize,
    ResizeBalloon,
    SetOvercommit,
    Balloons,
    BalloonStats,
    ResizeDisk,
    ResumeDisk,
    SnapshotDisk,
    StreamDisk,
    CommitDisk,
    Jobs,
    SetJob,
    CancelJob,
    DiskInfo,
}

impl Verb {
    /// The verb's name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "vm.create",
            Self::Boot => "vm.boot",
            Self::Shutdown => "vm.shutdown",
            Self::Reboot => "vm.reboot",
            Self::Pause => "vm.pause",
            Self::Resume => "vm.resume",
            Self::PowerButton => "vm.power-button",
            Self::Nmi => "vm.nmi",
            Self::Counters => "vm.counters",
            Self::AddDevice => "vm.add-*",
            Self::RemoveDevice => "vm.remove-device",
            Self::Resize => "vm.resize",
            Self::ResizeBalloon => "vm.resize-balloon",
            Self::SetOvercommit => "vm.set-overcommit",
            Self::Balloons => "vm.balloons",
            Self::BalloonStats => "vm.balloon-stats",
            Self::ResizeDisk => "vm.resize-disk",
            Self::ResumeDisk => "vm.resume-disk",
            Self::SnapshotDisk => "vm.snapshot-disk",
            Self::StreamDisk => "vm.stream-disk",
            Self::CommitDisk => "vm.commit-disk",
            Self::Jobs => "vm.jobs",
            Self::SetJob => "vm.set-job",
            Self::CancelJob => "vm.cancel-job",
            Self::DiskInfo => "vm.disk-info",
        }
    }
}

/// Whether `verb` may be carried out in `state` (`None`: there is no VM).
pub fn check(verb: Verb, state: Option<State>) -> Result<(), Error> {
    use State::{Created, Paused, Running};
    use Verb::{
        AddDevice, BalloonStats, Balloons, Boot, CancelJob, CommitDisk, Counters, Create, DiskInfo,
        Jobs, Nmi, Pause, PowerButton, Reboot, RemoveDevice, Resize, ResizeBalloon, ResizeDisk,
        Resume, ResumeDisk, SetJob, SetOvercommit, Shutdown, SnapshotDisk, StreamDisk,
    };
    let state = match (verb, state) {
        (Create, None) => return Ok(()),
        (Create, Some(_)) => return Err(Error::AlreadyCreated),
        (_, None) => return Err(Error::NotCreated),
        (_, Some(state)) => state,
    };
    let legal = match verb {
        Create => false,
        Boot => state == Created,
        Shutdown | Reboot | Counters | Balloons | ResizeDisk | ResumeDisk | SnapshotDisk
        | StreamDisk | CommitDisk | DiskInfo => state != Created,
        Pause | PowerButton | Nmi | BalloonStats => state == Running,
        Resume => state == Paused,
        AddDevice | RemoveDevice | Resize | ResizeBalloon | SetOvercommit | Jobs | SetJob
        | CancelJob => {
            matches!(state, Created | Running | Paused)
        }
    };
    if legal {
        Ok(())
    } else {
        Err(Error::WrongState {
            command: verb.name(),
            state,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBS: [Verb; 25] = [
        Verb::Create,
        Verb::Boot,
        Verb::Shutdown,
        Verb::Reboot,
        Verb::Pause,
        Verb::Resume,
        Verb::PowerButton,
        Verb::Nmi,
        Verb::Counters,
        Verb::AddDevice,
        Verb::RemoveDevice,
        Verb::Resize,
        Verb::ResizeBalloon,
        Verb::SetOvercommit,
        Verb::Balloons,
        Verb::BalloonStats,
        Verb::ResizeDisk,
        Verb::ResumeDisk,
        Verb::SnapshotDisk,
        Verb::StreamDisk,
        Verb::CommitDisk,
        Verb::Jobs,
        Verb::SetJob,
        Verb::CancelJob,
        Verb::DiskInfo,
    ];

    fn legal(state: Option<State>) -> Vec<Verb> {
        VERBS
            .into_iter()
            .filter(|verb| check(*verb, state).is_ok())
            .collect()
    }

    #[test]
    fn each_state_allows_just_the_verbs_of_the_picture() {
        use Verb::{
            AddDevice, BalloonStats, Balloons, Boot, CancelJob, CommitDisk, Counters, Create,
            DiskInfo, Jobs, Nmi, Pause, PowerButton, Reboot, RemoveDevice, Resize, ResizeBalloon,
            ResizeDisk, Resume, ResumeDisk, SetJob, SetOvercommit, Shutdown, SnapshotDisk,
            StreamDisk,
        };
        assert_eq!(legal(None), [Create]);
        assert_eq!(
            legal(Some(State::Created)),
            [
                Boot,
                AddDevice,
                RemoveDevice,
                Resize,
                ResizeBalloon,
                SetOvercommit,
                Jobs,
                SetJob,
                CancelJob
            ]
        );
        assert_eq!(
            legal(Some(State::Running)),
            [
                Shutdown,
                Reboot,
                Pause,
                PowerButton,
                Nmi,
                Counters,
                AddDevice,
                RemoveDevice,
                Resize,
                ResizeBalloon,
                SetOvercommit,
                Balloons,
                BalloonStats,
                ResizeDisk,
                ResumeDisk,
                SnapshotDisk,
                StreamDisk,
                CommitDisk,
                Jobs,
                SetJob,
                CancelJob,
                DiskInfo
            ]
        );
        assert_eq!(
            legal(Some(State::Paused)),
            [
                Shutdown,
                Reboot,
                Resume,
                Counters,
                AddDevice,
                RemoveDevice,
                Resize,
                ResizeBalloon,
                SetOvercommit,
                Balloons,
                ResizeDisk,
                ResumeDisk,
                SnapshotDisk,
                StreamDisk,
                CommitDisk,
                Jobs,
                SetJob,
                CancelJob,
                DiskInfo
            ]
        );
    }

    #[test]
    fn without_a_vm_every_verb_but_create_says_that_none_is_created() {
        for verb in VERBS.into_iter().filter(|verb| *verb != Verb::Create) {
            let error = check(verb, None).unwrap_err();
            assert_eq!(error.to_string(), "VM is not created");
        }
    }
}
