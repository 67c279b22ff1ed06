//! What Cloud Hypervisor's API has and ours has not, in one place.
//!
//! A field listed here belongs to a feature that is not built yet: it is refused by name, never
//! ignored, unless its value asks for nothing. When a feature is built, its field moves into its
//! config struct and its line here goes; a test fails until it does.

use serde_json::Value;

/// What may stand in a field whose feature is not built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inert {
    /// Nothing but null: whatever else stands there asks for a device or a feature.
    Null,
    /// Null, false, 0, an empty list or an empty string.
    Empty,
    /// The same, or this string: what we do anyway.
    Text(&'static str),
    /// The same, or this number: what we do anyway.
    Number(u64),
    /// Null or any boolean: it only shapes a feature that another field asks for.
    AnyBoolean,
}

impl Inert {
    /// Whether `value` asks for nothing.
    pub fn allows(self, value: &Value) -> bool {
        if value.is_null() {
            return true;
        }
        match self {
            Self::Null => false,
            Self::Empty => is_empty(value),
            Self::Text(text) => is_empty(value) || value == text,
            Self::Number(number) => is_empty(value) || value.as_u64() == Some(number),
            Self::AnyBoolean => value.is_boolean(),
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Bool(true) | Value::Object(_) => false,
    }
}

/// Fields of Cloud Hypervisor's structs that ours do not have, by the name of the schema.
pub const FIELDS: &[(&str, &[(&str, Inert)])] = &[
    (
        "VmConfig",
        &[
            ("devices", Inert::Empty),
            ("fs", Inert::Empty),
            ("gdb", Inert::Empty),
            ("generic_vhost_user", Inert::Empty),
            ("iommu", Inert::Empty),
            ("ivshmem", Inert::Null),
            ("landlock_enable", Inert::Empty),
            ("landlock_rules", Inert::Empty),
            ("net", Inert::Empty),
            ("numa", Inert::Empty),
            ("pci_segments", Inert::Empty),
            ("pmem", Inert::Empty),
            ("pvmemcontrol", Inert::Null),
            ("pvpanic", Inert::Empty),
            ("rate_limit_groups", Inert::Empty),
            ("rtc", Inert::Null),
            ("sgx_epc", Inert::Empty),
            ("tpm", Inert::Null),
            ("user_devices", Inert::Empty),
            ("vdpa", Inert::Empty),
            ("vsock", Inert::Null),
            ("watchdog", Inert::Empty),
        ],
    ),
    (
        "PayloadConfig",
        &[
            ("fw_cfg_config", Inert::Null),
            ("host_data", Inert::Empty),
            ("igvm", Inert::Empty),
        ],
    ),
    (
        "CpusConfig",
        &[
            ("kvm_hyperv", Inert::Empty),
            // The host's CPU as it is: what we do.
            ("profile", Inert::Text("Host")),
        ],
    ),
    (
        "MemoryConfig",
        &[
            ("hotplug_method", Inert::Text("Acpi")),
            ("hotplug_size", Inert::Empty),
            ("hotplugged_size", Inert::Empty),
            ("zones", Inert::Empty),
        ],
    ),
    (
        "PlatformConfig",
        &[
            ("iommu_address_width_bits", Inert::Number(64)),
            ("iommu_segments", Inert::Empty),
            ("iommufd", Inert::Empty),
            ("iommufd_fd", Inert::Null),
            ("sev_snp", Inert::Empty),
            ("tdx", Inert::Empty),
            // Shapes VFIO, which `devices` would ask for.
            ("vfio_p2p_dma", Inert::AnyBoolean),
        ],
    ),
    (
        "DiskConfig",
        &[
            ("iommu", Inert::Empty),
            ("queue_affinity", Inert::Empty),
            ("rate_limit_group", Inert::Empty),
            ("vhost_socket", Inert::Empty),
            ("vhost_user", Inert::Empty),
        ],
    ),
    ("BalloonConfig", &[("iommu", Inert::Empty)]),
    ("RngConfig", &[("iommu", Inert::Empty)]),
    // The virtio console is a PCI device in Cloud Hypervisor, the serial port is not; both have
    // one schema here.
    (
        "ConsoleConfig",
        &[
            ("id", Inert::Null),
            ("iommu", Inert::Empty),
            ("pci_device_id", Inert::Null),
            ("pci_segment", Inert::Empty),
        ],
    ),
    ("DebugConsoleConfig", &[("socket", Inert::Null)]),
];

/// Values of Cloud Hypervisor's enums that ours do not have, by the name of the schema.
pub const VALUES: &[(&str, &[&str])] = &[("ImageType", &["FixedVhd", "FlatVmdk", "Vhdx"])];

/// Older names that serde accepts beside those of the schema.
pub const ALIASES: &[(&str, &[&str])] = &[("PlatformConfig", &["serial_number", "uuid"])];

/// Operations of Cloud Hypervisor's API that are not built yet.
pub const OPERATIONS: &[&str] = &[
    "vm.add-device",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.coredump",
    "vm.receive-migration",
    "vm.resize-zone",
    "vm.restore",
    "vm.send-migration",
    "vm.snapshot",
];

/// The entry of `table` for the schema `name`.
pub fn lookup<T>(table: &'static [(&'static str, &'static [T])], name: &str) -> &'static [T] {
    table
        .iter()
        .find(|(key, _)| *key == name)
        .map_or(&[], |(_, entries)| *entries)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_that_asks_for_nothing_is_inert() {
        for value in [json!(null), json!(false), json!(0), json!(""), json!([])] {
            assert!(Inert::Empty.allows(&value), "{value}");
        }
        for value in [json!(true), json!(1), json!("x"), json!([0]), json!({})] {
            assert!(!Inert::Empty.allows(&value), "{value}");
        }
        assert!(!Inert::Null.allows(&json!({})));
        assert!(Inert::Text("Acpi").allows(&json!("Acpi")));
        assert!(!Inert::Text("Acpi").allows(&json!("VirtioMem")));
        assert!(Inert::Number(64).allows(&json!(64)));
        assert!(!Inert::Number(64).allows(&json!(48)));
    }
}
