//! A VM from `vm.create` to `vm.delete`: the desired configuration, the consoles that outlive
//! reboots, and, while it is booted, the machine.
//!
//! A change is made in the configuration only when it is certain, or has been made in the live
//! machine; whatever fails leaves both as they were.

use std::collections::HashMap;
use std::os::linux::fs::MetadataExt;
use std::time::Instant;

use devices::block::DiskConfig;
use devices::block::watermarks::Passed;
use devices::config::{DeviceConfig, Invalid};
use devices::sandbox::SeccompMode;
use devices::signals::Signalled;

use crate::boot::{Payload, smbios};
use crate::config::{BALLOON_ID, VmConfig, VmResize};
use crate::consoles::Consoles;
use crate::device_manager::Removed;
use crate::error::Error;
use crate::jobs::Jobs;
use crate::overcommit::cost::SharedRam;
use crate::overcommit::cpu::{self, CpuLimits};
use crate::state::State;
use crate::status::{PciDeviceInfo, VmInfo};
use crate::vcpu::placement;
use crate::vm::{Environment, RNG_ID, Vm, check_debug_port, open_payload};
use crate::{cpuid, memory};

mod jobs;
mod observe;
mod policy;
mod snapshot;

pub use snapshot::MovedOn;

/// A VM that exists.
pub struct Created {
    config: VmConfig,
    consoles: Consoles,
    /// Number for the next made-up id; all kinds of devices count together, as in Cloud
    /// Hypervisor.
    next_number: u32,
    running: Option<Vm>,
    paused: bool,
    /// Paused by a disk for which the host has no space, and not by a client.
    paused_for_space: bool,
    jobs: Jobs,
}

impl Created {
    /// Checks a configuration against itself and the host, fills in ids and opens the consoles.
    pub fn new(mut config: VmConfig, seccomp: SeccompMode) -> Result<Self, Error> {
        config.validate()?;
        if let Some(overcommit) = &mut config.overcommit {
            overcommit.fill_in(config.memory.size);
        }
        config.check_floor(0, "balloons")?;
        placement::check(&config.cpus).map_err(|e| e.within("cpus"))?;
        cpu::check(CpuLimits::of(config.overcommit.as_ref()))
            .map_err(|e| e.within("overcommit"))?;
        memory::check(&config.memory).map_err(|e| e.within("memory"))?;
        config.validate_addresses(config.cpus.max_phys_bits.min(cpuid::host_phys_bits()))?;
        if let Some(payload) = &config.payload {
            let opened = Payload::open(payload).and_then(|p| p.fits(config.memory.size));
            opened.map_err(|e| e.within("payload"))?;
        }
        check_debug_port(&config.debug_console).map_err(|e| e.within("debug_console"))?;
        if let Some(platform) = &config.platform {
            smbios::check(platform).map_err(|e| e.within("platform"))?;
        }
        for (field, device) in config.devices() {
            device
                .check_host()
                .map_err(|e| Error::from(e).within(&field))?;
        }
        check_images(&config)?;
        let mut next_number = 0;
        for index in 0..config.disks.len() {
            if config.disks[index].common.id.is_none() {
                config.disks[index].common.id = Some(free_id(&config, "_disk", &mut next_number));
            }
        }
        for index in 0..config.balloons.len() {
            if config.balloons[index].common.id.is_none() {
                let id = free_id(&config, "_balloon", &mut next_number);
                config.balloons[index].common.id = Some(id);
            }
        }
        config.cpus.max_vcpus = config.cpus.max();
        let consoles = Consoles::open(&mut config, seccomp)?;
        Ok(Self {
            config,
            consoles,
            next_number,
            running: None,
            paused: false,
            paused_for_space: false,
            jobs: Jobs::default(),
        })
    }

    /// What the VM is doing.
    pub fn state(&self) -> State {
        match (&self.running, self.paused) {
            (None, _) => State::Created,
            (Some(_), false) => State::Running,
            (Some(_), true) => State::Paused,
        }
    }

    /// The VM as `vm.info` shows it.
    pub fn info(&self) -> VmInfo {
        VmInfo {
            config: self.config.clone(),
            state: self.state(),
            memory_actual_size: self.memory_actual_bytes(),
            overcommit_ledger: None,
            device_tree: self.running.as_ref().map(|vm| vm.devices.tree()),
        }
    }

    /// The configuration as it is now.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// RAM, less what the guest says it has given; its word, so that it may be nonsense.
    fn memory_actual_bytes(&self) -> u64 {
        let size = self.config.memory.size;
        let Some(vm) = &self.running else {
            return size;
        };
        let given = vm.devices.balloons().map(|(_, b)| b.actual_bytes());
        size.saturating_sub(given.fold(0, u64::saturating_add))
    }

    /// The machine; the caller has checked that the state is right.
    pub fn running(&self) -> Result<&Vm, Error> {
        self.running.as_ref().ok_or(Error::NotCreated)
    }

    /// Checks that what the VM boots from is still there and fit, before it is pulled from under
    /// a guest that runs.
    pub fn check_payload(&self) -> Result<(), Error> {
        open_payload(&self.config)?
            .fits(self.config.memory.size)
            .map_err(|e| e.within("payload"))
    }

    /// Builds the machine and starts it, or has it stand still before its first instruction. On
    /// failure nothing of it stays.
    pub fn boot(&mut self, environment: Environment, paused: bool) -> Result<(), Error> {
        let vm = Vm::build(&self.config, &self.consoles, environment)?;
        if paused {
            vm.devices.pause()?;
        } else {
            vm.vcpus.resume();
        }
        self.running = Some(vm);
        self.paused = paused;
        self.paused_for_space = false;
        Ok(())
    }

    /// Pulls the plug; says which devices were on their way out and are gone with it.
    pub fn power_off(&mut self) -> Vec<Removed> {
        if self.running.is_some() {
            self.jobs.end_unless_suspended();
        }
        let Some(vm) = self.running.take() else {
            return Vec::new();
        };
        self.paused = false;
        let removed = vm.devices.removing();
        drop(vm);
        for device in &removed {
            self.config.remove(&device.id);
        }
        removed
    }

    /// Stops vCPUs, then drains the devices. On failure all go on.
    pub fn pause(&mut self) -> Result<(), Error> {
        let vm = self.running()?;
        vm.vcpus.pause()?;
        if let Err(error) = vm.devices.pause() {
            vm.vcpus.resume();
            return Err(error);
        }
        self.paused = true;
        Ok(())
    }

    /// Undoes [`Created::pause`].
    pub fn resume(&mut self) -> Result<(), Error> {
        let vm = self.running()?;
        vm.devices.resume();
        vm.vcpus.resume();
        self.paused = false;
        self.paused_for_space = false;
        Ok(())
    }

    /// Whether a disk wants the VM to stand still for lack of space.
    pub fn wants_pause(&self) -> bool {
        let devices = self.running.as_ref().map(|vm| &vm.devices);
        devices.is_some_and(|devices| devices.disks().any(|(_, disk)| disk.wants_pause()))
    }

    /// The VM was paused because of [`Created::wants_pause`].
    pub fn set_paused_for_space(&mut self) {
        self.paused_for_space = self.paused;
    }

    /// Whether it still is.
    pub fn is_paused_for_space(&self) -> bool {
        self.paused && self.paused_for_space
    }

    /// Looks how full the disks' places on the host are, when it is time to: what has been passed.
    pub fn look_at_disks(&mut self, now: Instant) -> Vec<(String, Passed)> {
        let vm = self.running.as_mut();
        vm.map(|vm| vm.disk_watch.look(&vm.devices, now))
            .unwrap_or_default()
    }

    /// Adds a device to the configuration, and plugs it in where the VM is booted.
    pub fn add_device(&mut self, mut device: DeviceConfig) -> Result<PciDeviceInfo, Error> {
        let mut next_number = self.next_number;
        let id = match &device.common().id {
            Some(id) => id.clone(),
            None => free_id(&self.config, device.id_prefix(), &mut next_number),
        };
        device.common_mut().id = Some(id.clone());
        let mut config = self.config.clone();
        let field = config.add(device.clone())?;
        config.validate().map_err(|e| e.relative_to(&field))?;
        config.check_floor(self.config.balloon_bytes(), "size")?;
        check_images(&config).map_err(|e| e.relative_to(&field))?;
        let info = match &mut self.running {
            Some(vm) => vm.devices.hot_plug(&id, &device)?,
            None => {
                device.check_host()?;
                PciDeviceInfo { id, bdf: None }
            }
        };
        self.config = config;
        self.next_number = next_number;
        self.keep_guarantee();
        Ok(info)
    }

    /// Asks the running guest to let go of a device, or takes it out of the configuration; says
    /// what is gone at once.
    pub fn remove_device(&mut self, id: &str) -> Result<Vec<Removed>, Error> {
        if id == RNG_ID || self.config.rng.common.id.as_deref() == Some(id) {
            return Err(Error::NotRemovable {
                id: id.to_owned(),
                reason: "it is part of the machine",
            });
        }
        match &mut self.running {
            Some(vm) => {
                vm.devices.request_removal(id)?;
                self.jobs.cancel_on(id);
            }
            None if !self.config.remove(id) => {
                return Err(Error::UnknownDevice { id: id.to_owned() });
            }
            None => {}
        }
        Ok(Vec::new())
    }

    /// Changes what can be changed; all of it or nothing.
    pub fn resize(&mut self, desired: VmResize) -> Result<(), Error> {
        let fixed = |field: &str, desired: Option<u64>, is: u64| match desired {
            Some(desired) if desired != is => Err(Error::from(Invalid::new(
                field,
                format!("not supported yet: it can't be changed, and is {is}"),
            ))),
            _ => Ok(()),
        };
        let vcpus = self.config.cpus.boot_vcpus;
        fixed(
            "desired_vcpus",
            desired.desired_vcpus.map(u64::from),
            vcpus.into(),
        )?;
        fixed("desired_ram", desired.desired_ram, self.config.memory.size)?;
        let Some(size) = desired.desired_balloon else {
            return Ok(());
        };
        let id = self.first_balloon()?;
        self.resize_balloon(&id, size, "desired_balloon", false)
    }

    /// Tells the guest a balloon's new target, or changes it in the configuration; `field` is what
    /// a refusal names. With `floor_override` the guarantee does not hold it back.
    pub fn resize_balloon(
        &mut self,
        id: &str,
        size: u64,
        field: &str,
        floor_override: bool,
    ) -> Result<(), Error> {
        let mut config = self.config.clone();
        let Some(balloon) = config.balloon_mut(id) else {
            if config
                .devices()
                .iter()
                .any(|(_, d)| d.common().id.as_deref() == Some(id))
            {
                return Err(Invalid::new("id", format!("device `{id}` is not a balloon")).into());
            }
            return Err(Error::UnknownDevice { id: id.to_owned() });
        };
        balloon.size = size;
        config
            .validate_balloons()
            .map_err(|invalid| Invalid::new(field, invalid.reason))?;
        if !floor_override {
            config.check_floor(self.config.balloon_bytes(), field)?;
        } else if self.is_driven(id) {
            return Err(Error::Driven { id: id.to_owned() });
        }
        if let Some(vm) = &self.running {
            vm.devices.balloon(id)?;
        }
        self.config = config;
        // Before, so that the two never ask for more than they may together.
        self.keep_guarantee();
        if let Some(vm) = &self.running {
            vm.devices.balloon(id)?.set_target(size);
        }
        Ok(())
    }

    /// The id of the balloon that Cloud Hypervisor's commands mean.
    pub fn first_balloon(&self) -> Result<String, Error> {
        let first = self.config.all_balloons().next();
        first
            .map(|(_, id, _)| id.to_owned())
            .ok_or_else(|| Error::UnknownDevice {
                id: BALLOON_ID.to_owned(),
            })
    }

    /// The guest has ejected the devices in these slots, one bit each.
    pub fn ejected(&mut self, slots: u32) -> Vec<Removed> {
        let Some(vm) = &mut self.running else {
            return Vec::new();
        };
        let removed = vm.devices.ejected(slots);
        self.jobs
            .end(|disk| removed.iter().any(|device| device.id == disk));
        for device in &removed {
            self.config.remove(&device.id);
        }
        removed
    }

    /// What the machine's RAM takes, where it is shared.
    pub fn shared_ram(&self) -> SharedRam {
        let vm = self.running.as_ref();
        vm.map_or_else(SharedRam::default, |vm| {
            memory::shared_usage(&vm.ram, self.config.memory.hugepages)
        })
    }

    /// When the machine was built; `None` while it is off.
    pub fn booted_at(&self) -> Option<Instant> {
        self.running.as_ref().map(|vm| vm.built_at)
    }

    /// What the guest has signalled since the last look.
    pub fn take_signals(&self) -> Signalled {
        self.running
            .as_ref()
            .map(|vm| vm.signals.take())
            .unwrap_or_default()
    }

    /// When [`Created::expired`], [`Created::look_at_disks`] or [`Created::look_at_jobs`] next have
    /// something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        let vm = self.running.as_ref()?;
        let removal = vm.devices.next_deadline();
        let disks = vm.disk_watch.next_look(&vm.devices);
        let jobs = self.jobs.next_look();
        removal.into_iter().chain(disks).chain(jobs).min()
    }

    /// Devices whose removal has just taken too long.
    pub fn expired(&mut self, now: Instant) -> Vec<String> {
        self.running
            .as_mut()
            .map(|vm| vm.devices.expired(now))
            .unwrap_or_default()
    }
}

/// The next id of the form `<prefix><number>` that no device has.
fn free_id(config: &VmConfig, prefix: &str, next_number: &mut u32) -> String {
    loop {
        let id = format!("{prefix}{next_number}");
        *next_number = next_number.wrapping_add(1);
        let taken = config
            .devices()
            .iter()
            .any(|(_, device)| device.common().id.as_ref() == Some(&id));
        if !taken {
            return id;
        }
    }
}

/// Refuses two disks on one image under different names (links), unless both only read.
fn check_images(config: &VmConfig) -> Result<(), Error> {
    let mut seen: HashMap<(u64, u64), &DiskConfig> = HashMap::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let Ok(metadata) = std::fs::metadata(&disk.path) else {
            continue;
        };
        let file = (metadata.st_dev(), metadata.st_ino());
        if let Some(other) = seen.get(&file)
            && !(other.readonly && disk.readonly)
        {
            return Err(Error::DuplicatePath {
                field: format!("disks[{index}].path"),
                path: disk.path.display().to_string(),
                id: other.common.id.clone().unwrap_or_default(),
            });
        }
        seen.insert(file, disk);
    }
    Ok(())
}
