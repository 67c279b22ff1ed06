//! The transport with a device behind it whose workers run inside their real filters.

mod arbitrary;
mod malicious;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::event::{DeviceEvent, Reporter};
use crate::pci::PciDevice;
use crate::virtio::TransportSignals;
use crate::virtio::pci::{VIRTIO_BAR_SIZE, VirtioPciDevice};
use crate::virtio::testing::{
    Buffer, Descriptor, EchoDevice, TestDriver, TestGuest, VERSION_1, eventually,
};

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

struct Bench {
    guest: TestGuest,
    echo: Arc<EchoDevice>,
    device: Arc<VirtioPciDevice>,
    driver: TestDriver,
    events: Arc<Mutex<Vec<DeviceEvent>>>,
}

fn bench_with(echo: Arc<EchoDevice>) -> Bench {
    let guest = TestGuest::new(4 << 20);
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let reporter = Reporter::new("echo", Arc::new(move |_, e| sink.lock().unwrap().push(e)));
    let (slot, device) = guest.plug_reporting(echo.clone(), reporter);
    Bench {
        driver: TestDriver::new(&guest, slot),
        guest,
        echo,
        device,
        events,
    }
}

fn bench() -> Bench {
    bench_with(EchoDevice::new(&[256, 64]))
}

#[test]
fn a_driver_finds_the_structures_and_they_do_not_overlap() {
    let Bench { driver, guest, .. } = bench();
    assert_eq!(driver.config_read32(0), 0x106f_1af4);
    assert_eq!(driver.config_read32(8), 0xff00_0001);
    let structures = [driver.common, driver.isr, driver.device, driver.notify];
    for (index, one) in structures.iter().enumerate() {
        assert!(one.length > 0 && one.offset + one.length <= VIRTIO_BAR_SIZE);
        for other in &structures[index + 1..] {
            assert!(
                one.offset + one.length <= other.offset
                    || other.offset + other.length <= one.offset
            );
        }
    }
    assert_eq!(driver.notify.length, 8);
    assert_ne!(driver.access.at, 0);
    let mut data = [0; 12];
    driver.device_read(0, &mut data);
    assert_eq!(&data, b"configur\0\0\0\0");
    let mut absent = [0; 4];
    guest.config_read(driver.slot + 1, 0, &mut absent);
    assert_eq!(absent, [0xff; 4]);
}

#[test]
fn requests_are_answered_and_interrupt_on_their_queues_vector() {
    for features in [
        VERSION_1,
        VERSION_1 | EVENT_IDX | INDIRECT | EchoDevice::FEATURE,
    ] {
        let Bench {
            mut driver,
            guest,
            echo,
            ..
        } = bench();
        driver.start(features, 16);
        for round in 0..100u32 {
            let queue = (round % 2) as usize;
            let before = guest.machine.vectors()[queue].fired();
            assert_eq!(
                driver.exchange(queue, &round.to_le_bytes(), 16),
                round.to_le_bytes()
            );
            assert!(eventually(
                || guest.machine.vectors()[queue].fired() > before
            ));
        }
        assert_eq!(
            guest.machine.vectors()[1].message(),
            Some((0xfee0_0000, 0x41))
        );
        assert_eq!(
            guest.machine.vectors()[2].fired(),
            0,
            "the configuration's vector"
        );
        assert_eq!(driver.take_isr(), 0);
        assert_eq!(echo.features_seen().last(), Some(&features));
    }
}

#[test]
fn features_are_the_devices_and_the_transports_and_nothing_reserved() {
    let Bench { mut driver, .. } = bench();
    let offered = driver.offered();
    assert_eq!(
        offered,
        VERSION_1 | EVENT_IDX | INDIRECT | EchoDevice::FEATURE
    );
    assert!(!driver.negotiate(VERSION_1 | 1 << 34));
    assert!(driver.reset());
    assert!(!driver.negotiate(EVENT_IDX));
    assert!(driver.reset());
    assert!(driver.negotiate(offered));
}

#[test]
fn indirect_chains_are_followed() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    driver.start(VERSION_1 | INDIRECT, 4);
    let (from, to) = (driver.allocate(8), driver.allocate(8));
    guest.poke(from, b"indirect");
    let parts = [
        Buffer::Readable(from, 3),
        Buffer::Readable(from + 3, 5),
        Buffer::Writable(to, 4),
        Buffer::Writable(to + 4, 4),
    ];
    driver.add_indirect(0, &parts);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (0, 8));
    assert_eq!(guest.peek(to, 8), b"indirect");
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    driver.start(VERSION_1, 16);
    driver.set_available_flags(0, 1);
    for _ in 0..20 {
        driver.exchange(0, b"quiet", 5);
    }
    // The worker has looked at the flag for all but the last when it is done with that one.
    assert_eq!(guest.machine.vectors()[0].fired(), 0);
}

#[test]
fn a_masked_vector_is_pending_and_delivers_when_unmasked() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    driver.start(VERSION_1, 16);
    driver.mask_vector(0, true);
    driver.exchange(0, b"x", 1);
    assert!(eventually(|| driver.pending_vectors() == 1));
    assert_eq!(guest.machine.vectors()[0].fired(), 0);
    driver.mask_vector(0, false);
    assert_eq!(driver.pending_vectors(), 0);
    assert_eq!(guest.machine.vectors()[0].fired(), 1);
}

#[test]
fn without_msix_the_isr_status_tells_and_a_read_clears_it() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    guest.config_write(driver.slot, driver.msix_control, &[0, 0]);
    driver.start(VERSION_1, 16);
    driver.exchange(0, b"x", 1);
    assert!(eventually(|| driver.config_read32(4) >> 16 & 8 != 0));
    assert_eq!(driver.take_isr(), 1);
    assert_eq!(driver.config_read32(4) >> 16 & 8, 0);
    assert_eq!(driver.take_isr(), 0);
    assert_eq!(guest.machine.vectors()[0].fired(), 0);
}

#[test]
fn a_change_of_the_configuration_bumps_the_generation_and_interrupts_a_running_driver() {
    let Bench {
        mut driver,
        guest,
        device,
        ..
    } = bench();
    let generation = driver.common_read::<1>(0x15);
    device.config_changed();
    assert_ne!(driver.common_read::<1>(0x15), generation);
    assert_eq!(guest.machine.vectors()[2].fired(), 0);
    driver.start(VERSION_1, 16);
    device.config_changed();
    assert_eq!(guest.machine.vectors()[2].fired(), 1);
    assert_eq!(driver.take_isr(), 2);
}

#[test]
fn a_driver_that_reads_while_the_configuration_changes_sees_the_generation_change() {
    let Bench {
        mut driver, device, ..
    } = bench();
    driver.start(VERSION_1, 16);
    let before = driver.common_read::<1>(0x15);
    let (changing, changed) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let changer = std::thread::spawn(move || {
        device.change_config(|| {
            changing.send(()).unwrap();
            // Whoever asks for the generation now waits for the end of the change.
            let _ = wait.recv_timeout(Duration::from_millis(50));
        });
        drop(go);
    });
    changed.recv().unwrap();
    assert_ne!(driver.common_read::<1>(0x15), before);
    changer.join().unwrap();
}

#[test]
fn a_reset_while_busy_reads_as_the_old_status_until_requests_are_finished() {
    let finishing = Duration::from_millis(50);
    let Bench {
        mut driver,
        guest,
        events,
        ..
    } = bench_with(EchoDevice::slow(&[16, 16], finishing));
    driver.start(VERSION_1, 16);
    let (from, to) = (driver.allocate(2), driver.allocate(2));
    guest.poke(from, &[EchoDevice::KEEP, 7]);
    for queue in [0, 1] {
        driver.add(queue, &[Buffer::Readable(from, 2), Buffer::Writable(to, 2)]);
        driver.kick(queue);
    }
    // A round trip behind the kept ones shows that they have been taken.
    for queue in [0, 1] {
        driver.exchange(queue, b"x", 1);
    }
    let used_index = driver.ring(0).used + 2;
    let begin = Instant::now();
    driver.common_write(0x14, &[0]);
    assert!(begin.elapsed() < finishing, "the vCPU does not wait");
    assert_eq!(driver.status(), 15);
    driver.common_write(0x14, &[0]);
    driver.common_write(0x16, &[1, 0]);
    assert!(eventually(|| driver.status() == 0));
    assert!(begin.elapsed() >= finishing);
    assert_eq!(
        driver.common_read::<2>(0x16),
        [0, 0],
        "written during the reset"
    );
    assert_eq!(guest.peek_u16(used_index), 2, "finished");
    assert_eq!(
        *events.lock().unwrap(),
        [DeviceEvent::Activated, DeviceEvent::Reset]
    );
    driver.start(VERSION_1, 16);
    assert_eq!(driver.exchange(1, b"again", 5), b"again");
}

#[test]
fn a_device_is_activated_and_reset_a_thousand_times() {
    let Bench {
        mut driver,
        guest,
        events,
        ..
    } = bench();
    for round in 0..1000u32 {
        let features = [VERSION_1, VERSION_1 | EVENT_IDX][(round % 2) as usize];
        driver.start(features, 8);
        if round % 7 == 0 {
            assert_eq!(driver.exchange(1, b"x", 1), b"x");
        } else {
            // Reset with the kick still on its way.
            driver.kick(0);
        }
    }
    assert!(driver.reset());
    // Both are reported each time, but a storm of them is cut.
    assert!((50..=2000).contains(&events.lock().unwrap().len()));
    assert_eq!(guest.machine.doorbells().len(), 2);
}

#[test]
fn doorbells_follow_the_bar() {
    let Bench {
        mut driver,
        guest,
        device,
        ..
    } = bench();
    let at = |base: u64| vec![base + 0x3000, base + 0x3004];
    let first = driver.bar;
    assert_eq!(guest.machine.doorbells(), at(first));
    driver.start(VERSION_1, 16);
    driver.move_bar(0xd000_0000);
    assert_eq!(guest.machine.doorbells(), at(0xd000_0000));
    assert_eq!(driver.exchange(0, b"moved", 5), b"moved");
    assert_eq!(device.bars()[0].base, 0xd000_0000);
    let mut gone = [0; 1];
    guest.mmio_read(first + 0x14, &mut gone);
    assert_eq!(gone, [0xff]);
    driver.config_write32(4, 0);
    assert!(guest.machine.doorbells().is_empty());
    guest.mmio_read(0xd000_0014, &mut gone);
    assert_eq!(gone, [0xff], "decoding is off");
    driver.config_write32(4, 6);
    assert_eq!(driver.exchange(0, b"back", 4), b"back");
}

#[test]
fn notifications_that_the_machine_does_not_take_reach_the_queue_by_the_bar() {
    let Bench {
        mut driver,
        guest,
        device,
        ..
    } = bench();
    guest.machine.refuse_doorbells.store(true, Ordering::SeqCst);
    driver.move_bar(0xd000_0000);
    assert!(guest.machine.doorbells().is_empty());
    driver.start(VERSION_1, 16);
    assert_eq!(driver.exchange(1, b"by the bar", 10), b"by the bar");
    drop(device);
}

#[test]
fn the_access_capability_reaches_the_registers_without_a_bar() {
    let Bench { driver, guest, .. } = bench();
    driver.config_write32(4, 0);
    let at = driver.access.at;
    let aim = |bar: u8, offset: u32, length: u32| {
        guest.config_write(driver.slot, at + 4, &[bar]);
        driver.config_write32(at + 8, offset);
        driver.config_write32(at + 12, length);
    };
    aim(0, 0x14, 1);
    driver.config_write32(at + 16, 3);
    assert_eq!(driver.config_read32(at + 16) & 0xff, 3, "device_status");
    aim(0, 0x2000, 4);
    assert_eq!(driver.config_read32(at + 16), u32::from_le_bytes(*b"conf"));
    driver.config_write32(at + 16, 0x3131_3131);
    assert_eq!(driver.config_read32(at + 16), 0x3131_3131);
    for (bar, offset, length) in [
        (1, 0x2000, 4),
        (0, 0x2000, 3),
        (0, 0x2000, 0),
        (0, 0x2000, 8),
        (0, 0x2001, 2),
        (0, 0x1_0000, 4),
        (0, !3, 4),
        (0, 0x2000, u32::MAX),
    ] {
        aim(bar, offset, length);
        driver.config_write32(at + 16, 0);
        let _ = driver.config_read32(at + 16);
    }
    aim(0, 0x2000, 4);
    assert_eq!(
        driver.config_read32(at + 16),
        0x3131_3131,
        "not written since"
    );
}

#[test]
fn a_worker_that_fails_asks_for_a_reset_and_works_after_it() {
    let Bench {
        mut driver, guest, ..
    } = bench();
    driver.start(VERSION_1, 16);
    let from = driver.allocate(1);
    guest.poke(from, &[EchoDevice::FAIL]);
    driver.add(0, &[Buffer::Readable(from, 1)]);
    driver.kick(0);
    assert!(eventually(|| driver.needs_reset()));
    assert!(eventually(|| guest.machine.vectors()[2].fired() == 1));
    assert_eq!(
        driver.exchange(1, b"other", 5),
        b"other",
        "one worker a queue"
    );
    driver.start(VERSION_1, 16);
    assert_eq!(driver.exchange(0, b"again", 5), b"again");
}

#[test]
fn unplugging_a_running_device_gives_everything_back_and_ends_its_threads() {
    let Bench {
        mut driver,
        guest,
        echo,
        device,
        ..
    } = bench();
    driver.start(VERSION_1, 16);
    assert_eq!(driver.exchange(0, b"x", 1), b"x");
    let slot = driver.slot;
    let weak = Arc::downgrade(&device);
    guest.unplug(slot, device);
    assert!(
        weak.upgrade().is_none(),
        "a running worker does not hold the transport's face"
    );
    assert!(guest.machine.doorbells().is_empty());
    for vector in guest.machine.vectors() {
        // The machine's list, and the one this loop goes over.
        assert_eq!(Arc::strong_count(&vector), 2);
    }
    // Notified by nobody any more, and interrupting nobody.
    driver.kick(0);
    assert_eq!(driver.status(), 0xff);
    assert_eq!(Arc::strong_count(&echo), 1);
    drop(echo);
    let slot_again = guest.plug(EchoDevice::new(&[8])).0;
    assert_eq!(slot_again, slot);
    let mut driver = TestDriver::new(&guest, slot);
    driver.start(VERSION_1, 8);
    assert_eq!(driver.guest.machine.vectors().len(), 5);
}

#[test]
fn a_vm_side_reset_stops_the_workers_as_the_drivers_does() {
    let Bench {
        mut driver, device, ..
    } = bench();
    driver.start(VERSION_1, 16);
    device.reset();
    assert!(eventually(|| device.status() == 0));
    driver.start(VERSION_1, 16);
    assert_eq!(driver.exchange(0, b"again", 5), b"again");
}

#[test]
fn a_bar_that_fits_nowhere_is_refused() {
    let guest = TestGuest::new(1 << 20);
    for base in [0xc000_1000, 1 << 32] {
        let error = VirtioPciDevice::new(
            EchoDevice::new(&[8]),
            guest.memory.clone(),
            guest.machine.clone(),
            Reporter::silent(),
            base,
        );
        assert!(error.is_err());
    }
}

#[test]
fn a_descriptor_is_laid_out_as_the_specification_says() {
    let descriptor = Descriptor {
        address: 1,
        len: 2,
        flags: 3,
        next: 4,
    };
    assert_eq!(
        descriptor.bytes(),
        [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 4, 0]
    );
}
