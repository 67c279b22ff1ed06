//! Plugging and unplugging: `vm.add-*` and `vm.remove-device`.

use std::path::Path;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use devices::block::DiskConfig;
use devices::config::DeviceConfig;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::command::Command;
use vmm::{Error, Handle};

use super::{answer, order};
use crate::body::Body;
use crate::error::ApiError;

/// A device that was added.
///
/// There is one shape for a VM that runs and one that does not, so that a generated client has one
/// type to return (Cloud Hypervisor answers 200 with a body or 204 without).
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"id": "_disk1", "bdf": "0000:00:05.0"}))]
pub struct AddedDevice {
    /// The device's id.
    id: String,
    /// Its PCI address: segment, bus, device, function. Absent while the VM is not booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    bdf: Option<String>,
}

/// Which device to remove.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = VmRemoveDevice, example = json!({"id": "_disk1"}))]
pub struct RemoveDevice {
    /// The device's id.
    id: String,
}

/// Add a disk
///
/// To a booted VM it is hot-plugged; to one that is not booted it is added to the configuration.
#[utoipa::path(
    put, path = "/vm.add-disk", operation_id = "addDisk", tag = "devices",
    request_body(
        content = DiskConfig, description = "The disk.",
        examples(
            ("minimal" = (
                summary = "An image with the default settings",
                value = json!({"path": "/var/lib/images/data.raw"})
            )),
            ("readonly" = (
                summary = "A named, read-only image",
                value = json!({
                    "id": "tools", "path": "/var/lib/images/tools.raw", "readonly": true,
                    "image_type": "Raw", "serial": "tools-1"
                })
            )),
        ),
    ),
    responses((status = 200, description = "The disk was added.", body = AddedDevice)),
)]
pub async fn add_disk(
    State(handle): State<Handle>,
    Body(config): Body<DiskConfig>,
) -> Result<Response, ApiError> {
    let path = config.path.clone();
    let device = Box::new(DeviceConfig::Disk(config));
    let plugged = handle
        .request(|reply| Command::AddDevice { device, reply })
        .await?;
    answer(&match plugged {
        Some(info) => AddedDevice {
            id: info.id,
            bdf: Some(info.bdf),
        },
        None => AddedDevice {
            id: id_of_disk(&handle, &path)?,
            bdf: None,
        },
    })
}

/// The id that a disk was given when it was added to the configuration, which is published before
/// the command is answered. A disk that is gone already was deleted with its VM.
fn id_of_disk(handle: &Handle, path: &Path) -> Result<String, ApiError> {
    let status = handle.status().ok_or(Error::NotCreated)?;
    let disks = &status.config.disks;
    let disk = disks.iter().rev().find(|disk| disk.path == path);
    let id = disk.and_then(|disk| disk.common.id.clone());
    id.ok_or_else(|| Error::NotCreated.into())
}

/// Remove a device
///
/// The guest is asked to let go of it; the event `device-removed` tells that it has, and
/// `device-removal-timed-out` that it has not yet. The request can be repeated.
#[utoipa::path(
    put, path = "/vm.remove-device", operation_id = "removeDevice", tag = "devices",
    request_body(content = RemoveDevice, description = "The device."),
    responses((
        status = 204,
        description = "The guest was asked, or the VM is not booted and the device is gone."
    )),
)]
pub async fn remove(
    State(handle): State<Handle>,
    Body(RemoveDevice { id }): Body<RemoveDevice>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::RemoveDevice { id, reply }).await
}
