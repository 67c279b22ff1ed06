//! The API's operations, all under `/api/v1`.
//!
//! A handler turns a request into one command to the VMM thread, or reads what that thread has
//! published. `vmm.ping`, `vm.info` and `vm.events` never queue behind a slow command.

pub mod balloons;
pub mod devices;
pub mod disks;
pub mod documents;
pub mod events;
pub mod jobs;
pub mod observe;
pub mod vm;
pub mod vmm;

use ::vmm::command::{Command, Reply};
use ::vmm::{Error, Handle};
use axum::handler::Handler;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use axum::{Extension, Router};
use serde::Serialize;

use crate::error::ApiError;
use crate::metrics::{self, Requests};
use crate::{compat, json};

/// Where the API lives.
pub const ROOT: &str = "/api/v1";

/// The whole API, answered through `handle`.
pub fn router(handle: Handle) -> Router {
    let requests = Requests::default();
    let operations = Router::new()
        .route("/vmm.ping", get(vmm::ping))
        .route("/vmm.shutdown", put(vmm::shutdown))
        .route("/vm.create", put(vm::create))
        .route("/vm.info", get(vm::info))
        .route("/vm.counters", get(vm::counters))
        .route("/vm.boot", put(vm::boot))
        .route("/vm.shutdown", put(vm::shutdown))
        .route("/vm.reboot", put(vm::reboot))
        .route("/vm.pause", put(vm::pause))
        .route("/vm.resume", put(vm::resume))
        .route("/vm.power-button", put(vm::power_button))
        .route("/vm.nmi", put(vm::nmi))
        .route("/vm.delete", put(vm::delete))
        .route("/vm.add-disk", put(devices::add_disk))
        .route("/vm.create-disk", put(devices::create_disk))
        .route("/vm.remove-device", put(devices::remove))
        .route("/vm.resize-disk", put(disks::resize))
        .route("/vm.resume-disk", put(disks::resume))
        .route("/vm.snapshot-disk", put(disks::snapshot))
        .route("/vm.stream-disk", put(jobs::stream))
        .route("/vm.commit-disk", put(jobs::commit))
        .route("/vm.jobs", get(jobs::list))
        .route("/vm.set-job", put(jobs::set))
        .route("/vm.cancel-job", put(jobs::cancel))
        .route("/vm.disk-info", get(disks::info))
        .route("/vm.resize", put(vm::resize))
        .route("/vm.set-overcommit", put(vm::set_overcommit))
        .route("/vm.add-balloon", put(balloons::add))
        .route("/vm.resize-balloon", put(balloons::resize))
        .route("/vm.balloons", get(balloons::list))
        .route("/vm.balloon-stats", get(balloons::stats))
        .route("/vm.overcommit", get(observe::overcommit))
        .route("/metrics", get(observe::metrics))
        .route("/vm.events", get(events::stream))
        .route("/openapi.json", get(documents::openapi));
    Router::new()
        .nest(ROOT, operations)
        // Where Prometheus looks unless told otherwise.
        .route("/metrics", get(observe::metrics))
        .fallback(nothing_here)
        .layer(from_fn_with_state(requests.clone(), metrics::count))
        .layer(Extension(requests))
        .with_state(handle)
}

/// An operation that only reads. HEAD is refused: axum would answer it by running the handler.
fn get<H: Handler<T, Handle>, T: 'static>(handler: H) -> MethodRouter<Handle> {
    let refuse = || async { ApiError::method_not_allowed("GET") };
    on(MethodFilter::GET, handler).head(refuse).fallback(refuse)
}

/// An operation that changes something.
fn put<H: Handler<T, Handle>, T: 'static>(handler: H) -> MethodRouter<Handle> {
    on(MethodFilter::PUT, handler).fallback(|| async { ApiError::method_not_allowed("PUT") })
}

async fn nothing_here(uri: Uri) -> ApiError {
    let operation = uri.path().strip_prefix(ROOT).unwrap_or_default();
    match compat::OPERATIONS
        .iter()
        .find(|name| operation.strip_prefix('/') == Some(**name))
    {
        Some(name) => ApiError::new(
            StatusCode::NOT_FOUND,
            "not-supported-yet",
            format!("not supported yet: {name}"),
        ),
        None => ApiError::not_found(uri.path()),
    }
}

/// Asks the VMM thread for something that has no answer but that it was done.
async fn order(
    handle: &Handle,
    command: impl FnOnce(Reply<()>) -> Command,
) -> Result<StatusCode, ApiError> {
    handle.request(command).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// An answer with a body.
fn answer(value: &impl Serialize) -> Result<Response, ApiError> {
    let bytes = json::to_vec(value).map_err(|e| Error::host("writing the answer", e))?;
    Ok(json_bytes(bytes))
}

fn json_bytes(bytes: impl Into<axum::body::Body>) -> Response {
    let json = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json)], bytes.into()).into_response()
}
