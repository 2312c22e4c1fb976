"""What the kernel takes long for: progress and advice in the log, and an answer within the message's deadline."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from daemonkit import function
from fakevfio import FakeKernel
from fakevfio.bed import answer, copies, map_request, session, unmap_request, until
from fakevfio.kernel import BASE, BDF
from rawclient import DMA_MAP, attached
from rawclient import map_request as packed_map
from vfiouser_oob.devices.kernel_vfio import maps, worker
from vfiouser_oob.devices.kernel_vfio import session as session_module
from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.status import function_status
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import listen_on_path

MIB = 1 << 20
GIB = 1 << 30
MAP_DMA, UNMAP_DMA, RESET = BASE + 13, BASE + 14, BASE + 11


class SlowKernel(FakeKernel):
    """A kernel whose clock goes on by so many seconds in each call of a kind, and that does not really wait."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.now = 1000.0
        self.costs: dict[int, float] = {}

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Let time pass."""
        self.now += self.costs.get(request, 0.0)
        return super().ioctl(fd, request, argument)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowKernel:
    """A slow machine by whose clock durations are measured."""
    machine = SlowKernel(tmp_path)
    clock = SimpleNamespace(monotonic=lambda: machine.now)
    for module in (maps, worker, session_module):
        monkeypatch.setattr(module, "time", clock)
    return machine


@pytest.fixture
def big() -> Iterator[int]:
    """A client's memory of 4 GiB that takes none."""
    fd = os.memfd_create("big")
    os.ftruncate(fd, 4 * GIB)
    yield fd
    os.close(fd)


def records(caplog: pytest.LogCaptureFixture, level: int) -> list[tuple[str, dict[str, Any]]]:
    """What the backend logged at a level: phrase and fields."""
    return [
        (record.getMessage(), record.__dict__["fields"])
        for record in caplog.records
        if record.levelno == level and "kernel_vfio" in record.name
    ]


async def test_progress_of_a_big_range(kernel: SlowKernel, big: int, caplog: pytest.LogCaptureFixture) -> None:
    """How far a big map is stands in the log about each second, and at the end that it was slow."""
    caplog.set_level(logging.INFO)
    kernel.costs[MAP_DMA] = 1.5
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(4 * GIB, 4 * GIB), copies(big)))
    progress = [fields for text, fields in records(caplog, logging.INFO) if text == "mapping memory"]
    assert [("1G", 1.5), ("2G", 3.0), ("3G", 4.5)] == [(fields["done"], fields["seconds"]) for fields in progress]
    assert {"4G"} == {fields["of"] for fields in progress}
    ((text, fields),) = records(caplog, logging.WARNING)
    assert "mapping memory was slow" in text
    assert "prealloc=on" in fields["advice"]
    assert "x-msg-timeout" in fields["advice"]


async def test_a_map_that_will_not_be_in_time_is_foreseen(
    kernel: SlowKernel, big: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As soon as the pace tells that the deadline will be missed, the log says so, with what helps."""
    kernel.costs[MAP_DMA] = 2.0
    async with session(kernel) as client:
        with trio.fail_after(4):
            await answer(client.dma_map(map_request(4 * GIB, 4 * GIB), copies(big)))
    text, fields = records(caplog, logging.WARNING)[0]
    assert "mapping memory will take longer than the reply budget" == text
    assert ("1G", "4G") == (fields["done"], fields["of"])
    assert "reply_budget_s" in fields["advice"]


async def test_quick_maps_are_quiet(kernel: SlowKernel, big: int, caplog: pytest.LogCaptureFixture) -> None:
    """A range that is mapped at once is worth a line at debug level only."""
    caplog.set_level(logging.DEBUG)
    kernel.costs[MAP_DMA] = 0.1
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(4 * GIB, 4 * GIB), copies(big)))
    assert ["memory mapped"] == [text for text, _ in records(caplog, logging.DEBUG) if "memory" in text]
    assert [] == records(caplog, logging.INFO) + records(caplog, logging.WARNING)


async def test_a_slow_reset_is_told_with_advice(kernel: SlowKernel, caplog: pytest.LogCaptureFixture) -> None:
    """A reset that took seconds, with what helps a client that does not wait so long."""
    kernel.costs[RESET] = 3.0
    async with session(kernel) as client:
        reset = client.reset()
        assert reset is not None
        await reset
        ((text, fields),) = records(caplog, logging.WARNING)
    assert "the kernel was slow" in text
    assert ("resetting the function", 3.0) == (fields["what"], fields["seconds"])
    assert "x-msg-timeout" in fields["advice"]


async def test_memory_without_a_file_is_a_debug_line(kernel: SlowKernel, caplog: pytest.LogCaptureFixture) -> None:
    """Ranges of ROMs and BARs are no cause for concern, and can be found when somebody looks for them."""
    caplog.set_level(logging.DEBUG)
    async with session(kernel) as client:
        await answer(client.dma_map(map_request(0xE000_0000, 0x4000), []))
    ((text, fields),) = (record for record in records(caplog, logging.DEBUG) if "memory" in record[0])
    assert "memory without a descriptor is not mapped" == text
    assert ("0xe0000000", 0x4000) == (fields["address"], fields["size"])


async def test_the_deadline_holds_over_the_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A map that hangs in the kernel is ETIMEDOUT within the budget, is undone, and the next one is served."""
    kernel = FakeKernel(tmp_path)
    activity = Activity()
    backend = KernelVfioBackend(kernel, BDF, handover_s=0.02, retry_s=0.01)
    served = Function("f0", backend, reply_budget_s=0.1, activity=activity, events=EventHub(), log=log.get("function"))
    config = function(tmp_path)
    assert config.socket is not None
    listener = listen_on_path(config.socket, 0o600)
    memory = os.memfd_create("client")
    os.ftruncate(memory, MIB)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.run_device)
            nursery.start_soon(served.serve, listener)
            async with attached(config.socket) as client:
                kernel.gate.clear()
                assert errno.ETIMEDOUT == await client.errno(DMA_MAP, packed_map(0, MIB), [memory])
                assert "DMA_MAP took longer than 0.1 s" in (function_status(served)["last_error"] or "")
                kernel.gate.set()
                await until(lambda: not kernel.iommu.ranges and not kernel.views)
                await client.dma_map(0, MIB, memory)
                assert [(0, MIB, 3)] == kernel.iommu.ranges
            nursery.cancel_scope.cancel()
    os.close(memory)
    listener.close()
    activity.close()
    text, fields = next(record for record in records(caplog, logging.WARNING) if "undone" in record[0])
    assert "mapping memory took too long; it is undone" == text
    assert "prealloc=on" in fields["advice"]


async def test_unmap_is_answered_when_the_kernel_has_done_it(tmp_path: Path) -> None:
    """While the IOMMU still has a range there is no answer, and it counts as mapped; also when all are unmapped."""

    class Held(FakeKernel):
        """Its UNMAP_DMA waits."""

        holding = False

        def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
            """Wait for the gate before an unmap."""
            if self.holding and request == UNMAP_DMA:
                self.mapping.set()
                self.gate.wait(10)
            return super().ioctl(fd, request, argument)

    kernel = Held(tmp_path)
    memory = os.memfd_create("client")
    os.ftruncate(memory, MIB)
    async with session(kernel) as client:
        for by_range in (True, False):
            await answer(client.dma_map(map_request(0, MIB), copies(memory)))
            kernel.holding = True
            kernel.gate.clear()
            kernel.mapping.clear()
            job = client.dma_unmap(unmap_request(0, MIB)) if by_range else client.dma_unmap_all()
            assert job is not None
            answered = trio.Event()

            async def wait(job: Awaitable[None] = job, answered: trio.Event = answered) -> None:
                await job
                answered.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.to_thread.run_sync(kernel.mapping.wait)
                assert not answered.is_set()
                assert 1 == len(client.memory.map)
                assert [(0, MIB, 3)] == kernel.iommu.ranges
                kernel.gate.set()
            assert answered.is_set()
            assert 0 == len(client.memory.map)
            assert [] == kernel.iommu.ranges
            kernel.holding = False
    os.close(memory)
