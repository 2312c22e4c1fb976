"""A client that has no memory, for tests in which no function does DMA."""

from __future__ import annotations

from vfiouser_oob.devices.base import ClientLink
from vfiouser_protocol.capabilities import VersionCapabilities


class MemorylessClient(ClientLink):
    """A client without memory, whose function is never lost."""

    capabilities = VersionCapabilities()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Fail: nothing is there."""
        raise AssertionError(f"DMA read of {count} bytes at {address:#x} from a client without memory")

    async def dma_write(self, address: int, data: bytes) -> None:
        """Fail: nothing is there."""
        raise AssertionError(f"DMA write of {len(data)} bytes at {address:#x} to a client without memory")

    def fail(self, reason: str) -> None:
        """Fail: the function is never lost here."""
        raise AssertionError(reason)
