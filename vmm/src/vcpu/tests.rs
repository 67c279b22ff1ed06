//! Small guests on the real /dev/kvm, their vCPU threads inside their real filter.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use devices::bus::BusDevice;
use devices::machine::Machine as _;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::boot::test_payload::{CODE, bz_image, elf, file, kernel};
use crate::boot::{Payload, create_vm, load, open_kvm};
use crate::config::MemoryConfig;
use crate::interrupts::Interrupts;
use crate::memory;

const MIB: u64 = 1 << 20;
/// Where the guests' MMIO device is.
const MMIO: u64 = 0xd000_0000;

/// Remembers writes, answers reads with what was written last, or counts up.
#[derive(Default)]
struct Recorder {
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
    reads: Mutex<Vec<(u64, usize)>>,
}

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut reads = self.reads.lock().unwrap();
        data.fill(reads.len() as u8 + 1);
        reads.push((offset, data.len()));
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.writes.lock().unwrap().push((offset, data.to_vec()));
    }
}

impl Recorder {
    fn written(&self) -> Vec<u8> {
        let writes = self.writes.lock().unwrap();
        writes.iter().flat_map(|(_, data)| data.clone()).collect()
    }
}

struct Guest {
    vcpus: Vcpus,
    vm: Arc<VmFd>,
    ram: GuestRam,
    /// Port 0x80 to 0x83.
    port: Arc<Recorder>,
    mmio: Arc<Recorder>,
    signals: Arc<GuestSignals>,
    events: tokio::sync::broadcast::Receiver<crate::event::Event>,
    woken: Receiver<()>,
}

/// A guest, paused; `None` (and a remark) where there is no KVM.
fn guest(image: &[u8], count: u32) -> Option<Guest> {
    if !std::path::Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: there is no /dev/kvm");
        return None;
    }
    let kvm = open_kvm().unwrap();
    let cpus = CpusConfig {
        boot_vcpus: count,
        max_vcpus: count,
        ..CpusConfig::default()
    };
    let vm = Arc::new(create_vm(&kvm, &cpus).unwrap());
    let ram = memory::allocate(&MemoryConfig {
        size: 16 * MIB,
        ..MemoryConfig::default()
    })
    .unwrap();
    memory::attach(&vm, &ram).unwrap();
    let image = file(image);
    let payload = Payload::open(&kernel(&image)).unwrap();
    let entry = load(&payload, &ram, GuestAddress(0xe_0000)).unwrap();
    let (wake, woken) = channel();
    let signals = Arc::new(GuestSignals::new(move || {
        let _ = wake.send(());
    }));
    let events = Events::new(Instant::now());
    let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
    let (port_device, mmio_device) = (Arc::new(Recorder::default()), Arc::default());
    pio.insert(0x80, 4, port_device.clone()).unwrap();
    mmio.insert(MMIO, 0x1000, Arc::clone(&mmio_device) as Arc<dyn BusDevice>)
        .unwrap();
    let receiver = events.subscribe();
    let vcpus = Vcpus::spawn(VcpuContext {
        kvm: &kvm,
        vm: &vm,
        cpus: &cpus,
        entry,
        ram: ram.clone(),
        pio,
        mmio,
        signals: signals.clone(),
        events,
        seccomp: SeccompMode::Enforce,
    })
    .unwrap();
    Some(Guest {
        vcpus,
        vm,
        ram,
        port: port_device,
        mmio: mmio_device,
        signals,
        events: receiver,
        woken,
    })
}

fn eventually(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !reached() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Guest {
    fn wait_for(&self, bytes: &[u8]) {
        let mut seen = Vec::new();
        eventually(&format!("{bytes:x?} on port 0x80"), || {
            seen = self.port.written();
            seen.len() >= bytes.len()
        });
        assert_eq!(seen, bytes);
    }

    fn signalled(&self) -> devices::signals::Signalled {
        self.woken.recv_timeout(Duration::from_secs(10)).unwrap();
        self.signals.take()
    }
}

/// `mov al, value; out 0x80, al`
fn out(value: u8) -> [u8; 4] {
    [0xb0, value, 0xe6, 0x80]
}

const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

fn code(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn a_guest_entered_by_pvh_finds_its_start_info_in_ebx() {
    // mov eax, [ebx]; out 0x80, eax
    let program = code(&[&[0x8b, 0x03, 0xe7, 0x80], &out(1), &HALT]);
    let Some(guest) = guest(&elf(&program), 1) else {
        return;
    };
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.port.written().is_empty(), "it was born paused");
    guest.vcpus.resume();
    guest.wait_for(&[0x78, 0xc5, 0x6e, 0x33, 1]);
    let writes = guest.port.writes.lock().unwrap();
    assert_eq!(writes[0].1.len(), 4, "one access of four bytes");
}

#[test]
fn a_guest_entered_as_a_bzimage_is_in_long_mode_with_the_zero_page_in_rsi() {
    // mov eax, [rsi + 0x202]; out 0x80, eax; push and pop; shr rdx, 32 of a 64-bit constant
    let program = code(&[
        &[0x8b, 0x86, 0x02, 0x02, 0, 0, 0xe7, 0x80],
        &[0x50, 0x58],
        &[0x48, 0xba, 0, 0, 0, 0, 0x2a, 0, 0, 0],
        &[0x48, 0xc1, 0xea, 0x20, 0x88, 0xd0, 0xe6, 0x80],
        &HALT,
    ]);
    let Some(guest) = guest(&bz_image(&program), 1) else {
        return;
    };
    guest.vcpus.resume();
    guest.wait_for(b"HdrS\x2a");
}

#[test]
fn string_io_reaches_the_device_element_by_element() {
    let program = code(&[
        // mov dx, 0x80; mov edi, 0x200000; mov ecx, 6; rep insb
        &[0x66, 0xba, 0x80, 0, 0xbf, 0, 0, 0x20, 0],
        &[0xb9, 6, 0, 0, 0, 0xf3, 0x6c],
        // mov ecx, 3; rep insw; mov ecx, 2; rep insd
        &[0xb9, 3, 0, 0, 0, 0x66, 0xf3, 0x6d],
        &[0xb9, 2, 0, 0, 0, 0xf3, 0x6d],
        // mov esi, 0x200000; mov ecx, 10; rep outsw
        &[0xbe, 0, 0, 0x20, 0, 0xb9, 10, 0, 0, 0, 0x66, 0xf3, 0x6f],
        &HALT,
    ]);
    let Some(guest) = guest(&elf(&program), 1) else {
        return;
    };
    guest.vcpus.resume();
    let mut expected = vec![1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9, 9];
    expected.extend([10; 4]);
    expected.extend([11; 4]);
    guest.wait_for(&expected);
    let reads = guest.port.reads.lock().unwrap();
    let sizes: Vec<_> = reads.iter().map(|(_, len)| *len).collect();
    assert_eq!(sizes, [1, 1, 1, 1, 1, 1, 2, 2, 2, 4, 4]);
    let writes = guest.port.writes.lock().unwrap();
    assert!(
        writes
            .iter()
            .all(|(offset, data)| *offset == 0 && data.len() == 2)
    );
}

#[test]
fn mmio_of_every_width_reaches_the_device() {
    let at = (MMIO as u32).to_le_bytes();
    let program = code(&[
        // mov eax, 0x44332211; mov [MMIO], al / ax / eax; mov eax, [MMIO]; out 0x80, eax
        &[0xb8, 0x11, 0x22, 0x33, 0x44],
        &[0xa2],
        &at,
        &[0x66, 0xa3],
        &at,
        &[0xa3],
        &at,
        &[0xa1],
        &at,
        &[0xe7, 0x80],
        &HALT,
    ]);
    let Some(guest) = guest(&elf(&program), 1) else {
        return;
    };
    guest.vcpus.resume();
    guest.wait_for(&[1; 4]);
    let writes = guest.mmio.writes.lock().unwrap();
    let data: Vec<_> = writes.iter().map(|(_, data)| data.clone()).collect();
    assert_eq!(
        data,
        [vec![0x11], vec![0x11, 0x22], vec![0x11, 0x22, 0x33, 0x44]]
    );
}

#[test]
fn a_triple_fault_is_a_reset_and_the_vcpu_stands_still_after_it() {
    // ud2, with an empty interrupt table
    let Some(guest) = guest(&elf(&code(&[&out(1), &[0x0f, 0x0b]])), 1) else {
        return;
    };
    guest.vcpus.resume();
    let signalled = guest.signalled();
    assert!(signalled.reset && !signalled.vcpu_failed);
    guest.vcpus.pause().unwrap();
    guest.vcpus.resume();
    guest.vcpus.nmi().unwrap();
    assert_eq!(guest.port.written(), [1]);
}

#[test]
fn a_vcpu_that_fails_says_where_and_stands_still() {
    // jmp MMIO: there is nothing to execute
    let target = (MMIO as u32).wrapping_sub(CODE + 5).to_le_bytes();
    let Some(mut guest) = guest(&elf(&code(&[&[0xe9], &target])), 1) else {
        return;
    };
    guest.vcpus.resume();
    assert!(guest.signalled().vcpu_failed);
    let event = guest.events.try_recv().unwrap();
    assert_eq!((event.source, event.event), ("vm", "vcpu-error"));
    let properties = event.properties.unwrap();
    assert_eq!(properties["vcpu"], "0");
    assert_eq!(properties["reason"], "InternalError");
    assert!(properties["rip"].starts_with("0xd0000"), "{properties:?}");
    guest.vcpus.pause().unwrap();
    assert!(guest.events.try_recv().is_err(), "told once");
}

#[test]
fn a_paused_guest_makes_no_access_and_a_resumed_one_goes_on() {
    // loop: out 0x80, al; inc al; jmp loop
    let Some(guest) = guest(&elf(&[0xe6, 0x80, 0xfe, 0xc0, 0xeb, 0xfa]), 1) else {
        return;
    };
    for _ in 0..50 {
        guest.vcpus.resume();
        let before = guest.port.written().len();
        eventually("progress", || guest.port.written().len() > before);
        guest.vcpus.pause().unwrap();
        let stopped = guest.port.written();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.port.written().len(), stopped.len());
        // Not one access was lost or made twice.
        let expected = (0..stopped.len()).map(|i| i as u8);
        assert!(
            stopped
                .iter()
                .copied()
                .eq(expected.map(|i| i.wrapping_add(stopped[0])))
        );
    }
    // Faster than it can obey.
    for _ in 0..100 {
        guest.vcpus.resume();
        guest.vcpus.pause().unwrap();
    }
}

#[test]
fn guests_that_halt_or_spin_can_be_paused_and_stopped_and_so_can_vcpus_never_started() {
    for program in [&HALT[..], &[0xeb, 0xfe]] {
        for count in [1, 4] {
            let Some(guest) = guest(&elf(&code(&[&out(1), program])), count) else {
                return;
            };
            guest.vcpus.resume();
            guest.wait_for(&[1]);
            for _ in 0..5 {
                let start = Instant::now();
                guest.vcpus.pause().unwrap();
                assert!(start.elapsed() < Duration::from_secs(2));
                guest.vcpus.resume();
            }
            let start = Instant::now();
            drop(guest);
            assert!(start.elapsed() < Duration::from_secs(2));
        }
    }
}

#[test]
fn threads_have_their_names_and_their_filters() {
    let Some(guest) = guest(&elf(&HALT), 2) else {
        return;
    };
    guest.vcpus.resume();
    let mut seen = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        // A thread of another test may be gone by now.
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else {
            continue;
        };
        if name.trim() == "vcpu1" {
            let Ok(status) = std::fs::read_to_string(path.join("status")) else {
                continue;
            };
            assert!(status.contains("Seccomp:\t2"), "{status}");
            seen += 1;
        }
    }
    assert!(seen >= 1);
}

/// Makes an interrupt gate for `vector` that leads to `handler`, and points IDTR's image, at
/// 0x3000, to the table at 0x2000.
fn write_idt(ram: &GuestRam, vector: u64, handler: u32) {
    let gate =
        u64::from(handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u64::from(handler >> 16) << 48;
    ram.write_obj(gate, GuestAddress(0x2000 + vector * 8))
        .unwrap();
    ram.write_obj(0x7ffu16, GuestAddress(0x3000)).unwrap();
    ram.write_obj(0x2000u32, GuestAddress(0x3002)).unwrap();
}

/// `mov esp, 0x5000; lidt [0x3000]`
const IDT: [u8; 12] = [0xbc, 0, 0x50, 0, 0, 0x0f, 0x01, 0x1d, 0, 0x30, 0, 0];

#[test]
fn an_nmi_reaches_a_halted_guest() {
    let main = code(&[&IDT, &out(1), &HALT]);
    let handler = code(&[&out(2), &HALT]);
    let Some(guest) = guest(&elf(&code(&[&main, &handler])), 1) else {
        return;
    };
    write_idt(&guest.ram, 2, CODE + main.len() as u32);
    guest.vcpus.resume();
    guest.wait_for(&[1]);
    guest.vcpus.nmi().unwrap();
    guest.wait_for(&[1, 2]);
}

#[test]
fn an_nmi_does_not_make_a_vcpu_spin_that_was_never_started() {
    // As many as no other test has, so that the last one's name is its own.
    let Some(guest) = guest(&elf(&code(&[&out(1), &HALT])), 7) else {
        return;
    };
    guest.vcpus.resume();
    guest.wait_for(&[1]);
    for _ in 0..3 {
        // The first vCPU has no handler, and resets.
        guest.vcpus.nmi().unwrap();
    }
    let task = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|path| std::fs::read_to_string(path.join("comm")).is_ok_and(|c| c.trim() == "vcpu6"))
        .unwrap();
    let nanoseconds = || -> u64 {
        let text = std::fs::read_to_string(task.join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    let before = nanoseconds();
    std::thread::sleep(Duration::from_millis(200));
    let used = nanoseconds() - before;
    assert!(used < 20_000_000, "{used} ns");
}

#[test]
fn a_routed_vector_interrupts_the_guest_and_an_unrouted_one_does_not() {
    let main = code(&[
        &IDT,
        // mov dword [0xfee000f0], 0x1ff: enable the local APIC
        &[0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0],
        &out(1),
        &[0xfb],
        &HALT,
    ]);
    // mov dword [0xfee000b0], 0 (end of interrupt); mov esp, 0x5000; sti; and no iret, which KVM
    // can't emulate where it emulates all of the guest's kernel
    let handler = code(&[
        &out(2),
        &[0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0],
        &[0xbc, 0, 0x50, 0, 0, 0xfb],
        &HALT,
    ]);
    let Some(guest) = guest(&elf(&code(&[&main, &handler])), 1) else {
        return;
    };
    write_idt(&guest.ram, 0x41, CODE + main.len() as u32);
    let interrupts = Interrupts::new(guest.vm.clone());
    let vectors = interrupts.allocate_msi(3).unwrap();
    guest.vcpus.resume();
    guest.wait_for(&[1]);
    vectors[0].trigger().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    guest.wait_for(&[1]);
    vectors[1].route(0xfee0_0000, 0x41).unwrap();
    vectors[1].trigger().unwrap();
    guest.wait_for(&[1, 2]);
    // Given back and made anew, it has no route.
    drop(vectors);
    let again = interrupts.allocate_msi(3).unwrap();
    for vector in &again {
        vector.trigger().unwrap();
    }
    std::thread::sleep(Duration::from_millis(20));
    guest.wait_for(&[1, 2]);
    again[2].route(0xfee0_0000, 0x41).unwrap();
    again[2].trigger().unwrap();
    guest.wait_for(&[1, 2, 2]);
    assert!(interrupts.allocate_msi(u16::MAX).is_err(), "bounded");
    interrupts.allocate_msi(100).unwrap();
    assert!(interrupts.line(24).is_err());
    interrupts.line(4).unwrap().write(1).unwrap();
}

#[test]
fn a_doorbell_rings_for_writes_of_any_width_and_they_do_not_reach_the_bus() {
    let at = (MMIO as u32 + 8).to_le_bytes();
    let program = code(&[
        &[0xa2],
        &at,
        &[0x66, 0xa3],
        &at,
        &[0xa3],
        &at,
        &out(1),
        &HALT,
    ]);
    let Some(guest) = guest(&elf(&program), 1) else {
        return;
    };
    let interrupts = Interrupts::new(guest.vm.clone());
    let bell = EventFd::new(EFD_NONBLOCK).unwrap();
    interrupts.bind_doorbell(MMIO + 8, &bell).unwrap();
    assert!(interrupts.bind_doorbell(MMIO + 8, &bell).is_err(), "taken");
    guest.vcpus.resume();
    guest.wait_for(&[1]);
    assert_eq!(bell.read().unwrap(), 3);
    assert!(guest.mmio.written().is_empty());
    interrupts.unbind_doorbell(MMIO + 8, &bell).unwrap();
    assert!(interrupts.unbind_doorbell(MMIO + 8, &bell).is_err());
}

#[test]
fn the_guest_starts_other_vcpus_with_init_and_sipi() {
    let ipi = |command: u32| {
        // mov dword [0xfee00310], 1 << 24; mov dword [0xfee00300], command
        code(&[
            &[0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 1],
            &[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe],
            &command.to_le_bytes(),
        ])
    };
    let program = code(&[&out(1), &ipi(0x4500), &ipi(0x4604), &HALT]);
    let Some(guest) = guest(&elf(&program), 2) else {
        return;
    };
    // Real mode at 0x4000.
    guest
        .ram
        .write_slice(&code(&[&out(2), &HALT]), GuestAddress(0x4000))
        .unwrap();
    guest.vcpus.resume();
    guest.wait_for(&[1, 2]);
}

#[test]
fn a_machine_is_made_run_and_taken_down_inside_the_filter_of_the_thread_that_does_it() {
    /// What spawning a thread that installs a filter needs.
    const SPAWN: &[Allow] = &[
        allow!(clone3),
        allow!(rseq),
        allow!(set_robust_list),
        allow!(sched_getaffinity),
        allow!(prctl, 0 => Test::Is(libc::PR_SET_NO_NEW_PRIVS as u32)),
        allow!(seccomp),
    ];
    /// What the test itself does.
    const TEST: &[Allow] = &[
        allow!(openat),
        allow!(unlink),
        allow!(statx),
        allow!(newfstatat),
        allow!(getrandom),
    ];
    let mut lists = vec![
        COMMON,
        SYSCALLS,
        CONTROL_SYSCALLS,
        interrupts::SYSCALLS,
        memory::SYSCALLS,
        SPAWN,
        TEST,
    ];
    lists.extend(crate::boot::SYSCALLS);
    let filter = Filter::compile("vmm", SeccompMode::Enforce, &lists).unwrap();
    std::thread::spawn(move || {
        filter.install().unwrap();
        let Some(guest) = guest(&elf(&code(&[&out(1), &HALT])), 2) else {
            return;
        };
        let interrupts = Interrupts::new(guest.vm.clone());
        let vectors = interrupts.allocate_msi(2).unwrap();
        vectors[0].route(0xfee0_0000, 0x41).unwrap();
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        interrupts.bind_doorbell(MMIO + 8, &bell).unwrap();
        interrupts.unbind_doorbell(MMIO + 8, &bell).unwrap();
        guest.vcpus.resume();
        guest.wait_for(&[1]);
        guest.vcpus.pause().unwrap();
        guest.vcpus.resume();
        guest.vcpus.nmi().unwrap();
    })
    .join()
    .unwrap();
}
