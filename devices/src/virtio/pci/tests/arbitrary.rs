//! Accesses of any width at any offset through every face of the bus, in any order: nothing
//! panics, nothing hangs, and after a reset the device works.

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Bench, bench};
use crate::virtio::pci::VIRTIO_BAR_SIZE;
use crate::virtio::testing::{TestDriver, VERSION_1};

#[derive(Clone, Debug)]
enum Access {
    ConfigRead(u64, usize),
    ConfigWrite(u64, Vec<u8>),
    PortRead(u64, usize),
    PortWrite(u64, Vec<u8>),
    BarRead(u64, usize),
    BarWrite(u64, Vec<u8>),
}

/// Widths that processors use, and others.
fn width() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => prop::sample::select(vec![1usize, 2, 4, 8]),
        1 => 0usize..20,
    ]
}

/// Values that mean something to registers, and others.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    (width(), any::<u64>(), vec(any::<u8>(), 20), 0u8..4).prop_map(|(width, word, noise, kind)| {
        let mut bytes = match kind {
            0 => noise,
            1 => (word & 0x1f).to_le_bytes().to_vec(),
            2 => (word & 0x3f_fff0).to_le_bytes().to_vec(),
            _ => vec![0xff; 20],
        };
        bytes.resize(width, 0);
        bytes
    })
}

fn config_offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => prop::sample::select(vec![4u64, 6, 0x10, 0x34, 0x42, 0x98, 0x9c, 0xa0, 0xa4]),
        2 => 0u64..0x110,
        1 => 0u64..0x1010,
    ]
}

fn bar_offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0u64..0x40,
        // The registers that move the device on.
        6 => prop::sample::select(vec![0x08u64, 0x0c, 0x14, 0x16, 0x18, 0x1c, 0x20, 0x28, 0x30]),
        1 => 0xff0u64..0x1010,
        1 => 0x2000u64..0x2010,
        2 => 0x2ff8u64..0x3010,
        3 => 0x8000u64..0x8040,
        1 => 0xbff8u64..0xc010,
        1 => 0u64..VIRTIO_BAR_SIZE + 16,
    ]
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        1 => (config_offset(), width()).prop_map(|(at, n)| Access::ConfigRead(at, n)),
        2 => (config_offset(), bytes()).prop_map(|(at, data)| Access::ConfigWrite(at, data)),
        1 => (0u64..9, width()).prop_map(|(at, n)| Access::PortRead(at, n)),
        1 => (0u64..9, bytes()).prop_map(|(at, data)| Access::PortWrite(at, data)),
        2 => (bar_offset(), width()).prop_map(|(at, n)| Access::BarRead(at, n)),
        8 => (bar_offset(), bytes()).prop_map(|(at, data)| Access::BarWrite(at, data)),
        // Steps of a handshake, so that deeper states are reached.
        3 => prop::sample::select(vec![
            Access::BarWrite(0x14, vec![3]),
            Access::BarWrite(0x08, vec![1, 0, 0, 0]),
            Access::BarWrite(0x0c, vec![1, 0, 0, 0]),
            Access::BarWrite(0x14, vec![11]),
            Access::BarWrite(0x1c, vec![1, 0]),
            Access::BarWrite(0x14, vec![15]),
            Access::BarWrite(0x14, vec![0]),
            Access::ConfigWrite(0x04, vec![6, 0]),
        ]),
    ]
}

fn perform(driver: &TestDriver, access: Access) {
    let (guest, slot) = (&driver.guest, driver.slot);
    match access {
        Access::ConfigRead(at, width) => guest.config_read(slot, at, &mut vec![0; width]),
        Access::ConfigWrite(at, data) => guest.config_write(slot, at, &data),
        Access::PortRead(at, width) => guest.port_read(at, &mut vec![0; width]),
        Access::PortWrite(at, data) => guest.port_write(at, &data),
        Access::BarRead(at, width) => guest.mmio_read(driver.bar + at, &mut vec![0; width]),
        Access::BarWrite(at, data) => guest.mmio_write(driver.bar + at, &data),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn any_sequence_of_accesses_leaves_a_device_that_works_after_a_reset(
        accesses in vec(access(), 0..150), ready in any::<bool>(),
    ) {
        let Bench { mut driver, guest, device, .. } = bench();
        if ready {
            driver.start(VERSION_1, 16);
        }
        guest.port_write(0, &(1u32 << 31 | u32::from(driver.slot) << 11).to_le_bytes());
        for access in accesses {
            perform(&driver, access);
        }
        let mut driver = TestDriver::new(&guest, driver.slot);
        driver.start(VERSION_1, 16);
        prop_assert_eq!(driver.exchange(0, b"still here", 10), b"still here");
        prop_assert_eq!(driver.exchange(1, b"me too", 6), b"me too");
        drop(device);
    }
}

#[test]
fn many_vcpus_at_once_do_not_tie_the_transport_up() {
    let Bench { driver, guest, .. } = bench();
    let slot = driver.slot;
    let vcpus: Vec<_> = (0..4u64)
        .map(|vcpu| {
            let guest = guest.clone();
            std::thread::spawn(move || {
                let bar = crate::virtio::testing::TestGuest::bar_base(slot);
                for round in 0..3000u64 {
                    let step = round.wrapping_mul(vcpu * 2 + 7) % 11;
                    match step {
                        0 => guest.mmio_write(bar + 0x14, &[0]),
                        1 => guest.mmio_write(bar + 0x14, &[3]),
                        2 => guest.mmio_write(bar + 0x08, &1u32.to_le_bytes()),
                        3 => guest.mmio_write(bar + 0x0c, &1u32.to_le_bytes()),
                        4 => guest.mmio_write(bar + 0x14, &[11]),
                        5 => guest.mmio_write(bar + 0x20, &0x1_0000u64.to_le_bytes()),
                        6 => guest.mmio_write(bar + 0x28, &0x2_0000u64.to_le_bytes()),
                        7 => guest.mmio_write(bar + 0x30, &0x3_0000u64.to_le_bytes()),
                        8 => guest.mmio_write(bar + 0x1c, &[1, 0]),
                        9 => guest.mmio_write(bar + 0x14, &[15]),
                        _ => guest.config_write(slot, 4, &[if vcpu == 0 { 4 } else { 6 }, 0]),
                    }
                }
            })
        })
        .collect();
    for vcpu in vcpus {
        vcpu.join().unwrap();
    }
    let mut driver = TestDriver::new(&guest, slot);
    driver.start(VERSION_1, 16);
    assert_eq!(driver.exchange(0, b"still here", 10), b"still here");
}
