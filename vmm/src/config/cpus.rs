//! vCPUs.

use std::collections::HashSet;

use devices::config::Invalid;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::MAX_VCPUS;

/// Longer than a second is no polling any more.
const MAX_HALT_POLL_NS: u32 = 1_000_000_000;

/// vCPUs and what they look like to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpusConfig {
    /// vCPUs at boot.
    #[schema(minimum = 1, maximum = 64)]
    pub boot_vcpus: u32,
    /// The most vCPUs there can be. vCPU hot-plug is not built yet, so it must equal
    /// `boot_vcpus`, which it does when absent.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 64)]
    pub max_vcpus: u32,
    /// Sockets, dies, cores and threads; one socket with a core per vCPU when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// The most bits of physical address to show to the guest; fewer where the host has fewer.
    #[serde(default = "default_max_phys_bits")]
    #[schema(minimum = 32, maximum = 52)]
    pub max_phys_bits: u8,
    /// Show the virtualization extensions (VMX, SVM) to the guest where the host has them.
    #[serde(default = "yes")]
    pub nested: bool,
    /// Features that must be asked for.
    #[serde(default)]
    pub features: CoreFeatures,
    /// Which of the host's CPUs a vCPU may run on; any, for those that are not named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Who may run beside a vCPU, on another hardware thread of the same core. Refused where the
    /// host can't do it. Cloud Hypervisor's default is `Vm`.
    #[serde(default)]
    pub core_scheduling: CoreScheduling,
    /// Nanoseconds that the host's kernel spins for a vCPU that has nothing to do, at most, before
    /// it gives the CPU to others; 0 where vCPUs share CPUs and should not burn them. KVM's own
    /// default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1000000000, example = 0)]
    pub halt_poll_ns: Option<u32>,
}

/// Which of the host's CPUs a vCPU may run on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(example = json!({"vcpu": 0, "host_cpus": [0, 1]}))]
pub struct CpuAffinity {
    /// Number of the vCPU, from 0; each at most once.
    #[schema(maximum = 63)]
    pub vcpu: u32,
    /// Numbers of CPUs that are online and that this process may use; at least one, each once.
    #[schema(min_items = 1)]
    pub host_cpus: Vec<usize>,
}

/// Who may run beside a vCPU, on another hardware thread of the same core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CoreScheduling {
    /// Only vCPUs of the same VM.
    #[serde(alias = "vm")]
    Vm,
    /// Nobody.
    #[serde(alias = "vcpu")]
    Vcpu,
    /// Anybody.
    #[default]
    #[serde(alias = "off")]
    Off,
}

/// How vCPUs are arranged; the product must be the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CpuTopology {
    /// Threads of a core: 1 or 2.
    #[schema(minimum = 1, maximum = 2)]
    pub threads_per_core: u16,
    /// Cores of a die.
    #[schema(minimum = 1, maximum = 64)]
    pub cores_per_die: u16,
    /// Dies of a package: 1.
    #[schema(minimum = 1, maximum = 1)]
    pub dies_per_package: u16,
    /// Packages (sockets).
    #[schema(minimum = 1, maximum = 64)]
    pub packages: u16,
}

/// CPU features that must be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CoreFeatures {
    /// Advanced Matrix Extensions; not supported yet, must be false.
    #[serde(default)]
    pub amx: bool,
}

fn default_max_phys_bits() -> u8 {
    46
}

fn yes() -> bool {
    true
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            max_phys_bits: default_max_phys_bits(),
            nested: true,
            features: CoreFeatures::default(),
            affinity: None,
            core_scheduling: CoreScheduling::default(),
            halt_poll_ns: None,
        }
    }
}

impl CpusConfig {
    /// `max_vcpus`, where 0 stands for "not given".
    pub fn max(&self) -> u32 {
        if self.max_vcpus == 0 {
            self.boot_vcpus
        } else {
            self.max_vcpus
        }
    }

    pub(super) fn validate(&self) -> Result<(), Invalid> {
        if !(1..=MAX_VCPUS).contains(&self.boot_vcpus) {
            return Err(Invalid::new(
                "boot_vcpus",
                format!("must be 1 to {MAX_VCPUS}"),
            ));
        }
        if self.max() < self.boot_vcpus {
            return Err(Invalid::new("max_vcpus", "must not be below boot_vcpus"));
        }
        if self.max() > self.boot_vcpus {
            return Err(Invalid::new(
                "max_vcpus",
                "not supported yet: vCPU hot-plug; must equal boot_vcpus",
            ));
        }
        if !(32..=52).contains(&self.max_phys_bits) {
            return Err(Invalid::new("max_phys_bits", "must be 32 to 52"));
        }
        if self.features.amx {
            return Err(Invalid::new("features.amx", "not supported yet: AMX"));
        }
        if let Some(topology) = &self.topology {
            topology
                .validate(self.boot_vcpus)
                .map_err(|e| e.within("topology"))?;
        }
        if self.halt_poll_ns.is_some_and(|ns| ns > MAX_HALT_POLL_NS) {
            return Err(Invalid::new(
                "halt_poll_ns",
                format!("must be at most {MAX_HALT_POLL_NS}, a second"),
            ));
        }
        self.validate_affinity()
    }

    /// Whether the host has those CPUs is for [`crate::vcpu::placement::check`] to say.
    fn validate_affinity(&self) -> Result<(), Invalid> {
        let mut vcpus = HashSet::new();
        for (index, affinity) in self.affinity.iter().flatten().enumerate() {
            let refuse = |field: &str, reason: String| {
                Err(Invalid::new(format!("affinity[{index}].{field}"), reason))
            };
            let vcpu = affinity.vcpu;
            if vcpu >= self.boot_vcpus {
                return refuse("vcpu", format!("there is no vCPU {vcpu}"));
            }
            if !vcpus.insert(vcpu) {
                return refuse("vcpu", format!("vCPU {vcpu} is named twice"));
            }
            if affinity.host_cpus.is_empty() {
                return refuse("host_cpus", "names no CPU".to_owned());
            }
            let mut cpus = HashSet::new();
            if let Some(twice) = affinity.host_cpus.iter().find(|cpu| !cpus.insert(**cpu)) {
                return refuse("host_cpus", format!("CPU {twice} is named twice"));
            }
        }
        Ok(())
    }
}

impl CpuTopology {
    fn validate(&self, vcpus: u32) -> Result<(), Invalid> {
        if !(1..=2).contains(&self.threads_per_core) {
            return Err(Invalid::new("threads_per_core", "must be 1 or 2"));
        }
        if self.dies_per_package != 1 {
            return Err(Invalid::new("dies_per_package", "must be 1"));
        }
        let product = u64::from(self.threads_per_core)
            * u64::from(self.cores_per_die)
            * u64::from(self.packages);
        if product != u64::from(vcpus) {
            return Err(Invalid::new(
                "packages",
                format!("the topology has room for {product} vCPUs, but there are {vcpus}"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> Option<String> {
        let config: CpusConfig = serde_json::from_str(json).unwrap();
        config.validate().err().map(|invalid| invalid.field)
    }

    #[test]
    fn an_affinity_names_vcpus_there_are_and_each_of_them_once() {
        let with = |affinity: &str| {
            refused(&format!(
                r#"{{"boot_vcpus": 2, "max_vcpus": 2, "affinity": {affinity}}}"#
            ))
        };
        for (affinity, field) in [
            (r#"[{"vcpu": 2, "host_cpus": [0]}]"#, "affinity[0].vcpu"),
            (
                r#"[{"vcpu": 1, "host_cpus": [0]}, {"vcpu": 1, "host_cpus": [1]}]"#,
                "affinity[1].vcpu",
            ),
            (r#"[{"vcpu": 0, "host_cpus": []}]"#, "affinity[0].host_cpus"),
            (
                r#"[{"vcpu": 0, "host_cpus": [0, 1, 0]}]"#,
                "affinity[0].host_cpus",
            ),
        ] {
            assert_eq!(with(affinity).as_deref(), Some(field), "{affinity}");
        }
        for affinity in [
            "null",
            "[]",
            r#"[{"vcpu": 1, "host_cpus": [3, 1]}, {"vcpu": 0, "host_cpus": [1]}]"#,
        ] {
            assert_eq!(with(affinity), None, "{affinity}");
        }
    }

    #[test]
    fn halt_polling_ends_within_a_second() {
        for (ns, field) in [(0, None), (1_000_000_000, None), (1_000_000_001, Some(()))] {
            let refused = refused(&format!(r#"{{"boot_vcpus": 1, "halt_poll_ns": {ns}}}"#));
            assert_eq!(
                refused.map(|field| assert_eq!(field, "halt_poll_ns")),
                field
            );
        }
    }

    #[test]
    fn core_scheduling_is_written_as_cloud_hypervisor_writes_it() {
        for (text, value, canonical) in [
            ("Vm", CoreScheduling::Vm, "\"Vm\""),
            ("vcpu", CoreScheduling::Vcpu, "\"Vcpu\""),
            ("off", CoreScheduling::Off, "\"Off\""),
        ] {
            let read: CoreScheduling = serde_json::from_str(&format!("{text:?}")).unwrap();
            assert_eq!(read, value);
            assert_eq!(serde_json::to_string(&read).unwrap(), canonical);
        }
    }
}
