//! Where vCPU threads may run: on which of the host's CPUs (`cpus.affinity`) and beside whom
//! (`cpus.core_scheduling`).
//!
//! A vCPU thread places itself before it installs its filter and before it runs anything of the
//! guest, and reads back what became of it: the kernel cuts a set of CPUs down to those that the
//! process's cpuset has, without a word.
//!
//! Core scheduling (Documentation/admin-guide/hw-vuln/core-scheduling.rst): threads with different
//! cookies are never at once on two hardware threads of one core.
//!
//! ```text
//!   vm     vcpu0 makes a cookie, the others take its: siblings run vCPUs of this VM only
//!   vcpu   every vCPU makes its own: siblings stay empty
//! ```

use std::sync::{Arc, OnceLock};

use devices::allow;
use devices::config::Invalid;
use devices::sandbox::{Allow, Test};
use rustix::io::Errno;
use rustix::thread::{
    CoreSchedulingScope, CpuSet, Pid, create_core_scheduling_cookie, gettid,
    pull_core_scheduling_cookie, sched_getaffinity, sched_setaffinity,
};

use crate::config::{CoreScheduling, CpuAffinity, CpusConfig};
use crate::error::Error;

// include/uapi/linux/prctl.h.
const PR_SCHED_CORE: u32 = 62;
const PR_SCHED_CORE_CREATE: u32 = 1;
const PR_SCHED_CORE_SHARE_FROM: u32 = 3;
const PIDTYPE_PID: u32 = 0;

/// What placing calls: made by vCPU threads before their own filter, so under the VMM thread's.
pub const SYSCALLS: &[Allow] = &[
    allow!(
        prctl,
        0 => Test::Is(PR_SCHED_CORE),
        1 => Test::Is(PR_SCHED_CORE_CREATE),
        3 => Test::Is(PIDTYPE_PID),
    ),
    allow!(
        prctl,
        0 => Test::Is(PR_SCHED_CORE),
        1 => Test::Is(PR_SCHED_CORE_SHARE_FROM),
        3 => Test::Is(PIDTYPE_PID),
    ),
    allow!(sched_getaffinity),
    // Only of the caller.
    allow!(sched_setaffinity, 0 => Test::Is(0)),
];

/// Stack of the thread that tries sets of CPUs.
const TRIAL_STACK_BYTES: usize = 64 << 10;

/// Checks that the host lets vCPUs run where and as `cpus` wants them. Fields are named as seen
/// from `cpus`. Called on the VMM thread.
///
/// A thread of its own tries, as what a thread has once asked for is remembered for it.
pub fn check(cpus: &CpusConfig) -> Result<(), Error> {
    let affinity = cpus.affinity.as_deref().unwrap_or_default();
    if affinity.is_empty() && cpus.core_scheduling == CoreScheduling::Off {
        return Ok(());
    }
    let failed = |error: std::io::Error| Error::os("trying where vCPUs may run", error);
    std::thread::scope(|scope| {
        let trial = std::thread::Builder::new()
            .name("affinity".to_owned())
            .stack_size(TRIAL_STACK_BYTES)
            .spawn_scoped(scope, || {
                (0..).zip(affinity).try_for_each(|(index, one)| {
                    run_on(one).map_err(|e| e.within(&format!("affinity[{index}]")))
                })?;
                match cpus.core_scheduling {
                    CoreScheduling::Off => Ok(()),
                    CoreScheduling::Vm | CoreScheduling::Vcpu => share_core_with(None),
                }
            })
            .map_err(failed)?;
        // A panic aborts the process, so a join can't report one.
        Ok(trial.join().unwrap_or(Ok(()))?)
    })
}

/// Gives the calling thread the cookie of another, or, with `None`, one of its own.
fn share_core_with(other: Option<Pid>) -> Result<(), Invalid> {
    let cookie = match other {
        None => create_core_scheduling_cookie(gettid(), CoreSchedulingScope::Thread),
        Some(other) => pull_core_scheduling_cookie(other, CoreSchedulingScope::Thread),
    };
    cookie.map_err(|error| {
        let reason = match error {
            Errno::INVAL => "this host's kernel has no core scheduling".to_owned(),
            Errno::NODEV => "this host's CPUs have no hardware threads (SMT) to keep apart".into(),
            other => format!("this host refuses it: {other}"),
        };
        Invalid::new("core_scheduling", reason)
    })
}

/// Has the calling thread run on the CPUs of `affinity` only.
fn run_on(affinity: &CpuAffinity) -> Result<(), Invalid> {
    let refuse = |reason: String| Invalid::new("host_cpus", reason);
    let mut wanted = CpuSet::new();
    for &cpu in &affinity.host_cpus {
        // What is beyond was refused before: setting it would be out of bounds.
        if cpu < CpuSet::MAX_CPU {
            wanted.set(cpu);
        }
    }
    let got = match sched_setaffinity(None, &wanted) {
        Ok(()) => sched_getaffinity(None).map_err(|e| refuse(e.to_string()))?,
        // None of them can be had.
        Err(Errno::INVAL) => CpuSet::new(),
        Err(error) => return Err(refuse(error.to_string())),
    };
    let lacking: Vec<String> = (affinity.host_cpus.iter())
        .filter(|cpu| **cpu >= CpuSet::MAX_CPU || !got.is_set(**cpu))
        .map(usize::to_string)
        .collect();
    if lacking.is_empty() {
        return Ok(());
    }
    Err(refuse(format!(
        "this host has no CPU {} online that this process may use",
        lacking.join(", ")
    )))
}

/// The placing of all vCPU threads of a VM.
pub struct Placement {
    affinity: Vec<CpuAffinity>,
    core_scheduling: CoreScheduling,
    /// The thread whose cookie is the VM's.
    first: OnceLock<Pid>,
}

impl Placement {
    /// The placing that `cpus` asks for; says in one line when vCPUs share the host's CPUs.
    pub fn new(cpus: &CpusConfig) -> Arc<Self> {
        if let Ok(host) = sched_getaffinity(None)
            && cpus.boot_vcpus > host.count()
        {
            tracing::info!(
                vcpus = cpus.boot_vcpus,
                host_cpus = host.count(),
                "more vCPUs than host CPUs: they take turns"
            );
        }
        Arc::new(Self {
            affinity: cpus.affinity.clone().unwrap_or_default(),
            core_scheduling: cpus.core_scheduling,
            first: OnceLock::new(),
        })
    }

    /// Places the calling thread, which is to run the vCPU `index`. vCPU 0 comes first. Fields are
    /// named as seen from `cpus`.
    pub fn apply(&self, index: u32) -> Result<(), Invalid> {
        let ours = (0..).zip(&self.affinity).find(|(_, a)| a.vcpu == index);
        if let Some((entry, affinity)) = ours {
            run_on(affinity).map_err(|e| e.within(&format!("affinity[{entry}]")))?;
        }
        match self.core_scheduling {
            CoreScheduling::Off => Ok(()),
            CoreScheduling::Vcpu => share_core_with(None),
            CoreScheduling::Vm => {
                let this = gettid();
                let first = *self.first.get_or_init(|| this);
                share_core_with((first != this).then_some(first))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn affinity(host_cpus: &[usize]) -> CpusConfig {
        CpusConfig {
            affinity: Some(vec![CpuAffinity {
                vcpu: 0,
                host_cpus: host_cpus.to_vec(),
            }]),
            ..CpusConfig::default()
        }
    }

    /// A CPU that this thread may run on, and one that is not there.
    fn cpus() -> (usize, usize) {
        let set = sched_getaffinity(None).unwrap();
        let ours = (0..CpuSet::MAX_CPU).find(|c| set.is_set(*c)).unwrap();
        (ours, CpuSet::MAX_CPU - 1)
    }

    #[test]
    fn a_cpu_that_the_host_has_not_is_refused_by_name_and_the_caller_stays_where_it_is() {
        let (ours, missing) = cpus();
        let before = sched_getaffinity(None).unwrap();
        check(&affinity(&[ours])).unwrap();
        for set in [&[missing][..], &[ours, missing], &[missing, ours]] {
            let Err(Error::Invalid(error)) = check(&affinity(set)) else {
                panic!("accepted {set:?}");
            };
            assert_eq!(error.field, "affinity[0].host_cpus");
            assert!(error.reason.contains(&missing.to_string()), "{error}");
            assert!(!error.reason.contains(&format!(" {ours},")), "{error}");
        }
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }

    #[test]
    fn a_thread_runs_where_it_is_placed_and_others_do_not() {
        let (ours, _) = cpus();
        let placement = Placement::new(&affinity(&[ours]));
        let before = sched_getaffinity(None).unwrap();
        let placed = |index| {
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    placement.apply(index).unwrap();
                    sched_getaffinity(None).unwrap()
                });
                thread.join().unwrap()
            })
        };
        assert_eq!((placed(0).count(), placed(0).is_set(ours)), (1, true));
        assert_eq!(placed(1), before);
    }
}
