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
            number: $crate::sandbox::numbers::$call,
            name: stringify!($call),
            arguments: &[$($crate::sandbox::Argument { index: $index, test: $test }),*],
        }
    };
}

/// The numbers of the calls that appear in allow-lists, by their plain names, so that [`allow!`]
/// needs each name once.
#[allow(missing_docs, non_upper_case_globals)]
pub mod numbers {
    macro_rules! numbers {
        ($($name:ident = $number:ident),* $(,)?) => { $(pub const $name: i64 = libc::$number;)* };
    }
    numbers! {
        accept4 = SYS_accept4, bind = SYS_bind, brk = SYS_brk, clock_gettime = SYS_clock_gettime,
        clock_nanosleep = SYS_clock_nanosleep, clone = SYS_clone, clone3 = SYS_clone3,
        close = SYS_close, connect = SYS_connect, dup = SYS_dup, epoll_create1 = SYS_epoll_create1,
        epoll_ctl = SYS_epoll_ctl, epoll_pwait = SYS_epoll_pwait, epoll_wait = SYS_epoll_wait,
        eventfd2 = SYS_eventfd2, exit = SYS_exit, exit_group = SYS_exit_group,
        fallocate = SYS_fallocate, fchmod = SYS_fchmod, fcntl = SYS_fcntl,
        fdatasync = SYS_fdatasync, flock = SYS_flock, fstat = SYS_fstat, fstatfs = SYS_fstatfs,
        fsync = SYS_fsync, ftruncate = SYS_ftruncate, futex = SYS_futex, getpid = SYS_getpid,
        getrandom = SYS_getrandom, getsockopt = SYS_getsockopt, gettid = SYS_gettid,
        getuid = SYS_getuid, io_uring_enter = SYS_io_uring_enter,
        io_uring_register = SYS_io_uring_register, io_uring_setup = SYS_io_uring_setup,
        ioctl = SYS_ioctl, listen = SYS_listen, lseek = SYS_lseek, madvise = SYS_madvise,
        memfd_create = SYS_memfd_create, mmap = SYS_mmap, mprotect = SYS_mprotect,
        mremap = SYS_mremap, munmap = SYS_munmap, nanosleep = SYS_nanosleep,
        newfstatat = SYS_newfstatat, openat = SYS_openat, poll = SYS_poll, ppoll = SYS_ppoll,
        prctl = SYS_prctl, pread64 = SYS_pread64, preadv = SYS_preadv, preadv2 = SYS_preadv2,
        prlimit64 = SYS_prlimit64, pwrite64 = SYS_pwrite64, pwritev = SYS_pwritev,
        pwritev2 = SYS_pwritev2, read = SYS_read, readlink = SYS_readlink, readv = SYS_readv,
        recvfrom = SYS_recvfrom, recvmsg = SYS_recvmsg, restart_syscall = SYS_restart_syscall,
        rseq = SYS_rseq, rt_sigaction = SYS_rt_sigaction, rt_sigprocmask = SYS_rt_sigprocmask,
        rt_sigreturn = SYS_rt_sigreturn, rt_sigtimedwait = SYS_rt_sigtimedwait,
        sched_getaffinity = SYS_sched_getaffinity, sched_setaffinity = SYS_sched_setaffinity,
        sched_yield = SYS_sched_yield, seccomp = SYS_seccomp, sendmsg = SYS_sendmsg,
        sendto = SYS_sendto, set_robust_list = SYS_set_robust_list, setsockopt = SYS_setsockopt,
        shutdown = SYS_shutdown, sigaltstack = SYS_sigaltstack, socket = SYS_socket,
        statx = SYS_statx, statfs = SYS_statfs, tgkill = SYS_tgkill,
        timerfd_create = SYS_timerfd_create, timerfd_settime = SYS_timerfd_settime,
        uname = SYS_uname, unlink = SYS_unlink, unlinkat = SYS_unlinkat, write = SYS_write,
        writev = SYS_writev,
    }
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
        // Debug builds of the standard library ask whether a descriptor is open before closing it.
        allow!(fcntl, 1 => Test::Is(libc::F_GETFD as u32)),
        allow!(futex),
        allow!(getpid),
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
        allocator::share_one_heap();
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
