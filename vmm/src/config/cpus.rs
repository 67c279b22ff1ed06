//! vCPUs.

use devices::config::Invalid;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::MAX_VCPUS;

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
