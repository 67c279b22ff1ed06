//! Balloons: `vm.add-balloon`, `vm.resize-balloon`, `vm.balloons`, `vm.balloon-stats`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use devices::balloon::{BalloonConfig, BalloonInfo};
use devices::config::DeviceConfig;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::Handle;
use vmm::command::Command;
use vmm::status::{BalloonStats, PciDeviceInfo};

use super::{answer, order};
use crate::body::Body;
use crate::error::ApiError;

/// Which balloon is to have which size.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(
    as = VmResizeBalloon,
    example = json!({"id": "__balloon", "desired_size": 268435456})
)]
pub struct ResizeBalloon {
    /// The device's id.
    id: String,
    /// Bytes to ask of the guest: a multiple of 4096; with those of the other balloons less than
    /// its RAM, and less than what it is not guaranteed (`overcommit.guaranteed_size`).
    desired_size: u64,
    /// Go below what the guest is guaranteed, this time. Not for the balloon that
    /// `overcommit.mode` auto drives.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    floor_override: bool,
}

/// Add a balloon
///
/// To a booted VM it is hot-plugged; to one that is not booted it is added to the configuration.
/// `vm.remove-device` takes it out again, and the guest has its memory back.
#[utoipa::path(
    put, path = "/vm.add-balloon", operation_id = "addBalloon", tag = "balloons",
    request_body(
        content = BalloonConfig, description = "The balloon.",
        example = json!({"size": 268435456, "deflate_on_oom": true, "free_page_reporting": true}),
    ),
    responses((status = 200, description = "The balloon was added.", body = PciDeviceInfo)),
)]
pub async fn add(
    State(handle): State<Handle>,
    Body(config): Body<BalloonConfig>,
) -> Result<Response, ApiError> {
    let device = Box::new(DeviceConfig::Balloon(config));
    let info = handle
        .request(|reply| Command::AddDevice { device, reply })
        .await?;
    answer(&info)
}

/// Ask for memory by a balloon, or give it back
///
/// The answer means that the guest is told, not that it is done: the events `balloon-progress` (at
/// most one a second), `balloon-reached` and `balloon-stalled` tell how it goes, and `vm.balloons`
/// where it stands. A guest that comes no closer to the target for five seconds is stalled; it may
/// go on later.
#[utoipa::path(
    put, path = "/vm.resize-balloon", operation_id = "resizeBalloon", tag = "balloons",
    request_body(content = ResizeBalloon, description = "The balloon and its size."),
    responses((status = 204, description = "The guest is told.")),
)]
pub async fn resize(
    State(handle): State<Handle>,
    Body(asked): Body<ResizeBalloon>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::ResizeBalloon {
        id: asked.id,
        desired_size: asked.desired_size,
        floor_override: asked.floor_override,
        reply,
    })
    .await
}

/// Show where the balloons stand
///
/// Each guest driver is asked for fresh statistics, and waited for at most a second; how old each
/// value is shows in its age.
#[utoipa::path(
    get, path = "/vm.balloons", operation_id = "getBalloons", tag = "balloons",
    responses((status = 200, description = "Every balloon.", body = [BalloonInfo])),
)]
pub async fn list(State(handle): State<Handle>) -> Result<Response, ApiError> {
    let balloons = handle.request(|reply| Command::Balloons { reply }).await?;
    answer(&balloons)
}

/// Show what the guest tells of its memory
///
/// By way of the first balloon. The guest is asked, and waited for at most a second; where it does
/// not answer in time, the answer is an error, and `vm.balloons` still has the older values.
#[utoipa::path(
    get, path = "/vm.balloon-stats", operation_id = "getBalloonStats", tag = "balloons",
    responses((
        status = 200, description = "Fresh statistics.", body = BalloonStats,
        example = json!({"balloon_actual": 268435456, "stats": {"free_memory": 100663296}}),
    )),
)]
pub async fn stats(State(handle): State<Handle>) -> Result<Response, ApiError> {
    let stats = handle
        .request(|reply| Command::BalloonStats { reply })
        .await?;
    answer(&stats)
}
