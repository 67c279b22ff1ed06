//! Opening KVM, and an empty machine in it: interrupt controllers and timer, no memory, no vCPUs.

use std::io;

use devices::allow;
use devices::config::Invalid;
use devices::sandbox::{Allow, Test};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_HALT_POLL, KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::config::CpusConfig;
use crate::cpuid::apic_id;
use crate::error::Error;
use crate::ioctls::{
    KVM_CHECK_EXTENSION, KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2, KVM_CREATE_VM, KVM_ENABLE_CAP,
    KVM_GET_API_VERSION, KVM_GET_VCPU_MMAP_SIZE, KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR,
};
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// What [`open_kvm`] and [`create_vm`] call beyond [`devices::sandbox::COMMON`].
pub const SYSCALLS: &[Allow] = &[
    allow!(ioctl, 1 => Test::Is(KVM_CHECK_EXTENSION)),
    allow!(ioctl, 1 => Test::Is(KVM_CREATE_IRQCHIP)),
    allow!(ioctl, 1 => Test::Is(KVM_CREATE_PIT2)),
    allow!(ioctl, 1 => Test::Is(KVM_CREATE_VM)),
    allow!(ioctl, 1 => Test::Is(KVM_ENABLE_CAP)),
    allow!(ioctl, 1 => Test::Is(KVM_GET_API_VERSION)),
    allow!(ioctl, 1 => Test::Is(KVM_GET_VCPU_MMAP_SIZE)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_IDENTITY_MAP_ADDR)),
    allow!(ioctl, 1 => Test::Is(KVM_SET_TSS_ADDR)),
    // /dev/kvm.
    allow!(openat, 2 => Test::Is((libc::O_RDWR | libc::O_CLOEXEC) as u32)),
];

/// What we can't do without.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::UserNmi, "KVM_CAP_USER_NMI"),
];

/// Opens /dev/kvm and checks that it can do what is needed.
pub fn open_kvm() -> Result<Kvm, Error> {
    const OPENING: &str = "opening /dev/kvm";
    let kvm = Kvm::new().map_err(|errno| {
        let error = io::Error::from(errno);
        match error.kind() {
            io::ErrorKind::NotFound => Error::host(
                OPENING,
                "there is no such device; does the CPU have virtualization extensions, and is \
                 the kernel module kvm_intel or kvm_amd loaded?",
            ),
            io::ErrorKind::PermissionDenied => Error::host(
                OPENING,
                "permission denied; is the user in the group `kvm`?",
            ),
            _ => Error::os(OPENING, error),
        }
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(Error::host(
            OPENING,
            format!("its API has version {version}, not {KVM_API_VERSION}"),
        ));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(*cap) {
            return Err(Error::host(OPENING, format!("this host lacks {name}")));
        }
    }
    Ok(kvm)
}

/// Makes a VM with interrupt controllers and timer. Called on the VMM thread.
pub fn create_vm(kvm: &Kvm, cpus: &CpusConfig) -> Result<VmFd, Error> {
    let most = kvm.get_max_vcpus();
    if cpus.boot_vcpus as usize > most {
        return Err(Invalid::new(
            "cpus.boot_vcpus",
            format!("this host's KVM can do {most} at most"),
        )
        .into());
    }
    let last = apic_id(cpus, cpus.boot_vcpus.saturating_sub(1));
    if last as usize >= kvm.get_max_vcpu_id() {
        return Err(Invalid::new(
            "cpus.topology",
            format!("APIC id {last} is more than this host's KVM can do"),
        )
        .into());
    }
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(Error::os("making a VM", error)),
        }
    };
    let step = |doing: &'static str| move |error| Error::host(doing, error);
    // Before the first vCPU; Intel CPUs that can't run real mode by themselves need both.
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(step("placing KVM's identity map"))?;
    vm.set_tss_address(KVM_TSS as usize)
        .map_err(step("placing KVM's task state segment"))?;
    vm.create_irq_chip()
        .map_err(step("making interrupt controllers"))?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(step("making a timer"))?;
    if let Some(ns) = cpus.halt_poll_ns {
        limit_halt_polling(&vm, ns).map_err(|e| e.within("cpus"))?;
    }
    Ok(vm)
}

/// Sets how long the kernel may spin for a vCPU that has halted
/// (Documentation/virt/kvm/halt-polling.rst).
fn limit_halt_polling(vm: &VmFd, ns: u32) -> Result<(), Invalid> {
    let refuse = |reason: String| Err(Invalid::new("halt_poll_ns", reason));
    if vm.check_extension_raw(KVM_CAP_HALT_POLL.into()) <= 0 {
        return refuse("this host's kernel lacks KVM_CAP_HALT_POLL (Linux 5.8)".to_owned());
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_HALT_POLL,
        args: [ns.into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    match vm.enable_cap(&cap) {
        Ok(()) => Ok(()),
        Err(error) => refuse(format!("this host refuses {ns}: {error}")),
    }
}
