//! The virtual machine: `vm.*`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use vmm::command::Command;
use vmm::config::{OvercommitConfig, VmConfig, VmResize};
use vmm::status::{VmCounters, VmInfo};
use vmm::{Error, Handle};

use super::{answer, order};
use crate::body::{Body, NoBody};
use crate::error::ApiError;

/// Configure a VM
///
/// Everything that can be checked is checked now; a configuration that is refused is not kept.
/// Nothing is started: `vm.boot` does that. Where the VM shares a ledger with others and would not
/// be admitted beside them now, that is 507 with the numbers; nothing is set aside yet.
#[utoipa::path(
    put, path = "/vm.create", operation_id = "createVm", tag = "vm",
    request_body(
        content = VmConfig,
        description = "The configuration. Null stands for \"not given\" in every optional field. A \
            field that belongs to a feature which is not built yet is refused unless its value \
            asks for nothing; an unknown field that looks like a typo of a known one is refused; \
            other unknown fields are ignored.",
        examples(
            ("kernel" = (
                summary = "A kernel, its initial RAM disk and a disk",
                value = json!({
                    "cpus": {"boot_vcpus": 2},
                    "memory": {"size": 1073741824},
                    "payload": {
                        "kernel": "/boot/vmlinuz",
                        "initramfs": "/boot/initrd.img",
                        "cmdline": "console=ttyS0 root=/dev/vda"
                    },
                    "disks": [{"path": "/var/lib/images/debian.raw", "num_queues": 2}],
                    "serial": {"mode": "File", "file": "/tmp/serial.log"}
                })
            )),
            ("minimal" = (
                summary = "Just a kernel",
                value = json!({"payload": {"kernel": "/boot/vmlinux"}})
            )),
            ("limits" = (
                summary = "A named disk with a limited bandwidth, on huge pages",
                value = json!({
                    "cpus": {
                        "boot_vcpus": 4,
                        "topology": {
                            "threads_per_core": 2, "cores_per_die": 2,
                            "dies_per_package": 1, "packages": 1
                        }
                    },
                    "memory": {"size": 2147483648u64, "hugepages": true, "hugepage_size": 2097152},
                    "payload": {"firmware": "/usr/share/firmware.elf"},
                    "disks": [{
                        "id": "root", "path": "/dev/vg/root", "direct": true,
                        "rate_limiter_config": {
                            "bandwidth": {"size": 104857600, "refill_time": 1000}
                        }
                    }],
                    "platform": {"system_uuid": "00112233-4455-6677-8899-aabbccddeeff"}
                })
            )),
        ),
    ),
    responses((status = 204, description = "The VM is configured.")),
)]
pub async fn create(
    State(handle): State<Handle>,
    Body(config): Body<VmConfig>,
) -> Result<StatusCode, ApiError> {
    let config = Box::new(config);
    order(&handle, |reply| Command::Create { config, reply }).await
}

/// Describe the VM
///
/// Answers at once, whatever else is going on.
#[utoipa::path(
    get, path = "/vm.info", operation_id = "getVmInfo", tag = "vm",
    responses((status = 200, description = "The VM.", body = VmInfo)),
)]
pub async fn info(State(handle): State<Handle>) -> Result<Response, ApiError> {
    match handle.status() {
        Some(info) => answer(&*info),
        None => Err(Error::NotCreated.into()),
    }
}

/// Count what the devices have done
///
/// Totals since the VM was booted, for every device that counts.
#[utoipa::path(
    get, path = "/vm.counters", operation_id = "getVmCounters", tag = "vm",
    responses((
        status = 200, description = "Running totals by device and counter.",
        body = inline(VmCounters),
        example = json!({"_disk0": {
            "read_bytes": 4096, "write_bytes": 0, "read_ops": 1, "write_ops": 0
        }}),
    )),
)]
pub async fn counters(State(handle): State<Handle>) -> Result<Response, ApiError> {
    let counters = handle.request(|reply| Command::Counters { reply }).await?;
    answer(&counters)
}

/// Start the VM
///
/// When it fails, everything is as it was, and it can be tried again. Where the VM shares a ledger
/// with others, what it is guaranteed is set aside first; 507 tells the numbers if there is too
/// little left.
#[utoipa::path(
    put, path = "/vm.boot", operation_id = "bootVm", tag = "vm",
    responses((status = 204, description = "The vCPUs run.")),
)]
pub async fn boot(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Boot { reply }).await
}

/// Resize the VM
///
/// So far only the first balloon can be: `vm.resize-balloon` is the same for any. What is not
/// supported yet is refused unless it is the size there is. All is done or nothing.
#[utoipa::path(
    put, path = "/vm.resize", operation_id = "resizeVm", tag = "vm",
    request_body(content = VmResize, description = "The sizes."),
    responses((status = 204, description = "The guest is told.")),
)]
pub async fn resize(
    State(handle): State<Handle>,
    Body(desired): Body<VmResize>,
) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Resize { desired, reply }).await
}

/// Change what the VM is guaranteed and who decides over the rest
///
/// The whole policy is replaced; what is left out has its default. In mode auto the governor drives
/// the first balloon, from now on or from when there is one; each of its steps is an event
/// `overcommit-action` with its reason. In mode off the balloon stays where it is. A guarantee that
/// the other balloons' targets already break is refused, and so is, of a booted VM with a ledger,
/// a larger one that does not fit beside those of the other VMs (507).
#[utoipa::path(
    put, path = "/vm.set-overcommit", operation_id = "setOvercommit", tag = "vm",
    request_body(
        content = OvercommitConfig, description = "The policy.",
        example = json!({
            "mode": "auto", "guaranteed_size": 167772160, "max_size": 536870912, "weight": 200
        }),
    ),
    responses((status = 204, description = "The policy holds.")),
)]
pub async fn set_overcommit(
    State(handle): State<Handle>,
    Body(config): Body<OvercommitConfig>,
) -> Result<StatusCode, ApiError> {
    let config = Box::new(config);
    order(&handle, |reply| Command::SetOvercommit { config, reply }).await
}

/// Pull the plug
///
/// The guest is not asked; `vm.power-button` does that. The configuration is kept.
#[utoipa::path(
    put, path = "/vm.shutdown", operation_id = "shutdownVm", tag = "vm",
    responses((status = 204, description = "The VM is off.")),
)]
pub async fn shutdown(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Shutdown { reply }).await
}

/// Pull the plug and start again
///
/// The guest is not asked. The process and the configuration stay.
#[utoipa::path(
    put, path = "/vm.reboot", operation_id = "rebootVm", tag = "vm",
    responses((status = 204, description = "The VM runs afresh.")),
)]
pub async fn reboot(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Reboot { reply }).await
}

/// Stop vCPUs and devices
///
/// Requests of the guest's drivers that are in flight are finished first.
#[utoipa::path(
    put, path = "/vm.pause", operation_id = "pauseVm", tag = "vm",
    responses((status = 204, description = "vCPUs and devices stand still.")),
)]
pub async fn pause(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Pause { reply }).await
}

/// Let a paused VM go on
///
/// Undoes `vm.pause`.
#[utoipa::path(
    put, path = "/vm.resume", operation_id = "resumeVm", tag = "vm",
    responses((status = 204, description = "The VM runs.")),
)]
pub async fn resume(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Resume { reply }).await
}

/// Press the power button
///
/// The guest is told and does what it likes.
#[utoipa::path(
    put, path = "/vm.power-button", operation_id = "pressPowerButton", tag = "vm",
    responses((status = 204, description = "The button was pressed.")),
)]
pub async fn power_button(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::PowerButton { reply }).await
}

/// Interrupt every vCPU, unmaskably
///
/// What a guest does then is its own affair; Linux can be told to panic and dump.
#[utoipa::path(
    put, path = "/vm.nmi", operation_id = "injectNmi", tag = "vm",
    responses((status = 204, description = "The interrupt was sent.")),
)]
pub async fn nmi(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Nmi { reply }).await
}

/// Forget the VM
///
/// A running VM is powered off first. Where there is no VM, nothing happens.
#[utoipa::path(
    put, path = "/vm.delete", operation_id = "deleteVm", tag = "vm",
    responses((status = 204, description = "There is no VM.")),
)]
pub async fn delete(State(handle): State<Handle>, _: NoBody) -> Result<StatusCode, ApiError> {
    order(&handle, |reply| Command::Delete { reply }).await
}
