"""One connection's way into the migration of its function: both generations, the dirty log, the shadow of config space.

`server.handlers` asks the port; what a client may use depends on the configuration and on what the client announced.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeAlias

from vfiouser_oob.config.schema import Generations, MigrationConfig
from vfiouser_oob.devices.base import BackendSession, BackendUnavailable
from vfiouser_oob.migration.attached_device import AttachedDevice
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.held_writes import HeldWrites
from vfiouser_oob.migration.inherited import NO_V1_MARK, KeptClient, V1Mark
from vfiouser_oob.migration.message_time import message_deadline
from vfiouser_oob.migration.no_migration import CONFIG_HEAD
from vfiouser_oob.migration.record import Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.migration.v1_view import V1View
from vfiouser_oob.migration.v2_view import V2View
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import RegionIndex
from vfiouser_protocol.dirty_pages import GetDirty, StartDirty, interpret_dirty_pages, require_dirty_range
from vfiouser_protocol.dma_logging import require_unmap_bitmap
from vfiouser_protocol.errors import CommandError, VfioUserError
from vfiouser_protocol.limits import DEFAULT_MAX_BITMAP_SIZE
from vfiouser_protocol.messages import DmaUnmap

Answer: TypeAlias = "bytes | Awaitable[bytes | Pieces]"


class MigrationPort:
    """What a connection asks of the migration engine; made by `attach`.

    Args:
        runner: the function's.
        device: the device as opened for this client.
        name: the function's name.
        client: what the client announced.
        v1: what it knows of the migration region.
    """

    def __init__(
        self,
        runner: MigrationRunner,
        device: AttachedDevice,
        name: str,
        client: VersionCapabilities,
        v1: V1Mark = NO_V1_MARK,
    ) -> None:
        session = device.session
        announced = client.migration is not None
        caps = runner.link.caps
        #: Whether the function can be migrated, as far as is known: what the agent said last, else the configuration.
        self.migratable = runner.record.blocked is None and (caps is None or caps.stop_copy)
        self.runner = runner
        self.shadow = device.shadow
        self._device = device
        self._page_size = 4096
        self.dirty = device.dirty
        self.held = device.held
        use_v1, use_v2 = _generations(runner.config, announced) if self.migratable else (False, False)
        index = max(RegionIndex.MIGRATION, len(session.description.regions))
        self.v1: V1View | None = None
        if use_v1:
            transfer = Transfer(runner, Owner.V1)
            self.v1 = V1View(transfer, name, index, runner.config.v1_data_size, device.notes)
            self.v1.restore(v1)
        self._use_v2 = use_v2
        self.v2: V2View | None = None

    def negotiated(self, client: VersionCapabilities, offer: VersionCapabilities, page_size: int | None) -> None:
        """Take what VERSION settled.

        Args:
            client: what the client takes.
            offer: what we take.
            page_size: bytes per bit of v1's dirty bitmaps, if both sides named it.
        """
        self._page_size = page_size or self._page_size
        if self._use_v2:
            transfer = Transfer(self.runner, Owner.V2)
            limits = (client.max_data_xfer_size, offer.max_data_xfer_size)
            self.v2 = V2View(transfer, self.dirty, self.runner.config, *limits)

    # Commands

    def device_feature(self, payload: bytes, *, posted: bool) -> Answer:
        """DEVICE_FEATURE."""
        return self._v2("DEVICE_FEATURE").device_feature(payload, posted=posted)

    def mig_data_read(self, payload: bytes, *, posted: bool) -> Pieces | Awaitable[Pieces]:
        """MIG_DATA_READ."""
        if posted:
            raise CommandError("MIG_DATA_READ without a reply would lose the data that it asks for; none is taken")
        return self._v2("MIG_DATA_READ").data_read(payload)

    def mig_data_write(self, payload: bytes) -> Awaitable[bytes]:
        """MIG_DATA_WRITE."""
        return self._v2("MIG_DATA_WRITE").data_write(payload)

    def _v2(self, what: str) -> V2View:
        if self.v2 is None:
            raise CommandError(f"{what} on a function that does not offer generation v2 of migration")
        return self.v2

    async def dirty_pages(self, payload: bytes, *, posted: bool) -> bytes:
        """DIRTY_PAGES."""
        deadline = message_deadline()
        await self.dirty.reclaim(deadline)
        call = interpret_dirty_pages(payload, self.dirty.log, migratable=self.v1 is not None)
        if isinstance(call, StartDirty):
            await self.dirty.start(self._page_size, (), deadline)
            return b""
        if not isinstance(call, GetDirty):
            await self.dirty.stop(deadline)
            return b""
        iova, length = call.iova, call.length
        mapped = any(True for _ in self._device.session.memory.map.overlapping(iova, length))
        require_dirty_range(call, mapped=mapped, by_file=self.dirty.by_file(iova, length))
        if call.short is not None:
            return call.short
        reply = call.reply(bytes(await self.dirty.report(iova, length, call.page_size, deadline)))
        if posted:
            # A report that is not sent has told nobody anything.
            self.dirty.undo_report()
        return reply

    async def unmap_dirty(self, request: DmaUnmap) -> bytes:
        """DMA_UNMAP with GET_DIRTY_BITMAP: what is dirty is told with the reply, then forgotten.

        Args:
            request: the decoded command.

        Raises:
            CommandError: nothing is logged, or the range is not mapped so.
        """
        require_unmap_bitmap(request, self.dirty.log)
        session, page_size = self._device.session, request.bitmap_pgsize or 0
        session.memory.require(request)
        # Unmapped first: what the device writes until then is in the report.
        regions = list(session.memory.map.overlapping(request.address, request.size))
        done = session.dma_unmap(request)
        if done is not None:
            await done
        bitmap = await self.dirty.report(request.address, request.size, page_size, message_deadline(), regions)
        await self.dirty.forget_range(request.address, request.size)
        return encode(request._replace(bitmap=bytes(bitmap)))

    # What the connection tells

    def reset(self) -> Awaitable[None]:
        """DEVICE_RESET."""
        return self.runner.reset()

    async def function_reset(self) -> None:
        """The guest has reset the function through configuration space, which the device has done already."""
        await self.runner.function_reset()

    def unmapped(self, iova: int, length: int) -> Awaitable[None] | None:
        """A mapping went away; if it was a large one, forgetting its pages has to be waited for."""
        return self.dirty.unmapped(iova, length)

    def config_written(self, offset: int, data: bytes) -> bool:
        """Note a write to configuration space; returns whether it resets the function."""
        return self.shadow.note(offset, data)

    async def detach(self) -> None:
        """The client has gone."""
        try:
            await self.runner.detach(logged=self.dirty.forget())
        finally:
            if self.v1 is not None:
                self.v1.close()


def _generations(config: MigrationConfig, announced: bool) -> tuple[bool, bool]:
    """Whether v1 and v2 are offered to a client."""
    return {
        Generations.AUTO: (announced, True),
        Generations.BOTH: (True, True),
        Generations.V1: (True, False),
        Generations.V2: (False, True),
        Generations.NONE: (False, False),
    }[config.generations]


async def attach(
    runner: MigrationRunner,
    session: BackendSession,
    name: str,
    client: VersionCapabilities,
    kept: KeptClient | None = None,
) -> MigrationPort:
    """Connect a client to the migration of its function.

    Args:
        runner: the function's.
        session: the device as opened for the client.
        name: the function's name.
        client: what the client announced.
        kept: what another daemon has left of it, and takes it down for the next one; None: none does.

    Raises:
        BackendUnavailable: the function must not run before it was reset, and that cannot be done now.
    """
    taken = client.migration.max_bitmap_size if client.migration is not None else DEFAULT_MAX_BITMAP_SIZE
    # Whatever the client would take: this is memory of ours, and no VMM takes more.
    session.memory.log.max_bitmap_size = min(taken, DEFAULT_MAX_BITMAP_SIZE)
    dirty = DirtyTracker(
        runner.link,
        runner.tracer,
        runner,
        session.memory.map,
        session.memory.log,
        device_seen=session.device_seen,
        by_message=session.memory.by_message,
        call_s=runner.config.call_s,
        notes=None if kept is None else kept.notes,
    )
    device = AttachedDevice(session, ConfigShadow(), dirty, HeldWrites(), None if kept is None else kept.notes)
    try:
        head = session.region_read(RegionIndex.CONFIG, 0, CONFIG_HEAD)
        device.shadow.learn(head if isinstance(head, bytes) else await head)
    except (VfioUserError, OSError) as error:
        raise BackendUnavailable(f"the device's configuration space cannot be read: {error}") from error
    if kept is not None:
        device.shadow.restore(kept.config)
        device.shadow.observer = kept.notes
        if kept.log is not None:
            dirty.resume(kept.log)
    if kept is not None and kept.goes_on:
        await runner.go_on(device, kept.mark)
    else:
        await runner.attach(device)
    return MigrationPort(runner, device, name, client, NO_V1_MARK if kept is None else kept.v1)
