"""Nothing of one client is left for the next: a tenant writes secrets, is killed, and a child of it keeps its mapping.

The next tenant has sent nothing but VERSION when it looks. It finds what the very first client of all found, what the
child writes into the old mapping changes nothing that it sees, and what it writes does not show there.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from fakeserver import Answer, Handler
from killbed.hosts import Service
from rawclient import CONFIG, RawClient, attached, connect
from tenant import Tenant, tenant
from upstreambed import upstream
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import Command, DeviceInfoFlags
from vfiouser_protocol.messages import DeviceInfo

SECRET = b"the last tenant's secret"
SECRETS = {
    "test": [
        (0, 0x04, struct.pack("<I", 0x5EC1)),
        (0, 0x08, b"SECRETS!"),
        (0, 0x18, struct.pack("<Q", 0x5EC000)),
        (1, 0x1000, SECRET),
        (2, 0xC000, SECRET),
        (CONFIG, 0x04, b"\x06\x00"),
        (CONFIG, 0x10, struct.pack("<I", 0xFEDC0000)),
        (CONFIG, 0x3C, b"\x0b"),
    ],
    "nvme": [
        (0, 0x0C, struct.pack("<I", 1)),
        (0, 0x24, struct.pack("<I", 0x001F001F)),
        (0, 0x28, struct.pack("<Q", 0x5EC000)),
        (0, 0x30, struct.pack("<Q", 0x5ED000)),
        (0, 0x50, struct.pack("<Q", 0x5EE003)),
        (0, 0x14, struct.pack("<I", 6 << 16 | 4 << 20 | 1)),
        (0, 0x2000, struct.pack("<QII", 0xFEE05EC0, 0x5EC, 1)),
        (2, 0x1000, SECRET),
        (CONFIG, 0x04, b"\x06\x00"),
        (CONFIG, 0x10, struct.pack("<I", 0xFEDC0000)),
        (CONFIG, 0x3C, b"\x0b"),
    ],
}
#: Regions and their sizes, and the one that the tenant maps.
LAYOUT = {
    "test": ({0: 4096, 1: 1 << 20, 2: 64 << 10, CONFIG: 4096}, 2),
    "nvme": ({0: 4 * 4096, 2: 2 << 20, CONFIG: 4096}, 2),
    "nvme doorbells": ({0: 4 * 4096, 2: 2 << 20, CONFIG: 4096}, 0),
}
NVME = "model:nvme,size=1M,cmb=2M,doorbells=polled"


@contextmanager
def program(name: str, directory: Path, *arguments: str) -> Iterator[None]:
    """Run one of our programs until the block ends."""
    service = Service(name, "vfiouser_oob", arguments, directory)
    service.await_ready(service.begin())
    try:
        yield
    finally:
        service.close()


def serve(path: Path, device: str) -> list[str]:
    """A daemon for one device."""
    return ["serve", "--socket-path", str(path), "--device", device, "--control-socket", "none"]


@contextmanager
def bed(kind: str, directory: Path) -> Iterator[Path]:
    """Give the socket of a function that is served by real processes."""
    path = directory / "f.sock"
    soc = ["simulate-soc", f"--socket-dir={directory}", "--size=1M", "--cmb=2M", "--doorbells=polled", "--device-only"]
    with ExitStack() as programs:
        if kind == "model":
            programs.enter_context(program("daemon", directory, *serve(path, NVME)))
        elif kind == "test":
            programs.enter_context(program("daemon", directory, *serve(path, "model:test")))
        else:
            path = directory / "f0.sock"
            programs.enter_context(program("soc", directory, *soc))
        if kind == "chain":
            upstream_path, path = path, directory / "f.sock"
            programs.enter_context(program("daemon", directory, *serve(path, f"vfio-user:{upstream_path}")))
        yield path


async def contents(client: RawClient, sizes: dict[int, int]) -> dict[int, bytes]:
    """All that a client can read."""
    found = {}
    for region, size in sizes.items():
        step = min(size, 1 << 20)
        found[region] = b"".join([await client.read(region, start, step) for start in range(0, size, step)])
    return found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("test", "test"),
        ("model", "nvme"),
        ("model", "nvme doorbells"),
        ("soc", "nvme"),
        ("soc", "nvme doorbells"),
        ("chain", "nvme"),
        ("chain", "nvme doorbells"),
    ],
)
async def test_nothing_is_left_for_the_next_tenant(tmp_path: Path, kind: str, layout: str) -> None:
    """Registers, config space, device memory, MSI-X table and queues are new, and the old mapping reaches nothing."""
    sizes, mapped = LAYOUT[layout]
    with bed(kind, tmp_path) as path:
        async with attached(path) as client:
            pristine = await contents(client, sizes)
        with tenant(path, mapped, SECRETS[layout.split()[0]]) as old:
            await trio.to_thread.run_sync(old.await_ready)
            assert int(await ask(old, "fill 165")), "the tenant has mapped nothing"
            old.kill()
            async with attached(path) as client:
                assert pristine == await contents(client, sizes)
                assert int(await ask(old, "fill 90"))
                assert pristine == await contents(client, sizes), "the old mapping forges what the new tenant reads"
                # Into the middle of what the old tenant has mapped: device memory, or doorbells.
                await client.write(mapped, 0x1800, b"\x77" * 8)
                assert "0" == await ask(old, "count 119"), "the old mapping shows what the new tenant writes"


async def ask(old: Tenant, line: str) -> str:
    """Ask the child with the mapping."""
    return await trio.to_thread.run_sync(old.ask, line)


# What decides whether it happens


def refusing(event: object) -> Answer:
    """The device cannot be reset now."""
    return Answer(errno=errno.EBUSY)


def without_reset(event: object) -> Answer:
    """The device has no reset."""
    return Answer(encode(DeviceInfo(16, DeviceInfoFlags.PCI, 9, 5)))


@pytest.mark.parametrize("retain_state", [False, True])
@pytest.mark.parametrize(
    "handlers", [{Command.DEVICE_RESET: refusing}, {Command.DEVICE_GET_INFO: without_reset}], ids=["busy", "none"]
)
async def test_upstream_that_cannot_be_reset(tmp_path: Path, handlers: dict[int, Handler], retain_state: bool) -> None:
    """Its client is turned away, unless the configuration says that state may be retained."""
    path = tmp_path / "up.sock"
    config = replace(function(tmp_path, "f0", UpstreamDevice(socket=path)), retain_state=retain_state)
    async with upstream(path, handlers), serving(config) as daemon:
        client = await connect(tmp_path / "f0.sock")
        answer = await client.negotiate()
        client.close()
        assert (0 if retain_state else errno.ENODEV) == answer.error
        if not retain_state:
            assert "retain_state = true" in str(daemon.functions[0].last_error)


async def test_upstream_is_reset_before_the_first_reply(tmp_path: Path) -> None:
    """When the client reads the reply to VERSION, the upstream server has reset its device."""
    path = tmp_path / "up.sock"
    config = function(tmp_path, "f0", UpstreamDevice(socket=path))
    async with upstream(path) as servers, serving(config), attached(tmp_path / "f0.sock"):
        assert Command.DEVICE_RESET == servers[0].received[-1].header.command


def test_shared_memory_is_renewed_or_as_before() -> None:
    """Old mappings and the new memory share nothing; with no descriptor to be had, everything stays."""
    memory = SharedMemory("test", 8192)
    memory.view[:4] = b"old!"
    kept = memory.view[:4]
    memory.renew()
    assert bytes(8192) == bytes(memory.view)
    kept[:] = b"late"
    assert bytes(8192) == os.pread(memory.fileno(), 8192, 0)
    memory.view[:4] = b"new!"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            memory.renew()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert b"new!" == bytes(memory.view[:4])
    memory.close()
