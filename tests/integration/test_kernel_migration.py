"""A function migrates by its kernel driver, as a VMM sees it: both generations, cancel, corruption, dirty pages."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fakevfio import FakeKernel, FakeMigration
from fakevfio.kernel import BDF
from fakevfio.migration import RUNNING as KERNEL_RUNNING
from migrationkit import (
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    V1_PRE_COPY,
    V1_RESUMING,
    V1_RUNNING,
    V1_STOP_COPY,
    V1_STOPPED,
    Vmm,
    until,
)
from rawclient import connect
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.server.function import Function
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import listen_on_path

CONFIG = MigrationConfig(chunk_size=64 << 10, v1_data_size=64 << 10)
STATE = bytes(range(251)) * 2000


def driver(kernel: FakeKernel) -> FakeMigration:
    """What the machine's driver migrates with."""
    assert kernel.migration is not None
    return kernel.migration


@asynccontextmanager
async def vmm(root: Path, kernel: FakeKernel) -> AsyncIterator[Vmm]:
    """A client of a function that is served on a machine."""
    activity = Activity()
    backend = KernelVfioBackend(kernel, BDF)
    agent = backend.agent()
    served = Function(
        "f0",
        backend,
        reply_budget_s=4.0,
        activity=activity,
        events=EventHub(),
        log=log.get("function"),
        migration=lambda name, events, logger: MigrationRunner(name, agent, BDF, CONFIG, events, logger),
    )
    path = root / "f0.sock"
    listener = listen_on_path(path, 0o600)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.run_device)
            nursery.start_soon(served.run_migration)
            nursery.start_soon(served.serve, listener)
            client = Vmm((await connect(path)).sock)
            answer = await client.negotiate()
            assert 1 == answer.flags
            yield client
            client.close()
            await until(lambda: served.connection is None)
            nursery.cancel_scope.cancel()
    listener.close()
    activity.close()


@asynccontextmanager
async def pair(root: Path) -> AsyncIterator[tuple[FakeKernel, Vmm, FakeKernel, Vmm]]:
    """Two machines with the same kind of function, and a VMM on each."""
    machines = []
    for name in ("a", "b"):
        (root / name).mkdir()
        machines.append(FakeKernel(root / name))
        machines[-1].migration = FakeMigration()
    driver(machines[0]).content = STATE
    async with vmm(root / "a", machines[0]) as source, vmm(root / "b", machines[1]) as destination:
        yield machines[0], source, machines[1], destination


@pytest.mark.parametrize("precopy", [True, False])
async def test_v2(tmp_path: Path, precopy: bool) -> None:
    """The state goes over by the v2 generation, and the destination runs only when the VMM says so."""
    async with pair(tmp_path) as (_, source, there, destination):
        stream = b""
        if precopy:
            await source.set_state(PRE_COPY)
            stream += await source.data_read(50_000)
        else:
            await source.set_state(STOP)
        await source.set_state(STOP_COPY)
        stream += await source.read_stream()
        await source.set_state(STOP)
        await destination.set_state(STOP)
        await destination.set_state(RESUMING)
        await destination.write_stream(stream)
        await destination.set_state(STOP)
        assert driver(there).content == STATE
        assert driver(there).state != KERNEL_RUNNING
        await destination.set_state(RUNNING)
        assert driver(there).state == KERNEL_RUNNING


async def test_v1(tmp_path: Path) -> None:
    """The state goes over by the v1 generation, with its pre-copy."""
    async with pair(tmp_path) as (_, source, there, destination):
        await source.v1_set(V1_PRE_COPY)
        stream = await source.v1_chunk() or b""
        await source.v1_set(V1_STOP_COPY)
        stream += await source.v1_read_stream()
        await source.v1_set(V1_STOPPED)
        await destination.v1_set(V1_RESUMING)
        await destination.v1_write_stream(stream)
        await destination.v1_set(V1_RUNNING)
        assert driver(there).content == STATE
        assert driver(there).state == KERNEL_RUNNING


async def test_cancel(tmp_path: Path) -> None:
    """A migration that is given up, in pre-copy and after the stop, leaves a source that runs and can try again."""
    async with pair(tmp_path) as (here, source, _, _):
        for last in (PRE_COPY, STOP_COPY):
            await source.set_state(PRE_COPY)
            await source.data_read(4096)
            if last == STOP_COPY:
                await source.set_state(STOP_COPY)
                await source.data_read(4096)
            await source.set_state(RUNNING)
            assert driver(here).state == KERNEL_RUNNING
            assert RUNNING == await source.state()


async def test_corruption(tmp_path: Path) -> None:
    """A changed byte is noticed, nothing of it runs, and a reset brings the destination back."""
    async with pair(tmp_path) as (_, source, there, destination):
        await source.set_state(STOP_COPY)
        stream = bytearray(await source.read_stream())
        stream[len(stream) // 2] ^= 1
        await destination.set_state(STOP)
        await destination.set_state(RESUMING)
        refused = [
            await destination.data_write_errno(bytes(stream[at : at + 70_000])) for at in range(0, len(stream), 70_000)
        ]
        refused.append(await destination.set_state_errno(STOP))
        assert any(refused)
        assert driver(there).content != STATE
        await destination.succeed(13)
        assert RUNNING == await destination.state()
        assert driver(there).state == KERNEL_RUNNING


async def test_dirty_pages(tmp_path: Path) -> None:
    """What the device's own log has is what the VMM is told."""
    async with pair(tmp_path) as (here, source, _, _):
        memory = os.memfd_create("guest")
        os.ftruncate(memory, 1 << 20)
        await source.dma_map(0x10_0000, 1 << 20, memory)
        await source.start_logging()
        driver(here).dirty |= {0x10_3000, 0x1F_F000}
        assert {3, 255} == await source.report(0x10_0000, 1 << 20)
        assert set() == await source.report(0x10_0000, 1 << 20)
        os.close(memory)


async def test_dirty_pages_of_a_driver_without_a_log(tmp_path: Path) -> None:
    """The IOMMU's bitmap takes its place, also for what is unmapped in the v1 generation."""
    async with pair(tmp_path) as (here, source, _, _):
        driver(here).has_log = False
        memory = os.memfd_create("guest")
        os.ftruncate(memory, 1 << 20)
        await source.dma_map(0x10_0000, 1 << 20, memory)
        await source.start_logging()
        assert set(range(256)) == await source.report(0x10_0000, 1 << 20)
        assert {2, 3} == await source.report(0x10_0000 - 0x2000, 0x4000)
        assert set(range(256)) == await source.unmap_dirty(0x10_0000, 1 << 20)
        assert [] == here.iommu.ranges
        os.close(memory)


async def test_a_driver_without_migration(tmp_path: Path) -> None:
    """Configured all the same, plain vfio-pci serves its client; the state change fails with a clear errno."""
    kernel = FakeKernel(tmp_path)
    async with vmm(tmp_path, kernel) as client:
        assert b"\x36\x1b" == await client.read(7, 0, 2)
        assert (await client.set_state_errno(STOP_COPY)) in {errno.ENOTSUP, errno.EINVAL, errno.ENOTTY}
