//! What a vCPU says about itself: the host's CPU as far as KVM can give it to a guest
//! (KVM_GET_SUPPORTED_CPUID), arranged as the configuration says.
//!
//! Passed on as KVM offers them: the brand string, instruction set extensions, caches, the
//! performance monitoring leaf (KVM emulates what it offers there). Made here: APIC ids and
//! topology (leaves 1, 4, 0xB, 0x1F, AMD's 0x8000_0008, 0x8000_001D and 0x8000_001E), the
//! physical address width, and which paravirtual features are shown.
//!
//! An APIC id is thread, core and package side by side, each in as many bits as it needs (Intel
//! SDM vol. 3, "Hierarchical mapping of shared resources"; AMD APM vol. 3, appendix E):
//! ```text
//!      package     │ core in package │ thread in core
//! ```

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::config::CpusConfig;
use crate::error::Error;

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: several logical processors in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
/// Leaf 7: AMX, which a guest gets only when it is asked for, and that is not built.
const AMX_7_0_EDX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const AMX_7_1_EAX: u32 = 1 << 21;
const AMX_7_1_EDX: u32 = 1 << 8;
/// Leaf 0xD: the state components of AMX.
const AMX_XSTATE: u32 = 1 << 17 | 1 << 18;

/// KVM's own leaves (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
/// The features shown where the host has them: kvmclock (0, 3, 24), no I/O delay (1), async page
/// faults (4, 10, 14), steal time (5), PV EOI (6), PV unhalt (7), PV TLB flush (9), PV IPIs (11),
/// poll control (12), PV sched yield (13). Others need the VMM's help.
const KVM_FEATURES_SHOWN: u32 = 1 << 24 | 0b0111_1110_1111_1011;

/// How vCPUs are arranged, as powers of two and as counts.
struct Topology {
    threads: u32,
    cores: u32,
    thread_bits: u32,
    core_bits: u32,
}

impl Topology {
    fn of(config: &CpusConfig) -> Self {
        let (threads, cores) = match &config.topology {
            // Configurations are checked before they come here; zeros must not divide even so.
            Some(topology) => (
                u32::from(topology.threads_per_core).max(1),
                (u32::from(topology.cores_per_die) * u32::from(topology.dies_per_package)).max(1),
            ),
            None => (1, config.boot_vcpus.max(1)),
        };
        let bits = |count: u32| count.next_power_of_two().trailing_zeros();
        Self {
            threads,
            cores,
            thread_bits: bits(threads),
            core_bits: bits(cores),
        }
    }

    fn package_bits(&self) -> u32 {
        self.thread_bits + self.core_bits
    }

    fn per_package(&self) -> u32 {
        self.threads * self.cores
    }

    fn core(&self, vcpu: u32) -> u32 {
        vcpu / self.threads % self.cores
    }

    fn apic_id(&self, vcpu: u32) -> u32 {
        let package = vcpu / self.per_package();
        let thread = vcpu % self.threads;
        package << self.package_bits() | self.core(vcpu) << self.thread_bits | thread
    }
}

/// The APIC id of the vCPU with this number.
pub fn apic_id(config: &CpusConfig, vcpu: u32) -> u32 {
    Topology::of(config).apic_id(vcpu)
}

/// Bits of physical address of the host's CPU, of which KVM gives a guest that many at most.
pub fn host_phys_bits() -> u8 {
    use std::arch::x86_64::__cpuid;
    if __cpuid(0x8000_0000).eax < 0x8000_0008 {
        return 36;
    }
    __cpuid(0x8000_0008).eax.to_le_bytes()[0]
}

/// What KVM can give to guests of this host.
pub struct Supported {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl Supported {
    /// Asks KVM.
    pub fn ask(kvm: &Kvm) -> Result<Self, Error> {
        let table = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| Error::host("asking KVM what the CPU can do", error))?;
        Ok(Self {
            entries: table.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// The table of one vCPU.
    pub fn for_vcpu(&self, config: &CpusConfig, vcpu: u32) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology::of(config);
        let amd = self.is_amd();
        let max_leaf = self.find(0).map_or(0, |entry| entry.eax);
        let mut entries = self.entries.clone();
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        for entry in &mut entries {
            self.patch(entry, config, &topology, vcpu, amd);
        }
        for leaf in [0xb, 0x1f] {
            if leaf <= max_leaf {
                entries.extend(extended_topology(leaf, &topology, vcpu));
            }
        }
        entries
    }

    fn find(&self, function: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| entry.function == function)
    }

    fn is_amd(&self) -> bool {
        self.find(0).is_some_and(|entry| {
            let vendor = [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes);
            matches!(vendor.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
        })
    }

    fn patch(
        &self,
        entry: &mut kvm_cpuid_entry2,
        config: &CpusConfig,
        topology: &Topology,
        vcpu: u32,
        amd: bool,
    ) {
        match (entry.function, entry.index) {
            (1, _) => {
                let logical = 1u32 << topology.package_bits();
                // CLFLUSH lines of 64 bytes.
                entry.ebx = topology.apic_id(vcpu) << 24 | logical.min(0xff) << 16 | 8 << 8;
                entry.ecx |= HYPERVISOR;
                set(&mut entry.ecx, TSC_DEADLINE, self.tsc_deadline);
                if !config.nested {
                    entry.ecx &= !VMX;
                }
                set(&mut entry.edx, HTT, topology.per_package() > 1);
            }
            (4, _) => cache(entry, topology, true),
            (7, 0) => entry.edx &= !AMX_7_0_EDX,
            (7, 1) => {
                entry.eax &= !AMX_7_1_EAX;
                entry.edx &= !AMX_7_1_EDX;
            }
            (0xd, 0) => entry.eax &= !AMX_XSTATE,
            (0xd, 17 | 18) | (0x1d | 0x1e, _) => clear(entry),
            (KVM_SIGNATURE, _) => entry.eax = KVM_FEATURES,
            (KVM_FEATURES, _) => {
                entry.eax &= KVM_FEATURES_SHOWN;
                // Hints promise what the host's load may break.
                entry.edx = 0;
            }
            (0x8000_0001, _) => {
                if !config.nested {
                    entry.ecx &= !SVM;
                }
                set(
                    &mut entry.ecx,
                    CMP_LEGACY,
                    amd && topology.per_package() > 1,
                );
            }
            (0x8000_0008, _) => {
                let limit = u32::from(config.max_phys_bits);
                let width = (entry.eax & 0xff).min(limit);
                let guest_width = (entry.eax >> 16 & 0xff).min(limit);
                entry.eax = entry.eax & !0xff_00ff | guest_width << 16 | width;
                if amd {
                    entry.ecx = topology.package_bits() << 12 | (topology.per_package() - 1) & 0xff;
                }
            }
            (0x8000_000a, _) if !config.nested => clear(entry),
            (0x8000_001d, _) => cache(entry, topology, false),
            (0x8000_001e, _) if amd => {
                entry.eax = topology.apic_id(vcpu);
                entry.ebx = (topology.threads - 1) << 8 | topology.core(vcpu);
                // One node in the package.
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// A cache (leaf 4, AMD's 0x8000_001D): those of the first two levels belong to a core, the
/// others to the package.
fn cache(entry: &mut kvm_cpuid_entry2, topology: &Topology, count_cores: bool) {
    if entry.eax & 0x1f == 0 {
        return;
    }
    let sharing_bits = match entry.eax >> 5 & 7 {
        1 | 2 => topology.thread_bits,
        _ => topology.package_bits(),
    };
    entry.eax = entry.eax & 0x3fff | ((1 << sharing_bits) - 1) << 14;
    if count_cores {
        entry.eax |= ((1 << topology.core_bits) - 1) << 26;
    }
}

/// Leaves 0xB and 0x1F: threads, cores, and the end of the list.
fn extended_topology(function: u32, topology: &Topology, vcpu: u32) -> [kvm_cpuid_entry2; 3] {
    let levels = [
        (1, topology.thread_bits, topology.threads),
        (2, topology.package_bits(), topology.per_package()),
        (0, 0, 0),
    ];
    let mut index = 0;
    levels.map(|(kind, shift, processors)| {
        let entry = kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | index,
            edx: topology.apic_id(vcpu),
            ..Default::default()
        };
        index += 1;
        entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CpuTopology;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    fn vendor(max_leaf: u32, name: &[u8; 12]) -> kvm_cpuid_entry2 {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        leaf(0, 0, [max_leaf, word(0), word(8), word(4)])
    }

    fn host(name: &[u8; 12]) -> Supported {
        Supported {
            entries: vec![
                vendor(0x1f, name),
                leaf(1, 0, [0x806f8, 0x1234_5678, VMX, 1]),
                // L1, L2, L3 of a big host, and the end.
                leaf(4, 0, [0xfc00_4121, 1, 2, 3]),
                leaf(4, 1, [0xfc00_4143, 1, 2, 3]),
                leaf(4, 2, [0xfc1f_c163, 1, 2, 3]),
                leaf(4, 3, [0, 0, 0, 0]),
                leaf(7, 0, [2, 3, 4, u32::MAX]),
                leaf(0xb, 0, [99, 99, 99, 99]),
                leaf(0xd, 0, [0x602e7, 0, 0, 0]),
                leaf(0xd, 18, [8192, 1, 2, 3]),
                leaf(0x1f, 0, [99, 99, 99, 99]),
                leaf(KVM_SIGNATURE, 0, [0, 1, 2, 3]),
                leaf(KVM_FEATURES, 0, [u32::MAX, 0, 0, 1]),
                leaf(0x8000_0001, 0, [0, 0, SVM, 0]),
                leaf(0x8000_0002, 0, [0x6c65_746e, 1, 2, 3]),
                leaf(0x8000_0008, 0, [0x0030_3934, 0, 0x7777, 0]),
                leaf(0x8000_000a, 0, [1, 2, 3, 4]),
                leaf(0x8000_001e, 0, [9, 9, 9, 9]),
            ],
            tsc_deadline: true,
        }
    }

    fn get(table: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let found: Vec<_> = table
            .iter()
            .filter(|e| e.function == function && e.index == index)
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        registers(found[0])
    }

    fn arranged(threads: u16, cores: u16, packages: u16) -> CpusConfig {
        let count = u32::from(threads) * u32::from(cores) * u32::from(packages);
        CpusConfig {
            boot_vcpus: count,
            max_vcpus: count,
            topology: Some(CpuTopology {
                threads_per_core: threads,
                cores_per_die: cores,
                dies_per_package: 1,
                packages,
            }),
            ..CpusConfig::default()
        }
    }

    #[test]
    fn apic_ids_leave_gaps_where_counts_are_no_powers_of_two() {
        let config = arranged(2, 3, 2);
        let ids: Vec<_> = (0..12).map(|vcpu| apic_id(&config, vcpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        let plain = CpusConfig {
            boot_vcpus: 64,
            ..CpusConfig::default()
        };
        assert!((0..64).all(|vcpu| apic_id(&plain, vcpu) == vcpu));
    }

    #[test]
    fn apic_ids_of_any_legal_topology_are_distinct_and_fit_the_xapic() {
        for threads in 1..=2 {
            for cores in 1..=64 {
                for packages in (1..=64).take_while(|p| threads * cores * p <= 64) {
                    let config = arranged(threads, cores, packages);
                    let mut ids: Vec<_> = (0..config.boot_vcpus)
                        .map(|vcpu| apic_id(&config, vcpu))
                        .collect();
                    ids.dedup();
                    assert_eq!(ids.len(), config.boot_vcpus as usize);
                    assert!(ids.is_sorted() && ids.iter().all(|id| *id < 255));
                }
            }
        }
    }

    #[test]
    fn leaf_1_tells_who_and_how_many() {
        let table = host(b"GenuineIntel").for_vcpu(&arranged(2, 3, 2), 7);
        let [_, ebx, ecx, edx] = get(&table, 1, 0);
        assert_eq!(ebx, 9 << 24 | 8 << 16 | 8 << 8);
        assert_eq!(ecx, HYPERVISOR | TSC_DEADLINE | VMX);
        assert_eq!(edx, HTT | 1);
        let alone = host(b"GenuineIntel").for_vcpu(&CpusConfig::default(), 0);
        assert_eq!(get(&alone, 1, 0)[1], 1 << 16 | 8 << 8);
        assert_eq!(get(&alone, 1, 0)[3] & HTT, 0);
    }

    #[test]
    fn the_topology_leaves_tell_of_threads_and_cores() {
        let table = host(b"GenuineIntel").for_vcpu(&arranged(2, 3, 2), 7);
        for function in [0xb, 0x1f] {
            assert_eq!(get(&table, function, 0), [1, 2, 0x100, 9]);
            assert_eq!(get(&table, function, 1), [3, 6, 0x201, 9]);
            assert_eq!(get(&table, function, 2), [0, 0, 2, 9]);
        }
        assert!(
            table
                .iter()
                .filter(|e| matches!(e.function, 0xb | 0x1f))
                .all(|e| e.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
        );
    }

    #[test]
    fn leaves_that_the_host_does_not_reach_are_not_made_up() {
        let mut host = host(b"GenuineIntel");
        host.entries[0].eax = 0xd;
        let table = host.for_vcpu(&CpusConfig::default(), 0);
        assert!(table.iter().any(|e| e.function == 0xb));
        assert!(table.iter().all(|e| e.function != 0x1f));
    }

    #[test]
    fn caches_are_shared_by_the_threads_of_a_core_or_by_the_package() {
        let table = host(b"GenuineIntel").for_vcpu(&arranged(2, 3, 2), 0);
        let shared = |index| get(&table, 4, index)[0] >> 14 & 0xfff;
        assert_eq!([shared(0), shared(1), shared(2)], [1, 1, 7]);
        assert_eq!(get(&table, 4, 0)[0] >> 26, 3, "four core ids in a package");
        assert_eq!(get(&table, 4, 2)[0] & 0x3fff, 0x163 & 0x3fff);
        assert_eq!(get(&table, 4, 3), [0; 4]);
    }

    #[test]
    fn amd_leaves_are_filled_for_amd_and_left_alone_for_others() {
        let config = arranged(2, 4, 1);
        let amd = host(b"AuthenticAMD").for_vcpu(&config, 5);
        assert_eq!(get(&amd, 0x8000_001e, 0), [5, 1 << 8 | 2, 0, 9]);
        assert_eq!(get(&amd, 0x8000_0008, 0)[2], 3 << 12 | 7);
        assert_eq!(get(&amd, 0x8000_0001, 0)[2], SVM | CMP_LEGACY);
        let intel = host(b"GenuineIntel").for_vcpu(&config, 5);
        assert_eq!(get(&intel, 0x8000_001e, 0), [9; 4]);
        assert_eq!(get(&intel, 0x8000_0008, 0)[2], 0x7777);
        assert_eq!(get(&intel, 0x8000_0001, 0)[2], SVM);
    }

    #[test]
    fn the_address_width_is_the_smaller_of_the_hosts_and_the_configured_one() {
        let width = |bits| {
            let config = CpusConfig {
                max_phys_bits: bits,
                ..CpusConfig::default()
            };
            get(&host(b"GenuineIntel").for_vcpu(&config, 0), 0x8000_0008, 0)[0]
        };
        assert_eq!(width(46), 0x002e_392e);
        assert_eq!(width(52), 0x0030_3934);
    }

    #[test]
    fn without_nested_neither_vmx_nor_svm_is_shown() {
        let config = CpusConfig {
            nested: false,
            ..CpusConfig::default()
        };
        let table = host(b"AuthenticAMD").for_vcpu(&config, 0);
        assert_eq!(get(&table, 1, 0)[2] & VMX, 0);
        assert_eq!(get(&table, 0x8000_0001, 0)[2] & SVM, 0);
        assert_eq!(get(&table, 0x8000_000a, 0), [0; 4]);
        let nested = host(b"AuthenticAMD").for_vcpu(&CpusConfig::default(), 0);
        assert_eq!(get(&nested, 0x8000_000a, 0), [1, 2, 3, 4]);
    }

    #[test]
    fn paravirtual_features_are_those_that_need_no_help_and_hints_are_none() {
        let table = host(b"GenuineIntel").for_vcpu(&CpusConfig::default(), 0);
        let [features, _, _, hints] = get(&table, KVM_FEATURES, 0);
        for shown in [0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 24] {
            assert_ne!(features & 1 << shown, 0, "feature {shown}");
        }
        for hidden in [2, 8, 15, 16, 17] {
            assert_eq!(features & 1 << hidden, 0, "feature {hidden}");
        }
        assert_eq!(hints, 0);
        assert_eq!(get(&table, KVM_SIGNATURE, 0), [KVM_FEATURES, 1, 2, 3]);
    }

    #[test]
    fn amx_is_hidden_and_the_brand_string_kept() {
        let table = host(b"GenuineIntel").for_vcpu(&CpusConfig::default(), 0);
        assert_eq!(get(&table, 7, 0)[3] & AMX_7_0_EDX, 0);
        assert_eq!(get(&table, 0xd, 0)[0], 0x2e7);
        assert_eq!(get(&table, 0xd, 18), [0; 4]);
        assert_eq!(get(&table, 0x8000_0002, 0), [0x6c65_746e, 1, 2, 3]);
    }
}
