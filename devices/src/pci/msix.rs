//! MSI-X: capability, table and pending bits (PCI Local Bus Specification 3.0 §6.8.2).
//!
//! ```text
//!                 vCPU threads                          device threads
//!  message control ┐                                          │ trigger
//!  table entry ────┴─► Table (one lock) ── route ──► Gate (one lock per vector) ─► MsiVector
//!                                        open/close    { open, pending }
//! ```
//!
//! **No lost interrupt.** A vector can be triggered by a worker while a vCPU unmasks it. What both
//! touch is the vector's gate alone, and both do their whole step under its lock: the worker finds
//! the gate open and delivers, or finds it shut and leaves the pending bit; the vCPU opens the
//! gate and takes the pending bit in one step. So either the worker came first, and the vCPU sees
//! the bit and delivers, or the vCPU came first, and the worker sees an open gate. Under the lock
//! there is at most one `write` to a non-blocking eventfd, so after a vCPU has masked a vector,
//! nothing is delivered by it any more.
//!
//! **No stale message.** Routing may take the machine a while, so it is done with the gate shut and
//! without its lock: a worker that triggers meanwhile leaves the pending bit and goes on. A vector
//! whose route could not be set stays shut until the next unmask, with its pending bit kept.
//!
//! While MSI-X is disabled a trigger leaves no pending bit: the interrupt belongs to INTx then,
//! and the device has its own way (virtio's ISR status) to remember it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{ConfigSpace, LayoutError};
use crate::machine::MsiVector;
use crate::throttle::Throttle;

/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The most vectors the capability can name.
pub const MAX_VECTORS: u16 = 2048;
const CAPABILITY_ID: u8 = 0x11;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// A device's vectors.
pub struct Msix {
    table: Mutex<Table>,
    vectors: Vec<Vector>,
    /// As in the table, for those who must not wait for its lock.
    enabled: AtomicBool,
    warnings: Throttle,
}

/// What vCPU threads write.
struct Table {
    enabled: bool,
    function_masked: bool,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    /// The message the vector was last routed to.
    routed: Option<(u64, u32)>,
}

/// A vector's gate.
struct Vector(Mutex<Gate>);

struct Gate {
    /// Gone once the device is on its way out.
    msi: Option<Arc<dyn MsiVector>>,
    open: bool,
    enabled: bool,
    pending: bool,
}

impl Msix {
    /// A table for these vectors, all masked, MSI-X disabled: the state after a reset.
    pub fn new(vectors: Vec<Arc<dyn MsiVector>>) -> Self {
        let entry = Entry {
            address: 0,
            data: 0,
            control: VECTOR_MASKED,
            routed: None,
        };
        Self {
            table: Mutex::new(Table {
                enabled: false,
                function_masked: false,
                entries: vec![entry; vectors.len()],
            }),
            vectors: vectors
                .into_iter()
                .map(|msi| {
                    Vector(Mutex::new(Gate {
                        msi: Some(msi),
                        open: false,
                        enabled: false,
                        pending: false,
                    }))
                })
                .collect(),
            enabled: AtomicBool::new(false),
            warnings: Throttle::default(),
        }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> usize {
        self.vectors.len()
    }

    /// Adds the capability to `space`: table and pending bits lie in BAR `bar` at these offsets
    /// (multiples of 8). Returns the offset of the capability; its message control register, whose
    /// value goes to [`Msix::set_control`] after every write, is 2 bytes further.
    pub fn add_capability(
        &self,
        space: &mut ConfigSpace,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<usize, LayoutError> {
        let last = u16::try_from(self.vectors.len())
            .ok()
            .filter(|count| (1..=MAX_VECTORS).contains(count))
            .ok_or(LayoutError::NoRoom(CAPABILITY_ID))?
            - 1;
        let mut body = [0; 10];
        body[..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(table & !7 | u32::from(bar & 7)).to_le_bytes());
        body[6..].copy_from_slice(&(pending & !7 | u32::from(bar & 7)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        space.add_capability(CAPABILITY_ID, &body, &writable)
    }

    /// The guest may have changed the message control register. Called on vCPU threads.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock_table();
        let enabled = control & CONTROL_ENABLE != 0;
        let function_masked = control & CONTROL_FUNCTION_MASK != 0;
        if (table.enabled, table.function_masked) == (enabled, function_masked) {
            return;
        }
        (table.enabled, table.function_masked) = (enabled, function_masked);
        if enabled {
            // First the gates, shut as they are: whoever finds MSI-X enabled leaves a pending bit.
            for vector in &self.vectors {
                vector.lock().enabled = true;
            }
        }
        self.enabled.store(enabled, Ordering::SeqCst);
        for index in 0..self.vectors.len() {
            self.settle(&mut table, index);
        }
    }

    /// Whether the guest has switched MSI-X on. Called on any thread.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Delivers vector `index`, or sets its pending bit while it is masked; `false` when MSI-X is
    /// disabled or there is no such vector, so that nothing was done. Called on any thread.
    pub fn trigger(&self, index: u16) -> bool {
        let Some(vector) = self.vectors.get(usize::from(index)) else {
            return false;
        };
        let mut gate = vector.lock();
        if gate.open {
            self.deliver(index.into(), &gate);
        } else {
            gate.pending |= gate.enabled;
        }
        gate.enabled
    }

    /// Forgets the interrupts that are pending, for when the device is reset.
    pub fn clear_pending(&self) {
        for vector in &self.vectors {
            vector.lock().pending = false;
        }
    }

    /// Gives the vectors back to the machine, on the calling thread: a device thread that drops the
    /// last reference to this table may not make the system calls that takes. Nothing is delivered
    /// afterwards. Called on the VMM thread.
    pub fn release(&self) {
        // With the table locked no vCPU holds a vector in order to route it.
        let _table = self.lock_table();
        for vector in &self.vectors {
            let mut gate = vector.lock();
            gate.open = false;
            let msi = gate.msi.take();
            drop(gate);
            drop(msi);
        }
    }

    /// A guest read of the table: 4 or 8 bytes, aligned (§6.8.2); others read as zeroes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock_table();
        each_dword(offset, data.len(), |index, dword, at| {
            let value = table.entries.get(index).map_or(0, |e| e.read(dword));
            data[at..at + 4].copy_from_slice(&value.to_le_bytes());
        });
    }

    /// A guest write of the table: 4 or 8 bytes, aligned; others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = self.lock_table();
        let mut touched = None;
        each_dword(offset, data.len(), |index, dword, at| {
            let value = u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
            if let Some(entry) = table.entries.get_mut(index) {
                entry.write(dword, value);
                touched = Some(index);
            }
        });
        // Both dwords of an 8-byte write belong to one entry.
        if let Some(index) = touched {
            self.settle(&mut table, index);
        }
    }

    /// A guest read of the pending bits: 4 or 8 bytes, aligned; others read as zeroes. Writes have
    /// no effect.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            data.fill(0);
            return;
        }
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset
                .checked_add(index as u64)
                .and_then(|at| usize::try_from(at.checked_mul(8)?).ok());
            *byte = (0..8)
                .filter(|bit| {
                    let vector = first.and_then(|first| self.vectors.get(first.checked_add(*bit)?));
                    vector.is_some_and(|v| v.lock().pending)
                })
                .fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Makes a vector's route and gate agree with the table, whose lock the caller holds: that
    /// keeps two vCPUs from routing one vector at once.
    fn settle(&self, table: &mut Table, index: usize) {
        let (Some(vector), Some(entry)) = (self.vectors.get(index), table.entries.get_mut(index))
        else {
            return;
        };
        let masked = table.function_masked || entry.control & VECTOR_MASKED != 0;
        let mut open = table.enabled && !masked;
        let message = (entry.address, entry.data);
        if open && entry.routed != Some(message) {
            entry.routed = None;
            let msi = {
                let mut gate = vector.lock();
                gate.open = false;
                gate.msi.clone()
            };
            match msi.map(|msi| msi.route(entry.address, entry.data)) {
                Some(Ok(())) => entry.routed = Some(message),
                Some(Err(error)) => {
                    open = false;
                    self.warn(index, "an interrupt could not be routed", &error);
                }
                None => open = false,
            }
        }
        let mut gate = vector.lock();
        gate.open = open;
        gate.enabled = table.enabled;
        gate.pending &= table.enabled;
        if open && std::mem::take(&mut gate.pending) {
            self.deliver(index, &gate);
        }
    }

    fn deliver(&self, index: usize, gate: &Gate) {
        if let Some(Err(error)) = gate.msi.as_ref().map(|msi| msi.trigger()) {
            self.warn(index, "an interrupt could not be delivered", &error);
        }
    }

    fn warn(&self, vector: usize, what: &str, error: &io::Error) {
        if let Some(suppressed) = self.warnings.pass() {
            tracing::warn!(vector, %error, suppressed, "{what}");
        }
    }

    fn lock_table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vector {
    fn lock(&self) -> MutexGuard<'_, Gate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn read(&self, dword: u64) -> u32 {
        match dword {
            0 => self.address as u32,
            1 => (self.address >> 32) as u32,
            2 => self.data,
            _ => self.control,
        }
    }

    fn write(&mut self, dword: u64, value: u32) {
        let wide = u64::from(value);
        match dword {
            // The two lowest bits are hardwired to 0 (§6.8.2.7).
            0 => self.address = (self.address & !0xffff_ffff) | (wide & !3),
            1 => self.address = (self.address & 0xffff_ffff) | (wide << 32),
            2 => self.data = value,
            _ => self.control = value & VECTOR_MASKED,
        }
    }
}

/// Calls `visit(entry, dword of the entry, position in the data)` for each dword of a well-formed
/// access, and not at all for another.
fn each_dword(offset: u64, len: usize, mut visit: impl FnMut(usize, u64, usize)) {
    if !matches!(len, 4 | 8) || !offset.is_multiple_of(len as u64) {
        return;
    }
    for (at, position) in (0..len).step_by(4).zip((offset / 4)..) {
        let entry = usize::try_from(position / 4).unwrap_or(usize::MAX);
        visit(entry, position % 4, at);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        routes: Mutex<Vec<(u64, u32)>>,
        fired: AtomicUsize,
        refuse: AtomicBool,
        /// What happens elsewhere while it is being routed.
        meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    }

    impl MsiVector for Recorder {
        fn route(&self, address: u64, data: u32) -> io::Result<()> {
            if self.refuse.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            self.routes.lock().unwrap().push((address, data));
            if let Some(meanwhile) = self.meanwhile.lock().unwrap().take() {
                meanwhile();
            }
            Ok(())
        }
        fn trigger(&self) -> io::Result<()> {
            self.fired.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    impl Recorder {
        fn fired(&self) -> usize {
            self.fired.load(Ordering::SeqCst)
        }
    }

    fn msix(count: usize) -> (Arc<Msix>, Vec<Arc<Recorder>>) {
        let recorders: Vec<_> = (0..count).map(|_| Arc::new(Recorder::default())).collect();
        let vectors = recorders.iter().map(|r| r.clone() as _).collect();
        (Arc::new(Msix::new(vectors)), recorders)
    }

    fn program(msix: &Msix, vector: u64, data: u32, control: u32) {
        msix.write_table(vector * 16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &control.to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn an_unmasked_vector_is_routed_and_delivers() {
        let (msix, vectors) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 1, 0x41, 0);
        assert!(msix.trigger(1));
        assert_eq!(*vectors[1].routes.lock().unwrap(), [(0xfee0_1000, 0x41)]);
        assert_eq!((vectors[0].fired(), vectors[1].fired()), (0, 1));
        assert!(!msix.trigger(2), "there is no such vector");
    }

    #[test]
    fn a_masked_vector_is_pending_and_delivers_once_when_unmasked() {
        let (msix, vectors) = msix(3);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 2, 0x41, 1);
        assert!(msix.trigger(2) && msix.trigger(2));
        assert_eq!((pending(&msix), vectors[2].fired()), (0b100, 0));
        program(&msix, 2, 0x41, 0);
        assert_eq!((pending(&msix), vectors[2].fired()), (0, 1));
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let (msix, vectors) = msix(2);
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        program(&msix, 0, 0x41, 0);
        msix.trigger(0);
        assert_eq!((pending(&msix), vectors[0].fired()), (1, 0));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!((pending(&msix), vectors[0].fired()), (0, 1));
    }

    #[test]
    fn a_disabled_function_neither_delivers_nor_remembers() {
        let (msix, vectors) = msix(1);
        program(&msix, 0, 0x41, 0);
        assert!(!msix.trigger(0));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!((pending(&msix), vectors[0].fired()), (0, 0));
    }

    #[test]
    fn a_trigger_while_msix_is_being_enabled_is_not_lost() {
        let (msix, vectors) = msix(2);
        program(&msix, 0, 0x40, 0);
        program(&msix, 1, 0x41, 0);
        let worker = msix.clone();
        *vectors[0].meanwhile.lock().unwrap() = Some(Box::new(move || {
            assert!(worker.enabled());
            assert!(worker.trigger(1), "it was swallowed");
        }));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(vectors[1].fired(), 1);
    }

    #[test]
    fn a_message_changed_while_unmasked_is_routed_anew_and_an_unchanged_one_is_not() {
        let (msix, vectors) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 0, 0x41, 0);
        program(&msix, 0, 0x41, 1);
        program(&msix, 0, 0x41, 0);
        assert_eq!(vectors[0].routes.lock().unwrap().len(), 1);
        msix.write_table(8, &0x42u32.to_le_bytes());
        assert_eq!(
            vectors[0].routes.lock().unwrap().last(),
            Some(&(0xfee0_1000, 0x42))
        );
    }

    #[test]
    fn a_vector_that_can_not_be_routed_keeps_its_interrupt_until_it_can() {
        let (msix, vectors) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        vectors[0].refuse.store(true, Ordering::SeqCst);
        program(&msix, 0, 0x41, 0);
        msix.trigger(0);
        assert_eq!((pending(&msix), vectors[0].fired()), (1, 0));
        vectors[0].refuse.store(false, Ordering::SeqCst);
        program(&msix, 0, 0x41, 0);
        assert_eq!((pending(&msix), vectors[0].fired()), (0, 1));
    }

    #[test]
    fn released_vectors_are_dropped_and_deliver_nothing() {
        let (msix, vectors) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 0, 0x41, 0);
        msix.release();
        assert_eq!(Arc::strong_count(&vectors[0]), 1);
        program(&msix, 0, 0x42, 1);
        program(&msix, 0, 0x42, 0);
        msix.trigger(0);
        assert_eq!(vectors[0].fired(), 0);
    }

    #[test]
    fn table_accesses_of_other_widths_and_alignments_have_no_effect() {
        let (msix, _) = msix(1);
        for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (12, 8), (0, 0), (0, 16)] {
            msix.write_table(offset, &vec![0xee; len]);
            let mut data = vec![0; len];
            msix.read_table(offset, &mut data);
            msix.read_pending(offset, &mut data);
        }
        msix.write_table(16, &[0xee; 4]);
        msix.write_table(u64::MAX - 7, &[0xee; 8]);
        let mut data = [0; 8];
        msix.read_table(0, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_table(8, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 1, 0, 0, 0]);
        msix.read_pending(u64::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
    }

    #[test]
    fn no_interrupt_is_lost_between_a_trigger_and_an_unmask() {
        let (msix, vectors) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 0, 0x41, 1);
        for _ in 0..2000 {
            let before = vectors[0].fired();
            let worker = {
                let msix = msix.clone();
                std::thread::spawn(move || msix.trigger(0))
            };
            msix.write_table(12, &0u32.to_le_bytes());
            worker.join().unwrap();
            assert_eq!(vectors[0].fired(), before + 1);
            assert_eq!(pending(&msix), 0);
            msix.write_table(12, &1u32.to_le_bytes());
        }
    }
}
