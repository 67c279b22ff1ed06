//! A host with guests that do what they are asked, each with a need of its own: what the governor
//! decides has consequences here.

use super::*;

/// A guest and its governor.
#[derive(Clone, Copy)]
pub struct Vm {
    pub limits: Limits,
    pub state: State,
    pub own: Own,
    pub target: u64,
    pub actual: u64,
    /// What the guest uses, if it can.
    pub used: u64,
    pub oom_kills: u64,
    /// Bytes a look by which the balloon comes closer to its target.
    pub speed: u64,
}

impl Vm {
    pub fn new(limits: Limits, target: u64, used: u64) -> Self {
        Self {
            limits,
            state: State::default(),
            own: Own::default(),
            target,
            actual: target,
            used,
            oom_kills: 0,
            speed: u64::MAX,
        }
    }

    /// What the guest has.
    pub fn has(&self) -> u64 {
        self.limits.ram - self.actual
    }

    fn reading(&self, now_ms: u64, host: HostReading, guest: GuestReading) -> Reading {
        Reading {
            now_ms,
            limits: self.limits,
            balloon: BalloonReading {
                target: self.target,
                actual: self.actual,
                driver: true,
            },
            guest: Some(GuestReading {
                at_ms: now_ms,
                available: self.has().saturating_sub(self.used),
                ..guest
            }),
            host,
            neighbours: Neighbours::default(),
            vcpus: CpuTime::default(),
        }
    }

    /// Looks, and has the guest follow.
    pub fn look(&mut self, now_ms: u64, host: HostReading, neighbours: Neighbours) -> Decision {
        let guest = GuestReading {
            oom_kills: self.oom_kills,
            ..GuestReading::default()
        };
        let reading = self.reading(now_ms, host, guest);
        self.follow(&Reading {
            neighbours,
            ..reading
        })
    }

    /// The same alone, with the totals that `guest` has.
    pub fn see(&mut self, now_ms: u64, host: HostReading, guest: GuestReading) -> Decision {
        self.follow(&self.reading(now_ms, host, guest))
    }

    fn follow(&mut self, reading: &Reading) -> Decision {
        let (decision, next) = decide(reading, &self.state);
        self.state = next;
        self.own = decision.own;
        self.target = decision.target;
        self.actual = if self.target > self.actual {
            self.target.min(self.actual.saturating_add(self.speed))
        } else {
            self.target.max(self.actual.saturating_sub(self.speed))
        };
        decision
    }
}

/// What the others of `vms[at]` tell.
pub fn neighbours(vms: &[Vm], at: usize) -> Neighbours {
    let others = vms.iter().enumerate().filter(|(other, _)| *other != at);
    others.fold(Neighbours::default(), |sum, (_, vm)| Neighbours {
        vms: sum.vms + 1,
        claims: sum.claims + vm.own.claim,
        pending: sum.pending + vm.own.pending,
    })
}

/// The host, where guests have touched all they have, and something else uses `other` bytes.
pub fn host(total: u64, other: u64, vms: &[Vm]) -> HostReading {
    let resident: u64 = vms.iter().map(Vm::has).sum();
    HostReading {
        total,
        available: total.saturating_sub(other).saturating_sub(resident),
        pressure: Some(Pressure::default()),
        cgroup_pressure: None,
    }
}
