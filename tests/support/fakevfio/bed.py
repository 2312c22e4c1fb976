"""A backend on a fake kernel, and a client of it."""

from __future__ import annotations

import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from fakevfio.kernel import FakeKernel
from vfiouser_oob.config.schema import RegionPolicy, VfioInterface
from vfiouser_oob.devices.base import ClientLink
from vfiouser_oob.devices.kernel_vfio.backend import KernelVfioBackend
from vfiouser_oob.devices.kernel_vfio.session import KernelVfioSession
from vfiouser_oob.transport.fds import OwnedFd, close_fds
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.messages import DmaMap, DmaUnmap, SetIrqs

T = TypeVar("T")


class NoMessages(ClientLink):
    """A client that is never asked for anything: real functions do no DMA by messages."""

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


@asynccontextmanager
async def running(
    kernel: FakeKernel,
    policy: RegionPolicy = RegionPolicy.AUTO,
    *,
    interface: VfioInterface = VfioInterface.AUTO,
    handover_s: float = 0.02,
    retry_s: float = 0.01,
) -> AsyncIterator[KernelVfioBackend]:
    """A backend whose tasks run."""
    backend = KernelVfioBackend(
        kernel, kernel.name, policy, interface=interface, handover_s=handover_s, retry_s=retry_s
    )
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.run)
            yield backend
            nursery.cancel_scope.cancel()
    close_fds(_lent)
    _lent.clear()


@asynccontextmanager
async def session(kernel: FakeKernel, policy: RegionPolicy = RegionPolicy.AUTO) -> AsyncIterator[KernelVfioSession]:
    """A client's session, closed at the end."""
    async with running(kernel, policy) as backend:
        opened = await backend.open(NoMessages())
        assert isinstance(opened, KernelVfioSession)
        try:
            yield opened
        finally:
            await opened.close()


async def answer(result: T | Awaitable[T]) -> T:
    """Take a backend's answer, whether or not it has to be waited for."""
    if inspect.isawaitable(result):
        waited: T = await result
        return waited
    return result


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads run until something is so; the bed's own deadline bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
        await trio.sleep(0.001)


def map_request(address: int, size: int, *, flags: int = 3, offset: int = 0) -> DmaMap:
    """A DMA_MAP."""
    return DmaMap(32, flags, offset, address, size)


def unmap_request(address: int, size: int) -> DmaUnmap:
    """A DMA_UNMAP."""
    return DmaUnmap(24, 0, address, size)


def irq_request(index: int, flags: int, start: int = 0, count: int = 0, data: bytes = b"") -> SetIrqs:
    """A SET_IRQS."""
    return SetIrqs(20 + len(data), flags, index, start, count, data)


#: What came with commands: a connection closes what the handlers did not take.
_lent: list[OwnedFd] = []


def given(*fds: int) -> list[OwnedFd]:
    """Descriptors as they come with a command; owned from now on."""
    owned = [OwnedFd(fd) for fd in fds]
    _lent.extend(owned)
    return owned


def copies(*fds: int) -> list[OwnedFd]:
    """Copies of descriptors, as they come with a command."""
    return given(*map(os.dup, fds))


def eventfds(count: int) -> list[int]:
    """New eventfds."""
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
