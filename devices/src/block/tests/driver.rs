//! The driver's half of a virtqueue, in memory: enough to send a device what a guest could send.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest_memory::GuestRam;
use crate::virtio::{Activation, QueueInterrupt, TransportSignals, VirtQueue};
use crate::worker::{Order, Worker};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Guest memory begins to be free for buffers here.
pub const BUFFERS: u64 = 0x10_0000;
/// Where a second host mapping begins: a buffer across it is two pieces on the host.
pub const SEAM: u64 = 0x20_0000;
pub const MEMORY: u64 = 0x100_0000;

const PATIENCE: Duration = Duration::from_secs(20);

pub fn memory() -> GuestRam {
    let seam = SEAM as usize;
    let ranges = [
        (GuestAddress(0), seam),
        (GuestAddress(SEAM), MEMORY as usize - seam),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

#[derive(Default)]
pub struct Interrupt {
    count: Mutex<u64>,
    came: Condvar,
}

impl Interrupt {
    pub fn count(&self) -> u64 {
        *self.count.lock().unwrap()
    }

    /// Waits until there were more than `seen`; false after a long time.
    fn wait_beyond(&self, seen: u64) -> bool {
        let count = self.count.lock().unwrap();
        let (_guard, timeout) = self
            .came
            .wait_timeout_while(count, PATIENCE, |count| *count <= seen)
            .unwrap();
        !timeout.timed_out()
    }
}

impl QueueInterrupt for Interrupt {
    fn trigger(&self) {
        *self.count.lock().unwrap() += 1;
        self.came.notify_all();
    }
}

#[derive(Default)]
pub struct Signals {
    pub needs_reset: Mutex<u64>,
}

impl TransportSignals for Signals {
    fn needs_reset(&self) {
        *self.needs_reset.lock().unwrap() += 1;
    }
    fn config_changed(&self) {}
}

#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// One queue as its driver has it.
pub struct Driver {
    pub memory: GuestRam,
    pub interrupt: Arc<Interrupt>,
    pub signals: Arc<Signals>,
    kick: Arc<EventFd>,
    base: u64,
    pub size: u16,
    event_idx: bool,
    avail: u16,
    used: u16,
    next_descriptor: u16,
}

impl Driver {
    /// The queue number `index` of a device, its rings below [`BUFFERS`].
    pub fn new(memory: GuestRam, index: u16, size: u16, event_idx: bool) -> Self {
        Self {
            memory,
            interrupt: Arc::default(),
            signals: Arc::default(),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            base: 0x1000 + u64::from(index) * 0x1_0000,
            size,
            event_idx,
            avail: 0,
            used: 0,
            next_descriptor: 0,
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x8000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0xa000
    }

    pub fn queue(&self, index: u16) -> VirtQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_ring()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring()))
            .unwrap();
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        VirtQueue::new(
            index,
            queue,
            self.memory.clone(),
            self.kick.clone(),
            self.interrupt.clone(),
        )
    }

    /// DRIVER_OK, with the rings zeroed as a driver would.
    pub fn activate(&mut self, worker: &Worker, index: u16) {
        self.clear();
        worker.order(Order::Activate(Box::new(Activation {
            features: 0,
            queues: vec![self.queue(index)],
            signals: self.signals.clone(),
        })));
    }

    /// DRIVER_OK of all queues of a worker, which have the indexes from 0 on.
    pub fn activate_all(drivers: &mut [Self], worker: &Worker) {
        drivers.iter_mut().for_each(Self::clear);
        let numbered = drivers.iter().zip(0..);
        worker.order(Order::Activate(Box::new(Activation {
            features: 0,
            queues: numbered
                .map(|(driver, index)| driver.queue(index))
                .collect(),
            signals: drivers[0].signals.clone(),
        })));
    }

    fn clear(&mut self) {
        let zeroes = [0_u8; 0x1_0000];
        self.memory
            .write_slice(&zeroes, GuestAddress(self.base))
            .unwrap();
        (self.avail, self.used, self.next_descriptor) = (0, 0, 0);
    }

    pub fn set(&self, index: u16, descriptor: Descriptor) {
        self.set_at(self.base, index, descriptor);
    }

    /// Writes an entry of a descriptor table at `table`.
    pub fn set_at(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = table + u64::from(index) * 16;
        let write = |offset, bytes: &[u8]| {
            self.memory
                .write_slice(bytes, GuestAddress(at + offset))
                .unwrap();
        };
        write(0, &descriptor.address.to_le_bytes());
        write(8, &descriptor.len.to_le_bytes());
        write(12, &descriptor.flags.to_le_bytes());
        write(14, &descriptor.next.to_le_bytes());
    }

    /// Lays a chain of (address, len, writable) into the table; returns its head.
    pub fn chain(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (count, &(address, len, writable)) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let last = count + 1 == pieces.len();
            self.set(
                index,
                Descriptor {
                    address,
                    len,
                    flags: if last { 0 } else { NEXT } | if writable { WRITE } else { 0 },
                    next: self.next_descriptor,
                },
            );
        }
        head
    }

    /// The same as an indirect table at `table`.
    pub fn indirect_chain(&mut self, table: u64, pieces: &[(u64, u32, bool)]) -> u16 {
        for (count, &(address, len, writable)) in pieces.iter().enumerate() {
            let last = count + 1 == pieces.len();
            let descriptor = Descriptor {
                address,
                len,
                flags: if last { 0 } else { NEXT } | if writable { WRITE } else { 0 },
                next: count as u16 + 1,
            };
            self.set_at(table, count as u16, descriptor);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        self.set(
            head,
            Descriptor {
                address: table,
                len: pieces.len() as u32 * 16,
                flags: INDIRECT,
                next: 0,
            },
        );
        head
    }

    /// Makes a chain available, without ringing.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + u64::from(self.avail % self.size) * 2;
        self.memory
            .write_obj(head.to_le(), GuestAddress(slot))
            .unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(self.avail);
    }

    pub fn set_avail_index(&self, index: u16) {
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.avail_ring() + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    /// Rings the doorbell if the device wants it rung.
    pub fn ring(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            // Rung rather once too often than never: what the device asked for may be any of
            // those offered since.
            true
        } else {
            let flags: u16 = self
                .memory
                .load(GuestAddress(self.used_ring()), Ordering::SeqCst)
                .unwrap();
            flags & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    pub fn ring_anyway(&self) {
        self.kick.write(1).unwrap();
    }

    /// Whether the doorbell was rung since the last look.
    pub fn rung(&self) -> bool {
        self.kick.read().is_ok()
    }

    fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.used_ring() + 2), Ordering::SeqCst)
            .unwrap()
    }

    /// Takes a used chain if there is one: its head, and how many bytes were written.
    pub fn try_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.used {
            return None;
        }
        let at = self.used_ring() + 4 + u64::from(self.used % self.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((head as u16, len))
    }

    /// Waits for a used chain, by interrupt only: one that never comes fails the test.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.interrupt.count();
            if self.event_idx {
                let event = self.avail_ring() + 4 + u64::from(self.size) * 2;
                self.memory
                    .store(self.used.to_le(), GuestAddress(event), Ordering::SeqCst)
                    .unwrap();
                std::sync::atomic::fence(Ordering::SeqCst);
            }
            if let Some(used) = self.try_used() {
                return used;
            }
            assert!(
                self.interrupt.wait_beyond(seen) && Instant::now() < deadline,
                "no interrupt came"
            );
        }
    }

    pub fn poke(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

/// Sends an order that others wait for, and waits.
pub fn order_and_wait(worker: &Worker, order: impl FnOnce(crate::worker::Done) -> Order) {
    let (done, wait) = std::sync::mpsc::channel();
    worker.order(order(Box::new(move || done.send(()).unwrap())));
    wait.recv_timeout(PATIENCE)
        .expect("the order was not carried out");
}
