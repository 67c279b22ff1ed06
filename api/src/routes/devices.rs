//! Plugging and unplugging: `vm.add-*` and `vm.remove-device`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use devices::block::{DiskConfig, NewDiskConfig};
use devices::config::DeviceConfig;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::Handle;
use vmm::command::Command;
use vmm::status::PciDeviceInfo;

use super::{answer, order};
use crate::body::Body;
use crate::error::ApiError;

/// Which device to remove.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    responses((status = 200, description = "The disk was added.", body = PciDeviceInfo)),
)]
pub async fn add_disk(
    State(handle): State<Handle>,
    Body(config): Body<DiskConfig>,
) -> Result<Response, ApiError> {
    let device = Box::new(DeviceConfig::Disk(config));
    let info = handle
        .request(|reply| Command::AddDevice { device, reply })
        .await?;
    answer(&info)
}

/// Make a disk image
///
/// An empty one, to be added as a disk; it takes no space for data. Whether there is a VM does not
/// matter. What exists is never replaced, and on an error nothing is left behind.
#[utoipa::path(
    put, path = "/vm.create-disk", operation_id = "createDisk", tag = "devices",
    request_body(
        content = NewDiskConfig, description = "The image.",
        examples(
            ("thin" = (
                summary = "A thin disk",
                value = json!({
                    "path": "/var/lib/images/data.qcow2", "image_type": "Qcow2",
                    "size": 107374182400u64
                })
            )),
            ("overlay" = (
                summary = "An overlay, as large as what is below it",
                value = json!({
                    "path": "/var/lib/images/clone.qcow2", "image_type": "Qcow2",
                    "backing_path": "base.raw", "backing_type": "Raw"
                })
            )),
        ),
    ),
    responses((status = 204, description = "The image is there.")),
)]
pub async fn create_disk(
    State(handle): State<Handle>,
    Body(disk): Body<NewDiskConfig>,
) -> Result<StatusCode, ApiError> {
    let disk = Box::new(disk);
    order(&handle, |reply| Command::CreateDisk { disk, reply }).await
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
