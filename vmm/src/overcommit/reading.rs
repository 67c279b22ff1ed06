//! What a decision of the governor is made of: plain data, gathered by the plumbing in
//! [`super`], made up by tests and read from recorded traces.
//!
//! Sizes are bytes, times milliseconds of one steady clock.

/// Everything the governor looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Now.
    pub now_ms: u64,
    /// What the configuration says.
    pub limits: Limits,
    /// The balloon the governor drives.
    pub balloon: BalloonReading,
    /// What the guest tells of its memory; `None` where it never has.
    pub guest: Option<GuestReading>,
    /// How the host is.
    pub host: HostReading,
    /// The other VMs on the host.
    pub neighbours: Neighbours,
    /// What the vCPUs had of the host's CPUs; looked at while the guest gives memory.
    pub vcpus: CpuTime,
}

/// Time of the vCPUs' threads since they were made, all together; nothing where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Nanoseconds they ran.
    pub run_ns: u64,
    /// Nanoseconds they were ready to run and waited for a CPU.
    pub delay_ns: u64,
}

/// What the configuration says of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// RAM.
    pub ram: u64,
    /// What is never taken.
    pub guaranteed: u64,
    /// What the guest may have at most.
    pub max: u64,
    /// What the VM's other balloons ask for.
    pub others_target: u64,
    /// What the guest says they have.
    pub others_actual: u64,
    /// How much the VM counts beside others; at least 1.
    pub weight: u32,
    /// What the guest keeps beyond what it uses, in percent of that.
    pub buffer_percent: u32,
    /// The most that is taken in one step.
    pub step: u64,
    /// Milliseconds between two looks.
    pub interval_ms: u32,
    /// Below this much available memory, in percent, the host is under pressure.
    pub host_free_percent: u32,
}

/// The balloon the governor drives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonReading {
    /// What the guest is asked for.
    pub target: u64,
    /// What it says it has given, as far as it has sent the pages.
    pub actual: u64,
    /// Whether a driver runs the device.
    pub driver: bool,
}

/// What the guest tells of its memory; all of it its word. The counters are totals since it
/// booted; one that it does not send stays 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestReading {
    /// When it told.
    pub at_ms: u64,
    /// Bytes that programs could have without swapping.
    pub available: u64,
    /// Processes killed for lack of memory.
    pub oom_kills: u64,
    /// Allocations that had to wait for reclaim.
    pub alloc_stalls: u64,
    /// Pages reclaimed by allocations that waited.
    pub direct_reclaims: u64,
    /// Page faults that needed I/O.
    pub major_faults: u64,
}

/// How the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostReading {
    /// Its memory; 0 where it could not be read, and then nothing is taken.
    pub total: u64,
    /// What it could still hand out.
    pub available: u64,
    /// Pressure on the whole host; `None` on a kernel without PSI.
    pub pressure: Option<Pressure>,
    /// Pressure in our own cgroup; `None` where there is none.
    pub cgroup_pressure: Option<Pressure>,
}

/// Pressure stall information of the last ten seconds, in hundredths of a percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pressure {
    /// Part of the time in which some task waited for memory.
    pub some: u32,
    /// Part of the time in which all did.
    pub full: u32,
}

/// What the other VMs on the host tell through the ledger. By default there are none: a VM without
/// a ledger decides as if it were alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// How many there are.
    pub vms: u32,
    /// The sum of their [`Own::claim`]: of what the host needs, this VM gives its own claim's part
    /// of all claims.
    pub claims: u64,
    /// The sum of their [`Own::pending`]: bytes of the host's available memory that are spoken
    /// for, as their guests have been given them and have not touched them yet.
    pub pending: u64,
}

/// What this VM tells the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// Idle memory by weight, see [`claim`].
    pub claim: u64,
    /// Bytes given back to the guest lately, which it may be about to touch.
    pub pending: u64,
}

/// How much of what the host needs should come from a VM with so many idle bytes: the more the
/// more it has, the less the more it weighs.
pub fn claim(idle: u64, weight: u32) -> u64 {
    idle.saturating_mul(100) / u64::from(weight.max(1))
}
