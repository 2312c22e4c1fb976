"""The way into the migration of a function that has none: what there is to be done without it, and clear refusals."""

from __future__ import annotations

import errno
from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeAlias

from vfiouser_oob.devices.base import Answer, BackendSession
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.errors import CommandError, VfioUserError
from vfiouser_protocol.messages import DeviceFeature, DirtyPages, DmaUnmap, MigDataRead, MigDataWrite
from vfiouser_protocol.rules import check_request

if TYPE_CHECKING:
    from vfiouser_oob.migration.v1_view import V1View

#: What is needed of configuration space to find the registers that reset the function.
CONFIG_HEAD = 256
#: A reply's payload, or what waits for it.
PortReply: TypeAlias = "bytes | Pieces | Awaitable[bytes | Pieces]"


class Port(Protocol):
    """What a connection asks of the migration of its function, whether it has one or not."""

    @property
    def migratable(self) -> bool:
        """Whether the function can be migrated, as far as is known."""

    @property
    def v1(self) -> V1View | None:
        """The migration region, if this client has one."""

    @property
    def shadow(self) -> ConfigShadow:
        """Configuration space as this client wrote it."""

    def negotiated(self, client: VersionCapabilities, offer: VersionCapabilities, page_size: int | None) -> None:
        """Take what VERSION settled."""

    def reset(self) -> Answer[None]:
        """DEVICE_RESET."""

    def config_written(self, offset: int, data: bytes) -> bool:
        """Note a write to configuration space; returns whether it resets the function."""

    async def function_reset(self) -> None:
        """The guest has reset the function through configuration space, which the device has done already."""

    def unmapped(self, iova: int, length: int) -> Awaitable[None] | None:
        """A mapping went away."""

    def unmap_dirty(self, request: DmaUnmap) -> Awaitable[bytes]:
        """DMA_UNMAP with GET_DIRTY_BITMAP."""

    def dirty_pages(self, payload: bytes, *, posted: bool) -> Awaitable[bytes]:
        """DIRTY_PAGES."""

    def device_feature(self, payload: bytes, *, posted: bool) -> PortReply:
        """DEVICE_FEATURE."""

    def mig_data_read(self, payload: bytes, *, posted: bool) -> Pieces | Awaitable[Pieces]:
        """MIG_DATA_READ."""

    def mig_data_write(self, payload: bytes) -> Awaitable[bytes]:
        """MIG_DATA_WRITE."""

    async def detach(self) -> None:
        """The client has gone."""


class NoMigration:
    """What a connection asks of the migration of a function without an agent.

    Args:
        session: the device as opened for the client.
        max_transfer: bytes of the largest request that we take.
    """

    migratable = False
    v1: V1View | None = None

    def __init__(self, session: BackendSession, max_transfer: int) -> None:
        self._session = session
        self._max_transfer = max_transfer
        self.shadow = ConfigShadow()

    async def learn(self) -> None:
        """Find the registers that reset the function; a device that cannot be read now resets unnoticed."""
        with suppress(VfioUserError, OSError):
            head = self._session.region_read(RegionIndex.CONFIG, 0, CONFIG_HEAD)
            self.shadow.learn(head if isinstance(head, bytes) else await head)

    def negotiated(self, client: VersionCapabilities, offer: VersionCapabilities, page_size: int | None) -> None:
        """Nothing depends on it."""

    def reset(self) -> Answer[None]:
        """The device alone is reset."""
        self.shadow.clear()
        return self._session.reset()

    def config_written(self, offset: int, data: bytes) -> bool:
        """Note it; whether it resets the function is told, though nothing but the note depends on it."""
        return self.shadow.note(offset, data)

    async def function_reset(self) -> None:
        """What the device has done is all there is to be done."""
        self.shadow.clear(keep_addresses=True)

    def unmapped(self, iova: int, length: int) -> Awaitable[None] | None:
        """No page is logged."""
        return None

    def unmap_dirty(self, request: DmaUnmap) -> Awaitable[bytes]:
        """Refused: nothing is logged."""
        raise CommandError("DMA_UNMAP asks for a dirty bitmap while nothing is logged")

    def dirty_pages(self, payload: bytes, *, posted: bool) -> Awaitable[bytes]:
        """Refused."""
        check_request(decode(DirtyPages, payload), self._max_transfer)
        raise CommandError("DIRTY_PAGES on a function that cannot be migrated", errno.ENOTSUP)

    def device_feature(self, payload: bytes, *, posted: bool) -> PortReply:
        """Refused, whatever the feature."""
        request = decode(DeviceFeature, payload)
        raise CommandError(f"feature {request.index} on a function that cannot be migrated")

    def mig_data_read(self, payload: bytes, *, posted: bool) -> Pieces | Awaitable[Pieces]:
        """Refused."""
        decode(MigDataRead, payload)
        raise CommandError("MIG_DATA_READ on a function that cannot be migrated")

    def mig_data_write(self, payload: bytes) -> Awaitable[bytes]:
        """Refused."""
        decode(MigDataWrite, payload)
        raise CommandError("MIG_DATA_WRITE on a function that cannot be migrated")

    async def detach(self) -> None:
        """Nobody has to know."""
