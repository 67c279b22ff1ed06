//! From OpenAPI 3.1 to 3.0.3, for generators that know nothing newer.
//!
//! A 3.1 schema is JSON Schema 2020-12; 3.0 has its own dialect. What differs, and occurs here:
//! - "or null" is a type among others in 3.1, and `nullable: true` in 3.0;
//! - a `$ref` may have siblings in 3.1; in 3.0 they are ignored, so it moves into an `allOf`;
//! - `examples` of a schema is a list in 3.1, and one `example` in 3.0;
//! - `const` is an `enum` of one in 3.0;
//! - an exclusive bound is a number in 3.1, and a boolean beside the bound in 3.0;
//! - what a map's keys look like can be said in 3.1 only;
//! - a license has an `identifier` in 3.1 only.

use serde_json::{Map, Value, json};

/// Turns an OpenAPI 3.1 document into one of 3.0.3.
pub fn to_3_0(mut document: Value) -> Value {
    if let Some(root) = document.as_object_mut() {
        root.insert("openapi".to_owned(), json!("3.0.3"));
        if let Some(license) = root
            .get_mut("info")
            .and_then(|info| info.get_mut("license"))
            .and_then(Value::as_object_mut)
        {
            license.remove("identifier");
        }
        for (key, value) in root.iter_mut() {
            if key != "info" {
                walk(value, Place::Document);
            }
        }
    }
    document
}

/// What a value is: keywords mean something only in a schema, and nothing in an example.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// Part of the document that is not a schema.
    Document,
    /// A map whose values are schemas.
    Schemas,
    /// A schema.
    Schema,
}

fn walk(value: &mut Value, place: Place) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|item| walk(item, place)),
        Value::Object(object) => {
            for (key, inner) in object.iter_mut() {
                if let Some(place) = place_of(key, place) {
                    walk(inner, place);
                }
            }
            if place == Place::Schema {
                convert(object);
            }
        }
        _ => {}
    }
}

/// Where the value of `key` is, seen from `place`; `None` for what is data.
fn place_of(key: &str, place: Place) -> Option<Place> {
    match (place, key) {
        (Place::Schemas, _) => Some(Place::Schema),
        (_, "example" | "examples" | "default" | "enum" | "const") => None,
        (Place::Document, "schema") => Some(Place::Schema),
        (Place::Document, "schemas") => Some(Place::Schemas),
        (Place::Document, _) => Some(Place::Document),
        (Place::Schema, "properties") => Some(Place::Schemas),
        (Place::Schema, "items" | "additionalProperties" | "not") => Some(Place::Schema),
        (Place::Schema, "allOf" | "anyOf" | "oneOf") => Some(Place::Schema),
        (Place::Schema, _) => None,
    }
}

fn convert(schema: &mut Map<String, Value>) {
    convert_type(schema);
    for union in ["oneOf", "anyOf"] {
        convert_union(schema, union);
    }
    if let Some(value) = schema.remove("const") {
        schema.insert("enum".to_owned(), json!([value]));
    }
    if let Some(Value::Array(examples)) = schema.remove("examples")
        && let Some(first) = examples.into_iter().next()
    {
        schema.entry("example").or_insert(first);
    }
    // Maps have strings for keys anyhow.
    schema.remove("propertyNames");
    for (exclusive, inclusive) in [
        ("exclusiveMinimum", "minimum"),
        ("exclusiveMaximum", "maximum"),
    ] {
        if schema.get(exclusive).is_some_and(Value::is_number)
            && let Some(bound) = schema.insert(exclusive.to_owned(), Value::Bool(true))
        {
            schema.insert(inclusive.to_owned(), bound);
        }
    }
    if schema.len() > 1
        && let Some(reference) = schema.remove("$ref")
    {
        schema.insert("allOf".to_owned(), json!([{ "$ref": reference }]));
    }
}

/// `type: [T, "null"]` becomes `type: T, nullable: true`; several types become `oneOf`.
fn convert_type(schema: &mut Map<String, Value>) {
    let Some(Value::Array(types)) = schema.get("type").cloned() else {
        return;
    };
    let (nulls, mut others): (Vec<_>, Vec<_>) = types.into_iter().partition(|t| t == "null");
    schema.remove("type");
    match others.len() {
        0 => {}
        1 => {
            schema.insert("type".to_owned(), others.swap_remove(0));
        }
        _ => {
            let others: Vec<_> = others.iter().map(|t| json!({ "type": t })).collect();
            schema.insert("oneOf".to_owned(), Value::Array(others));
        }
    }
    if !nulls.is_empty() {
        schema.insert("nullable".to_owned(), Value::Bool(true));
    }
}

/// A null among the alternatives becomes `nullable: true`; a single one left moves out of them.
///
/// 3.0 allows `nullable` only beside a `type`, so a reference loses its null: what is optional can
/// be left out instead.
fn convert_union(schema: &mut Map<String, Value>, union: &str) {
    let Some(Value::Array(alternatives)) = schema.get(union).cloned() else {
        return;
    };
    // The alternatives are converted already: `{"type": "null"}` stayed as it was.
    let is_null = |alternative: &Value| alternative.get("type").is_some_and(|t| t == "null");
    let (nulls, others): (Vec<_>, Vec<_>) = alternatives.into_iter().partition(is_null);
    if nulls.is_empty() {
        return;
    }
    schema.remove(union);
    if others.iter().all(|other| other.get("type").is_some()) {
        schema.insert("nullable".to_owned(), Value::Bool(true));
    }
    if let [Value::Object(only)] = others.as_slice() {
        for (key, value) in only {
            schema.entry(key.clone()).or_insert_with(|| value.clone());
        }
    } else {
        schema.insert(union.to_owned(), Value::Array(others));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(before: Value) -> Value {
        let document = json!({"openapi": "3.1.0", "components": {"schemas": {"A": before}}});
        to_3_0(document)["components"]["schemas"]["A"].clone()
    }

    #[test]
    fn null_among_the_types_becomes_nullable() {
        assert_eq!(
            schema(json!({"type": ["string", "null"]})),
            json!({"type": "string", "nullable": true})
        );
        assert_eq!(
            schema(json!({"oneOf": [{"$ref": "#/x", "description": "d"}, {"type": "null"}]})),
            json!({"allOf": [{"$ref": "#/x"}], "description": "d"})
        );
        assert_eq!(
            schema(json!({"oneOf": [{"$ref": "#/x"}, {"type": "null"}]})),
            json!({"$ref": "#/x"})
        );
    }

    #[test]
    fn a_reference_with_siblings_moves_into_an_all_of() {
        assert_eq!(
            schema(json!({"properties": {"type": {"$ref": "#/x", "description": "d"}}})),
            json!({"properties": {"type": {"allOf": [{"$ref": "#/x"}], "description": "d"}}})
        );
        assert_eq!(schema(json!({"$ref": "#/x"})), json!({"$ref": "#/x"}));
    }

    #[test]
    fn keywords_of_json_schema_become_those_of_3_0() {
        assert_eq!(schema(json!({"const": 1})), json!({"enum": [1]}));
        assert_eq!(
            schema(json!({"examples": ["a", "b"]})),
            json!({"example": "a"})
        );
        assert_eq!(
            schema(json!({"type": "integer", "exclusiveMinimum": 3})),
            json!({"type": "integer", "exclusiveMinimum": true, "minimum": 3})
        );
    }

    #[test]
    fn examples_and_properties_with_the_names_of_keywords_are_left_alone() {
        let before = json!({
            "example": {"type": ["x", "null"], "const": 1},
            "properties": {"const": {"type": "string"}, "oneOf": {"type": "string"}},
        });
        assert_eq!(schema(before.clone()), before);
    }
}
