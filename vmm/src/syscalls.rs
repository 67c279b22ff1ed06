//! The VMM thread's seccomp filter.
//!
//! The VMM thread opens files and spawns all other threads, and a filter can only be narrowed by
//! those who inherit it: so its list is its own needs, which stand beside the code that has them,
//! and those of every thread it spawns.

use devices::allow;
use devices::block;
use devices::config;
use devices::disk::qcow2::check;
use devices::legacy::console;
use devices::sandbox::{Allow, COMMON, Test, WORKER};

use crate::overcommit::{cpu, ledger, psi, triggers};
use crate::{boot, interrupts, memory, vcpu};

/// Making a thread, and installing its filter in it.
const SPAWN: &[Allow] = &[
    allow!(clone3),
    allow!(clone),
    allow!(prctl, 0 => Test::Is(libc::PR_SET_NO_NEW_PRIVS as u32)),
    allow!(rseq),
    allow!(sched_getaffinity),
    allow!(seccomp, 0 => Test::Is(libc::SECCOMP_SET_MODE_FILTER)),
    allow!(set_robust_list),
];

/// The lists that make up the VMM thread's filter.
pub fn vmm_thread() -> Vec<&'static [Allow]> {
    let mut lists = vec![
        COMMON,
        WORKER,
        SPAWN,
        memory::SYSCALLS,
        ledger::SYSCALLS,
        interrupts::SYSCALLS,
        vcpu::SYSCALLS,
        vcpu::CONTROL_SYSCALLS,
        vcpu::placement::SYSCALLS,
        cpu::SYSCALLS,
        console::OPEN,
        psi::SYSCALLS,
    ];
    lists.extend(boot::SYSCALLS);
    lists.push(config::BUILD);
    lists.push(check::SYSCALLS);
    lists.push(block::CREATE_SYSCALLS);
    lists.push(block::snapshot::SYSCALLS);
    lists.extend(config::thread_kinds().into_iter().flat_map(|kind| kind.1));
    lists
}

/// Every kind of thread that this crate and `devices` run, with the lists of its filter.
pub fn thread_kinds() -> Vec<(&'static str, Vec<&'static [Allow]>)> {
    let mut kinds = vec![
        ("vmm", vmm_thread()),
        ("vcpu", vec![COMMON, vcpu::SYSCALLS, interrupts::SYSCALLS]),
        ("psi", triggers::LISTS.to_vec()),
    ];
    kinds.extend(config::thread_kinds());
    kinds
}
