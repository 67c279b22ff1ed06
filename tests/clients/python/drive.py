"""Drives a real process with the client that openapi-python-client generates.

    drive.py BALLAST, with the generated package on the module path

All there is to a VM that is never booted, and jobs on the disk of one whose guest sleeps.
"""

import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from ballast_client import Client
from ballast_client.api.devices import add_disk, create_disk, remove_device
from ballast_client.api.disks import cancel_job, commit_disk, get_jobs, set_job, snapshot_disk
from ballast_client.api.disks import stream_disk
from ballast_client.api.vm import boot_vm, create_vm, delete_vm, get_vm_info
from ballast_client.api.vmm import ping_vmm, shutdown_vmm
from ballast_client.models import CpusConfig, DiskConfig, DiskSnapshot, ImageType, JobKind
from ballast_client.models import JobState, MemoryConfig, NewDiskConfig, PayloadConfig
from ballast_client.models import VmCancelJob, VmCommitDisk, VmConfig, VmInfo, VmmPingResponse
from ballast_client.models import VmRemoveDevice, VmSetJob, VmSnapshotDisk, VmState, VmStreamDisk

PATIENCE = 20
passed = 0


def check(what, holds):
    global passed
    if not holds:
        sys.exit(f"test result: FAILED. {passed} passed; 1 failed; {what}: not so")
    passed += 1
    print(f"ok: {what}")


def refusal(response, status, text=""):
    """A documented refusal, parsed by the client: the reasons as a list."""
    reasons = response.parsed
    return (
        response.status_code == status
        and isinstance(reasons, list)
        and len(reasons) > 0
        and text in " ".join(reasons)
    )


def wait_until_it_answers(client, process):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            return ping_vmm.sync(client=client)
        except httpx.TransportError:
            time.sleep(0.05)
    sys.exit("ballast does not answer")


def image(folder, name):
    path = folder / name
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return str(path)


def sleeper(folder):
    """A guest that sleeps: an ELF file with a PVH entry, `cli; hlt; jmp`."""
    entry, code = 0x100000, b"\xfa\xf4\xeb\xfd".ljust(64, b"\0")
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)

    def segment(kind, offset, size):
        return struct.pack("<IIQQQQQQ", kind, 5, offset, entry, entry, size, size, 0x1000)

    elf = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    elf += segment(1, 0x1000, len(code)) + segment(4, 0x200, len(note))
    elf = elf.ljust(0x200, b"\0") + note
    path = folder / "sleeper"
    path.write_bytes(elf.ljust(0x1000, b"\0") + code)
    return str(path)


def ended(client, id):
    """The job, when it has ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        job = next(job for job in get_jobs.sync(client=client) if job.id == id)
        if job.state != JobState.RUNNING:
            return job
        time.sleep(0.05)
    sys.exit(f"{id} does not end")


def drive_jobs(folder, client):
    base, overlay, upper = (str(folder / name) for name in ("base.raw", "o.qcow2", "n.qcow2"))
    Path(base).write_bytes(b"\x07" * (1 << 20))
    new = NewDiskConfig(
        path=overlay,
        image_type=ImageType.QCOW2,
        backing_path=base,
        backing_type=ImageType.RAW,
    )
    made = create_disk.sync_detailed(client=client, body=new)
    check("an overlay is made", made.status_code == 204)
    disk = DiskConfig(path=overlay, id="disk", image_type=ImageType.QCOW2, backing_files=True)
    config = VmConfig(
        memory=MemoryConfig(size=64 << 20),
        payload=PayloadConfig(kernel=sleeper(folder)),
        disks=[disk],
    )
    created = create_vm.sync_detailed(client=client, body=config)
    check("a VM with it is created", created.status_code == 204)

    def stream(**speed):
        return stream_disk.sync_detailed(client=client, body=VmStreamDisk(id="disk", **speed))

    def commit():
        return commit_disk.sync_detailed(client=client, body=VmCommitDisk(id="disk"))

    def cancel(id):
        return cancel_job.sync_detailed(client=client, body=VmCancelJob(id=id))

    check("no disk is in use yet", refusal(stream(), 409) and refusal(commit(), 409))
    check("there are no jobs", get_jobs.sync(client=client) == [])
    check("there is none to be changed", refusal(cancel("job0"), 404, "job0"))
    check("it boots", boot_vm.sync_detailed(client=client).status_code == 204)
    job = stream(speed=1).parsed
    check("a job runs", job.kind == JobKind.STREAM and job.state == JobState.RUNNING)
    check("and is the only one", refusal(commit(), 409, job.id))
    faster = set_job.sync_detailed(client=client, body=VmSetJob(id=job.id, speed=2))
    check("it goes faster", faster.status_code == 204)
    check("it is cancelled", cancel(job.id).status_code == 204)
    check("and ends so", ended(client, job.id).state == JobState.CANCELLED)
    job = ended(client, stream().parsed.id)
    check("another is done", job.state == JobState.COMPLETED and job.done_bytes == 1 << 20)
    up = VmSnapshotDisk(disks=[DiskSnapshot(id="disk", path=upper)])
    up = snapshot_disk.sync_detailed(client=client, body=up)
    check("the disk goes up to an overlay", up.status_code == 204)
    begun = commit().parsed
    check("and down again", begun.kind == JobKind.COMMIT)
    check("to the end", ended(client, begun.id).state == JobState.COMPLETED)
    info = get_vm_info.sync(client=client)
    check("to the image it had", info.config.disks[0].path == overlay)
    check("which is on nothing", refusal(commit(), 400, "id: "))
    check("that VM is deleted", delete_vm.sync_detailed(client=client).status_code == 204)


def drive(folder, client, process):
    pong = wait_until_it_answers(client, process)
    check("a typed answer to vmm.ping", isinstance(pong, VmmPingResponse))
    check("it is our process", pong.pid == process.pid)
    info = get_vm_info.sync_detailed(client=client)
    check("no VM at first", refusal(info, 404, "VM is not created"))

    config = VmConfig(
        cpus=CpusConfig(boot_vcpus=2, max_vcpus=2),
        memory=MemoryConfig(size=256 << 20),
        disks=[DiskConfig(path=image(folder, "first.raw"), id="first")],
    )
    created = create_vm.sync_detailed(client=client, body=config)
    check("a VM is created", created.status_code == 204)
    created = create_vm.sync_detailed(client=client, body=config)
    check("but not twice", refusal(created, 409))

    info = get_vm_info.sync(client=client)
    check("a typed answer to vm.info", isinstance(info, VmInfo))
    check("the VM is there", info.state == VmState.CREATED)
    check("with its memory", info.memory_actual_size == 256 << 20)

    def add(id, path):
        body = DiskConfig(path=path, id=id)
        return add_disk.sync_detailed(client=client, body=body)

    added = add("second", image(folder, "second.raw"))
    check("a disk is added", added.status_code == 200 and added.parsed.id == "second")
    check("but not twice", refusal(add("second", image(folder, "third.raw")), 409))
    check("nor one that is missing", refusal(add("fourth", "/nonexistent.raw"), 400, "/nonexistent"))
    info = get_vm_info.sync(client=client)
    check("a refused disk is not there", len(info.config.disks) == 2)
    booted = boot_vm.sync_detailed(client=client)
    check("there is nothing to boot", 400 <= booted.status_code < 500)

    def remove(id):
        return remove_device.sync_detailed(client=client, body=VmRemoveDevice(id=id))

    check("an unknown disk is not removed", refusal(remove("none"), 404))
    check("a known one is", remove("second").status_code == 204)
    check("the VM is deleted", delete_vm.sync_detailed(client=client).status_code == 204)
    check("and gone", refusal(get_vm_info.sync_detailed(client=client), 404))
    drive_jobs(folder, client)
    check("the process ends", shutdown_vmm.sync_detailed(client=client).status_code == 204)
    check("without complaint", process.wait(PATIENCE) == 0)


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        socket = str(folder / "api.sock")
        client = Client(
            base_url="http://localhost/api/v1",
            httpx_args={"transport": httpx.HTTPTransport(uds=socket)},
        )
        process = subprocess.Popen(
            [sys.argv[1], "--api-socket", socket], stdin=subprocess.DEVNULL
        )
        try:
            drive(folder, client, process)
        finally:
            process.kill()
            process.wait()
    print(f"test result: ok. {passed} passed; 0 failed;")


main()
