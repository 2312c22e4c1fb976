"""What is proven in the guest below the protocol: the backend's own parts on the real kernel, without a daemon."""

from __future__ import annotations

import os
from pathlib import Path

import trio

from kvfio.bed import NVME
from vfiouser_agents.testing import CheckOutcome, check_agent
from vfiouser_oob.devices.base import ClientLink
from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
from vfiouser_oob.devices.kernel_vfio.kernel import LinuxKernel
from vfiouser_oob.devices.kernel_vfio.openers import choose_opener
from vfiouser_protocol.capabilities import VersionCapabilities

MIB = 1 << 20
PAGES = MIB // 4096
BUS = Path("/sys/bus/mdev/devices")


class NoMessages(ClientLink):
    """A client that is never asked for anything."""

    capabilities = VersionCapabilities()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Fail."""
        raise AssertionError("a real function asked for DMA by message")

    async def dma_write(self, address: int, data: bytes) -> None:
        """Fail."""
        raise AssertionError("a real function asked for DMA by message")

    def fail(self, reason: str) -> None:
        """Fail."""
        raise AssertionError(reason)


async def _check(name: str) -> None:
    backend = KernelVfioBackend(LinuxKernel(), name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.run)
        session = await backend.open(NoMessages())
        agent = backend.agent()
        results = await check_agent(lambda: agent, function_id=name)
        await session.close()
        nursery.cancel_scope.cancel()
    failed = [f"{result.name}: {result.detail}" for result in results if result.outcome is CheckOutcome.FAILED]
    passed = sum(result.outcome is CheckOutcome.PASSED for result in results)
    print(f"{passed} of {len(results)} passed")
    assert not failed, "\n".join(failed)
    assert passed > 0


def contract() -> None:
    """The contract of agents holds for the kernel's own migration on real drivers, with and without a dirty log."""
    drivers = {(path / "driver").resolve().name: path.name for path in BUS.glob("*")}
    assert {"mtty", "mttydma"} == drivers.keys()
    for name in drivers.values():
        trio.run(_check, name)


def container_log() -> None:
    """A real function's pages are all dirty, every time, those that were unmapped too."""
    opened = choose_opener(LinuxKernel(), NVME).open()
    fd = os.memfd_create("logged")
    os.ftruncate(fd, 4 * MIB)
    space = opened.space
    try:
        assert space.can_log
        for place in range(2):
            space.map(fd, place * MIB, place * MIB, MIB, read=True, write=True)
        space.start_log()
        everything = b"\xff" * (2 * PAGES // 8)
        for _ in range(2):
            assert everything == space.logged(0, 2 * MIB)
        assert b"\xff\x03" == space.logged(MIB - 4 * 4096, 10 * 4096), "a range that begins and ends within mappings"
        assert bytes(PAGES // 8) == space.logged(8 * MIB, MIB), "nothing is mapped there"
        space.map(fd, 2 * MIB, 4 * MIB, MIB, read=True, write=True)
        space.unmap(MIB, MIB)
        assert everything == space.logged(0, 2 * MIB), "what was unmapped counts once more"
        assert b"\xff" * (PAGES // 8) + bytes(PAGES // 8) == space.logged(0, 2 * MIB)
        assert b"\xff" * (PAGES // 8) == space.logged(4 * MIB, MIB)
        space.stop_log()
        space.unmap(0, MIB)
        space.unmap_all()
    finally:
        opened.close()
        os.close(fd)
