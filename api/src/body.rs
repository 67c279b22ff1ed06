//! From bytes to a request: the one parser of HTTP bodies and of the `--config` file.
//!
//! The JSON is first walked along the OpenAPI schema of the type it is for, so that field names
//! are declared once. The walk
//! - takes null for every optional field as "not given", as generated clients send it;
//! - takes 2.0 for the integer it is, as the schema does and serde does not;
//! - refuses fields and values of features that are not built yet (see [`crate::compat`]);
//! - refuses unknown fields that look like a typo of a known one;
//! - lets other unknown fields pass with a warning, as Cloud Hypervisor does for its clients.
//!
//! Then serde makes the value. Every refusal names the field by its path.

use std::fmt;
use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;
use utoipa::ToSchema;
use utoipa::openapi::schema::{AdditionalProperties, Schema, SchemaType, Type};
use utoipa::openapi::{Ref, RefOr};

use crate::compat;
use crate::error::{ApiError, shorten};
use crate::server::Descriptors;

/// The longest body accepted (Cloud Hypervisor's limit).
pub const MAX_BYTES: usize = 4 << 20;
/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Unknown fields named in the log for one body; a body can hold a great many.
const WARNINGS_MAX: u32 = 8;

/// The body of a request, parsed.
#[derive(Debug)]
pub struct Body<T>(pub T);

/// A request that has no body.
#[derive(Debug)]
pub struct NoBody;

impl<T: DeserializeOwned + ToSchema, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = read(request).await?;
        parse(&bytes).map(Self)
    }
}

impl<S: Sync> FromRequest<S> for NoBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        if read(request).await?.is_empty() {
            Ok(Self)
        } else {
            Err(ApiError::bad_request(
                "unexpected-body",
                "this request takes no body",
            ))
        }
    }
}

/// Reads all of the body, in bounded space and time. No content type is asked for.
async fn read(mut request: Request) -> Result<Bytes, ApiError> {
    if let Some(descriptors) = request.extensions_mut().remove::<Descriptors>() {
        // Nothing that is built yet takes any; dropping closes them.
        return Err(ApiError::bad_request(
            "unexpected-descriptors",
            format!(
                "{} file descriptors came with the request, which takes none",
                descriptors.len()
            ),
        )
        .closing());
    }
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            format!("the body may have at most {MAX_BYTES} bytes"),
        )
        .closing()
    };
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > MAX_BYTES as u64) {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), MAX_BYTES).collect();
    match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::bad_request(
            "incomplete-body",
            format!("the body could not be read: {error}"),
        )
        .closing()),
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "body-timeout",
            format!(
                "the body did not come within {} seconds",
                BODY_TIMEOUT.as_secs()
            ),
        )
        .closing()),
    }
}

/// Parses a body or a file.
pub fn parse<T: DeserializeOwned + ToSchema>(bytes: &[u8]) -> Result<T, ApiError> {
    let name = T::name();
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::bad_request(
            "empty-body",
            format!("the body is empty; it must be a JSON object, a {name}"),
        ));
    }
    // serde_json gives up beyond 128 levels of nesting.
    let mut value: Value = serde_json::from_slice(bytes)
        .map_err(|e| ApiError::bad_request("not-json", format!("the body is not JSON: {e}")))?;
    Walk::of::<T>().check(
        &Path::Root,
        &RefOr::Ref(Ref::from_schema_name(name)),
        &mut value,
    )?;
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let reason = error.into_inner();
        if path == "." {
            ApiError::bad_request("invalid", reason.to_string())
        } else {
            ApiError::bad_request("invalid", format!("{path}: {reason}")).with_field(path)
        }
    })
}

/// Where in the body we are.
enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Self::Root, name) => f.write_str(name),
            Self::Field(outer, name) => write!(f, "{outer}.{name}"),
            Self::Index(outer, index) => write!(f, "{outer}[{index}]"),
        }
    }
}

/// The schemas that a body is walked along.
struct Walk {
    schemas: Vec<(String, RefOr<Schema>)>,
    warnings_left: u32,
}

/// The fields of an object's schema.
#[derive(Default)]
struct Fields<'a> {
    known: Vec<(&'a str, &'a RefOr<Schema>)>,
    required: Vec<&'a str>,
    /// Whether any name will do, as in a map.
    open: bool,
}

impl Walk {
    fn of<T: ToSchema>() -> Self {
        let mut schemas = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut schemas);
        Self {
            schemas,
            warnings_left: WARNINGS_MAX,
        }
    }

    /// Checks `value`, which stands at `path`, and takes away its nulls.
    fn check(
        &mut self,
        path: &Path<'_>,
        schema: &RefOr<Schema>,
        value: &mut Value,
    ) -> Result<(), ApiError> {
        let (name, schema) = match self.resolve(schema) {
            Some((name, schema)) => (name.to_owned(), schema.clone()),
            // A schema that is not there checks nothing; a test looks for such.
            None => return Ok(()),
        };
        if let Some(integer) = wanted_integer(&schema, value) {
            *value = integer;
        }
        check_type(path, &schema, value)?;
        match value {
            Value::Object(object) => self.check_object(path, &name, &schema, object),
            Value::Array(list) => {
                let Schema::Array(array) = &schema else {
                    return Ok(());
                };
                let utoipa::openapi::schema::ArrayItems::RefOrSchema(item) = &array.items else {
                    return Ok(());
                };
                for (index, value) in list.iter_mut().enumerate() {
                    self.check(&Path::Index(path, index), item, value)?;
                }
                Ok(())
            }
            Value::String(text) => {
                if compat::lookup(compat::VALUES, &name).contains(&text.as_str()) {
                    return Err(not_supported_yet(path, Some(text)));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn check_object(
        &mut self,
        path: &Path<'_>,
        name: &str,
        schema: &Schema,
        object: &mut serde_json::Map<String, Value>,
    ) -> Result<(), ApiError> {
        let mut fields = Fields::default();
        self.collect(schema, &mut fields);
        if fields.open {
            return Ok(());
        }
        object.retain(|key, value| !value.is_null() || fields.required.contains(&key.as_str()));
        // The schemas are borrowed from `self`, which the walk into a field needs as a whole.
        let known: Vec<(String, RefOr<Schema>)> = fields
            .known
            .iter()
            .map(|(key, schema)| ((*key).to_owned(), (*schema).clone()))
            .collect();
        for (key, value) in object {
            let here = Path::Field(path, key);
            if let Some((_, schema)) = known.iter().find(|(known, _)| known == key) {
                self.check(&here, schema, value)?;
            } else {
                self.check_unknown(&here, name, key, &known, value)?;
            }
        }
        Ok(())
    }

    fn check_unknown(
        &mut self,
        path: &Path<'_>,
        name: &str,
        key: &str,
        known: &[(String, RefOr<Schema>)],
        value: &Value,
    ) -> Result<(), ApiError> {
        let aliases = compat::lookup(compat::ALIASES, name);
        if aliases.contains(&key) {
            return Ok(());
        }
        let later = compat::lookup(compat::FIELDS, name);
        if let Some((_, inert)) = later.iter().find(|(field, _)| *field == key) {
            return if inert.allows(value) {
                Ok(())
            } else {
                Err(not_supported_yet(path, None))
            };
        }
        let names = known
            .iter()
            .map(|(name, _)| name.as_str())
            .chain(aliases.iter().copied())
            .chain(later.iter().map(|(name, _)| *name));
        if let Some(meant) = closest(key, names) {
            return Err(ApiError::bad_request(
                "unknown-field",
                format!("{path}: unknown field `{key}`, did you mean `{meant}`?"),
            )
            .with_field(path.to_string()));
        }
        if self.warnings_left > 0 {
            self.warnings_left -= 1;
            let field = shorten(&path.to_string());
            tracing::warn!(field, "an unknown field is ignored");
        }
        Ok(())
    }

    /// Follows references and looks past "or null", to the schema and the name it has.
    fn resolve<'a>(&'a self, schema: &'a RefOr<Schema>) -> Option<(&'a str, &'a Schema)> {
        match schema {
            RefOr::Ref(reference) => {
                let name = reference.ref_location.rsplit('/').next()?;
                let (name, schema) = self.schemas.iter().find(|(known, _)| known == name)?;
                let (_, schema) = self.resolve(schema)?;
                Some((name, schema))
            }
            RefOr::T(Schema::OneOf(one)) => {
                let inner = one.items.iter().find(|item| !is_null(item))?;
                self.resolve(inner)
            }
            RefOr::T(schema) => Some(("", schema)),
        }
    }

    fn collect<'a>(&'a self, schema: &'a Schema, fields: &mut Fields<'a>) {
        match schema {
            Schema::Object(object) => {
                let known = object.properties.iter();
                fields.known.extend(known.map(|(k, s)| (k.as_str(), s)));
                fields
                    .required
                    .extend(object.required.iter().map(String::as_str));
                fields.open |= matches!(
                    object.additional_properties.as_deref(),
                    Some(AdditionalProperties::RefOr(_) | AdditionalProperties::FreeForm(true))
                );
            }
            Schema::AllOf(all) => {
                for part in &all.items {
                    if let Some((_, part)) = self.resolve(part) {
                        self.collect(part, fields);
                    }
                }
            }
            _ => {}
        }
    }
}

fn is_null(schema: &RefOr<Schema>) -> bool {
    matches!(
        schema,
        RefOr::T(Schema::Object(object)) if object.schema_type == SchemaType::Type(Type::Null)
    )
}

/// The integer in a value like `2.0`, where the schema wants one: to JSON Schema (2020-12 core
/// §4.2.2) it is the same number, and languages without integers write it so.
fn wanted_integer(schema: &Schema, value: &Value) -> Option<Value> {
    /// Beyond 2^53 not every integer is a double.
    const EXACT: f64 = (1_u64 << 53) as f64;
    let Schema::Object(object) = schema else {
        return None;
    };
    let wanted = match &object.schema_type {
        SchemaType::Type(one) => *one == Type::Integer,
        SchemaType::Array(some) => some.contains(&Type::Integer),
        SchemaType::AnyValue => false,
    };
    let number = value.as_f64().filter(|_| wanted && value.is_f64())?;
    (number.fract() == 0.0 && number.abs() <= EXACT).then(|| (number as i64).into())
}

/// serde would find a wrong type too, but can't name a field of a flattened struct.
fn check_type(path: &Path<'_>, schema: &Schema, value: &Value) -> Result<(), ApiError> {
    let declared = match schema {
        Schema::Object(object) => &object.schema_type,
        Schema::Array(array) => &array.schema_type,
        Schema::AllOf(_) => &SchemaType::Type(Type::Object),
        _ => return Ok(()),
    };
    let allowed: &[Type] = match declared {
        SchemaType::Type(one) => std::slice::from_ref(one),
        SchemaType::Array(some) => some,
        SchemaType::AnyValue => return Ok(()),
    };
    let fits = allowed.iter().any(|allowed| match allowed {
        Type::Object => value.is_object(),
        Type::String => value.is_string(),
        Type::Integer => value.is_u64() || value.is_i64(),
        Type::Number => value.is_number(),
        Type::Boolean => value.is_boolean(),
        Type::Array => value.is_array(),
        Type::Null => value.is_null(),
    });
    if fits {
        return Ok(());
    }
    let wanted = match allowed.iter().find(|t| **t != Type::Null) {
        Some(Type::Object) => "an object",
        Some(Type::String) => "a string",
        Some(Type::Integer) => "an integer",
        Some(Type::Number) => "a number",
        Some(Type::Boolean) => "true or false",
        Some(Type::Array) => "a list",
        Some(Type::Null) | None => "null",
    };
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) if allowed.contains(&Type::Integer) => "another kind of number",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    let field = match path {
        Path::Root => "the body".to_owned(),
        path => path.to_string(),
    };
    Err(
        ApiError::bad_request("invalid", format!("{field}: must be {wanted}, not {found}"))
            .with_field(field),
    )
}

fn not_supported_yet(path: &Path<'_>, value: Option<&str>) -> ApiError {
    let message = match value {
        Some(value) => format!("not supported yet: {path} {value}"),
        None => format!("not supported yet: {path}"),
    };
    ApiError::bad_request("not-supported-yet", message).with_field(path.to_string())
}

/// The name that `key` is probably a typo of: at most two edits away, and not so short that two
/// edits make anything of it.
fn closest<'a>(key: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let length = key.chars().count();
    // No name of ours is nearly as long, and the distance takes quadratic time.
    if length > 64 {
        return None;
    }
    names
        .map(|name| (strsim::osa_distance(key, name), name))
        .filter(|(distance, _)| *distance <= 2 && distance * 3 <= length)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests;
