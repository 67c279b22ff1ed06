//! The truth about where the memory is: `vm.overcommit`.
//!
//! Read on the VMM thread when somebody asks, so that `vmm.ping` waits for none of it; it opens
//! files for reading only.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devices::balloon::BalloonInfo;
use devices::block::DiskReading;
use serde::Serialize;
use utoipa::ToSchema;

use super::cgroup::{self, Cgroup};
use super::cost::{Cached, Cost, SharedRam};
use super::files;
use super::ksm::KsmGain;
use super::pressure::{self, Pressure};
use super::reading::CpuTime;
use super::storage::{self, DiskTotals, Seen};
use crate::config::{OvercommitMode, VmConfig};

/// `vm.overcommit`. Ages are the milliseconds since something was read.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = OvercommitView)]
pub struct View {
    /// Who decides how large the first balloon is.
    pub mode: OvercommitMode,
    /// What the governor last found. Absent where it drives no balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub governor: Option<Governor>,
    /// Bytes of RAM the guest was promised.
    pub promised: u64,
    /// Bytes the host must have for it whatever happens: what the configuration guarantees, or all
    /// RAM where it says nothing.
    pub guaranteed: u64,
    /// Bytes the VM takes, with the VMM around it. Absent where they can't be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
    /// Why there is no `cost`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_unavailable: Option<String>,
    /// All balloons together.
    pub balloons: BalloonTotals,
    /// All disks together: what was promised, and what the host has for it.
    pub disks: DiskTotals,
    /// What merging equal pages gains.
    pub ksm: KsmGain,
    /// Transparent huge pages of private memory.
    pub huge_pages: HugePages,
    /// The vCPUs of a booted VM.
    pub vcpus: Vec<VcpuTime>,
    /// How long tasks stood still for want of something.
    pub pressure: PressureReading,
}

/// What the governor last found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Governor {
    /// The balloon it drives.
    pub balloon: String,
    /// How the host is: `ease`, `pressure` or `critical`.
    #[schema(example = "ease")]
    pub host: &'static str,
    /// Why the target is what it is, as in the event `overcommit-action`.
    #[schema(example = "steady")]
    pub reason: &'static str,
    /// Whose pressure has the governor look at once, by a trigger of the kernel: `host`, `cgroup`.
    /// The others it sees at its regular looks only.
    #[schema(example = json!(["host"]))]
    pub pressure_triggers: Vec<&'static str>,
    /// How long nothing will be taken, because of trouble.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_off_ms: Option<u64>,
    /// How long ago it looked.
    pub age_ms: u64,
}

/// All balloons together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct BalloonTotals {
    /// How many there are.
    pub count: u32,
    /// Bytes the guest is asked to give.
    pub target: u64,
    /// Bytes it says it has given; its word.
    pub actual: u64,
    /// Bytes of the pages that it has truly sent and not taken back, counted by us.
    pub given: u64,
    /// Bytes given back to the host by inflating since boot, counted by us.
    pub inflated: u64,
    /// Bytes the guest has taken out again since boot.
    pub deflated: u64,
    /// Bytes the guest has reported free and the host has got since boot.
    pub reported_free: u64,
    /// How old that is.
    pub age_ms: u64,
}

/// Transparent huge pages of private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct HugePages {
    /// Whether they are asked for (`memory.thp`, and private memory of ordinary pages).
    pub wanted: bool,
    /// Bytes in huge pages. Absent where that can't be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge: Option<u64>,
    /// Bytes in memory that could be in huge pages and are not: never were, or were split, by a
    /// balloon, by KSM or by the host. The kernel does not tell which, so this is the most that
    /// was lost. Absent where none are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
    /// How old that is.
    pub age_ms: u64,
}

/// The time of a vCPU's thread on the host since it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct VcpuTime {
    /// Which vCPU.
    pub vcpu: u32,
    /// The thread on the host.
    pub thread: u32,
    /// Nanoseconds it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_ns: Option<u64>,
    /// Nanoseconds it was ready to run and had to wait for a CPU. KVM tells this to the guest as
    /// steal time, from when the guest turns that on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_delay_ns: Option<u64>,
    /// Why they could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
    /// How old that is.
    pub age_ms: u64,
}

/// Pressure on the host and on the cgroup that the process is in.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct PressureReading {
    /// The whole host.
    pub host: Resources,
    /// Our own cgroup.
    pub cgroup: Resources,
    /// How old that is.
    pub age_ms: u64,
}

/// Pressure by resource. Absent is what could not be read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
#[schema(as = PressureByResource)]
pub struct Resources {
    /// Processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Pressure>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Pressure>,
    /// Disks and the like.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<Pressure>,
    /// Why something could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
}

/// What of a VM is to be seen.
#[derive(Debug)]
pub struct Subject<'a> {
    /// Its configuration.
    pub config: &'a VmConfig,
    /// Where its balloons stand.
    pub balloons: &'a [BalloonInfo],
    /// What its disks take.
    pub disks: &'a Seen,
    /// The threads of its vCPUs.
    pub vcpu_threads: &'a [u32],
    /// Its memory, where that is shared.
    pub shared_ram: SharedRam,
}

/// Reads it all, and keeps what is costly to read for a while.
#[derive(Debug)]
pub struct Observer {
    process: PathBuf,
    pressure: PathBuf,
    pid: u32,
    cost: Cached,
    disks: storage::Cached,
}

impl Default for Observer {
    fn default() -> Self {
        Self {
            process: "/proc/self".into(),
            pressure: "/proc/pressure".into(),
            pid: rustix::process::getpid()
                .as_raw_nonzero()
                .get()
                .unsigned_abs(),
            cost: Cached::default(),
            disks: storage::Cached::default(),
        }
    }
}

/// Something, and when it was read.
struct Dated<T>(T, Instant);

impl<T> Dated<T> {
    fn now(read: impl FnOnce() -> T) -> Self {
        let at = Instant::now();
        Self(read(), at)
    }

    fn age_ms(&self) -> u64 {
        milliseconds(self.1.elapsed())
    }
}

fn milliseconds(age: Duration) -> u64 {
    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
}

impl Observer {
    /// What the VM costs.
    pub fn cost(&mut self, shared_ram: SharedRam) -> Result<Cost, String> {
        let cgroup = cgroup::locate(&self.process, self.pid);
        self.cost_in(&cgroup, shared_ram)
    }

    /// What KSM gains.
    pub fn ksm(&self) -> KsmGain {
        KsmGain::read(&self.process)
    }

    /// What the disks with these `ids` take; `read` looks at all of them.
    pub fn disks<'a>(
        &mut self,
        ids: impl Iterator<Item = &'a str>,
        read: impl FnOnce() -> Vec<DiskReading>,
    ) -> Seen {
        let now = Instant::now();
        self.disks.get(now, ids, || (read(), now.elapsed()))
    }

    fn cost_in(
        &mut self,
        cgroup: &Result<Cgroup, String>,
        shared_ram: SharedRam,
    ) -> Result<Cost, String> {
        let read = || Cost::read(&self.process, cgroup, shared_ram);
        self.cost.get(Instant::now(), read)
    }

    /// Forgets what it has kept: the VM is not what it was.
    pub fn forget(&mut self) {
        self.cost.clear();
        self.disks.clear();
    }

    /// Everything, now.
    pub fn view(&mut self, subject: &Subject) -> View {
        let memory = &subject.config.memory;
        let balloons = Dated::now(|| balloon_totals(subject.balloons));
        let cgroup = cgroup::locate(&self.process, self.pid);
        let begun = Instant::now();
        let cost = self.cost_in(&cgroup, subject.shared_ram);
        let ksm = Dated::now(|| self.ksm());
        let vcpus = Dated::now(|| self.vcpus(subject.vcpu_threads));
        let pressure = Dated::now(|| (self.host_pressure(), cgroup_pressure(&cgroup)));

        let (cost, cost_unavailable) = match cost {
            Ok(mut cost) => {
                cost.age_ms = cost.age_ms.saturating_add(milliseconds(begun.elapsed()));
                (Some(cost), None)
            }
            Err(reason) => (None, Some(reason)),
        };
        let wanted = memory.thp && !memory.hugepages && !memory.shared;
        let huge = cost.as_ref().and_then(|cost| cost.anon_huge);
        let lost = cost
            .as_ref()
            .zip(huge)
            .map(|(cost, huge)| cost.anon.saturating_sub(huge));
        View {
            mode: subject
                .config
                .overcommit
                .as_ref()
                .map_or(OvercommitMode::Off, |overcommit| overcommit.mode),
            governor: None,
            promised: memory.size,
            guaranteed: subject.config.guaranteed_bytes(),
            balloons: BalloonTotals {
                age_ms: balloons.age_ms(),
                ..balloons.0
            },
            huge_pages: HugePages {
                wanted,
                huge,
                lost: lost.filter(|_| wanted),
                age_ms: cost.as_ref().map_or(0, |cost| cost.age_ms),
            },
            cost,
            cost_unavailable,
            disks: DiskTotals::of(subject.disks),
            ksm: KsmGain {
                mergeable: memory.mergeable,
                age_ms: ksm.age_ms(),
                ..ksm.0
            },
            vcpus: {
                let age_ms = vcpus.age_ms();
                let vcpus = vcpus.0.into_iter();
                vcpus.map(|vcpu| VcpuTime { age_ms, ..vcpu }).collect()
            },
            pressure: PressureReading {
                age_ms: pressure.age_ms(),
                host: pressure.0.0,
                cgroup: pressure.0.1,
            },
        }
    }

    fn vcpus(&self, threads: &[u32]) -> Vec<VcpuTime> {
        let times = |thread: u32| {
            let path = self.process.join(format!("task/{thread}/schedstat"));
            let text = files::read(&path)?;
            parse_schedstat(&text).ok_or_else(|| format!("{}: has no times", path.display()))
        };
        (0..)
            .zip(threads)
            .map(|(vcpu, &thread)| {
                let (run_ns, run_delay_ns, unavailable) = match times(thread) {
                    Ok((run, delay)) => (Some(run), Some(delay), None),
                    Err(reason) => (None, None, Some(reason)),
                };
                VcpuTime {
                    vcpu,
                    thread,
                    run_ns,
                    run_delay_ns,
                    unavailable,
                    age_ms: 0,
                }
            })
            .collect()
    }

    fn host_pressure(&self) -> Resources {
        resources(|name| pressure::read(&self.pressure.join(name)))
    }
}

fn balloon_totals(balloons: &[BalloonInfo]) -> BalloonTotals {
    let sum =
        |value: fn(&BalloonInfo) -> u64| balloons.iter().map(value).fold(0, u64::saturating_add);
    BalloonTotals {
        count: u32::try_from(balloons.len()).unwrap_or(u32::MAX),
        target: sum(|balloon| balloon.target),
        actual: sum(|balloon| balloon.actual),
        given: sum(|balloon| balloon.given),
        inflated: sum(|balloon| balloon.inflated),
        deflated: sum(|balloon| balloon.deflated),
        reported_free: sum(|balloon| balloon.reported_free),
        age_ms: 0,
    }
}

/// The pressure in the cgroup, where that is ours alone: that of others says nothing of this VM.
fn cgroup_pressure(cgroup: &Result<Cgroup, String>) -> Resources {
    let reason = match cgroup {
        Ok(Cgroup {
            shared: None,
            directory,
            ..
        }) => {
            return resources(|name| pressure::read(&directory.join(format!("{name}.pressure"))));
        }
        Ok(Cgroup {
            shared: Some(reason),
            ..
        })
        | Err(reason) => reason,
    };
    Resources {
        unavailable: Some(reason.clone()),
        ..Resources::default()
    }
}

fn resources(read: impl Fn(&str) -> Result<Pressure, String>) -> Resources {
    let mut unavailable = None;
    let mut one = |name| match read(name) {
        Ok(pressure) => Some(pressure),
        Err(reason) => {
            unavailable.get_or_insert(reason);
            None
        }
    };
    let (cpu, memory, io) = (one("cpu"), one("memory"), one("io"));
    Resources {
        cpu,
        memory,
        io,
        unavailable,
    }
}

/// What the vCPUs had of the host's CPUs: all that can be read of it, together.
pub fn vcpu_time(threads: &[u32]) -> CpuTime {
    let times = threads.iter().filter_map(|thread| {
        let path = format!("/proc/self/task/{thread}/schedstat");
        parse_schedstat(&files::read(Path::new(&path)).ok()?)
    });
    times.fold(CpuTime::default(), |sum, (run, delay)| CpuTime {
        run_ns: sum.run_ns.saturating_add(run),
        delay_ns: sum.delay_ns.saturating_add(delay),
    })
}

/// The time a thread ran and the time it waited for a CPU, in nanoseconds
/// (Documentation/scheduler/sched-stats.rst).
fn parse_schedstat(text: &str) -> Option<(u64, u64)> {
    let mut numbers = text.split_ascii_whitespace();
    let run = numbers.next()?.parse().ok()?;
    let delay = numbers.next()?.parse().ok()?;
    Some((run, delay))
}

#[cfg(test)]
mod tests;
