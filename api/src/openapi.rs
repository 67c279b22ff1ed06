//! The OpenAPI document, generated from the operations and the types they take and give.
//!
//! The binary serves the committed files under `openapi/`; a test fails when they differ from
//! what the code says, and rewrites them when `BALLAST_UPDATE` is set:
//! `BALLAST_UPDATE=1 cargo test -p ballast openapi`.

mod downgrade;

use serde_json::Value;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{Content, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{Modify, OpenApi};

pub use downgrade::to_3_0;

use crate::error::{Errors, PROBLEM_JSON, Problem};
use crate::json;
use crate::routes::{balloons, devices, disks, documents, events, jobs, observe, vm, vmm};

/// The document, as OpenAPI 3.1.
pub const OPENAPI_3_1: &str = include_str!("../../openapi/ballast.json");
/// The document, as OpenAPI 3.0.3, for generators that need it.
pub const OPENAPI_3_0: &str = include_str!("../../openapi/ballast-3.0.json");

#[derive(OpenApi)]
#[openapi(
    info(
        title = "ballast",
        description = "One virtual machine, over HTTP/1.1 on a Unix socket. Paths, fields and \
            events are Cloud Hypervisor's.\n\nAn error is answered as a JSON array of strings, \
            from the outermost error to its cause; with `Accept: application/problem+json` as \
            RFC 9457 problem details, whose `code` is stable.\n\nBodies may have up to 4 MiB and \
            need no content type.",
        contact(name = "The ballast authors"),
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "http://localhost/api/v1", description = "Over the socket of --api-socket")),
    // Who can open the socket may do everything.
    security(()),
    tags(
        (name = "vmm", description = "The process"),
        (name = "vm", description = "The virtual machine"),
        (name = "devices", description = "Plugging and unplugging"),
        (name = "disks", description = "Disks and their place on the host"),
        (name = "balloons", description = "Memory the guest leaves to the host"),
        (name = "overcommit", description = "Where the memory is, and who gets it"),
    ),
    paths(
        vmm::ping, vmm::shutdown,
        vm::create, vm::info, vm::counters, vm::boot, vm::shutdown, vm::reboot, vm::pause,
        vm::resume, vm::power_button, vm::nmi, vm::delete,
        vm::resize, vm::set_overcommit,
        devices::add_disk, devices::create_disk, devices::remove,
        disks::resize, disks::resume, disks::snapshot, disks::info,
        jobs::stream, jobs::commit, jobs::list, jobs::set, jobs::cancel,
        balloons::add, balloons::resize, balloons::list, balloons::stats,
        observe::overcommit, observe::metrics,
        events::stream, documents::openapi,
    ),
    components(schemas(::vmm::event::Event, Errors, Problem)),
    modifiers(&ErrorResponses),
)]
struct Document;

/// The document as the code has it, OpenAPI 3.1.
pub fn generate() -> serde_json::Result<Value> {
    serde_json::to_value(Document::openapi())
}

/// The text of a committed file.
pub fn to_text(document: &Value) -> serde_json::Result<String> {
    let mut bytes = json::to_vec_pretty(document)?;
    bytes.push(b'\n');
    Ok(String::from_utf8(bytes).unwrap_or_default())
}

/// Adds to each operation the errors it can answer, all of one schema.
struct ErrorResponses;

/// Every status an error can have, and when.
const STATUSES: &[(u16, &str)] = &[
    (400, "The request is not what it should be."),
    (404, "There is no VM, or no such device."),
    (408, "The body did not come in time."),
    (409, "Not possible in this state, or something is taken."),
    (413, "The body is too large."),
    (500, "The host failed."),
    (
        503,
        "The process or the host has no file descriptor left; it may be tried again.",
    ),
    (504, "It took too long; it may be tried again."),
    (
        507,
        "The host has not enough memory, or not enough that is not guaranteed to other VMs.",
    ),
];

/// The statuses of errors that an operation can answer.
pub fn error_statuses(operation_id: &str) -> &'static [u16] {
    match operation_id {
        "pingVmm" | "followEvents" | "getOpenApi" => &[400],
        "getVmInfo" => &[400, 404],
        "getOvercommit" => &[400, 404, 500],
        "getMetrics" => &[400, 500],
        "getVmCounters" | "getDiskInfo" | "getBalloons" | "getBalloonStats" => {
            &[400, 404, 409, 500, 504]
        }
        "shutdownVmm" | "deleteVm" => &[400, 408, 413, 500, 504],
        "createVm" => &[400, 408, 409, 413, 500, 503, 504, 507],
        "setOvercommit" => &[400, 404, 408, 409, 413, 500, 504, 507],
        "bootVm" | "rebootVm" | "addDisk" | "addBalloon" => {
            &[400, 404, 408, 409, 413, 500, 503, 504, 507]
        }
        _ => &[400, 404, 408, 409, 413, 500, 504],
    }
}

impl Modify for ErrorResponses {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for item in document.paths.paths.values_mut() {
            for operation in [&mut item.get, &mut item.put].into_iter().flatten() {
                add_errors(operation);
            }
        }
    }
}

fn add_errors(operation: &mut Operation) {
    let id = operation.operation_id.clone().unwrap_or_default();
    for status in error_statuses(&id) {
        let description = STATUSES
            .iter()
            .find(|(known, _)| known == status)
            .map_or("An error.", |(_, description)| *description);
        operation
            .responses
            .responses
            .insert(status.to_string(), RefOr::T(error_response(description)));
    }
}

fn error_response(description: &str) -> Response {
    let schema = |name: &str| Content::new(Some(Ref::from_schema_name(name)));
    ResponseBuilder::new()
        .description(description)
        .content("application/json", schema("Errors"))
        .content(PROBLEM_JSON, schema("Problem"))
        .build()
}

#[cfg(test)]
mod tests;
