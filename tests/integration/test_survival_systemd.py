"""A client outlives restarts and kills of a daemon that a real systemd runs; and what is said when it cannot."""

from __future__ import annotations

import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import systemdbed
from restartbed import COUNTED, COUNTING, CountingDevice
from upstreambed import upstream
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.errors import ServerGone

ROOT = Path(systemdbed.__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(systemdbed.why_not() is not None, reason=str(systemdbed.why_not()))


def unit(place: Path, room: int) -> str:
    """The daemon as a service, in front of a device in the test."""
    return f"""
[Service]
Type=notify
NotifyAccess=main
Environment=PYTHONPATH={ROOT}:{ROOT}/protocol:{ROOT}/agents
ExecStart={sys.executable} -m vfiouser_oob serve --control-socket none --socket-path {place}/f0.sock \
    --device vfio-user:{place}/device.sock
StandardError=append:{place}/daemon.log
FileDescriptorStoreMax={room}
Restart=on-failure
RestartSec=100ms
"""


@asynccontextmanager
async def managed(place: Path, room: int) -> AsyncIterator[tuple[systemdbed.Manager, CountingDevice]]:
    """A systemd with the daemon, which has room for so many descriptors in its store."""
    device = CountingDevice()
    units = {"oob.service": unit(place, room)}
    async with upstream(place / "device.sock", device.handlers):
        try:
            async with systemdbed.started(place, units, "oob.service") as manager:
                yield manager, device
        finally:
            device.close()


async def use(client: Client, count: int) -> int:
    """Access registers that count."""
    for _ in range(10):
        count += 1
        await client.region_write(0, COUNTED, struct.pack("<I", count))
        assert struct.pack("<I", count) == await client.region_read(0, COUNTING, 4)
    return count


@pytest.mark.slow
def test_a_client_outlives_restarts_and_kills(tmp_path: Path) -> None:
    """`systemctl restart` and kill -9, twice each: the client goes on, and nothing is lost or doubled."""

    async def main() -> None:
        async with managed(tmp_path, 64) as (manager, device), Client.connect(tmp_path / "f0.sock") as client:
            count = await use(client, 0)
            for verb in (("restart",), ("kill", "--signal=KILL"), ("restart",), ("kill", "--signal=KILL")):
                await trio.to_thread.run_sync(partial(manager.ctl, *verb, "oob.service"))
                with trio.fail_after(60):
                    count = await use(client, count)
            assert device.written == list(range(1, count + 1))

    trio.run(main)


@pytest.mark.slow
@pytest.mark.parametrize(("room", "said"), [(0, "keeps no descriptors"), (4, "some of what they need was not kept")])
def test_a_store_without_room_costs_what_a_restart_always_did(tmp_path: Path, room: int, said: str) -> None:
    """No store, or a full one: the client is turned out, the log says why, and the next client is served."""

    async def main() -> None:
        async with managed(tmp_path, room) as (manager, device):
            async with Client.connect(tmp_path / "f0.sock") as client:
                await use(client, 0)
                await trio.to_thread.run_sync(manager.ctl, "restart", "oob.service")
                with trio.fail_after(30), pytest.raises(ServerGone):
                    await use(client, 10)
            device.written.clear()
            device.reads = 0
            async with Client.connect(tmp_path / "f0.sock") as client:
                await use(client, 0)

    trio.run(main)
    assert said in (tmp_path / "daemon.log").read_text()
