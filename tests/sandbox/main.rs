//! Every rule of every seccomp filter, executed: what is allowed passes, the same call with an
//! argument the rule forbids dies of SIGSYS, and so does a list of calls that no thread may make.
//!
//! Each case runs in a forked child that installs the filter, makes one call with harmless
//! arguments (no descriptors, null pointers) and exits; the parent looks at how it ended.
#![expect(
    unsafe_code,
    reason = "forks and makes raw system calls with chosen arguments"
)]

use std::collections::BTreeSet;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::Instant;

use devices::sandbox::violation::report_violations;
use devices::sandbox::{Allow, Filter, SeccompMode, Sysno, Test};

/// A kind of thread and the lists that make up its filter.
type Kind = (&'static str, Vec<&'static [Allow]>);

fn kinds() -> Vec<Kind> {
    let mut kinds = ballast_api::sandbox::thread_kinds();
    kinds.extend(vmm::syscalls::thread_kinds());
    kinds
}

/// Calls that no thread of ours has any use for after its start.
const FORBIDDEN: &[Sysno] = &[
    Sysno::execve,
    Sysno::execveat,
    Sysno::ptrace,
    Sysno::fork,
    Sysno::vfork,
    Sysno::kill,
    Sysno::mount,
    Sysno::umount2,
    Sysno::chroot,
    Sysno::pivot_root,
    Sysno::unshare,
    Sysno::setns,
    Sysno::setuid,
    Sysno::setgid,
    Sysno::capset,
    Sysno::bpf,
    Sysno::keyctl,
    Sysno::perf_event_open,
    Sysno::process_vm_readv,
    Sysno::process_vm_writev,
    Sysno::init_module,
    Sysno::finit_module,
    Sysno::kexec_load,
    Sysno::userfaultfd,
    Sysno::open_by_handle_at,
    Sysno::personality,
    Sysno::rename,
    Sysno::link,
    Sysno::symlink,
    Sysno::mknod,
    Sysno::chmod,
    Sysno::chown,
];

/// Calls that only the VMM thread may make: it alone opens, binds and spawns.
const ONLY_VMM: &[Sysno] = &[
    Sysno::connect,
    Sysno::openat,
    Sysno::socket,
    Sysno::clone3,
    Sysno::memfd_create,
    Sysno::io_uring_setup,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Passed,
    Violation,
}

/// Makes the call in a child under the filter. A child that blocks in the call (and is ended by
/// its alarm), or that crashes on what the call did, has passed the filter.
fn run(filter: &Filter, call: i64, arguments: [u64; 6]) -> End {
    // SAFETY: the child makes only async-signal-safe calls: the filter is compiled already, and
    // installing it is two system calls.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork failed");
        if child == 0 {
            let no_core = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            libc::setrlimit(libc::RLIMIT_CORE, &no_core);
            libc::signal(libc::SIGSYS, libc::SIG_DFL);
            libc::alarm(2);
            if filter.install().is_err() {
                libc::_exit(99);
            }
            let [a, b, c, d, e, f] = arguments;
            libc::syscall(call, a, b, c, d, e, f);
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(
            !(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 99),
            "the filter could not be installed"
        );
        if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS {
            End::Violation
        } else {
            End::Passed
        }
    }
}

/// Arguments that the line allows, and otherwise do nothing.
fn fitting(line: &Allow) -> [u64; 6] {
    // All ones is no descriptor; for the calls that take none, zeroes do less.
    let mut arguments = match Sysno::new(line.number as usize) {
        Some(
            Sysno::futex
            | Sysno::clone
            | Sysno::clone3
            | Sysno::exit
            | Sysno::exit_group
            | Sysno::poll
            | Sysno::ppoll
            | Sysno::getpid
            | Sysno::munmap
            | Sysno::mprotect
            | Sysno::madvise
            | Sysno::mremap
            | Sysno::tgkill
            | Sysno::brk
            | Sysno::rt_sigaction
            | Sysno::seccomp,
        ) => [0; 6],
        _ => [u64::from(u32::MAX), 0, 0, 0, 0, 0],
    };
    for argument in line.arguments {
        arguments[usize::from(argument.index)] = match argument.test {
            Test::Is(value) => value.into(),
            Test::IsQword(value) => value,
            Test::Without(_) => 0,
        };
    }
    arguments
}

fn allows(line: &Allow, call: i64, arguments: &[u64; 6]) -> bool {
    line.number == call
        && line.arguments.iter().all(|argument| {
            let value = arguments[usize::from(argument.index)];
            match argument.test {
                Test::Is(wanted) => value as u32 == wanted,
                Test::IsQword(wanted) => value == wanted,
                Test::Without(bits) => value & bits == 0,
            }
        })
}

/// The line's arguments with each condition broken in turn.
fn perturbed(line: &Allow) -> Vec<[u64; 6]> {
    let fitting = fitting(line);
    line.arguments
        .iter()
        .map(|argument| {
            let mut arguments = fitting;
            arguments[usize::from(argument.index)] = match argument.test {
                Test::Is(value) => u64::from(value ^ 0x0040_0000),
                Test::IsQword(value) => value ^ (1 << 40),
                Test::Without(bits) => bits,
            };
            arguments
        })
        .collect()
}

fn compile(kind: &Kind) -> Filter {
    Filter::compile(kind.0, SeccompMode::Enforce, &kind.1).expect("the filter compiles")
}

fn lines(kind: &Kind) -> impl Iterator<Item = &'static Allow> {
    kind.1.clone().into_iter().flatten()
}

#[test]
fn every_allowed_call_passes_its_filter() {
    for kind in &kinds() {
        let filter = compile(kind);
        for line in lines(kind) {
            // Without a signal's frame on the stack, returning from one is a crash of its own.
            if line.number == libc::SYS_rt_sigreturn {
                continue;
            }
            let end = run(&filter, line.number, fitting(line));
            assert_eq!(end, End::Passed, "{}: {line:?}", kind.0);
        }
    }
}

#[test]
fn every_allowed_call_dies_when_an_argument_breaks_its_rule() {
    let mut tried = 0;
    for kind in &kinds() {
        let filter = compile(kind);
        for line in lines(kind) {
            for arguments in perturbed(line) {
                if lines(kind).any(|other| allows(other, line.number, &arguments)) {
                    continue;
                }
                let end = run(&filter, line.number, arguments);
                assert_eq!(end, End::Violation, "{}: {line:?} {arguments:x?}", kind.0);
                tried += 1;
            }
        }
    }
    assert!(tried > 50, "only {tried} perturbed calls were tried");
}

#[test]
fn calls_that_no_thread_needs_die_on_every_thread() {
    for kind in &kinds() {
        let filter = compile(kind);
        for call in FORBIDDEN {
            let end = run(&filter, *call as i64, [0; 6]);
            assert_eq!(end, End::Violation, "{}: {call:?}", kind.0);
        }
    }
}

#[test]
fn only_the_vmm_thread_opens_binds_and_spawns() {
    for kind in kinds().iter().filter(|kind| kind.0 != "vmm") {
        let filter = compile(kind);
        for call in ONLY_VMM {
            let end = run(&filter, *call as i64, [0; 6]);
            assert_eq!(end, End::Violation, "{}: {call:?}", kind.0);
        }
    }
}

#[test]
fn no_thread_maps_memory_executable() {
    let executable = libc::PROT_EXEC as u64 | libc::PROT_READ as u64;
    for kind in &kinds() {
        let filter = compile(kind);
        let map = [0, 4096, executable, 0x22, u64::MAX, 0];
        assert_eq!(
            run(&filter, libc::SYS_mmap, map),
            End::Violation,
            "{}",
            kind.0
        );
        let protect = [0, 4096, executable, 0, 0, 0];
        assert_eq!(
            run(&filter, libc::SYS_mprotect, protect),
            End::Violation,
            "{}",
            kind.0
        );
    }
}

#[test]
fn no_thread_makes_an_internet_socket() {
    for kind in &kinds() {
        let filter = compile(kind);
        for family in [
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_NETLINK,
            libc::AF_PACKET,
        ] {
            let end = run(&filter, libc::SYS_socket, [family as u64, 1, 0, 0, 0, 0]);
            assert_eq!(end, End::Violation, "{}: family {family}", kind.0);
        }
    }
}

#[test]
fn a_violation_leaves_a_line_and_an_event_that_name_thread_and_call() {
    let (mut stderr, line) = std::io::pipe().unwrap();
    let (mut monitor, event) = std::io::pipe().unwrap();
    let filter = compile(&kinds().remove(0));
    // SAFETY: as in `run`; the handler is registered by a plain system call, and the name is set
    // by another.
    let child = unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork failed");
        if child == 0 {
            let no_core = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            libc::setrlimit(libc::RLIMIT_CORE, &no_core);
            libc::dup2(line.as_raw_fd(), 2);
            libc::prctl(libc::PR_SET_NAME, c"culprit".as_ptr());
            let ready = report_violations(Instant::now(), Some(event.into())).is_ok();
            if ready && filter.install().is_ok() {
                libc::syscall(libc::SYS_ptrace, 0, 0, 0, 0);
            }
            libc::_exit(99);
        }
        child
    };
    drop((line, event));
    let mut status = 0;
    // SAFETY: waits for the child made above.
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGSYS);
    let mut text = String::new();
    stderr.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("thread=culprit syscall=ptrace"), "{text}");
    let mut text = String::new();
    monitor.read_to_string(&mut text).unwrap();
    let told: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(text.ends_with("}\n\n"), "{text}");
    assert_eq!(told["event"], "seccomp-violation");
    assert_eq!(told["properties"]["thread"], "culprit");
    assert_eq!(told["properties"]["syscall"], "ptrace");
}

#[test]
fn every_kind_of_thread_is_there_once() {
    let kinds = kinds();
    let names: BTreeSet<&str> = kinds.iter().map(|kind| kind.0).collect();
    assert_eq!(names.len(), kinds.len());
    for name in [
        "main",
        "signal-handler",
        "vmm",
        "vcpu",
        "raw-io-uring",
        "qcow2-io-uring",
        "qcow2-sync",
        "qcow2-write-io-uring",
        "qcow2-write-sync",
        "rng",
    ] {
        assert!(names.contains(name), "{name} is missing from {names:?}");
    }
}
