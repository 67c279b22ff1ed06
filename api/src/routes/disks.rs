//! Disks and their place on the host: `vm.resize-disk`, `vm.resume-disk`, `vm.snapshot-disk`,
//! `vm.disk-info`.

use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use devices::block::DiskInfo;
use devices::block::snapshot::DiskSnapshot;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::Handle;
use vmm::command::Command;

use super::{answer, order};
use crate::body::Body;
use crate::error::ApiError;

/// Which disk is to have which size.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(
    as = VmResizeDisk,
    example = json!({"id": "_disk0", "desired_size": 21474836480_u64})
)]
pub struct ResizeDisk {
    /// The device's id.
    id: String,
    /// Bytes: not less than the disk has, and a multiple of its logical block.
    desired_size: u64,
}

/// Which disk is to go on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = VmResumeDisk, example = json!({"id": "_disk0"}))]
pub struct ResumeDisk {
    /// The device's id.
    id: String,
    /// Hold what is held no longer: what still lacks space fails, and the guest is told. A guest
    /// can let go of a disk (`vm.remove-device`) only when it has had an answer to all it asked. A
    /// job that waits for space fails, where it still lacks it.
    #[serde(default)]
    give_up: bool,
}

/// Which disks are to move on, and where to.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(
    as = VmSnapshotDisk,
    example = json!({"disks": [{"id": "_disk0", "path": "/var/lib/images/data-1.qcow2"}]})
)]
pub struct SnapshotDisk {
    /// All of them at the same moment.
    #[schema(min_items = 1)]
    disks: Vec<DiskSnapshot>,
}

/// Make a disk larger
///
/// The image grows (a raw file is extended sparsely; a block device must be as large already), and
/// the guest is told. A disk can't be made smaller. A qcow2 image that has internal snapshots can't
/// be resized if it is of version 2, or if one of them does not record the size of the disk.
#[utoipa::path(
    put, path = "/vm.resize-disk", operation_id = "resizeDisk", tag = "disks",
    request_body(content = ResizeDisk, description = "The disk and its size."),
    responses((status = 204, description = "The disk has that size, and the guest is told.")),
)]
pub async fn resize(
    State(handle): State<Handle>,
    Body(ResizeDisk { id, desired_size }): Body<ResizeDisk>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::ResizeDisk {
        id,
        desired_size,
        reply,
    })
    .await
}

/// Try again what lacked space
///
/// Writes for which the host had no space are held (`on_enospc`) and tried again every second; this
/// does it at once. A VM that was paused for that (`pause-vm`) is resumed. Where nothing is held,
/// nothing happens; where the VM was paused by a client, it stays so, and they are tried when it is
/// resumed. The event `disk-resumed` tells that nothing is held any more. A job on the disk that waits
/// for space tries again, too.
#[utoipa::path(
    put, path = "/vm.resume-disk", operation_id = "resumeDisk", tag = "disks",
    request_body(content = ResumeDisk, description = "The disk."),
    responses((status = 204, description = "What is held is being tried again.")),
)]
pub async fn resume(
    State(handle): State<Handle>,
    Body(ResumeDisk { id, give_up }): Body<ResumeDisk>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::ResumeDisk { id, give_up, reply }).await
}

/// Freeze what is on disks, and go on in overlays
///
/// For each disk a new qcow2 image is made, with subclusters, on top of the one it has, and the disk
/// moves on to it while the guest uses it. The images of before stay as they were at that moment,
/// the same one for all disks of the request, and are only read from then on. They look like those
/// of a machine that lost its power then: what the guest had not flushed may be missing, unless it
/// froze its file systems. All disks move on or none does; an error leaves nothing behind. The
/// configuration then has the overlay, with `image_type`, `backing_files`, and the `serial` that the
/// guest knows. Not possible for disks that are read-only, lie on block devices, are locked as a
/// whole (`lock_granularity`), or whose queues have more than 16384 descriptors in all. What is held
/// for lack of space goes to the overlay.
/// Where the process dies without an answer, an overlay that is there is to be used: what the guest
/// has written since may be in it.
#[utoipa::path(
    put, path = "/vm.snapshot-disk", operation_id = "snapshotDisk", tag = "disks",
    request_body(content = SnapshotDisk, description = "The disks and their overlays."),
    responses((status = 204, description = "The disks are on their overlays, which are durable.")),
)]
pub async fn snapshot(
    State(handle): State<Handle>,
    Body(SnapshotDisk { disks }): Body<SnapshotDisk>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::SnapshotDisk { disks, reply }).await
}

/// Show how a disk stands on the host
///
/// Its size, what of it is allocated, what its file system has left, and what its image's engine
/// knows; the rest is null.
#[utoipa::path(
    get, path = "/vm.disk-info", operation_id = "getDiskInfo", tag = "disks",
    params(("id" = String, Query, description = "The disk's id.", example = "_disk0")),
    responses((
        status = 200, description = "How it stands.", body = DiskInfo,
        example = json!({
            "id": "_disk0", "path": "/var/lib/images/data.raw", "image_type": "Raw",
            "virtual_size": 10737418240_u64, "allocated_size": 2147483648_u64,
            "file_size": 10737418240_u64, "host_free": 53687091200_u64,
            "host_total": 107374182400_u64, "backing_chain": [], "cluster_size": null,
            "leaked_clusters": null, "cache_hit_ratio": null, "snapshots": null,
            "write_threshold": 8589934592_u64, "on_enospc": "hold", "held_requests": 0,
            "held_bytes": 0
        }),
    )),
)]
pub async fn info(
    State(handle): State<Handle>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let id = id_of(query.as_deref().unwrap_or_default()).ok_or_else(|| {
        ApiError::bad_request(
            "invalid",
            "id: must be given in the query, as in `?id=_disk0`",
        )
        .with_field("id")
    })?;
    let info = handle
        .request(|reply| Command::DiskInfo { id, reply })
        .await?;
    answer(&info)
}

/// The parameter `id` of a query, as forms are encoded.
fn id_of(query: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix("id="))?;
    let spaced = value.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().ok()?;
    (!decoded.is_empty()).then(|| decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_found_in_a_query_however_it_is_encoded() {
        let cases = [
            ("id=_disk0", Some("_disk0")),
            ("x=1&id=a&id=b", Some("a")),
            ("id=a%20b+c%2Bd%26", Some("a b c+d&")),
            ("id=%C3%A9", Some("\u{e9}")),
            ("id=%", Some("%")),
            ("id=%FF", None),
            ("id=", None),
            ("", None),
            ("idx=1", None),
        ];
        for (query, id) in cases {
            assert_eq!(id_of(query).as_deref(), id, "{query}");
        }
    }
}
