//! What can go wrong, named for what the caller can do about it. `api` has the one place that
//! turns these into HTTP statuses.

use devices::config::{BuildError, Invalid};
use thiserror::Error;

use crate::state::State;

/// Why a command was refused or failed. Whatever it is, nothing was changed.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no VM; `vm.create` makes one. The text is what Cloud Hypervisor's clients look
    /// for.
    #[error("VM is not created")]
    NotCreated,
    /// There is a VM already; `vm.delete` takes it away.
    #[error("VM is already created")]
    AlreadyCreated,
    /// The command does not fit what the VM is doing.
    #[error("{command} is not possible while the VM is {state}")]
    WrongState {
        /// The command, by its name in the API.
        command: &'static str,
        /// What the VM is doing.
        state: State,
    },
    /// No device has this id.
    #[error("there is no device `{id}`")]
    UnknownDevice {
        /// The id asked for.
        id: String,
    },
    /// The device is part of the machine.
    #[error("device `{id}` can't be removed: {reason}")]
    NotRemovable {
        /// The id asked for.
        id: String,
        /// Why.
        reason: &'static str,
    },
    /// Two devices would have the same id.
    #[error("{field}: the id `{id}` is taken")]
    DuplicateId {
        /// Where it was found.
        field: String,
        /// The id.
        id: String,
    },
    /// Two disks would have the same image.
    #[error("{field}: `{path}` is already used by disk `{id}`")]
    DuplicatePath {
        /// Where it was found.
        field: String,
        /// The image.
        path: String,
        /// Who has it.
        id: String,
    },
    /// The balloons would take what the guest is guaranteed.
    #[error("{field}: leaves the guest {left} bytes, and `overcommit.guaranteed_size` is {floor}")]
    BelowFloor {
        /// Where it was asked for.
        field: String,
        /// Bytes the guest would have.
        left: u64,
        /// Bytes it is guaranteed.
        floor: u64,
    },
    /// The governor would undo it at once.
    #[error(
        "balloon `{id}` is driven by `overcommit.mode` auto, which keeps the guarantee; \
         set the mode to off first"
    )]
    Driven {
        /// The balloon.
        id: String,
    },
    /// The disk has a job, which must end first.
    #[error(
        "disk `{disk}` has the job `{job}` ({kind}): wait for its end, or cancel it \
         (vm.cancel-job)"
    )]
    HasJob {
        /// The disk.
        disk: String,
        /// The job.
        job: String,
        /// What it does.
        kind: &'static str,
    },
    /// No job has this id.
    #[error("there is no job `{id}`")]
    UnknownJob {
        /// The id asked for.
        id: String,
    },
    /// The job can't be changed any more.
    #[error("the job `{id}` has ended")]
    JobEnded {
        /// The id asked for.
        id: String,
    },
    /// A value that can't be accepted.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// Somebody else is using the file.
    #[error("{path} is in use: {reason}")]
    Busy {
        /// The file.
        path: String,
        /// By whom, as far as is known.
        reason: String,
    },
    /// The PCI bus is full, or the slot asked for is taken.
    #[error("no PCI slot: {0}")]
    NoSlot(String),
    /// The host has not enough memory, now.
    #[error("not enough host memory: {0}")]
    OutOfMemory(String),
    /// The process, or the host, has no descriptor left for what was to be opened. Nothing is wrong
    /// with the request: it can be sent again when some are free.
    #[error("out of file descriptors: {doing}: {reason}")]
    OutOfDescriptors {
        /// What was being done.
        doing: String,
        /// Whose limit it was.
        reason: String,
    },
    /// The VM does not fit beside what the others on the host are guaranteed or promised.
    #[error("not admitted: {0}")]
    NotAdmitted(String),
    /// The guest or the host took too long; the command may be sent again.
    #[error("{0} took too long")]
    Timeout(&'static str),
    /// Nobody in the guest is there to answer; it may load a driver and the command be sent again.
    #[error("{0}")]
    NoDriver(&'static str),
    /// The host failed us.
    #[error("{doing}: {reason}")]
    Host {
        /// What was being done.
        doing: String,
        /// Why it failed.
        reason: String,
    },
}

impl Error {
    /// The host failed while `doing`.
    pub fn host(doing: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Host {
            doing: doing.into(),
            reason: reason.to_string(),
        }
    }

    /// A system call failed while `doing`: what the host or the process has run out of is told
    /// apart from what is wrong with it.
    pub fn os(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let (doing, source) = (doing.into(), source.into());
        match source.raw_os_error() {
            Some(libc::ENOMEM) => Self::OutOfMemory(doing),
            Some(libc::EMFILE | libc::ENFILE) => Self::OutOfDescriptors {
                doing,
                reason: source.to_string(),
            },
            _ => Self::host(doing, source),
        }
    }

    /// The same error as seen from the struct that lies at `outer`: the opposite of
    /// [`Error::within`].
    pub fn relative_to(mut self, outer: &str) -> Self {
        let field = match &mut self {
            Self::Invalid(invalid) => &mut invalid.field,
            Self::DuplicateId { field, .. }
            | Self::DuplicatePath { field, .. }
            | Self::BelowFloor { field, .. } => field,
            _ => return self,
        };
        if let Some(inner) = field.strip_prefix(outer).and_then(|f| f.strip_prefix('.')) {
            *field = inner.to_owned();
        }
        self
    }

    /// The same error as seen from an outer struct in which this one's field lies under `outer`.
    pub fn within(self, outer: &str) -> Self {
        match self {
            Self::Invalid(invalid) => Self::Invalid(invalid.within(outer)),
            other => other,
        }
    }
}

impl From<BuildError> for Error {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Invalid(invalid) => Self::Invalid(invalid),
            BuildError::Locked { path, reason } => Self::Busy { path, reason },
            BuildError::Host { doing, source } => Self::os(doing, source),
        }
    }
}
