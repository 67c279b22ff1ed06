//! A vCPU's state before its first instruction, as firmware would leave it.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::StepError;
use crate::boot::{Entry, registers, special_registers};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Local APIC registers (Intel SDM vol. 3, §11.4.1) and delivery modes.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const EXT_INT: u32 = 7 << 8;
const NMI: u32 = 4 << 8;

/// Sets up a vCPU; the boot CPU is given its `entry`, the others wait for INIT and SIPI.
pub(super) fn initialise(
    vcpu: &VcpuFd,
    cpuid: &[kvm_cpuid_entry2],
    entry: Option<&Entry>,
) -> Result<(), StepError> {
    let step = |doing| {
        move |error: kvm_ioctls::Error| StepError {
            doing,
            source: error.into(),
        }
    };
    let other = |doing| {
        move |_| StepError {
            doing,
            source: std::io::ErrorKind::InvalidInput.into(),
        }
    };
    let table = CpuId::from_entries(cpuid).map_err(other("building CPUID"))?;
    vcpu.set_cpuid2(&table).map_err(step("setting CPUID"))?;
    set_msrs(vcpu)?;
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })
    .map_err(step("setting the FPU"))?;
    if let Some(entry) = entry {
        vcpu.set_regs(&registers(entry))
            .map_err(step("setting registers"))?;
        let mut sregs = vcpu
            .get_sregs()
            .map_err(step("reading special registers"))?;
        special_registers(&mut sregs, entry);
        vcpu.set_sregs(&sregs)
            .map_err(step("setting special registers"))?;
    }
    let mut lapic = vcpu.get_lapic().map_err(step("reading the local APIC"))?;
    wire(&mut lapic, LVT_LINT0, EXT_INT);
    wire(&mut lapic, LVT_LINT1, NMI);
    vcpu.set_lapic(&lapic)
        .map_err(step("setting the local APIC"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), StepError> {
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let values = [
        msr(IA32_MISC_ENABLE, FAST_STRINGS),
        msr(IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    let failed = |source| StepError {
        doing: "setting MSRs",
        source,
    };
    let msrs =
        Msrs::from_entries(&values).map_err(|_| failed(std::io::ErrorKind::InvalidInput.into()))?;
    let set = vcpu.set_msrs(&msrs).map_err(|e| failed(e.into()))?;
    // KVM stops at the first it does not take.
    match values.get(set) {
        None => Ok(()),
        Some(refused) => Err(failed(std::io::Error::other(format!(
            "KVM refuses MSR {:#x}",
            refused.index
        )))),
    }
}

/// Sets the delivery mode of a pin, unmasked.
fn wire(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let value = mode.to_le_bytes();
    for (place, byte) in lapic.regs.iter_mut().skip(register).zip(value) {
        *place = byte as _;
    }
}
