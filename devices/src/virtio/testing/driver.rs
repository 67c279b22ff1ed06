//! A driver: finds the structures of a device, negotiates, builds split rings (virtio 1.3 §2.7) in
//! guest memory and exchanges buffers; or, by the raw methods, breaks every rule.

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use super::{PATIENCE, TestGuest, eventually, within};
use crate::virtio::pci::VIRTIO_BAR_SIZE;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

/// Where the rings of queue 0 go; each queue has [`RING_STRIDE`] bytes.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x1_0000;

/// Where a structure of the device lies, from the device's capabilities (§4.1.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capability {
    /// Offset of the capability in configuration space.
    pub at: u64,
    /// Offset of the structure in the BAR.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// A part of a chain: what the device reads, or room for what it writes.
#[derive(Clone, Copy, Debug)]
pub enum Buffer {
    /// The device may read this much at this address.
    Readable(u64, u32),
    /// The device may write this much at this address.
    Writable(u64, u32),
}

/// A descriptor, as it lies in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Physical address of the buffer.
    pub address: u64,
    /// Its length.
    pub len: u32,
    /// VIRTQ_DESC_F_NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// VIRTQ_DESC_F_NEXT.
    pub const NEXT: u16 = 1;
    /// VIRTQ_DESC_F_WRITE.
    pub const WRITE: u16 = 2;
    /// VIRTQ_DESC_F_INDIRECT.
    pub const INDIRECT: u16 = 4;

    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where the parts of a queue lie in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

struct DriverQueue {
    ring: Ring,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

/// A driver of the device in one slot.
pub struct TestDriver {
    /// The guest it runs in.
    pub guest: TestGuest,
    /// The slot of its device.
    pub slot: u8,
    /// Where the BAR lies.
    pub bar: u64,
    /// Common configuration.
    pub common: Capability,
    /// ISR status.
    pub isr: Capability,
    /// Device configuration.
    pub device: Capability,
    /// Notifications.
    pub notify: Capability,
    /// PCI configuration access.
    pub access: Capability,
    /// Message control register of MSI-X.
    pub msix_control: u64,
    multiplier: u64,
    features: u64,
    queues: Vec<DriverQueue>,
    next_buffer: u64,
}

impl TestDriver {
    /// Finds the device's structures, puts the BAR where [`TestGuest::plug`] had it, switches
    /// memory decoding and MSI-X on and unmasks all vectors.
    pub fn new(guest: &TestGuest, slot: u8) -> Self {
        let mut driver = Self {
            guest: guest.clone(),
            slot,
            bar: TestGuest::bar_base(slot),
            common: Capability::default(),
            isr: Capability::default(),
            device: Capability::default(),
            notify: Capability::default(),
            access: Capability::default(),
            msix_control: 0,
            multiplier: 0,
            features: 0,
            queues: Vec::new(),
            next_buffer: 0x10_0000,
        };
        driver.config_write32(0x04, 0);
        driver.move_bar(driver.bar);
        driver.config_write32(0x04, 0x6);
        driver.discover();
        let count = u64::from(driver.config_read32(driver.msix_control) & 0x7ff) + 1;
        let table = u64::from(driver.config_read32(driver.msix_control + 2) & !7);
        driver
            .guest
            .config_write(slot, driver.msix_control, &0x8000u16.to_le_bytes());
        for vector in 0..count {
            driver.program_vector(table, vector, 0);
        }
        driver
    }

    fn discover(&mut self) {
        let mut at = u64::from(self.config_read32(0x34) & 0xff);
        while at != 0 {
            let header = self.config_read32(at).to_le_bytes();
            let capability = Capability {
                at,
                offset: self.config_read32(at + 8).into(),
                length: self.config_read32(at + 12).into(),
            };
            match (header[0], header[3]) {
                (0x11, _) => self.msix_control = at + 2,
                (0x09, 1) => self.common = capability,
                (0x09, 2) => {
                    self.notify = capability;
                    self.multiplier = self.config_read32(at + 16).into();
                }
                (0x09, 3) => self.isr = capability,
                (0x09, 4) => self.device = capability,
                (0x09, 5) => self.access = capability,
                _ => {}
            }
            at = header[1].into();
        }
    }

    fn program_vector(&self, table: u64, vector: u64, control: u32) {
        let entry = self.bar + table + vector * 16;
        let write = |at, value: u32| self.guest.mmio_write(at, &value.to_le_bytes());
        write(entry, 0xfee0_0000);
        write(entry + 4, 0);
        write(entry + 8, 0x40 + vector as u32);
        write(entry + 12, control);
    }

    /// Masks or unmasks a vector in the MSI-X table.
    pub fn mask_vector(&self, vector: u64, masked: bool) {
        let table = u64::from(self.config_read32(self.msix_control + 2) & !7);
        self.program_vector(table, vector, masked.into());
    }

    /// The first 64 pending bits.
    pub fn pending_vectors(&self) -> u64 {
        let offset = u64::from(self.config_read32(self.msix_control + 6) & !7);
        let mut data = [0; 8];
        self.guest.mmio_read(self.bar + offset, &mut data);
        u64::from_le_bytes(data)
    }

    /// Writes the BAR.
    pub fn move_bar(&mut self, base: u64) {
        assert_eq!(base % VIRTIO_BAR_SIZE, 0);
        self.config_write32(0x10, base as u32);
        self.bar = base;
    }

    /// Reads configuration space.
    pub fn config_read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.guest.config_read(self.slot, offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes configuration space.
    pub fn config_write32(&self, offset: u64, value: u32) {
        self.guest
            .config_write(self.slot, offset, &value.to_le_bytes());
    }

    /// Reads a register of the common configuration.
    pub fn common_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.guest
            .mmio_read(self.bar + self.common.offset + offset, &mut data);
        data
    }

    /// Writes a register of the common configuration.
    pub fn common_write(&self, offset: u64, data: &[u8]) {
        self.guest
            .mmio_write(self.bar + self.common.offset + offset, data);
    }

    /// Reads the device configuration.
    pub fn device_read(&self, offset: u64, data: &mut [u8]) {
        self.guest
            .mmio_read(self.bar + self.device.offset + offset, data);
    }

    /// Writes the device configuration.
    pub fn device_write(&self, offset: u64, data: &[u8]) {
        self.guest
            .mmio_write(self.bar + self.device.offset + offset, data);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.common_read::<1>(0x14)[0]
    }

    /// Whether the device has asked for a reset.
    pub fn needs_reset(&self) -> bool {
        self.status() & 0x40 != 0
    }

    /// Reads and so clears the ISR status.
    pub fn take_isr(&self) -> u8 {
        let mut data = [0];
        self.guest.mmio_read(self.bar + self.isr.offset, &mut data);
        data[0]
    }

    /// Resets the device and waits until it says that it is done; whether it did.
    pub fn reset(&mut self) -> bool {
        self.common_write(0x14, &[0]);
        self.queues.clear();
        eventually(|| self.status() == 0)
    }

    /// The features the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.common_write(0x00, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.common_read(0x04)))
        };
        half(0) | half(1) << 32
    }

    /// Accepts `features` up to FEATURES_OK; whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.common_write(0x14, &[1]);
        self.common_write(0x14, &[3]);
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.common_write(0x08, &select.to_le_bytes());
            self.common_write(0x0c, &half.to_le_bytes());
        }
        self.common_write(0x14, &[11]);
        self.features = features;
        self.status() & 8 != 0
    }

    /// Sets up and enables queue `index` with empty rings of `size` entries, its interrupts on the
    /// vector of the same number. Queues are to be set up in order.
    pub fn set_up_queue(&mut self, index: u16, size: u16) {
        let base = RINGS + u64::from(index) * RING_STRIDE;
        let ring = Ring {
            size,
            descriptors: base,
            available: base + 0x8000,
            used: base + 0xa000,
        };
        assert!(size <= 1024 && usize::from(index) == self.queues.len());
        self.guest.poke(base, &vec![0; 0xd000]);
        self.place_queue(index, ring);
        self.queues.push(DriverQueue {
            ring,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_available: 0,
            next_used: 0,
        });
    }

    /// Raw: tells the device of a ring, wherever it may lie, and enables the queue.
    pub fn place_queue(&self, index: u16, ring: Ring) {
        self.common_write(0x16, &index.to_le_bytes());
        self.common_write(0x18, &ring.size.to_le_bytes());
        self.common_write(0x1a, &index.to_le_bytes());
        self.common_write(0x20, &ring.descriptors.to_le_bytes());
        self.common_write(0x28, &ring.available.to_le_bytes());
        self.common_write(0x30, &ring.used.to_le_bytes());
        self.common_write(0x1c, &1u16.to_le_bytes());
    }

    /// DRIVER_OK, with configuration changes on the vector after the queues'.
    pub fn driver_ok(&self) {
        self.common_write(0x10, &self.common_read::<2>(0x12));
        self.common_write(0x14, &[15]);
    }

    /// The whole handshake from reset to DRIVER_OK, with all queues at `size` entries or their
    /// maximum if that is less.
    pub fn start(&mut self, features: u64, size: u16) {
        assert!(self.reset(), "the device does not come out of reset");
        assert!(self.negotiate(features), "the device refuses the features");
        for index in 0..u16::from_le_bytes(self.common_read(0x12)) {
            self.common_write(0x16, &index.to_le_bytes());
            let most = u16::from_le_bytes(self.common_read(0x18));
            self.set_up_queue(index, size.min(most));
        }
        self.driver_ok();
        assert_eq!(self.status() & 0x4f, 15, "the device does not start");
    }

    /// Takes fresh guest memory for a buffer; never given back.
    pub fn allocate(&mut self, len: usize) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += (len as u64).next_multiple_of(64);
        address
    }

    /// Where the rings of a queue lie.
    pub fn ring(&self, queue: usize) -> Ring {
        self.queues[queue].ring
    }

    /// Makes a chain available; returns its head.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = (buffers.iter())
            .map(|_| self.queues[queue].free.pop().expect("a free descriptor"))
            .collect();
        for (position, descriptor) in chain(buffers, &indices).into_iter().enumerate() {
            self.write_descriptor(queue, indices[position], descriptor);
        }
        let head = indices[0];
        self.queues[queue].chains.insert(head, indices);
        self.publish(queue, head);
        head
    }

    /// Makes a chain available by way of an indirect table; returns its head.
    pub fn add_indirect(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = (0..buffers.len() as u16).collect();
        let table = self.allocate(buffers.len() * 16);
        for (position, descriptor) in chain(buffers, &indices).into_iter().enumerate() {
            self.guest
                .poke(table + position as u64 * 16, &descriptor.bytes());
        }
        let head = self.queues[queue].free.pop().expect("a free descriptor");
        let descriptor = Descriptor {
            address: table,
            len: buffers.len() as u32 * 16,
            flags: Descriptor::INDIRECT,
            next: 0,
        };
        self.write_descriptor(queue, head, descriptor);
        self.queues[queue].chains.insert(head, vec![head]);
        self.publish(queue, head);
        head
    }

    /// Raw: writes an entry of the descriptor table.
    pub fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = self.ring(queue).descriptors + u64::from(index) * 16;
        self.guest.poke(at, &descriptor.bytes());
    }

    /// Raw: puts `head` into the available ring and moves its index on. With EVENT_IDX it asks for
    /// an interrupt as soon as anything more is used than the driver has seen.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let ring = self.ring(queue);
        if self.features & EVENT_IDX != 0 {
            let used_event = ring.available + 4 + u64::from(ring.size) * 2;
            let seen = self.queues[queue].next_used;
            self.guest.poke(used_event, &seen.to_le_bytes());
        }
        let next = self.queues[queue].next_available;
        let entry = ring.available + 4 + u64::from(next % ring.size) * 2;
        self.guest.poke(entry, &head.to_le_bytes());
        fence(Ordering::SeqCst);
        self.queues[queue].next_available = next.wrapping_add(1);
        self.set_available_index(queue, next.wrapping_add(1));
    }

    /// Raw: writes the index of the available ring.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        let at = self.ring(queue).available + 2;
        self.guest.poke(at, &index.to_le_bytes());
    }

    /// Raw: writes the flags of the available ring (1: no interrupts, please).
    pub fn set_available_flags(&self, queue: usize, flags: u16) {
        self.guest
            .poke(self.ring(queue).available, &flags.to_le_bytes());
    }

    /// Notifies the device of a queue.
    pub fn kick(&self, queue: usize) {
        let address = self.bar + self.notify.offset + queue as u64 * self.multiplier;
        self.guest
            .mmio_write(address, &(queue as u16).to_le_bytes());
    }

    /// The next chain the device has used, if any: its head and the bytes written.
    pub fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = self.ring(queue);
        let next = self.queues[queue].next_used;
        if self.guest.peek_u16(ring.used + 2) == next {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = ring.used + 4 + u64::from(next % ring.size) * 8;
        let bytes = self.guest.peek(entry, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let (head, len) = (word(0), word(4));
        let queue_state = &mut self.queues[queue];
        queue_state.next_used = next.wrapping_add(1);
        let chain = queue_state.chains.remove(&(head as u16));
        queue_state.free.extend(chain.unwrap_or_default());
        Some((head, len))
    }

    /// Waits for the device to use a chain; `None` when `limit` runs out first.
    pub fn wait_used_within(&mut self, queue: usize, limit: Duration) -> Option<(u32, u32)> {
        let mut used = None;
        within(limit, || {
            used = self.take_used(queue);
            used.is_some()
        });
        used
    }

    /// Waits for the device to use a chain, with patience.
    pub fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        self.wait_used_within(queue, PATIENCE)
            .expect("the device uses the chain")
    }

    /// Sends `request` and room for `room` bytes through a queue, waits, and returns what the
    /// device wrote.
    pub fn exchange(&mut self, queue: usize, request: &[u8], room: u32) -> Vec<u8> {
        let from = self.allocate(request.len());
        let to = self.allocate(room as usize);
        self.guest.poke(from, request);
        let mut buffers = vec![Buffer::Readable(from, request.len() as u32)];
        buffers.extend((room > 0).then_some(Buffer::Writable(to, room)));
        let head = self.add(queue, &buffers);
        self.kick(queue);
        let (used, len) = self.wait_used(queue);
        assert_eq!(used, u32::from(head));
        self.guest.peek(to, len.min(room) as usize)
    }
}

/// The descriptors of a chain whose parts lie at `indices`.
fn chain(buffers: &[Buffer], indices: &[u16]) -> Vec<Descriptor> {
    (buffers.iter().enumerate())
        .map(|(position, buffer)| {
            let next = indices.get(position + 1);
            let (address, len, write) = match *buffer {
                Buffer::Readable(address, len) => (address, len, 0),
                Buffer::Writable(address, len) => (address, len, Descriptor::WRITE),
            };
            Descriptor {
                address,
                len,
                flags: write | next.map_or(0, |_| Descriptor::NEXT),
                next: next.copied().unwrap_or_default(),
            }
        })
        .collect()
}
