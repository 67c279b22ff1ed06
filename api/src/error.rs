//! How an error is told to a client, and the one place that turns errors into HTTP statuses.
//!
//! By default the body is a JSON array of strings from the outermost error to its cause, as Cloud
//! Hypervisor's clients expect. Who sends `Accept: application/problem+json` gets problem details
//! (RFC 9457) with a stable `code`.
//!
//! A handler does not know what the client accepts, so it answers with an empty body and the
//! [`ApiError`] among the response's extensions; [`render`] writes the body on the way out. That
//! also catches what the router answers by itself.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use devices::config::Invalid;
use serde::Serialize;
use utoipa::ToSchema;
use vmm::Error;

use crate::json;

/// Media type of [`Problem`].
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What a client is told when something went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    field: Option<String>,
    message: String,
    allow: Option<&'static str>,
    close: bool,
}

/// Why the request failed, from the outermost error to its cause.
#[derive(Debug, Serialize, ToSchema)]
#[schema(
    as = Errors,
    example = json!(["vm.boot failed", "VM is not created"])
)]
pub struct Errors(Vec<String>);

/// Why the request failed, as RFC 9457 problem details.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({
    "type": "urn:ballast:problem:vm-not-created",
    "title": "vm not created",
    "status": 404,
    "detail": "VM is not created",
    "code": "vm-not-created",
    "errors": ["vm.boot failed", "VM is not created"],
}))]
pub struct Problem {
    /// A URN that ends in the code.
    #[serde(rename = "type")]
    type_: String,
    /// The code in words.
    title: String,
    /// The HTTP status.
    status: u16,
    /// What happened this time.
    detail: String,
    /// Names the kind of error; stable across versions.
    code: &'static str,
    /// Path of the offending field in the request's body, as in `disks[0].queue_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    field: Option<String>,
    /// The same as the default answer: from the outermost error to its cause.
    errors: Vec<String>,
}

impl ApiError {
    /// An error that is not the VMM's.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            field: None,
            message: message.into(),
            allow: None,
            close: false,
        }
    }

    /// The request's body is not what it should be.
    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// There is nothing at this path.
    pub fn not_found(path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "not-found",
            format!("Not Found: there is nothing at `{}`", shorten(path)),
        )
    }

    /// The path exists, but takes only the method `allow`.
    pub fn method_not_allowed(allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                format!("Method Not Allowed: use {allow}"),
            )
        }
    }

    /// Names the offending field.
    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// The connection can't be used any further, because the rest of the request was not read.
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The text, for logs and standard error.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The path of the field that is wrong, if it is one.
    pub fn field(&self) -> Option<&str> {
        self.field.as_deref()
    }

    /// The stable code.
    pub fn code(&self) -> &'static str {
        self.code
    }

    fn errors(&self, operation: &str) -> Vec<String> {
        if operation.is_empty() {
            vec![self.message.clone()]
        } else {
            vec![format!("{operation} failed"), self.message.clone()]
        }
    }

    /// The body, as problem details or as an array, and its media type.
    fn body(&self, operation: &str, problem: bool) -> (Vec<u8>, &'static str) {
        let errors = self.errors(operation);
        let (bytes, media_type) = if problem {
            let problem = Problem {
                type_: format!("urn:ballast:problem:{}", self.code),
                title: self.code.replace('-', " "),
                status: self.status.as_u16(),
                detail: self.message.clone(),
                code: self.code,
                field: self.field.clone(),
                errors,
            };
            (json::to_vec(&problem), PROBLEM_JSON)
        } else {
            (json::to_vec(&Errors(errors)), "application/json")
        };
        // Strings and a number can't fail to be written; an empty body would still be an answer.
        (bytes.unwrap_or_default(), media_type)
    }
}

/// The error as a complete HTTP message, for where hyper does not write one: on a connection that
/// is refused, or in place of hyper's own answer to what is not HTTP.
pub fn raw_response(error: &ApiError) -> Vec<u8> {
    let (body, media_type) = error.body("", false);
    let mut bytes = format!(
        "HTTP/1.1 {} \r\nServer: {}\r\nConnection: close\r\nContent-Type: {media_type}\r\n\
         Content-Length: {}\r\n\r\n",
        error.status.as_u16(),
        crate::server::SERVER,
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(&body);
    bytes
}

/// Writes the body of an error; leaves other responses alone. `path` is the request's, and
/// `problem` says whether its sender wants problem details.
pub fn render(mut response: Response<Body>, path: &str, problem: bool) -> Response<Body> {
    let Some(error) = response.extensions_mut().remove::<ApiError>() else {
        return response;
    };
    let operation = match response.status() {
        StatusCode::NOT_FOUND if error.code == "not-found" => "",
        _ => path.rsplit('/').next().unwrap_or_default(),
    };
    let (body, media_type) = error.body(operation, problem);
    let length = body.len();
    *response.body_mut() = Body::from(body);
    let headers = response.headers_mut();
    // The router has put down the length of the empty body.
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    if let Some(allow) = error.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if error.close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Whether the sender of a request with these headers wants problem details.
pub fn wants_problem(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|accept| accept.to_str().ok())
        .any(|accept| accept.to_ascii_lowercase().contains(PROBLEM_JSON))
}

/// What comes from a client is quoted only in part.
pub(crate) fn shorten(text: &str) -> String {
    const KEPT: usize = 100;
    if text.chars().count() <= KEPT {
        text.to_owned()
    } else {
        text.chars().take(KEPT).chain(['…']).collect()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response<Body> {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<Error> for ApiError {
    /// The one match from what happened to a status and a code.
    fn from(error: Error) -> Self {
        let message = error.to_string();
        let (status, code) = match &error {
            Error::NotCreated => (StatusCode::NOT_FOUND, "vm-not-created"),
            Error::AlreadyCreated => (StatusCode::CONFLICT, "vm-already-created"),
            Error::WrongState { .. } => (StatusCode::CONFLICT, "wrong-state"),
            Error::UnknownDevice { .. } => (StatusCode::NOT_FOUND, "unknown-device"),
            Error::NotRemovable { .. } => (StatusCode::CONFLICT, "not-removable"),
            Error::DuplicateId { .. } => (StatusCode::CONFLICT, "duplicate-id"),
            Error::DuplicatePath { .. } => (StatusCode::CONFLICT, "duplicate-path"),
            Error::BelowFloor { .. } => (StatusCode::CONFLICT, "below-floor"),
            Error::HasJob { .. } => (StatusCode::CONFLICT, "has-job"),
            Error::UnknownJob { .. } => (StatusCode::NOT_FOUND, "unknown-job"),
            Error::JobEnded { .. } => (StatusCode::CONFLICT, "job-ended"),
            Error::Driven { .. } => (StatusCode::CONFLICT, "driven-balloon"),
            Error::Invalid(invalid) => (StatusCode::BAD_REQUEST, code_of(invalid)),
            Error::Busy { .. } => (StatusCode::CONFLICT, "busy"),
            Error::NoSlot(_) => (StatusCode::CONFLICT, "no-slot"),
            Error::OutOfMemory(_) => (StatusCode::INSUFFICIENT_STORAGE, "out-of-memory"),
            Error::OutOfDescriptors { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "out-of-descriptors")
            }
            Error::NotAdmitted(_) => (StatusCode::INSUFFICIENT_STORAGE, "not-admitted"),
            Error::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "timeout"),
            Error::NoDriver(_) => (StatusCode::GATEWAY_TIMEOUT, "no-driver"),
            Error::Host { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "host"),
        };
        let field = match error {
            Error::Invalid(Invalid { field, .. })
            | Error::DuplicateId { field, .. }
            | Error::BelowFloor { field, .. }
            | Error::DuplicatePath { field, .. } => Some(field),
            _ => None,
        };
        Self {
            field,
            ..Self::new(status, code, message)
        }
    }
}

fn code_of(invalid: &Invalid) -> &'static str {
    if invalid.reason.starts_with("not supported yet") {
        "not-supported-yet"
    } else {
        "invalid"
    }
}

#[cfg(test)]
mod tests {
    use vmm::state::State;

    use super::*;

    fn status(error: Error) -> (u16, &'static str) {
        let error = ApiError::from(error);
        (error.status.as_u16(), error.code)
    }

    #[test]
    fn statuses_say_what_happened() {
        assert_eq!(status(Error::NotCreated), (404, "vm-not-created"));
        assert_eq!(status(Error::AlreadyCreated), (409, "vm-already-created"));
        let wrong = Error::WrongState {
            command: "vm.boot",
            state: State::Running,
        };
        assert_eq!(status(wrong), (409, "wrong-state"));
        assert_eq!(
            status(Invalid::new("cpus.boot_vcpus", "must be 1 to 64").into()),
            (400, "invalid")
        );
        assert_eq!(
            status(Invalid::new("console.mode", "not supported yet: it").into()),
            (400, "not-supported-yet")
        );
        assert_eq!(
            status(Error::OutOfMemory("8 GiB".into())),
            (507, "out-of-memory")
        );
        for number in [libc::EMFILE, libc::ENFILE] {
            let error = std::io::Error::from_raw_os_error(number);
            assert_eq!(
                status(Error::os("opening /x", error)),
                (503, "out-of-descriptors")
            );
        }
        assert_eq!(
            status(Error::NotAdmitted("the guarantee".into())),
            (507, "not-admitted")
        );
        assert_eq!(status(Error::Timeout("pausing")), (504, "timeout"));
        assert_eq!(status(Error::NoDriver("none")), (504, "no-driver"));
        let below = Error::BelowFloor {
            field: "size".into(),
            left: 1,
            floor: 2,
        };
        assert_eq!(ApiError::from(below).field(), Some("size"));
        assert_eq!(
            status(Error::Driven { id: "b".into() }),
            (409, "driven-balloon")
        );
        assert_eq!(status(Error::host("x", "y")), (500, "host"));
    }

    #[test]
    fn the_default_body_is_an_array_that_ends_in_the_text_clients_look_for() {
        let (body, media_type) = ApiError::from(Error::NotCreated).body("vm.info", false);
        assert_eq!(body, br#"["vm.info failed","VM is not created"]"#);
        assert_eq!(media_type, "application/json");
    }

    #[test]
    fn problem_details_name_the_code_and_the_field() {
        let mut headers = HeaderMap::new();
        headers.insert(
            header::ACCEPT,
            HeaderValue::from_static("application/problem+json, application/json;q=0.5"),
        );
        let error = ApiError::from(Error::from(Invalid::new("memory.size", "too small")));
        let (body, media_type) = error.body("vm.create", wants_problem(&headers));
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(media_type, PROBLEM_JSON);
        assert_eq!(body["code"], "invalid");
        assert_eq!(body["field"], "memory.size");
        assert_eq!(body["status"], 400);
        assert_eq!(body["detail"], "memory.size: too small");
    }
}
