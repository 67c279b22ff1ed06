use devices::block::DiskConfig;
use proptest::prelude::*;
use serde_json::json;
use vmm::config::VmConfig;

use super::*;

fn vm(value: Value) -> Result<VmConfig, ApiError> {
    parse(value.to_string().as_bytes())
}

fn refusal(value: Value) -> (String, &'static str) {
    let error = vm(value).unwrap_err();
    assert_eq!(error.status().as_u16(), 400);
    (error.message().to_owned(), error.code())
}

#[test]
fn an_empty_object_is_the_default_vm() {
    let config = vm(json!({})).unwrap();
    assert_eq!(config.cpus.boot_vcpus, 1);
    assert_eq!(config.memory.size, 512 << 20);
}

#[test]
fn an_integer_may_be_written_with_a_point() {
    let config = vm(json!({
        "memory": {"size": 268435456.0, "hugepage_size": null},
        "cpus": {"boot_vcpus": 2.0, "max_vcpus": 2},
        "disks": [{"path": "/a", "pci_segment": -0.0, "pci_device_id": 7.0}],
    }))
    .unwrap();
    assert_eq!(config.memory.size, 256 << 20);
    assert_eq!(config.cpus.boot_vcpus, 2);
    assert_eq!(config.disks[0].common.pci_device_id, Some(7));
    for wrong in [1.5, 1e300, 18446744073709551616.0] {
        let (message, _) = refusal(json!({"memory": {"size": wrong}}));
        assert!(message.contains("must be an integer"), "{message}");
    }
    let (message, _) = refusal(json!({"cpus": {"boot_vcpus": -1.0}}));
    assert!(message.starts_with("cpus.boot_vcpus: "), "{message}");
}

#[test]
fn an_empty_body_is_refused_by_saying_what_is_wanted() {
    for bytes in [&b""[..], b" \n"] {
        let error = parse::<VmConfig>(bytes).unwrap_err();
        assert_eq!(error.code(), "empty-body");
        assert!(error.message().contains("VmConfig"));
    }
}

#[test]
fn what_is_not_json_is_refused_by_line_and_column() {
    let error = parse::<VmConfig>(b"{\"cpus\": ").unwrap_err();
    assert_eq!(error.code(), "not-json");
    assert!(error.message().contains("line 1 column"), "{error:?}");
}

#[test]
fn nesting_ten_thousand_deep_is_refused() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let body = open.repeat(10_000) + "1" + &close.repeat(10_000);
        let error = parse::<VmConfig>(body.as_bytes()).unwrap_err();
        assert!(error.message().contains("recursion limit"), "{error:?}");
    }
}

#[test]
fn a_field_of_a_feature_that_is_not_built_is_refused_by_name() {
    for (value, field) in [
        (json!({"net": [{"tap": "t0"}]}), "net"),
        (
            json!({"balloon": {"size": 0, "iommu": true}}),
            "balloon.iommu",
        ),
        (json!({"watchdog": true}), "watchdog"),
        (json!({"rtc": {}}), "rtc"),
        (
            json!({"rate_limit_groups": [{"id": "a"}]}),
            "rate_limit_groups",
        ),
        (
            json!({"memory": {"size": 1 << 29, "zones": [{"id": "a"}]}}),
            "memory.zones",
        ),
        (
            json!({"memory": {"size": 1 << 29, "hotplug_size": 4096}}),
            "memory.hotplug_size",
        ),
        (
            json!({"cpus": {"boot_vcpus": 1, "kvm_hyperv": true}}),
            "cpus.kvm_hyperv",
        ),
        (
            json!({"disks": [{"path": "/a"}, {"vhost_user": true, "vhost_socket": "/s"}]}),
            "disks[1].vhost_socket",
        ),
        (
            json!({"disks": [{"path": "/a", "rate_limit_group": "slow"}]}),
            "disks[0].rate_limit_group",
        ),
    ] {
        let error = vm(value).unwrap_err();
        assert_eq!(error.message(), format!("not supported yet: {field}"));
        assert_eq!(error.code(), "not-supported-yet");
        assert_eq!(error.field(), Some(field));
    }
}

#[test]
fn an_image_type_that_is_not_built_is_refused_by_name() {
    let (message, code) = refusal(json!({"disks": [{"path": "/a", "image_type": "Vhdx"}]}));
    assert_eq!(message, "not supported yet: disks[0].image_type Vhdx");
    assert_eq!(code, "not-supported-yet");
    let (message, _) = refusal(json!({"disks": [{"path": "/a", "image_type": "Floppy"}]}));
    assert!(message.starts_with("disks[0].image_type: "), "{message}");
}

#[test]
fn a_later_field_whose_value_asks_for_nothing_is_accepted() {
    vm(json!({
        "net": null, "fs": [], "iommu": false, "watchdog": false, "tpm": null,
        "cpus": {"boot_vcpus": 1, "kvm_hyperv": false, "core_scheduling": "Off"},
        "memory": {"size": 1 << 29, "hotplug_method": "Acpi", "zones": null},
        "disks": [{"path": "/a", "vhost_user": false, "iommu": false, "queue_affinity": []}],
        "platform": {"iommufd": false, "vfio_p2p_dma": true, "iommu_address_width_bits": 64},
        "console": {"mode": "Off", "iommu": false},
    }))
    .unwrap();
}

#[test]
fn an_explicit_null_means_not_given_for_every_optional_field() {
    let config = vm(json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": null, "topology": null, "features": null},
        "memory": null, "payload": null, "disks": null, "rng": null, "serial": null,
        "console": null, "debug_console": {"mode": "Off", "iobase": null},
        "platform": {"num_pci_segments": null, "uuid": null, "oem_strings": null},
    }))
    .unwrap();
    assert_eq!(config.cpus.boot_vcpus, 2);
    assert!(config.disks.is_empty());
    let disk: DiskConfig =
        parse(br#"{"path": "/a", "id": null, "readonly": null, "num_queues": null}"#).unwrap();
    assert_eq!(disk.num_queues, 1);
    let (message, _) = refusal(json!({"memory": {"size": null}}));
    assert_eq!(message, "memory.size: must be an integer, not null");
}

#[test]
fn a_typo_of_a_field_is_refused_with_the_name_that_was_meant() {
    for (value, message) in [
        (
            json!({"memroy": {}}),
            "memroy: unknown field `memroy`, did you mean `memory`?",
        ),
        (
            json!({"cpu": {}}),
            "cpu: unknown field `cpu`, did you mean `cpus`?",
        ),
        (
            json!({"disks": [{"path": "/a", "read_only": true}]}),
            "disks[0].read_only: unknown field `read_only`, did you mean `readonly`?",
        ),
        (
            json!({"disks": [{"path": "/a", "ido": "x", "num_queue": 1}]}),
            "disks[0].ido: unknown field `ido`, did you mean `id`?",
        ),
    ] {
        assert_eq!(refusal(value), (message.to_owned(), "unknown-field"));
    }
}

#[test]
fn other_unknown_fields_are_accepted_as_cloud_hypervisor_does() {
    vm(json!({"foo": 1, "x-vendor": {"a": [1, 2]}, "memory": {"size": 1 << 29, "colour": "red"}}))
        .unwrap();
}

#[test]
fn older_names_of_fields_are_accepted() {
    let config = vm(json!({
        "platform": {"uuid": "00112233-4455-6677-8899-aabbccddeeff", "serial_number": "1"}
    }))
    .unwrap();
    assert_eq!(config.platform.unwrap().system_serial_number.unwrap(), "1");
}

#[test]
fn a_wrong_type_is_refused_by_the_path_of_the_field() {
    for (value, message) in [
        (json!([]), "the body: must be an object, not a list"),
        (
            json!({"cpus": {"boot_vcpus": "two"}}),
            "cpus.boot_vcpus: must be an integer, not a string",
        ),
        (
            json!({"disks": [{"path": "/a"}, {"path": "/b", "pci_segment": true}]}),
            "disks[1].pci_segment: must be an integer, not a boolean",
        ),
        (
            json!({"memory": {"size": 1.5}}),
            "memory.size: must be an integer, not another kind of number",
        ),
        (
            json!({"platform": {"oem_strings": [1]}}),
            "platform.oem_strings[0]: must be a string, not a number",
        ),
    ] {
        assert_eq!(refusal(value).0, message);
    }
    let (message, _) = refusal(json!({"cpus": {"boot_vcpus": 1, "max_phys_bits": 300}}));
    assert!(message.starts_with("cpus.max_phys_bits: "), "{message}");
    let (message, _) = refusal(json!({"disks": [{}]}));
    assert!(message.contains("missing field `path`"), "{message}");
}

#[test]
fn a_field_given_twice_counts_the_last_time() {
    let config: VmConfig = parse(br#"{"cpus":{"boot_vcpus":1},"cpus":{"boot_vcpus":2}}"#).unwrap();
    assert_eq!(config.cpus.boot_vcpus, 2);
}

/// What a feature brings to a config struct must leave the list of what is not built.
#[test]
fn the_lists_of_later_fields_name_only_fields_that_we_do_not_have() {
    let mut walk = Walk::of::<VmConfig>();
    walk.schemas.extend(Walk::of::<DiskConfig>().schemas);
    for (name, later) in compat::FIELDS {
        let reference = RefOr::Ref(Ref::from_schema_name(*name));
        let (_, schema) = walk.resolve(&reference).expect(name);
        let mut fields = Fields::default();
        walk.collect(schema, &mut fields);
        for (field, _) in *later {
            let built = fields.known.iter().any(|(known, _)| known == field);
            assert!(!built, "{name}.{field} is built");
        }
    }
    for (name, values) in compat::VALUES {
        let reference = RefOr::Ref(Ref::from_schema_name(*name));
        let Some((_, Schema::Object(object))) = walk.resolve(&reference) else {
            panic!("{name} is not an enum");
        };
        let built = object.enum_values.as_ref().unwrap();
        for value in *values {
            assert!(!built.contains(&json!(value)), "{name}::{value} is built");
        }
    }
}

/// A reference to a schema that is not there would check nothing.
#[test]
fn every_schema_that_is_referred_to_is_there() {
    let walk = Walk::of::<VmConfig>();
    let text = serde_json::to_string(&walk.schemas).unwrap();
    for part in text.split("#/components/schemas/").skip(1) {
        let name = part.split('"').next().unwrap();
        assert!(
            walk.schemas.iter().any(|(known, _)| known == name),
            "{name}"
        );
    }
}

proptest! {
    #[test]
    fn no_body_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse::<VmConfig>(&bytes);
    }

    #[test]
    fn no_value_in_any_field_makes_the_parser_panic(
        field in prop::sample::select(vec![
            "cpus", "memory", "payload", "disks", "rng", "serial", "console", "platform", "net",
        ]),
        value in prop_oneof![
            Just(json!(null)), Just(json!([null])), Just(json!({"size": -1})),
            any::<i64>().prop_map(|n| json!(n)), any::<f64>().prop_map(|n| json!(n)),
            ".*".prop_map(|s| json!({s: 1})), ".*".prop_map(|s| json!([s])),
        ],
    ) {
        let _ = vm(json!({field: value}));
    }
}
