//! Long work on disks while the guest uses them: `vm.stream-disk`, `vm.commit-disk`, `vm.jobs`,
//! `vm.set-job`, `vm.cancel-job`.

use std::num::NonZeroU64;

use ::vmm::Handle;
use ::vmm::command::Command;
use ::vmm::jobs::{JobInfo, NewJob};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use devices::block::job::JobKind;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{answer, order};
use crate::body::Body;
use crate::error::ApiError;

/// Which disk is to stand alone, and how fast.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = VmStreamDisk, example = json!({"id": "_disk0", "speed": 104857600}))]
pub struct StreamDisk {
    /// The device's id.
    id: String,
    /// The most bytes that may be read for it in a second; without it there is no limit.
    #[schema(minimum = 1)]
    speed: Option<u64>,
}

/// Which disk is to go on with the image below its own, and how fast.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = VmCommitDisk, example = json!({"id": "_disk0", "speed": 104857600}))]
pub struct CommitDisk {
    /// The device's id.
    id: String,
    /// The most bytes that may be moved for it in a second; without it there is no limit.
    #[schema(minimum = 1)]
    speed: Option<u64>,
}

/// Which job is to go how fast.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = VmSetJob, example = json!({"id": "job0", "speed": 10485760}))]
pub struct SetJob {
    /// The job's id.
    id: String,
    /// The most bytes that it may read in a second; without it, or where it is null, there is no
    /// limit any more.
    #[schema(minimum = 1)]
    speed: Option<u64>,
}

/// Which job is to end.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = VmCancelJob, example = json!({"id": "job0"}))]
pub struct CancelJob {
    /// The job's id.
    id: String,
}

/// Have a disk's image stand alone
///
/// What the disk has only in the images below its own is copied into its own, while the guest uses
/// it; what reads as zero there takes no space. Then the image forgets them, and their files are
/// closed and unlocked. The answer is a job: the events `job-progress` (at most one a second) and
/// `job-completed`, `job-failed` or `job-cancelled` tell of it, and `vm.jobs`. At any moment,
/// whatever ends it, the image is whole: one that was not done to the end is on top of the others
/// as before, and can be streamed again. A disk has one job at a time, and can neither be resized
/// nor moved on to an overlay meanwhile. When the guest is reset, or the VM rebooted, the job begins
/// again; what was copied is not copied twice. It ends with a shutdown, and with the disk's removal.
/// Where the host has no space for what it writes, it waits as the disk's `on_enospc` and
/// `enospc_grace_ms` say of the guest's writes, but never pauses the VM: the events `job-waiting` and
/// `job-resumed` tell of that, and `waiting_for_space` of the job does.
/// Not possible for disks that are read-only, have nothing below them or snapshots inside, or are
/// locked as a whole (`lock_granularity`).
#[utoipa::path(
    put, path = "/vm.stream-disk", operation_id = "streamDisk", tag = "disks",
    request_body(content = StreamDisk, description = "The disk, and how fast."),
    responses((status = 200, description = "The job was begun.", body = JobInfo)),
)]
pub async fn stream(
    State(handle): State<Handle>,
    Body(StreamDisk { id, speed }): Body<StreamDisk>,
) -> Result<Response, ApiError> {
    begin(&handle, id, JobKind::Stream, speed).await
}

/// Have a disk's image come into the one below it
///
/// The opposite of `vm.snapshot-disk`. What the disk's qcow2 image has is written into the one
/// below it, its base, which may be raw or qcow2, while the guest uses the disk; then the disk goes
/// on with the base, which `vm.info` shows as its `path` from then on (the guest sees the same
/// disk), and the image it had is emptied and closed. The answer is a job, as of `vm.stream-disk`,
/// and the same holds for it: one job a disk, at its own speed, begun again on a reset, cancelled
/// with a shutdown and with the disk's removal, waiting for space (that is the base's, also where
/// it is about to end: the disk goes on meanwhile). However it ends, by a SIGKILL as well, the image
/// over its base shows the whole disk; the base alone does only when the job has completed. Until
/// then the base is locked as one that is written to: the job is refused while anybody else reads
/// it, other overlays of it in the first place. Not possible for disks that are read-only, have
/// nothing below them, have snapshots inside or a queue with a thread of its own, or are locked as a
/// whole (`lock_granularity`), nor where the base is larger than the disk.
#[utoipa::path(
    put, path = "/vm.commit-disk", operation_id = "commitDisk", tag = "disks",
    request_body(content = CommitDisk, description = "The disk, and how fast."),
    responses((status = 200, description = "The job was begun.", body = JobInfo)),
)]
pub async fn commit(
    State(handle): State<Handle>,
    Body(CommitDisk { id, speed }): Body<CommitDisk>,
) -> Result<Response, ApiError> {
    begin(&handle, id, JobKind::Commit, speed).await
}

async fn begin(
    handle: &Handle,
    disk: String,
    kind: JobKind,
    speed: Option<u64>,
) -> Result<Response, ApiError> {
    let speed = checked(speed)?;
    let order = NewJob { disk, kind, speed };
    let info = handle
        .request(|reply| Command::BeginJob { order, reply })
        .await?;
    answer(&info)
}

/// Show the jobs
///
/// Those that have not ended, then the last 16 that have, the last one first. One that runs and has
/// `waiting_for_space` tries every second whether there is space: `vm.resume-disk` has it try at
/// once, or give up.
#[utoipa::path(
    get, path = "/vm.jobs", operation_id = "getJobs", tag = "disks",
    responses((status = 200, description = "Every job.", body = [JobInfo])),
)]
pub async fn list(State(handle): State<Handle>) -> Result<Response, ApiError> {
    let jobs = handle.request(|reply| Command::Jobs { reply }).await?;
    answer(&jobs)
}

/// Have a job go faster or slower
#[utoipa::path(
    put, path = "/vm.set-job", operation_id = "setJob", tag = "disks",
    request_body(content = SetJob, description = "The job, and how fast."),
    responses((status = 204, description = "It goes so fast from now on.")),
)]
pub async fn set(
    State(handle): State<Handle>,
    Body(SetJob { id, speed }): Body<SetJob>,
) -> Result<StatusCode, ApiError> {
    let speed = checked(speed)?;
    order(&handle, |reply| Command::SetJob { id, speed, reply }).await
}

/// Have a job end before it is done
///
/// The event `job-cancelled` tells that it has, unless it was done just before: `job-completed`.
#[utoipa::path(
    put, path = "/vm.cancel-job", operation_id = "cancelJob", tag = "disks",
    request_body(content = CancelJob, description = "The job."),
    responses((status = 204, description = "It ends as soon as it can.")),
)]
pub async fn cancel(
    State(handle): State<Handle>,
    Body(CancelJob { id }): Body<CancelJob>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::CancelJob { id, reply }).await
}

/// A job that may read nothing would never end.
fn checked(speed: Option<u64>) -> Result<Option<NonZeroU64>, ApiError> {
    let Some(bytes) = speed else {
        return Ok(None);
    };
    let speed = NonZeroU64::new(bytes).ok_or_else(|| {
        let message = "speed: must be at least 1; leave it out for no limit";
        ApiError::bad_request("invalid", message).with_field("speed")
    })?;
    Ok(Some(speed))
}
