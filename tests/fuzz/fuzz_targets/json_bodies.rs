//! Bodies of requests: whatever the bytes, nothing panics; what is accepted is the same value
//! after it was written out and read again, and then still as valid.
//!
//! An input is raw text, or choices by which a document is made of the names that mean something.
#![no_main]

use std::fmt::Debug;
use std::sync::LazyLock;

use arbitrary::{Arbitrary, Unstructured};
use ballast_api::body;
use ballast_api::compat;
use ballast_api::routes::balloons::ResizeBalloon;
use ballast_api::routes::devices::RemoveDevice;
use ballast_api::routes::disks::{ResizeDisk, ResumeDisk};
use devices::balloon::BalloonConfig;
use devices::block::DiskConfig;
use fuzz::seeds;
use libfuzzer_sys::{Corpus, fuzz_target};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::Schema;
use utoipa::{PartialSchema, ToSchema};
use vmm::config::{OvercommitConfig, VmConfig, VmResize};

/// What a body is read as.
fn all_types(bytes: &[u8]) {
    round_trip(bytes, |config: &VmConfig| config.validate().is_ok());
    round_trip(bytes, |config: &DiskConfig| config.validate().is_ok());
    round_trip(bytes, |config: &BalloonConfig| config.validate().is_ok());
    round_trip(bytes, |_: &RemoveDevice| true);
    round_trip(bytes, |_: &ResizeBalloon| true);
    round_trip(bytes, |_: &ResizeDisk| true);
    round_trip(bytes, |_: &ResumeDisk| true);
    round_trip(bytes, |_: &VmResize| true);
    round_trip(bytes, |config: &OvercommitConfig| {
        config.validate(1 << 30).is_ok()
    });
}

fn round_trip<T>(bytes: &[u8], valid: impl Fn(&T) -> bool)
where
    T: DeserializeOwned + ToSchema + Serialize + PartialEq + Debug,
{
    let value: T = match body::parse(bytes) {
        Ok(value) => value,
        Err(error) => {
            // It is made into an answer, which must not fail either.
            let _ = format!("{error:?}");
            return;
        }
    };
    let was_valid = valid(&value);
    let written = serde_json::to_vec(&value).expect("can be written");
    match body::parse::<T>(&written) {
        Ok(again) => {
            assert_eq!(again, value);
            assert_eq!(valid(&again), was_valid);
        }
        Err(error) => panic!("not read again: {error:?}: {value:?}"),
    }
}

/// Every name and word there is in the schemas and beside them.
static WORDS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let mut schemas = vec![
        (VmConfig::name().into_owned(), VmConfig::schema()),
        (DiskConfig::name().into_owned(), DiskConfig::schema()),
        (BalloonConfig::name().into_owned(), BalloonConfig::schema()),
        (RemoveDevice::name().into_owned(), RemoveDevice::schema()),
        (ResizeBalloon::name().into_owned(), ResizeBalloon::schema()),
        (ResizeDisk::name().into_owned(), ResizeDisk::schema()),
        (ResumeDisk::name().into_owned(), ResumeDisk::schema()),
        (VmResize::name().into_owned(), VmResize::schema()),
    ];
    VmConfig::schemas(&mut schemas);
    let mut words = Vec::new();
    for (_, schema) in &schemas {
        let value = serde_json::to_value(schema).expect("a schema");
        collect(&value, &mut words);
        if let RefOr::T(Schema::Object(object)) = schema {
            words.extend(object.properties.keys().cloned());
        }
    }
    for (_, fields) in compat::FIELDS {
        words.extend(fields.iter().map(|(name, _)| (*name).to_owned()));
    }
    for list in [compat::ALIASES, compat::VALUES] {
        words.extend(
            list.iter()
                .flat_map(|(_, names)| names.iter())
                .map(|n| (*n).to_owned()),
        );
    }
    words.extend(["/dev/null", "", "00112233-4455-6677-8899-aabbccddeeff"].map(str::to_owned));
    words.sort();
    words.dedup();
    words
});

/// Names of properties and values of enumerations.
fn collect(schema: &Value, words: &mut Vec<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::Object(properties)) = object.get("properties") {
                words.extend(properties.keys().cloned());
            }
            if let Some(Value::Array(values)) = object.get("enum") {
                words.extend(values.iter().filter_map(Value::as_str).map(str::to_owned));
            }
            object.values().for_each(|value| collect(value, words));
        }
        Value::Array(list) => list.iter().for_each(|value| collect(value, words)),
        _ => {}
    }
}

fn word(u: &mut Unstructured<'_>) -> arbitrary::Result<String> {
    if u.ratio(1, 12)? {
        return String::arbitrary(u);
    }
    Ok(u.choose(&WORDS)?.clone())
}

fn document(u: &mut Unstructured<'_>, depth: u32) -> arbitrary::Result<Value> {
    let kinds = if depth == 0 { 6 } else { 9 };
    Ok(match u.int_in_range(0..=kinds)? {
        0 => Value::Null,
        1 => bool::arbitrary(u)?.into(),
        2 => u8::arbitrary(u)?.into(),
        3 => (u64::from(u8::arbitrary(u)?) << u.int_in_range(0..=56)?).into(),
        4 => i64::arbitrary(u)?.into(),
        5 => f64::arbitrary(u)?.into(),
        6 => word(u)?.into(),
        7 => {
            let len = u.int_in_range(0..=3)?;
            let items: arbitrary::Result<_> = (0..len).map(|_| document(u, depth - 1)).collect();
            Value::Array(items?)
        }
        _ => {
            let mut object = Map::new();
            for _ in 0..u.int_in_range(0..=8)? {
                object.insert(word(u)?, document(u, depth - 1)?);
            }
            Value::Object(object)
        }
    })
}

fn examples() -> Vec<(&'static str, Vec<u8>)> {
    let vm = json!({
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2, "topology": { "threads_per_core": 1,
            "cores_per_die": 2, "dies_per_package": 1, "packages": 1 } },
        "memory": { "size": 536870912, "hugepages": true, "hugepage_size": 2097152 },
        "payload": { "kernel": "/vmlinuz", "cmdline": "console=ttyS0", "initramfs": "/initrd" },
        "disks": [{ "path": "/disk", "id": "root", "num_queues": 2, "rate_limiter_config":
            { "ops": { "size": 100, "refill_time": 1000, "one_time_burst": null } } }],
        "rng": { "src": "/dev/urandom" },
        "serial": { "mode": "File", "file": "/log" },
        "console": { "mode": "Off" },
        "debug_console": { "mode": "Null", "iobase": 233 },
        "platform": { "uuid": "00112233-4455-6677-8899-aabbccddeeff", "oem_strings": ["a"] },
        "net": [], "balloon": { "size": 1048576, "deflate_on_oom": true },
    });
    let disk = json!({ "path": "/disk", "serial": "0123456789", "image_type": "Raw",
        "lock_granularity": "Full", "pci_device_id": 7, "queue_size": 1024 });
    let texts = [
        ("vm", vm),
        ("disk", disk),
        ("remove", json!({ "id": "_disk0" })),
        ("balloon", json!({ "id": "b", "desired_size": 4096 })),
        (
            "resize",
            json!({ "desired_balloon": 4096, "desired_vcpus": null }),
        ),
        ("nothing", json!({})),
    ];
    texts
        .map(|(name, text)| (name, format!("\0{text}").into_bytes()))
        .into()
}

fuzz_target!(
    init: seeds::plant(examples()),
    |data: &[u8]| -> Corpus {
        match data.split_first() {
            Some((0, text)) => all_types(text),
            Some((_, choices)) => {
                let Ok(document) = document(&mut Unstructured::new(choices), 4) else {
                    return Corpus::Reject;
                };
                all_types(document.to_string().as_bytes());
            }
            None => {}
        }
        Corpus::Keep
    }
);
