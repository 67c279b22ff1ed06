//! The devices that sit in PCI slots: a map from id to slot. Plug, unplug, ejected, find.
//!
//! Unplugging is a state, not a call: the guest is asked, and the device stays until the guest
//! ejects it, or until the guest is reset.
//!
//! ```text
//!            remove                guest ejects, or guest reset
//!  plugged ─────────► removing ────────────────────────────────► gone
//!                      │    ▲                                     ▲
//!           10 seconds ▼    │ remove (asks again)                 │
//!                     timed out ──────────────────────────────────┘
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::acpi::Ged;
use devices::balloon::{Balloon, BalloonInfo};
use devices::block::Block;
use devices::config::{BuildContext, DeviceConfig, Invalid};
use devices::event::{EventSink, Reporter};
use devices::guest_memory::GuestRam;
use devices::guest_memory::discard::inhibit::Inhibitor;
use devices::machine::Machine;
use devices::pci::PciDevice;
use devices::pci::bus::PciBus;
use devices::pci::hotplug::PciHotplug;
use devices::sandbox::SeccompMode;
use devices::virtio::VirtioDevice;
use devices::virtio::pci::{VIRTIO_BAR_SIZE, VirtioPciDevice};
use devices::worker::{Order, Worker};

use crate::error::Error;
use crate::layout::PCI_WINDOW;
use crate::status::{DeviceNode, PciDeviceInfo, Removal, Resource, VmCounters};

/// How long the guest may take to eject a device before an event says so.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long devices may take to finish what is in flight.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// What the id of a device's PCI function begins with; its own id follows.
pub const TRANSPORT_PREFIX: &str = "_virtio-pci-";
/// Slot 0 is the host bridge.
const SLOTS: std::ops::RangeInclusive<u8> = 1..=31;

/// What devices are plugged into.
pub struct Sockets {
    /// The bus.
    pub bus: Arc<PciBus>,
    /// Interrupts and doorbells.
    pub machine: Arc<dyn Machine>,
    /// RAM.
    pub ram: GuestRam,
    /// Tells the guest which slots changed …
    pub hotplug: Arc<PciHotplug>,
    /// … and that some did.
    pub ged: Arc<Ged>,
    /// Mode of the devices' filters.
    pub seccomp: SeccompMode,
    /// Holds discards of RAM off.
    pub discards: Inhibitor,
    /// Where they report.
    pub sink: EventSink,
}

struct Plugged {
    slot: u8,
    transport: Arc<VirtioPciDevice>,
    removal: Option<Removing>,
}

struct Removing {
    deadline: Instant,
    timed_out: bool,
}

/// A device that is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its id.
    pub id: String,
    /// Where it was.
    pub bdf: String,
}

/// The devices of a booted VM. Owned by the VMM thread.
pub struct DeviceManager {
    sockets: Sockets,
    devices: BTreeMap<String, Plugged>,
}

impl DeviceManager {
    /// No devices yet.
    pub fn new(sockets: Sockets) -> Self {
        Self {
            sockets,
            devices: BTreeMap::new(),
        }
    }

    /// Builds a device and puts it into a slot, before the guest runs. On failure nothing stays.
    pub fn plug(&mut self, id: &str, config: &DeviceConfig) -> Result<PciDeviceInfo, Error> {
        if self.devices.contains_key(id) {
            return Err(Error::DuplicateId {
                field: "id".to_owned(),
                id: id.to_owned(),
            });
        }
        let slot = self.choose_slot(config.common().pci_device_id)?;
        let reporter = Reporter::new(id, self.sockets.sink.clone());
        let device = config.build(BuildContext {
            reporter: reporter.clone(),
            seccomp: self.sockets.seccomp,
            discards: self.sockets.discards.clone(),
        })?;
        let transport = VirtioPciDevice::new(
            device,
            self.sockets.ram.clone(),
            self.sockets.machine.clone(),
            reporter,
            PCI_WINDOW + u64::from(slot) * VIRTIO_BAR_SIZE,
        )
        .map_err(|e| Error::os(format!("plugging device `{id}`"), e))?;
        self.sockets
            .bus
            .plug(slot, transport.clone())
            .map_err(|e| Error::NoSlot(e.to_string()))?;
        self.devices.insert(
            id.to_owned(),
            Plugged {
                slot,
                transport,
                removal: None,
            },
        );
        Ok(PciDeviceInfo {
            id: id.to_owned(),
            bdf: Some(bdf(slot)),
        })
    }

    /// Like [`DeviceManager::plug`], and tells the running guest.
    pub fn hot_plug(&mut self, id: &str, config: &DeviceConfig) -> Result<PciDeviceInfo, Error> {
        let info = self.plug(id, config)?;
        if let Some(plugged) = self.devices.get(id) {
            self.sockets.hotplug.slot_added(plugged.slot);
            self.sockets.ged.pci_changed();
        }
        Ok(info)
    }

    /// Asks the guest to let go of a device; may be repeated.
    pub fn request_removal(&mut self, id: &str) -> Result<(), Error> {
        let plugged = self
            .devices
            .get_mut(id)
            .ok_or_else(|| Error::UnknownDevice { id: id.to_owned() })?;
        plugged.removal = Some(Removing {
            deadline: Instant::now() + REMOVAL_TIMEOUT,
            timed_out: false,
        });
        self.sockets.hotplug.request_removal(plugged.slot);
        self.sockets.ged.pci_changed();
        Ok(())
    }

    /// Takes out the devices in `slots` (one bit each) that the guest was asked to eject. A guest
    /// that ejects unasked is ignored: the configuration is the client's.
    pub fn ejected(&mut self, slots: u32) -> Vec<Removed> {
        let gone: Vec<String> = self
            .devices
            .iter()
            .filter(|(_, plugged)| plugged.removal.is_some() && slots & (1 << plugged.slot) != 0)
            .map(|(id, _)| id.clone())
            .collect();
        gone.into_iter().filter_map(|id| self.unplug(id)).collect()
    }

    /// The ids of devices on their way out: a reset of the guest completes their removal.
    pub fn removing(&self) -> Vec<Removed> {
        self.devices
            .iter()
            .filter(|(_, plugged)| plugged.removal.is_some())
            .map(|(id, plugged)| Removed {
                id: id.clone(),
                bdf: bdf(plugged.slot),
            })
            .collect()
    }

    /// When [`DeviceManager::expired`] next has something to tell.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.devices
            .values()
            .filter_map(|plugged| plugged.removal.as_ref())
            .filter(|removal| !removal.timed_out)
            .map(|removal| removal.deadline)
            .min()
    }

    /// Devices whose removal has just taken too long; each is told once per request.
    pub fn expired(&mut self, now: Instant) -> Vec<String> {
        let mut expired = Vec::new();
        for (id, plugged) in &mut self.devices {
            if let Some(removal) = &mut plugged.removal
                && !removal.timed_out
                && removal.deadline <= now
            {
                removal.timed_out = true;
                expired.push(id.clone());
            }
        }
        expired
    }

    /// The balloons.
    pub fn balloons(&self) -> impl Iterator<Item = (&str, &Balloon)> {
        self.devices.iter().filter_map(|(id, plugged)| {
            let balloon = plugged.transport.device().as_balloon()?;
            Some((id.as_str(), balloon))
        })
    }

    /// Where each balloon stands, without asking the guest.
    pub fn balloon_infos(&self) -> Vec<BalloonInfo> {
        let balloons = self.balloons();
        balloons
            .map(|(id, balloon)| balloon.viewer().info(id))
            .collect()
    }

    /// The balloon of this id.
    pub fn balloon(&self, id: &str) -> Result<&Balloon, Error> {
        self.balloons()
            .find(|(its_id, _)| *its_id == id)
            .map(|(_, balloon)| balloon)
            .ok_or_else(|| Error::UnknownDevice { id: id.to_owned() })
    }

    /// Whether the guest has been asked to let go of the device.
    pub fn is_leaving(&self, id: &str) -> bool {
        let plugged = self.devices.get(id);
        plugged.is_some_and(|plugged| plugged.removal.is_some())
    }

    /// The disks.
    pub fn disks(&self) -> impl Iterator<Item = (&str, &Block)> {
        self.devices.iter().filter_map(|(id, plugged)| {
            let disk = plugged.transport.device().as_block()?;
            Some((id.as_str(), disk))
        })
    }

    /// The disk of this id.
    pub fn disk(&self, id: &str) -> Result<&Block, Error> {
        Ok(self.plugged_disk(id)?.1)
    }

    /// Makes a disk larger, and tells the guest.
    pub fn resize_disk(&self, id: &str, desired_size: u64) -> Result<(), Error> {
        let (transport, disk) = self.plugged_disk(id)?;
        disk.grow(desired_size)?;
        // Also where it has grown after an earlier request had stopped waiting for it.
        if disk.has_new_size() {
            transport.change_config(|| disk.set_size());
        }
        Ok(())
    }

    fn plugged_disk(&self, id: &str) -> Result<(&VirtioPciDevice, &Block), Error> {
        let unknown = || Error::UnknownDevice { id: id.to_owned() };
        let transport = &self.devices.get(id).ok_or_else(unknown)?.transport;
        let disk = transport.device().as_block();
        let disk =
            disk.ok_or_else(|| Invalid::new("id", format!("device `{id}` is not a disk")))?;
        Ok((transport, disk))
    }

    /// Whether there is a device of this id.
    pub fn contains(&self, id: &str) -> bool {
        self.devices.contains_key(id)
    }

    /// Has every worker finish what is in flight and stand still. Where one does not within the
    /// time, all go on again.
    pub fn pause(&self) -> Result<(), Error> {
        let workers = || self.devices.values().flat_map(workers);
        let (done, all) = std::sync::mpsc::channel();
        for worker in workers() {
            let done = done.clone();
            worker.order(Order::Pause(Box::new(move || {
                // The other end waits, or has given up.
                let _ = done.send(());
            })));
        }
        drop(done);
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        for _ in workers() {
            let left = deadline.saturating_duration_since(Instant::now());
            if all.recv_timeout(left).is_err() {
                self.resume();
                return Err(Error::Timeout("draining the devices"));
            }
        }
        Ok(())
    }

    /// Lets every worker go on.
    pub fn resume(&self) {
        for worker in self.devices.values().flat_map(workers) {
            worker.order(Order::Resume);
        }
    }

    /// The totals of the devices that count.
    pub fn counters(&self) -> VmCounters {
        self.devices
            .iter()
            .map(|(id, plugged)| {
                let counters = plugged.transport.device().counters();
                let named = counters.into_iter().map(|(name, n)| (name.to_owned(), n));
                (id.clone(), named.collect::<BTreeMap<_, _>>())
            })
            .filter(|(_, counters)| !counters.is_empty())
            .collect()
    }

    /// The devices as `vm.info` shows them.
    pub fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let mut tree = BTreeMap::new();
        for (id, plugged) in &self.devices {
            let transport_id = format!("{TRANSPORT_PREFIX}{id}");
            let bars = plugged.transport.bars().into_iter();
            let transport = DeviceNode {
                id: transport_id.clone(),
                resources: bars.map(Resource::PciBar).collect(),
                parent: None,
                children: vec![id.clone()],
                pci_bdf: Some(bdf(plugged.slot)),
                removal: plugged.removal.as_ref().map(|removal| {
                    if removal.timed_out {
                        Removal::TimedOut
                    } else {
                        Removal::Removing
                    }
                }),
            };
            let device = DeviceNode {
                id: id.clone(),
                resources: Vec::new(),
                parent: Some(transport_id.clone()),
                children: Vec::new(),
                pci_bdf: None,
                removal: None,
            };
            tree.insert(transport_id, transport);
            tree.insert(id.clone(), device);
        }
        tree
    }

    fn unplug(&mut self, id: String) -> Option<Removed> {
        let plugged = self.devices.remove(&id)?;
        let slot = plugged.slot;
        self.sockets.bus.unplug(slot);
        retire(plugged.transport);
        Some(Removed { id, bdf: bdf(slot) })
    }

    fn choose_slot(&self, wanted: Option<u8>) -> Result<u8, Error> {
        let taken = |slot: u8| self.devices.values().any(|plugged| plugged.slot == slot);
        match wanted {
            Some(slot) if taken(slot) => {
                Err(Invalid::new("pci_device_id", format!("slot {slot} is taken")).into())
            }
            Some(slot) => Ok(slot),
            None => SLOTS
                .into_iter()
                .find(|slot| !taken(*slot))
                .ok_or_else(|| Error::NoSlot("all 31 slots are taken".to_owned())),
        }
    }
}

impl Drop for DeviceManager {
    fn drop(&mut self) {
        for (_, plugged) in std::mem::take(&mut self.devices) {
            self.sockets.bus.unplug(plugged.slot);
            retire(plugged.transport);
        }
    }
}

fn workers(plugged: &Plugged) -> &[Worker] {
    plugged.transport.device().workers()
}

/// Drops a device that is no longer on the bus, on this thread: a vCPU that is just reading one
/// of its registers holds it a moment longer, and must not be the one to join its workers.
fn retire(transport: Arc<VirtioPciDevice>) {
    transport.reset();
    transport.retire();
    let device: Arc<dyn VirtioDevice> = transport.device().clone();
    drop(transport);
    let deadline = Instant::now() + Duration::from_secs(1);
    while Arc::strong_count(&device) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// The PCI address of a slot.
fn bdf(slot: u8) -> String {
    format!("0000:00:{slot:02x}.0")
}
