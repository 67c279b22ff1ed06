//! A booted machine: RAM, vCPUs, buses and everything on them. Built whole or not at all, and
//! dropped whole: a reset of the guest is a new machine.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use devices::acpi::{GED_PORTS, Ged, SLEEP_PORTS, SleepAndReset};
use devices::bus::{Bus, BusDevice};
use devices::config::{DeviceConfig, Invalid};
use devices::event::{BalloonNews, DeviceEvent, EventSink};
use devices::guest_memory::GuestRam;
use devices::guest_memory::discard::inhibit::Inhibitor;
use devices::legacy::{
    CMOS_PORTS, Cmos, ConsoleMode, DebugConsole, DebugConsoleConfig, DebugPort, I8042, I8042_PORTS,
    PM_TIMER_PORTS, PmTimer, SERIAL_PORTS, SerialDevice,
};
use devices::pci::bus::{PORTS, PciBus};
use devices::pci::hotplug::{HOTPLUG_PORTS, PciHotplug};
use devices::sandbox::SeccompMode;
use devices::signals::GuestSignals;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::{self, Payload};
use crate::command::Message;
use crate::config::{BALLOON_ID, VmConfig};
use crate::consoles::Consoles;
use crate::cpuid::apic_id;
use crate::device_manager::{DeviceManager, Sockets};
use crate::disks::DiskWatch;
use crate::error::Error;
use crate::event::Events;
use crate::interrupts::Interrupts;
use crate::layout::{
    ACPI_SLEEP_PORT, CMOS_PORT, ECAM, ECAM_SIZE, GED_GSI, GED_PORT, HOLE_START, HOTPLUG_PORT,
    I8042_PORT, PCI_CONFIG_PORT, PCI_WINDOW, PCI_WINDOW_SIZE, PM_TIMER_PORT, POST_PORT, SERIAL_GSI,
    SERIAL_PORT,
};
use crate::overcommit::cpu::{CpuGroup, CpuLimits};
use crate::vcpu::{VcpuContext, Vcpus};
use crate::{acpi, memory};

/// Id of the entropy device that every machine has, unless the configuration names it otherwise.
pub const RNG_ID: &str = "__rng";

/// What a machine is built in.
#[derive(Clone)]
pub struct Environment {
    /// Mode of all seccomp filters.
    pub seccomp: SeccompMode,
    /// Where events go.
    pub events: Events,
    /// The VMM thread's inbox.
    pub inbox: mpsc::Sender<Message>,
}

/// A booted machine. Fields are dropped in this order: vCPUs stop first.
pub struct Vm {
    /// The vCPUs.
    pub vcpus: Vcpus,
    /// The devices in PCI slots.
    pub devices: DeviceManager,
    /// What the guest does to the machine.
    pub signals: Arc<GuestSignals>,
    /// When it was ready to run.
    pub built_at: Instant,
    /// RAM.
    pub ram: GuestRam,
    /// How full the disks' places on the host are.
    pub disk_watch: DiskWatch,
    ged: Arc<Ged>,
    /// Last: every thread it has places for is gone by then.
    cpu_group: Option<CpuGroup>,
}

/// The I/O ports that the machine's own devices have: first port and number.
const PORTS_TAKEN: &[(u64, u64)] = &[
    (ACPI_SLEEP_PORT, SLEEP_PORTS),
    (CMOS_PORT, CMOS_PORTS),
    (GED_PORT, GED_PORTS),
    (HOTPLUG_PORT, HOTPLUG_PORTS),
    (I8042_PORT, I8042_PORTS),
    (PCI_CONFIG_PORT, PORTS),
    (PM_TIMER_PORT, PM_TIMER_PORTS),
    (POST_PORT, 1),
    (SERIAL_PORT, SERIAL_PORTS),
];

/// Refuses a debug port at a port that another device has.
pub fn check_debug_port(config: &DebugConsoleConfig) -> Result<(), Invalid> {
    let port = u64::from(config.iobase);
    let taken = |(base, len): &(u64, u64)| (*base..base + len).contains(&port);
    if config.mode != ConsoleMode::Off && PORTS_TAKEN.iter().any(taken) {
        return Err(Invalid::new(
            "iobase",
            format!("port {port:#x} belongs to another device"),
        ));
    }
    Ok(())
}

/// The buses while devices are being put on them.
struct Buses {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
}

impl Buses {
    fn pio(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        self.pio
            .insert(base, len, device)
            .map_err(|e| Error::host("placing a device on the I/O ports", e))
    }

    fn mmio(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        self.mmio
            .insert(base, len, device)
            .map_err(|e| Error::host("placing a device in memory", e))
    }
}

impl Vm {
    /// Builds the machine of `config`; its vCPUs wait to be resumed. Whatever was done when
    /// something fails is undone by dropping it.
    pub fn build(
        config: &VmConfig,
        consoles: &Consoles,
        environment: Environment,
    ) -> Result<Self, Error> {
        let started = Instant::now();
        let payload = open_payload(config)?;
        let kvm = boot::open_kvm()?;
        let vm = Arc::new(boot::create_vm(&kvm, &config.cpus)?);
        let ram = memory::allocate(&config.memory).map_err(|e| e.within("memory"))?;
        memory::attach(&vm, &ram)?;

        let interrupts = Interrupts::new(vm.clone());
        let inbox = environment.inbox.clone();
        let signals = Arc::new(GuestSignals::new(move || {
            // The VMM thread outlives its machines.
            let _ = inbox.send(Message::Guest);
        }));
        let buses = Buses {
            pio: Arc::default(),
            mmio: Arc::default(),
        };
        let line = |gsi| {
            interrupts
                .line(gsi)
                .map_err(|e| Error::os("making an interrupt line", e))
        };
        let ged = Arc::new(Ged::new(line(GED_GSI)?));
        let hotplug = Arc::new(PciHotplug::new(signals.clone()));
        buses.pio(GED_PORT, GED_PORTS, ged.clone())?;
        buses.pio(HOTPLUG_PORT, HOTPLUG_PORTS, hotplug.clone())?;
        legacy_devices(&buses, &ram, &signals, &environment.events, started)?;
        if let Some(backend) = consoles.serial() {
            let serial = SerialDevice::attach(backend, line(SERIAL_GSI)?);
            buses.pio(SERIAL_PORT, SERIAL_PORTS, serial)?;
        }
        if let Some(backend) = consoles.debug() {
            let port = config.debug_console.iobase.into();
            buses.pio(port, 1, Arc::new(DebugConsole::new(backend)))?;
        }
        let mut devices = DeviceManager::new(Sockets {
            bus: pci_bus(&buses)?,
            machine: Arc::new(interrupts),
            ram: ram.clone(),
            hotplug,
            ged: ged.clone(),
            seccomp: environment.seccomp,
            discards: Inhibitor::default(),
            sink: event_sink(environment.events.clone(), signals.clone()),
        });
        // Who asks for a slot gets it before those that take any.
        let mut configured = config.devices();
        configured.sort_by_key(|(_, device)| device.common().pci_device_id.is_none());
        for (field, device) in configured {
            let unnamed = match &device {
                DeviceConfig::Balloon(_) => BALLOON_ID,
                _ => RNG_ID,
            };
            let id = device.common().id.as_deref().unwrap_or(unnamed);
            devices.plug(id, &device).map_err(|e| e.within(&field))?;
        }

        let rsdp = write_tables(config, &ram)?;
        let entry = boot::load(&payload, &ram, rsdp).map_err(|e| e.within("payload"))?;
        let vcpus = Vcpus::spawn(VcpuContext {
            kvm: &kvm,
            vm: &vm,
            cpus: &config.cpus,
            entry,
            ram: ram.clone(),
            pio: buses.pio,
            mmio: buses.mmio,
            signals: signals.clone(),
            events: environment.events,
            seccomp: environment.seccomp,
        })?;
        let mut this = Self {
            vcpus,
            devices,
            signals,
            built_at: Instant::now(),
            ram,
            disk_watch: DiskWatch::new(Instant::now()),
            ged,
            cpu_group: None,
        };
        this.limit_cpu(CpuLimits::of(config.overcommit.as_ref()))
            .map_err(|e| e.within("overcommit"))?;
        Ok(this)
    }

    /// Sets, changes or lifts the limits on CPU time; on failure they stay what they were. Fields
    /// are named as seen from `overcommit`.
    pub fn limit_cpu(&mut self, limits: CpuLimits) -> Result<(), Invalid> {
        match &mut self.cpu_group {
            Some(group) => {
                // Also to lift them: what can't be lifted is told while there is who to tell.
                group.set(limits)?;
                if !limits.any() {
                    self.cpu_group = None;
                }
            }
            None if limits.any() => {
                self.cpu_group = Some(CpuGroup::new(limits, &self.vcpus.thread_ids())?);
            }
            None => {}
        }
        Ok(())
    }

    /// Presses the ACPI power button; what comes of it is up to the guest.
    pub fn power_button(&self) {
        self.ged.press_power_button();
    }
}

/// What a firmware would leave in memory: the tables that describe the machine, and the way to
/// restart it. Says where the ACPI tables begin.
fn write_tables(config: &VmConfig, ram: &GuestRam) -> Result<GuestAddress, Error> {
    // 64 vCPUs never get beyond the ids that need an x2APIC, however they are arranged.
    let apic_ids = (0..config.cpus.boot_vcpus)
        .map(|vcpu| u8::try_from(apic_id(&config.cpus, vcpu)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| Error::host("describing the vCPUs to the guest", e))?;
    let platform = config.platform.clone().unwrap_or_default();
    boot::smbios::write_tables(ram, &platform)?;
    boot::reset_vector::write(ram)?;
    let machine = acpi::Machine {
        apic_ids: &apic_ids,
        serial: config.serial.mode != ConsoleMode::Off,
    };
    acpi::write_tables(ram, &machine)
}

/// Opens and checks what the VM boots from.
pub fn open_payload(config: &VmConfig) -> Result<Payload, Error> {
    let Some(payload) = &config.payload else {
        return Err(Invalid::new(
            "payload",
            "the VM was created without one, so there is nothing to boot",
        )
        .into());
    };
    Payload::open(payload).map_err(|e| e.within("payload"))
}

fn legacy_devices(
    buses: &Buses,
    ram: &GuestRam,
    signals: &Arc<GuestSignals>,
    events: &Events,
    started: Instant,
) -> Result<(), Error> {
    let total: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    let low = total.min(HOLE_START);
    let sleep = SleepAndReset::new(signals.clone());
    buses.pio(ACPI_SLEEP_PORT, SLEEP_PORTS, Arc::new(sleep))?;
    buses.pio(PM_TIMER_PORT, PM_TIMER_PORTS, Arc::new(PmTimer::default()))?;
    buses.pio(
        I8042_PORT,
        I8042_PORTS,
        Arc::new(I8042::new(signals.clone())),
    )?;
    buses.pio(CMOS_PORT, CMOS_PORTS, Arc::new(Cmos::new(low, total - low)))?;
    let events = events.clone();
    let marker = DebugPort::new(
        started,
        Arc::new(move |code, since| {
            let properties = [
                ("code", format!("{code:#04x}")),
                ("since_boot_us", since.as_micros().to_string()),
            ];
            let properties = properties.each_ref().map(|(k, v)| (*k, v.as_str()));
            events.emit("guest", "boot-marker", &properties);
        }),
    );
    buses.pio(POST_PORT, 1, Arc::new(marker))
}

fn pci_bus(buses: &Buses) -> Result<Arc<PciBus>, Error> {
    let bus = PciBus::new();
    buses.mmio(ECAM, ECAM_SIZE, bus.ecam())?;
    buses.mmio(PCI_WINDOW, PCI_WINDOW_SIZE, bus.memory_window(PCI_WINDOW))?;
    buses.pio(PCI_CONFIG_PORT, PORTS, bus.ports())?;
    Ok(bus)
}

/// Turns what devices report into events, and has the VMM thread look where that changes what is
/// published.
fn event_sink(events: Events, signals: Arc<GuestSignals>) -> EventSink {
    Arc::new(move |id, event| match event {
        DeviceEvent::Activated => {
            events.emit("virtio-device", "activated", &[("id", id)]);
            signals.moved();
        }
        // At most one message waits for the VMM thread, however many there are of these.
        DeviceEvent::Unsaid => signals.moved(),
        DeviceEvent::Reset => events.emit("virtio-device", "reset", &[("id", id)]),
        DeviceEvent::Failed { reason } => {
            events.emit(
                "virtio-device",
                "device-failed",
                &[("id", id), ("reason", &reason)],
            );
        }
        DeviceEvent::Balloon {
            news,
            target_bytes,
            actual_bytes,
        } => {
            let event = match news {
                BalloonNews::Progress => "balloon-progress",
                BalloonNews::Reached => "balloon-reached",
                BalloonNews::Stalled => "balloon-stalled",
            };
            events.emit(
                "virtio-device",
                event,
                &[
                    ("id", id),
                    ("target", &target_bytes.to_string()),
                    ("actual", &actual_bytes.to_string()),
                ],
            );
            signals.moved();
        }
        DeviceEvent::DiskFull {
            pause,
            needed_bytes,
            free_bytes,
            error,
        } => {
            let free = free_bytes.map(|free| free.to_string());
            events.emit(
                "virtio-device",
                "disk-full",
                &[
                    ("id", id),
                    ("action", if pause { "pause-vm" } else { "hold" }),
                    ("needed_bytes", &needed_bytes.to_string()),
                    ("free_bytes", free.as_deref().unwrap_or("unknown")),
                    ("error", &error),
                ],
            );
            if pause {
                signals.disk_full();
            }
        }
        DeviceEvent::DiskResumed { outcome } => events.emit(
            "virtio-device",
            "disk-resumed",
            &[("id", id), ("outcome", outcome.name())],
        ),
        DeviceEvent::IoError {
            operation,
            offset_bytes,
            error,
            suppressed,
        } => events.emit(
            "virtio-device",
            "io-error",
            &[
                ("id", id),
                ("operation", operation),
                ("offset_bytes", &offset_bytes.to_string()),
                ("error", &error),
                ("suppressed", &suppressed.to_string()),
            ],
        ),
    })
}
