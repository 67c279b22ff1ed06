//! What a VM is guaranteed, and the balloon that the governor drives.
//!
//! In mode auto the configuration keeps the size that the client gave, where the guest's next boot
//! begins; the target that the governor has come to is the device's and stands in `vm.balloons`.

use super::Created;
use crate::config::{OvercommitConfig, OvercommitMode, VmConfig};
use crate::error::Error;
use crate::overcommit::control::{Driven, Step};
use crate::overcommit::cpu::{self, CpuLimits};
use crate::overcommit::reading::Limits;
use crate::state::State;

impl Created {
    /// Changes the policy; all of it or nothing.
    pub fn set_overcommit(&mut self, mut overcommit: OvercommitConfig) -> Result<(), Error> {
        overcommit.fill_in(self.config.memory.size);
        let floor = overcommit.guaranteed_size();
        let mode = overcommit.mode;
        let mut config = self.config.clone();
        config.overcommit = Some(overcommit);
        config.validate().map_err(|e| e.relative_to("overcommit"))?;
        if mode == OvercommitMode::Off
            && let Some((id, target)) = self.driven_target()
            && let Some(balloon) = config.balloon_mut(&id)
        {
            // From now on it stays where it is.
            balloon.size = target;
        }
        let taken = match mode {
            OvercommitMode::Off => config.balloon_bytes(),
            // What the driven one asks for is lowered to what is left.
            OvercommitMode::Auto => undriven_bytes(&config),
        };
        let left = config.memory.size.saturating_sub(taken);
        if left < floor && floor > self.config.floor_bytes() {
            return Err(Error::BelowFloor {
                field: "guaranteed_size".to_owned(),
                left,
                floor,
            });
        }
        // The last that can fail; it takes itself back.
        let cpu_limits = CpuLimits::of(config.overcommit.as_ref());
        match &mut self.running {
            Some(vm) => vm.limit_cpu(cpu_limits)?,
            None => cpu::check(cpu_limits)?,
        }
        self.config = config;
        self.keep_guarantee();
        Ok(())
    }

    /// Lowers the target of the driven balloon where it is beyond what the guarantee leaves beside
    /// the others. Called when those, or the guarantee, have changed.
    pub(super) fn keep_guarantee(&mut self) {
        let most = limits(&self.config, 0).most();
        if let Some((id, target)) = self.driven_target()
            && target > most
            && let Some(vm) = &self.running
            && let Ok(balloon) = vm.devices.balloon(&id)
        {
            balloon.set_target(most);
        }
    }

    /// Whether `id` is the balloon that the governor drives, or will.
    pub(super) fn is_driven(&self, id: &str) -> bool {
        let mut balloons = self.config.all_balloons();
        self.config.governed() && balloons.next().is_some_and(|b| b.1 == id)
    }

    fn driven_target(&self) -> Option<(String, u64)> {
        let driven = self.driven()?;
        Some((driven.id.to_owned(), driven.balloon.target_bytes()))
    }

    /// The first balloon, where mode auto is on and there is one that is not on its way out.
    fn driven(&self) -> Option<Driven<'_>> {
        if !self.config.governed() {
            return None;
        }
        let vm = self.running.as_ref()?;
        let (_, id, _) = self.config.all_balloons().next()?;
        if vm.devices.is_leaving(id) {
            return None;
        }
        let others = vm.devices.balloons().filter(|(other, _)| *other != id);
        let others_actual = others.map(|(_, b)| b.actual_bytes());
        let others_actual = others_actual.fold(0, u64::saturating_add);
        Some(Driven {
            id,
            balloon: vm.devices.balloon(id).ok()?,
            limits: limits(&self.config, others_actual),
            vcpu_threads: vm.vcpus.thread_ids(),
        })
    }

    /// What the governor is to look at, and every how many milliseconds; `None` where it is off,
    /// and while the VM does not run.
    pub fn governed(&self) -> Option<(Driven<'_>, u32)> {
        if self.state() != State::Running {
            return None;
        }
        let driven = self.driven()?;
        let interval_ms = driven.limits.interval_ms;
        Some((driven, interval_ms))
    }

    /// Does what the governor says.
    pub fn carry_out(&self, step: &Step) -> Result<(), Error> {
        let vm = self.running()?;
        vm.devices.balloon(&step.id)?.set_target(step.to);
        Ok(())
    }
}

/// What the balloons but the first ask for.
fn undriven_bytes(config: &VmConfig) -> u64 {
    let others = config.all_balloons().skip(1);
    let sizes = others.map(|(_, _, balloon)| balloon.size);
    sizes.fold(0, u64::saturating_add)
}

fn limits(config: &VmConfig, others_actual: u64) -> Limits {
    let ram = config.memory.size;
    let overcommit = config.overcommit.clone().unwrap_or_default();
    Limits {
        ram,
        guaranteed: overcommit.guaranteed_size(),
        max: overcommit.max_size(ram),
        others_target: undriven_bytes(config),
        others_actual,
        weight: overcommit.weight,
        buffer_percent: overcommit.buffer_percent,
        step: overcommit.step_size(),
        interval_ms: overcommit.interval_ms,
        host_free_percent: overcommit.host_free_percent,
    }
}
