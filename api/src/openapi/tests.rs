use std::path::PathBuf;

use ::devices::balloon::BalloonConfig;
use ::devices::block::{DiskConfig, NewDiskConfig};
use ::vmm::config::{OvercommitConfig, VmConfig, VmResize};

use super::*;
use crate::body;
use crate::routes::balloons::ResizeBalloon;
use crate::routes::devices::RemoveDevice;
use crate::routes::disks::{ResizeDisk, ResumeDisk, SnapshotDisk};
use crate::routes::jobs::{CancelJob, CommitDisk, SetJob, StreamDisk};

fn committed(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../openapi")
        .join(name)
}

fn document() -> Value {
    generate().unwrap()
}

/// Every operation: its path, method and itself.
fn operations(document: &Value) -> Vec<(&String, &String, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, item)| {
            let item = item.as_object().unwrap();
            item.iter()
                .map(move |(method, operation)| (path, method, operation))
        })
        .collect()
}

#[test]
fn the_committed_documents_are_what_the_code_says() {
    let document = document();
    for (name, text) in [
        ("ballast.json", to_text(&document).unwrap()),
        ("ballast-3.0.json", to_text(&to_3_0(document)).unwrap()),
    ] {
        let path = committed(name);
        if std::env::var_os("BALLAST_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap() == text,
            "openapi/{name} differs from the code: BALLAST_UPDATE=1 cargo test -p ballast openapi"
        );
    }
}

#[test]
fn every_operation_has_an_id_a_tag_a_description_and_one_success() {
    let document = document();
    let operations = operations(&document);
    assert_eq!(operations.len(), 35);
    let mut ids = std::collections::BTreeSet::new();
    for (path, _, operation) in operations {
        let id = operation["operationId"].as_str().expect(path);
        assert!(ids.insert(id), "{id} twice");
        assert!(!operation["summary"].as_str().expect(path).is_empty());
        assert!(!operation["tags"].as_array().expect(path).is_empty());
        let responses = operation["responses"].as_object().unwrap();
        assert_eq!(
            responses.keys().filter(|s| s.starts_with('2')).count(),
            1,
            "{path}"
        );
        for response in responses.values() {
            assert!(!response["description"].as_str().expect(path).is_empty());
        }
    }
}

#[test]
fn every_error_has_the_one_schema_in_its_two_forms() {
    let document = document();
    for (path, _, operation) in operations(&document) {
        for (status, response) in operation["responses"].as_object().unwrap() {
            if !status.starts_with('2') {
                let content = &response["content"];
                let schema = |media: &str| content[media]["schema"]["$ref"].as_str();
                assert_eq!(
                    schema("application/json"),
                    Some("#/components/schemas/Errors"),
                    "{path}"
                );
                assert_eq!(
                    schema(PROBLEM_JSON),
                    Some("#/components/schemas/Problem"),
                    "{path}"
                );
            }
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    for document in [document(), to_3_0(document())] {
        let text = document.to_string();
        for part in text.split("\"#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(
                document["components"]["schemas"][name].is_object(),
                "{name}"
            );
        }
    }
}

#[test]
fn every_small_integer_of_a_request_has_its_bounds() {
    let document = document();
    let mut schemas: Vec<&Value> = operations(&document)
        .into_iter()
        .map(|(_, _, operation)| &operation["requestBody"])
        .collect();
    let (mut seen, mut count) = (std::collections::BTreeSet::new(), 0);
    while let Some(value) = schemas.pop() {
        // Its format can't say that it has less than 32 bits.
        if value["format"] == "int32" {
            assert!(
                value["minimum"].is_i64() && value["maximum"].is_i64(),
                "{value}"
            );
            count += 1;
        }
        match value {
            Value::Object(object) => schemas.extend(object.values()),
            Value::Array(list) => schemas.extend(list),
            Value::String(text) if text.starts_with("#/") && seen.insert(text.as_str()) => {
                schemas.extend(document.pointer(&text[1..]));
            }
            _ => {}
        }
    }
    assert!(count > 10);
}

/// Every example of `schema` or its content, with the name of the schema.
fn examples(content: &Value) -> Vec<Value> {
    let named = content["examples"].as_object().into_iter().flatten();
    let mut examples: Vec<_> = named.map(|(_, example)| example["value"].clone()).collect();
    examples.extend(content.get("example").cloned());
    examples
}

#[test]
fn every_example_of_a_request_passes_the_real_parser() {
    let document = document();
    let mut count = 0;
    for (path, _, operation) in operations(&document) {
        let content = &operation["requestBody"]["content"]["application/json"];
        let mut examples = examples(content);
        if examples.is_empty()
            && let Some(name) = content["schema"]["$ref"].as_str()
        {
            let schema = document.pointer(&name[1..]).unwrap();
            examples.extend(schema.get("example").cloned());
            assert!(!examples.is_empty(), "{path} has no example");
        }
        for example in examples {
            let bytes = example.to_string().into_bytes();
            count += 1;
            match path.as_str() {
                "/vm.create" => {
                    let config: VmConfig = body::parse(&bytes).unwrap();
                    config.validate().unwrap();
                }
                "/vm.add-disk" => {
                    let config: DiskConfig = body::parse(&bytes).unwrap();
                    config.validate().unwrap();
                }
                "/vm.create-disk" => {
                    body::parse::<NewDiskConfig>(&bytes).unwrap();
                }
                "/vm.remove-device" => {
                    body::parse::<RemoveDevice>(&bytes).unwrap();
                }
                "/vm.add-balloon" => {
                    let config: BalloonConfig = body::parse(&bytes).unwrap();
                    config.validate().unwrap();
                }
                "/vm.resize-balloon" => {
                    body::parse::<ResizeBalloon>(&bytes).unwrap();
                }
                "/vm.resize-disk" => {
                    body::parse::<ResizeDisk>(&bytes).unwrap();
                }
                "/vm.resume-disk" => {
                    body::parse::<ResumeDisk>(&bytes).unwrap();
                }
                "/vm.snapshot-disk" => {
                    body::parse::<SnapshotDisk>(&bytes).unwrap();
                }
                "/vm.stream-disk" => {
                    body::parse::<StreamDisk>(&bytes).unwrap();
                }
                "/vm.commit-disk" => {
                    body::parse::<CommitDisk>(&bytes).unwrap();
                }
                "/vm.set-job" => {
                    body::parse::<SetJob>(&bytes).unwrap();
                }
                "/vm.cancel-job" => {
                    body::parse::<CancelJob>(&bytes).unwrap();
                }
                "/vm.resize" => {
                    body::parse::<VmResize>(&bytes).unwrap();
                }
                "/vm.set-overcommit" => {
                    let config: OvercommitConfig = body::parse(&bytes).unwrap();
                    config.validate(1 << 30).unwrap();
                }
                other => panic!("{other} has a body that this test does not know"),
            }
        }
    }
    assert!(count >= 6, "only {count} examples were seen");
}

/// A check of `value` against `schema`, as far as our document uses JSON Schema.
fn matches(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let schema = document.pointer(&reference[1..]).ok_or(reference)?;
        return matches(document, schema, value);
    }
    for all in schema["allOf"].as_array().into_iter().flatten() {
        matches(document, all, value)?;
    }
    for union in ["oneOf", "anyOf"] {
        if let Some(alternatives) = schema[union].as_array() {
            let fits = |schema: &&Value| matches(document, schema, value).is_ok();
            if !alternatives.iter().any(|a| fits(&a)) {
                return Err(format!("{value} fits none of {alternatives:?}"));
            }
        }
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(some) => some.iter().filter_map(Value::as_str).collect(),
        _ => return Ok(()),
    };
    let fits = types.iter().any(|t| match *t {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("unknown type {other}"),
    });
    if !fits {
        return Err(format!("{value} is none of {types:?}"));
    }
    if let Some(values) = schema["enum"].as_array()
        && !values.contains(value)
    {
        return Err(format!("{value} is none of {values:?}"));
    }
    for required in schema["required"].as_array().into_iter().flatten() {
        if value.get(required.as_str().unwrap()).is_none() {
            return Err(format!("{value} lacks {required}"));
        }
    }
    if let Some(object) = value.as_object() {
        for (key, value) in object {
            match (&schema["properties"][key], &schema["additionalProperties"]) {
                (Value::Null, Value::Bool(false)) => return Err(format!("{key} is unknown")),
                (Value::Null, rest @ Value::Object(_)) => matches(document, rest, value)?,
                (Value::Null, _) => {}
                (schema, _) => matches(document, schema, value)?,
            }
        }
    }
    for (value, item) in value
        .as_array()
        .into_iter()
        .flatten()
        .zip(std::iter::repeat(&schema["items"]))
    {
        matches(document, item, value)?;
    }
    Ok(())
}

#[test]
fn every_example_of_an_answer_matches_its_schema() {
    let document = document();
    let mut count = 0;
    for (path, _, operation) in operations(&document) {
        for response in operation["responses"].as_object().unwrap().values() {
            for content in response["content"]
                .as_object()
                .into_iter()
                .flat_map(|c| c.values())
            {
                for example in examples(content) {
                    count += 1;
                    matches(&document, &content["schema"], &example).expect(path);
                }
            }
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        if let Some(example) = schema.get("example") {
            count += 1;
            matches(&document, schema, example).expect(name);
        }
    }
    assert!(count >= 6, "only {count} examples were seen");
}

/// What `vm.info` and `vm.counters` really answer, against what the document says.
#[test]
fn a_real_answer_matches_its_schema() {
    let document = document();
    let config: VmConfig = body::parse(
        br#"{"payload":{"kernel":"/k"},"disks":[{"path":"/a","rate_limiter_config":
        {"ops":{"size":1,"refill_time":1}}}],"balloon":{"size":4096},
        "balloons":[{"id":"b","size":0,"free_page_reporting":true}],"platform":{"oem_strings":["a"]}}"#,
    )
    .unwrap();
    let node = ::vmm::status::DeviceNode {
        id: "_disk0".into(),
        resources: vec![::vmm::status::Resource::PciBar(::devices::pci::BarInfo {
            index: 0,
            base: 1 << 32,
            size: 4096,
            type_: ::devices::pci::BarType::Mmio64,
            prefetchable: false,
        })],
        parent: None,
        children: vec![],
        pci_bdf: Some("0000:00:01.0".into()),
        removal: Some(::vmm::status::Removal::Removing),
    };
    let info = ::vmm::status::VmInfo {
        config,
        state: ::vmm::state::State::Running,
        memory_actual_size: 1 << 29,
        overcommit_ledger: None,
        device_tree: Some([("_disk0".to_owned(), node)].into()),
    };
    let value = serde_json::to_value(&info).unwrap();
    let schema = &document["components"]["schemas"]["VmInfo"];
    matches(&document, schema, &value).unwrap();
    // What vm.info shows as config can be given to vm.create.
    let back: VmConfig = body::parse(value["config"].to_string().as_bytes()).unwrap();
    assert_eq!(back, info.config);
}

#[test]
fn the_3_0_document_has_none_of_the_words_of_3_1() {
    let document = to_3_0(document());
    assert_eq!(document["openapi"], "3.0.3");
    let text = document.to_string();
    for word in ["\"null\"", "\"identifier\"", "\"const\"", "propertyNames"] {
        assert!(!text.contains(word), "{word}");
    }
}
