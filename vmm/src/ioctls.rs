//! Numbers of the KVM system calls (`ioctl` requests), for seccomp lists.
//!
//! `kvm-ioctls` makes the calls but keeps the numbers to itself. Source: the KVM API document,
//! Documentation/virt/kvm/api.rst of Linux.

use kvm_bindings::{
    KVMIO, kvm_cpuid2, kvm_enable_cap, kvm_fpu, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd,
    kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_pit_config, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const fn number<T>(direction: u32, number: u32) -> u32 {
    ioctl_expr(direction, KVMIO, number, size_of::<T>() as u32) as u32
}

macro_rules! requests {
    ($($name:ident = $direction:expr, $number:literal, $type:ty;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`")]
            pub const $name: u32 = number::<$type>($direction, $number);
        )*
    };
}

requests! {
    KVM_GET_API_VERSION = _IOC_NONE, 0x00, ();
    KVM_CREATE_VM = _IOC_NONE, 0x01, ();
    KVM_CHECK_EXTENSION = _IOC_NONE, 0x03, ();
    KVM_GET_VCPU_MMAP_SIZE = _IOC_NONE, 0x04, ();
    KVM_GET_SUPPORTED_CPUID = _IOC_READ | _IOC_WRITE, 0x05, kvm_cpuid2;
    KVM_CREATE_VCPU = _IOC_NONE, 0x41, ();
    KVM_SET_USER_MEMORY_REGION = _IOC_WRITE, 0x46, kvm_userspace_memory_region;
    KVM_SET_TSS_ADDR = _IOC_NONE, 0x47, ();
    KVM_SET_IDENTITY_MAP_ADDR = _IOC_WRITE, 0x48, u64;
    KVM_CREATE_IRQCHIP = _IOC_NONE, 0x60, ();
    KVM_SET_GSI_ROUTING = _IOC_WRITE, 0x6a, kvm_irq_routing;
    KVM_IRQFD = _IOC_WRITE, 0x76, kvm_irqfd;
    KVM_CREATE_PIT2 = _IOC_WRITE, 0x77, kvm_pit_config;
    KVM_IOEVENTFD = _IOC_WRITE, 0x79, kvm_ioeventfd;
    KVM_RUN = _IOC_NONE, 0x80, ();
    KVM_GET_REGS = _IOC_READ, 0x81, kvm_regs;
    KVM_SET_REGS = _IOC_WRITE, 0x82, kvm_regs;
    KVM_GET_SREGS = _IOC_READ, 0x83, kvm_sregs;
    KVM_SET_SREGS = _IOC_WRITE, 0x84, kvm_sregs;
    KVM_SET_MSRS = _IOC_WRITE, 0x89, kvm_msrs;
    KVM_SET_FPU = _IOC_WRITE, 0x8d, kvm_fpu;
    KVM_GET_LAPIC = _IOC_READ, 0x8e, kvm_lapic_state;
    KVM_SET_LAPIC = _IOC_WRITE, 0x8f, kvm_lapic_state;
    KVM_SET_CPUID2 = _IOC_WRITE, 0x90, kvm_cpuid2;
    KVM_GET_MP_STATE = _IOC_READ, 0x98, kvm_mp_state;
    KVM_NMI = _IOC_NONE, 0x9a, ();
    KVM_ENABLE_CAP = _IOC_WRITE, 0xa3, kvm_enable_cap;
    KVM_KVMCLOCK_CTRL = _IOC_NONE, 0xad, ();
}
