//! The common configuration structure (virtio 1.3 §4.1.4.3) and the device status state machine
//! (§2.1, §3.1.1): a register file that does nothing but say what a write amounts to.
//!
//! ```text
//!   0 ──► ACKNOWLEDGE|DRIVER ──► FEATURES_OK ──► DRIVER_OK ──► NEEDS_RESET
//!   ▲           features            queues       (activated)       │
//!   └──────────────────────── write of 0 ◄─────────────────────────┘
//! ```
//!
//! A write has an effect only with the width of its register (64-bit ones also by halves); reads
//! of any width see the structure as bytes. Bits of the status are only added; only 0 takes them
//! away. While a reset is under way all writes are ignored and reads show the old values.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};

use crate::virtio::config_space;

/// DRIVER_OK: the driver is set up.
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// DEVICE_NEEDS_RESET: the device can't go on.
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
/// The bits a driver may set just like that.
const FREE_BITS: u8 =
    VIRTIO_CONFIG_S_ACKNOWLEDGE as u8 | VIRTIO_CONFIG_S_DRIVER as u8 | VIRTIO_CONFIG_S_FAILED as u8;

/// Offset of device_status.
pub(super) const DEVICE_STATUS: u64 = 0x14;
/// VIRTIO_MSI_NO_VECTOR.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Length of the structure: up to and including queue_device. What comes after it belongs to
/// features that are not offered.
pub(super) const COMMON_SIZE: usize = 0x38;

/// Which MSI-X vector each source of interrupts uses; written by the driver, looked up by device
/// threads at the moment they interrupt.
pub(super) struct Vectors {
    pub(super) config: AtomicU16,
    pub(super) queues: Vec<AtomicU16>,
}

impl Vectors {
    fn new(queues: usize) -> Self {
        Self {
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    fn reset(&self) {
        self.config.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }
}

/// What the driver says about a queue.
#[derive(Clone, Debug)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver_area: u64,
    pub(super) device_area: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver_area: 0,
            device_area: 0,
        }
    }
}

/// What a write amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// The driver's features were accepted.
    pub(super) features_accepted: bool,
    /// The driver is ready: the queues are to be handed to the workers.
    pub(super) activate: bool,
    /// The driver wrote 0 to the status.
    pub(super) reset: Option<Reset>,
}

/// What it takes to reset the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    /// Nothing: it never ran, the registers are reset already.
    Done,
    /// Its workers have queues; [`Registers::reset`] is to be called when they have given them up.
    Workers,
}

/// The registers.
pub(super) struct Registers {
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// The driver accepted a feature that has no bit in the first 64. Sticks until the reset.
    beyond: bool,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    vectors: Arc<Vectors>,
    /// How many MSI-X vectors there are to choose from.
    vector_count: usize,
    /// Workers have been told to take queues, and not yet given them up.
    activated: bool,
    resetting: bool,
}

impl Registers {
    /// Registers as they are after a reset.
    pub(super) fn new(offered: u64, queue_sizes: &[u16], vector_count: usize) -> Self {
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            beyond: false,
            status: 0,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .copied()
                .map(QueueRegisters::new)
                .collect(),
            vectors: Arc::new(Vectors::new(queue_sizes.len())),
            vector_count,
            activated: false,
            resetting: false,
        }
    }

    pub(super) fn vectors(&self) -> Arc<Vectors> {
        self.vectors.clone()
    }

    pub(super) fn status(&self) -> u8 {
        self.status
    }

    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// The workers are about to take the queues.
    pub(super) fn set_activated(&mut self) {
        self.activated = true;
    }

    /// Whether the driver may be interrupted: the device runs and is not being reset (§3.1.1).
    pub(super) fn is_live(&self) -> bool {
        !self.resetting && self.status & DRIVER_OK != 0
    }

    /// The device can't go on; true when the driver is to be told.
    pub(super) fn set_needs_reset(&mut self) -> bool {
        let live = self.is_live();
        if live {
            self.status |= NEEDS_RESET;
        }
        live
    }

    /// Everything as it was at first (§2.4.1: the status reads 0 when this is done).
    pub(super) fn reset(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.beyond = false;
        self.status = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        self.vectors.reset();
        self.activated = false;
        self.resetting = false;
    }

    /// A driver's read.
    pub(super) fn read(&self, generation: u8, offset: u64, data: &mut [u8]) {
        let mut image = [0; COMMON_SIZE];
        let mut put = |at: u64, bytes: &[u8]| config_space::write(&mut image, at, bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.offered, self.device_feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(
            0x10,
            &self.vectors.config.load(Ordering::SeqCst).to_le_bytes(),
        );
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.status, generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        let index = usize::from(self.queue_select);
        // For a queue that is not there, queue_size reads 0 (§4.1.4.3).
        put(0x1a, &NO_VECTOR.to_le_bytes());
        if let (Some(queue), Some(vector)) =
            (self.queues.get(index), self.vectors.queues.get(index))
        {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &vector.load(Ordering::SeqCst).to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver_area.to_le_bytes());
            put(0x30, &queue.device_area.to_le_bytes());
        }
        config_space::read(&image, offset, data);
    }

    /// A driver's write.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Effects {
        let mut effects = Effects::default();
        if self.resetting || data.len() > 8 {
            return effects;
        }
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (word, dword) = (value as u16, value as u32);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = dword,
            (0x08, 4) => self.driver_feature_select = dword,
            (0x0c, 4) => self.write_driver_features(dword),
            (0x10, 2) => {
                let vector = self.existing_vector(word);
                self.vectors.config.store(vector, Ordering::SeqCst);
            }
            (DEVICE_STATUS, 1) => effects = self.write_status(value as u8),
            (0x16, 2) => self.queue_select = word,
            (0x18, 2) => {
                if let Some(queue) = self.unfrozen_queue()
                    && word.is_power_of_two()
                    && word <= queue.max_size
                {
                    queue.size = word;
                }
            }
            (0x1a, 2) => {
                let vector = self.existing_vector(word);
                if let Some(register) = self.vectors.queues.get(usize::from(self.queue_select)) {
                    register.store(vector, Ordering::SeqCst);
                }
            }
            (0x1c, 2) => {
                if let Some(queue) = self.unfrozen_queue() {
                    // An address of 0 is one that was not written.
                    let placed =
                        queue.descriptors != 0 && queue.driver_area != 0 && queue.device_area != 0;
                    queue.enabled = word == 1 && placed;
                }
            }
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
                self.write_queue_address(offset, data);
            }
            _ => {}
        }
        effects
    }

    fn write_driver_features(&mut self, value: u32) {
        // No new features after FEATURES_OK (§3.1.1).
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let wide = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | wide,
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (wide << 32),
            _ => self.beyond |= value != 0,
        }
    }

    fn write_status(&mut self, value: u8) -> Effects {
        let mut effects = Effects::default();
        if value == 0 {
            effects.reset = Some(if self.activated {
                self.resetting = true;
                Reset::Workers
            } else {
                self.reset();
                Reset::Done
            });
            return effects;
        }
        let added = value & !self.status;
        self.status |= added & FREE_BITS;
        if added & FEATURES_OK != 0 && self.features_acceptable() {
            self.status |= FEATURES_OK;
            effects.features_accepted = true;
        }
        // §3.1.1: only with features agreed on, and not after the driver has given up.
        if added & DRIVER_OK != 0
            && self.status & FEATURES_OK != 0
            && self.status & (FAILED | NEEDS_RESET) == 0
        {
            self.status |= DRIVER_OK;
            effects.activate = true;
        }
        effects
    }

    fn features_acceptable(&self) -> bool {
        let version_1 = 1u64 << VIRTIO_F_VERSION_1;
        !self.beyond
            && self.driver_features & !self.offered == 0
            && self.driver_features & version_1 != 0
    }

    /// The vector itself if there is such a one, else NO_VECTOR: what the driver reads back to see
    /// whether it worked (§4.1.5.1.2).
    fn existing_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vector_count {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// The selected queue, while its registers may be written: before it is enabled, and before
    /// the device runs.
    fn unfrozen_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.status & DRIVER_OK != 0 {
            return None;
        }
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.enabled)
    }

    fn write_queue_address(&mut self, offset: u64, data: &[u8]) {
        let Some(queue) = self.unfrozen_queue() else {
            return;
        };
        let register = match offset & !7 {
            0x20 => &mut queue.descriptors,
            0x28 => &mut queue.driver_area,
            _ => &mut queue.device_area,
        };
        let mut bytes = register.to_le_bytes();
        config_space::write(&mut bytes, offset & 7, data);
        *register = u64::from_le_bytes(bytes);
    }
}

/// The 32 feature bits that a select register shows; there are none from 64 on.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION_1: u64 = 1 << 32;

    fn registers() -> Registers {
        Registers::new(VERSION_1 | 5, &[256, 64], 3)
    }

    fn read<const N: usize>(registers: &Registers, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        registers.read(0, offset, &mut data);
        data
    }

    fn status(registers: &Registers) -> u8 {
        read::<1>(registers, 0x14)[0]
    }

    fn accept(registers: &mut Registers, features: u64) -> Effects {
        for select in [0u32, 1] {
            registers.write(0x08, &select.to_le_bytes());
            registers.write(0x0c, &half(features, select).to_le_bytes());
        }
        registers.write(0x14, &[1]);
        registers.write(0x14, &[3]);
        registers.write(0x14, &[11])
    }

    fn place_queue(registers: &mut Registers, index: u16) {
        registers.write(0x16, &index.to_le_bytes());
        for offset in [0x20, 0x28, 0x30] {
            registers.write(offset, &0x1_0000_1000u64.to_le_bytes());
        }
    }

    #[test]
    fn features_are_offered_by_halves_and_nothing_beyond() {
        let mut registers = registers();
        for (select, expected) in [(0u32, 5u32), (1, 1), (2, 0), (u32::MAX, 0)] {
            registers.write(0x00, &select.to_le_bytes());
            assert_eq!(read(&registers, 0x04), expected.to_le_bytes());
        }
    }

    #[test]
    fn features_ok_needs_version_1_and_nothing_that_was_not_offered() {
        for (features, good) in [
            (VERSION_1, true),
            (VERSION_1 | 5, true),
            (5, false),
            (VERSION_1 | 2, false),
            (VERSION_1 | 1 << 63, false),
        ] {
            let mut registers = registers();
            assert_eq!(accept(&mut registers, features).features_accepted, good);
            assert_eq!(status(&registers), if good { 11 } else { 3 });
        }
        let mut registers = registers();
        registers.write(0x08, &2u32.to_le_bytes());
        registers.write(0x0c, &1u32.to_le_bytes());
        assert!(!accept(&mut registers, VERSION_1).features_accepted);
    }

    #[test]
    fn driver_ok_needs_features_ok_and_takes_effect_once() {
        let mut registers = registers();
        assert_eq!(registers.write(0x14, &[7]), Effects::default());
        assert_eq!(status(&registers), 3);
        accept(&mut registers, VERSION_1);
        assert!(registers.write(0x14, &[15]).activate);
        assert!(!registers.write(0x14, &[15]).activate);
        assert_eq!(status(&registers), 15);
    }

    #[test]
    fn status_bits_are_only_taken_away_by_a_reset() {
        let mut registers = registers();
        accept(&mut registers, VERSION_1);
        registers.write(0x14, &[1]);
        assert_eq!(status(&registers), 11);
        registers.write(0x14, &[0x40]);
        assert_eq!(status(&registers), 11, "needs-reset is the device's");
        registers.write(0x14, &[0x80]);
        assert!(!registers.write(0x14, &[15]).activate, "it had given up");
        assert_eq!(registers.write(0x14, &[0]).reset, Some(Reset::Done));
        assert_eq!(status(&registers), 0);
    }

    #[test]
    fn a_reset_of_a_running_device_shows_the_old_status_until_the_workers_are_done() {
        let mut registers = registers();
        accept(&mut registers, VERSION_1);
        registers.write(0x14, &[15]);
        registers.set_activated();
        assert_eq!(registers.write(0x14, &[0]).reset, Some(Reset::Workers));
        assert_eq!(status(&registers), 15);
        assert_eq!(registers.write(0x14, &[0]), Effects::default());
        registers.write(0x16, &[1, 0]);
        assert_eq!(read(&registers, 0x16), [0, 0]);
        assert!(!registers.set_needs_reset());
        registers.reset();
        assert_eq!(status(&registers), 0);
    }

    #[test]
    fn a_queue_size_is_a_power_of_two_up_to_the_maximum() {
        let mut registers = registers();
        for (size, expected) in [(0u16, 256u16), (3, 256), (512, 256), (128, 128), (1, 1)] {
            registers.write(0x18, &size.to_le_bytes());
            assert_eq!(read(&registers, 0x18), expected.to_le_bytes());
        }
        registers.write(0x16, &2u16.to_le_bytes());
        assert_eq!(read(&registers, 0x18), [0, 0], "there is no such queue");
        registers.write(0x18, &[8, 0]);
    }

    #[test]
    fn a_queue_is_enabled_once_it_has_addresses_and_frozen_then() {
        let mut registers = registers();
        registers.write(0x1c, &[1, 0]);
        assert_eq!(read(&registers, 0x1c), [0, 0]);
        place_queue(&mut registers, 0);
        registers.write(0x1c, &[2, 0]);
        assert_eq!(read(&registers, 0x1c), [0, 0]);
        registers.write(0x1c, &[1, 0]);
        registers.write(0x1c, &[0, 0]);
        registers.write(0x18, &[8, 0]);
        registers.write(0x24, &[9; 4]);
        assert_eq!(read(&registers, 0x1c), [1, 0]);
        assert_eq!(read(&registers, 0x18), [0, 1]);
        assert_eq!(read(&registers, 0x20), 0x1_0000_1000u64.to_le_bytes());
    }

    #[test]
    fn no_queue_is_enabled_or_moved_while_the_device_runs() {
        let mut registers = registers();
        accept(&mut registers, VERSION_1);
        registers.write(0x14, &[15]);
        place_queue(&mut registers, 1);
        registers.write(0x1c, &[1, 0]);
        assert_eq!(read(&registers, 0x1c), [0, 0]);
        assert_eq!(read(&registers, 0x20), [0; 8]);
    }

    #[test]
    fn queue_addresses_are_written_whole_or_by_halves() {
        let mut registers = registers();
        registers.write(0x28, &0x1111_1111u32.to_le_bytes());
        registers.write(0x2c, &0x2222_2222u32.to_le_bytes());
        registers.write(0x2a, &[9; 4]);
        registers.write(0x2c, &[9; 8]);
        registers.write(0x28, &[9; 2]);
        assert_eq!(
            read(&registers, 0x28),
            0x2222_2222_1111_1111u64.to_le_bytes()
        );
    }

    #[test]
    fn a_vector_that_does_not_exist_reads_back_as_no_vector() {
        let mut registers = registers();
        for offset in [0x10, 0x1a] {
            registers.write(offset, &2u16.to_le_bytes());
            assert_eq!(read(&registers, offset), [2, 0]);
            registers.write(offset, &3u16.to_le_bytes());
            assert_eq!(read(&registers, offset), [0xff, 0xff]);
        }
    }
}
