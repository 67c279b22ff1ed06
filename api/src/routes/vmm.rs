//! The process itself: `vmm.*`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;
use vmm::Handle;
use vmm::command::Command;

use super::{answer, order};
use crate::body::NoBody;
use crate::cli::{BUILD_VERSION, CH_VERSION, FEATURES};
use crate::error::ApiError;

/// Who answers.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({
    "build_version": "v53.0.0-ballast-0.1.0",
    "version": "53.0.0",
    "pid": 4711,
    "features": ["io_uring", "kvm"],
}))]
pub struct VmmPingResponse {
    /// The Cloud Hypervisor version whose API this is, and the version of ballast.
    build_version: &'static str,
    /// The Cloud Hypervisor version whose API this is; clients compare it.
    version: &'static str,
    /// The process.
    pid: i64,
    /// What was built in.
    features: &'static [&'static str],
}

/// Say that the VMM is there
///
/// Answers at once, whatever else is going on.
#[utoipa::path(
    get, path = "/vmm.ping", operation_id = "pingVmm", tag = "vmm",
    responses((status = 200, description = "The VMM is there.", body = VmmPingResponse)),
)]
pub async fn ping() -> Result<Response, ApiError> {
    answer(&VmmPingResponse {
        build_version: BUILD_VERSION,
        version: CH_VERSION,
        pid: std::process::id().into(),
        features: FEATURES,
    })
}

/// End the process
///
/// A running VM is powered off first. The API socket is removed.
#[utoipa::path(
    put, path = "/vmm.shutdown", operation_id = "shutdownVmm", tag = "vmm",
    responses((status = 204, description = "The process is about to end.")),
)]
pub async fn shutdown(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::VmmShutdown { reply }).await
}
