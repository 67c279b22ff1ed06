//! Seccomp filters: one allow-list per kind of thread, written beside the code that makes the
//! calls, compiled before the thread is spawned and installed as the first thing it does.
//!
//! Filters are inherited and can only be narrowed, so whoever spawns a thread must itself be
//! allowed everything that thread needs: only the VMM thread (and, before it installs its own
//! filter, the main thread) spawns.
//!
//! Seccomp cannot see the operations submitted to an io_uring; whoever makes a ring restricts it
//! (`IORING_REGISTER_RESTRICTIONS`) to the operations it needs.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
pub use syscalls::Sysno;
use thiserror::Error;

pub mod allocator;
pub mod violation;

/// What a filter does with a call that is not on its list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// End the process, after one line and one event that name thread and system call.
    #[default]
    Enforce,
    /// Let it pass and have the kernel log it (for diagnosis).
    Log,
    /// Fail the call with EPERM (for diagnosis).
    Errno,
    /// No filters at all.
    Off,
}

impl FromStr for SeccompMode {
    type Err = String;

    /// `true`, `log`, `errno` or `false`, as Cloud Hypervisor's `--seccomp`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "true" => Ok(Self::Enforce),
            "log" => Ok(Self::Log),
            "errno" => Ok(Self::Errno),
            "false" => Ok(Self::Off),
            other => Err(format!("`{other}` is none of true, log, errno, false")),
        }
    }
}

/// One line of an allow-list: a system call, and what its arguments must be.
///
/// Several lines for one call are alternatives.
#[derive(Clone, Copy, Debug)]
pub struct Allow {
    /// System call number (`libc::SYS_*`).
    pub number: i64,
    /// Its name, for people and tests.
    pub name: &'static str,
    /// All of these must hold.
    pub arguments: &'static [Argument],
}

/// A condition on one argument of a system call.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// Position, from 0.
    pub index: u8,
    /// What the value must be.
    pub test: Test,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// Equal, compared as 32 bits (ioctl numbers, flags, signals).
    Is(u32),
    /// Equal, compared as 64 bits.
    IsQword(u64),
    /// None of these bits may be set, compared as 64 bits.
    Without(u64),
}

/// Allows a call with whatever arguments; `allow!(read)`, or with conditions
/// `allow!(ioctl, 1 => Test::Is(KVM_RUN))`.
#[macro_export]
macro_rules! allow {
    ($call:ident) => {
        $crate::allow!($call,)
    };
    ($call:ident, $($index:expr => $test:expr),* $(,)?) => {
        $crate::sandbox::Allow {
            number: $crate::sandbox::Sysno::$call as i64,
            name: stringify!($call),
            arguments: &[$($crate::sandbox::Argument { index: $index, test: $test }),*],
        }
    };
}

/// What every thread of ours needs: memory, locks, logging, ending, and reporting a violation.
pub const COMMON: &[Allow] = {
    use libc::{PROT_EXEC, SIGABRT, SIGSYS};
    &[
        allow!(brk),
        allow!(clock_gettime),
        allow!(clock_nanosleep),
        allow!(close),
        allow!(exit),
        allow!(exit_group),
        // A debug build of std looks at a descriptor before it closes it.
        allow!(fcntl, 1 => Test::Is(libc::F_GETFD as u32)),
        allow!(futex),
        allow!(getpid),
        // Hash maps seed themselves.
        allow!(getrandom),
        allow!(gettid),
        allow!(madvise),
        allow!(mmap, 2 => Test::Without(PROT_EXEC as u64)),
        allow!(mprotect, 2 => Test::Without(PROT_EXEC as u64)),
        allow!(mremap),
        allow!(munmap),
        allow!(prctl, 0 => Test::Is(libc::PR_GET_NAME as u32)),
        allow!(prctl, 0 => Test::Is(libc::PR_SET_NAME as u32)),
        allow!(restart_syscall),
        allow!(rt_sigaction, 0 => Test::Is(SIGABRT as u32)),
        allow!(rt_sigaction, 0 => Test::Is(SIGSYS as u32)),
        allow!(rt_sigprocmask),
        allow!(rt_sigreturn),
        allow!(sched_yield),
        allow!(sigaltstack),
        allow!(tgkill, 2 => Test::Is(SIGABRT as u32)),
        allow!(tgkill, 2 => Test::Is(SIGSYS as u32)),
        allow!(write),
        allow!(writev),
    ]
};

/// What [`crate::worker`]'s loop needs beside [`COMMON`].
pub const WORKER: &[Allow] = &[
    allow!(epoll_ctl),
    allow!(epoll_pwait),
    allow!(epoll_wait),
    allow!(read),
];

/// A filter could not be made or installed.
#[derive(Debug, Error)]
#[error("seccomp filter of thread `{thread}`: {source}")]
pub struct SandboxError {
    thread: String,
    source: seccompiler::Error,
}

/// A compiled filter, ready to be installed by the thread it is for.
#[derive(Clone)]
pub struct Filter {
    thread: Arc<str>,
    program: Arc<BpfProgram>,
}

impl Filter {
    /// Compiles the union of some allow-lists for the threads named `thread`.
    pub fn compile(
        thread: &str,
        mode: SeccompMode,
        lists: &[&[Allow]],
    ) -> Result<Self, SandboxError> {
        let fail = |source: seccompiler::Error| SandboxError {
            thread: thread.to_owned(),
            source,
        };
        allocator::settle();
        let violation = match mode {
            SeccompMode::Off => {
                return Ok(Self {
                    thread: thread.into(),
                    program: Arc::default(),
                });
            }
            SeccompMode::Enforce => SeccompAction::Trap,
            SeccompMode::Log => SeccompAction::Log,
            SeccompMode::Errno => SeccompAction::Errno(libc::EPERM as u32),
        };
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut unconditional = Vec::new();
        for line in lists.iter().copied().flatten() {
            let alternatives = rules.entry(line.number).or_default();
            if line.arguments.is_empty() {
                unconditional.push(line.number);
                continue;
            }
            let conditions = line
                .arguments
                .iter()
                .map(Argument::condition)
                .collect::<Result<Vec<_>, _>>()
                .and_then(SeccompRule::new)
                .map_err(|e| fail(e.into()))?;
            alternatives.push(conditions);
        }
        // An empty list of rules means "with any arguments".
        for number in unconditional {
            rules.insert(number, Vec::new());
        }
        let filter = SeccompFilter::new(rules, violation, SeccompAction::Allow, TargetArch::x86_64)
            .map_err(|e| fail(e.into()))?;
        let program = BpfProgram::try_from(filter).map_err(|e| fail(e.into()))?;
        Ok(Self {
            thread: thread.into(),
            program: Arc::new(program),
        })
    }

    /// Installs the filter for the calling thread and all it will ever spawn.
    pub fn install(&self) -> Result<(), SandboxError> {
        if self.program.is_empty() {
            return Ok(());
        }
        seccompiler::apply_filter(&self.program).map_err(|source| SandboxError {
            thread: self.thread.to_string(),
            source,
        })
    }
}

impl Argument {
    fn condition(&self) -> Result<SeccompCondition, seccompiler::BackendError> {
        let (length, operator, value) = match self.test {
            Test::Is(value) => (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value.into()),
            Test::IsQword(value) => (SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value),
            Test::Without(bits) => (SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(bits), 0),
        };
        SeccompCondition::new(self.index, length, operator, value)
    }
}
