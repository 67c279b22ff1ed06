"""Drives a real process with the client that openapi-python-client generates.

    drive.py BALLAST, with the generated package on the module path

All there is to a VM that is never booted, which needs no guest.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from ballast_client import Client
from ballast_client.api.devices import add_disk, remove_device
from ballast_client.api.vm import boot_vm, create_vm, delete_vm, get_vm_info
from ballast_client.api.vmm import ping_vmm, shutdown_vmm
from ballast_client.models import CpusConfig, DiskConfig, MemoryConfig, VmConfig, VmInfo
from ballast_client.models import VmmPingResponse, VmRemoveDevice, VmState

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
