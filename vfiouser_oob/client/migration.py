"""The migration commands of both generations, as methods."""

from __future__ import annotations

from collections.abc import Sequence

from vfiouser_oob.client.connection import Connection
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.client.replies import (
    DIRTY_BITMAP_OFFSET,
    bitmap_size,
    checked_bitmap,
    decode_reply,
    decode_reply_part,
)
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import Command, DeviceState, DirtyPagesFlags, Feature, FeatureFlags
from vfiouser_protocol.messages import (
    DeviceFeature,
    DirtyPages,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
    LoggingRange,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
)

_FEATURE_SIZE = 8
_LOGGING_REPORT_SIZE = 24
_MIG_DATA_SIZE = 8
_DIRTY_PAGES_SIZE = 8


class MigrationCommands(Connection):
    """A connection that can drive a migration."""

    # Migration, v2 generation

    async def device_feature(self, flags: int, data: bytes = b"", *, room: int = 0) -> bytes:
        """Get, set or probe a feature.

        Args:
            flags: `Feature` number and `FeatureFlags`.
            data: the feature's payload.
            room: bytes of payload that the reply may have; at least those of `data`.

        Returns:
            The payload of the reply.
        """
        argsz = _FEATURE_SIZE + max(room, len(data))
        reply = await self.request(Command.DEVICE_FEATURE, encode(DeviceFeature(argsz, int(flags), data)))
        return decode_reply(DeviceFeature, Command.DEVICE_FEATURE, reply).data

    async def probe_feature(self, feature: int, methods: int = 0) -> None:
        """Ask whether `feature` exists and has all of `methods` (`FeatureFlags` GET, SET)."""
        await self.device_feature(feature | FeatureFlags.PROBE | methods)

    async def get_migration_flags(self) -> int:
        """Ask which migration states the device has (`MigrationFlags`)."""
        data = await self.device_feature(Feature.MIGRATION | FeatureFlags.GET, room=8)
        return decode_reply_part(FeatureMigration, Command.DEVICE_FEATURE, data).flags

    async def get_device_state(self) -> int:
        """Ask for the migration state (`DeviceState`)."""
        data = await self.device_feature(Feature.MIG_DEVICE_STATE | FeatureFlags.GET, room=8)
        return decode_reply_part(FeatureDeviceState, Command.DEVICE_FEATURE, data).device_state

    async def set_device_state(self, state: DeviceState) -> None:
        """Go to a migration state; returns when the device is there."""
        data = encode(FeatureDeviceState(int(state)))
        await self.device_feature(Feature.MIG_DEVICE_STATE | FeatureFlags.SET, data)

    async def start_dma_logging(self, page_size: int, ranges: Sequence[LoggingRange] = ()) -> int:
        """Start to log what the device writes.

        Args:
            page_size: bytes per bit that the client would like.
            ranges: what to log; nothing means everything.

        Returns:
            The page size that the device chose.
        """
        data = encode(FeatureLoggingStart(page_size, tuple(ranges)))
        reply = await self.device_feature(Feature.DMA_LOGGING_START | FeatureFlags.SET, data)
        return decode_reply_part(FeatureLoggingStart, Command.DEVICE_FEATURE, reply).page_size

    async def stop_dma_logging(self) -> None:
        """Stop logging what the device writes."""
        await self.device_feature(Feature.DMA_LOGGING_STOP | FeatureFlags.SET)

    async def report_dma_logging(self, iova: int, length: int, page_size: int) -> bytes:
        """Read and clear the log of a range; bit n stands for the page at iova + n * page_size.

        Args:
            iova: first DMA address.
            length: bytes.
            page_size: bytes per bit.

        Returns:
            The bitmap, in whole 64-bit words.

        Raises:
            BadReply: the bitmap has the wrong size.
        """
        room = bitmap_size(length, page_size)
        data = encode(FeatureLoggingReport(iova, length, page_size))
        flags = Feature.DMA_LOGGING_REPORT | FeatureFlags.GET
        reply = await self.device_feature(flags, data, room=_LOGGING_REPORT_SIZE + room)
        report = decode_reply_part(FeatureLoggingReport, Command.DEVICE_FEATURE, reply)
        return checked_bitmap(report.bitmap, room, Command.DEVICE_FEATURE)

    async def mig_data_read(self, size: int) -> bytes:
        """Read device state; fewer bytes than `size` mean that no more is ready now.

        Args:
            size: bytes wanted at most.

        Raises:
            BadReply: the server sent more than `size`.
        """
        request = encode(MigDataRead(_MIG_DATA_SIZE + size, size))
        reply = await self.request(Command.MIG_DATA_READ, request)
        data = decode_reply(MigDataReadReply, Command.MIG_DATA_READ, reply).data
        if len(data) > size:
            raise BadReply(f"the server answered MIG_DATA_READ of {size} bytes with {len(data)}")
        return data

    async def mig_data_write(self, data: bytes) -> None:
        """Load device state, in as many commands as the server's limit, or ours, needs.

        Args:
            data: the state, or its next part.
        """
        limit = self.max_write_size
        view = memoryview(data)
        for start in range(0, len(data), limit):
            part = bytes(view[start : start + limit])
            request = MigDataWrite(_MIG_DATA_SIZE + len(part), len(part), part)
            await self.request(Command.MIG_DATA_WRITE, encode(request))

    # Migration, v1 generation

    async def start_dirty_pages(self) -> None:
        """Start to log what the device writes (v1 generation)."""
        request = encode(DirtyPages(_DIRTY_PAGES_SIZE, int(DirtyPagesFlags.START)))
        await self.request(Command.DIRTY_PAGES, request)

    async def stop_dirty_pages(self) -> None:
        """Stop logging what the device writes (v1 generation)."""
        request = encode(DirtyPages(_DIRTY_PAGES_SIZE, int(DirtyPagesFlags.STOP)))
        await self.request(Command.DIRTY_PAGES, request)

    async def dirty_pages(self, iova: int, size: int, page_size: int) -> bytes:
        """Read and clear the log of a range (v1 generation); bit n stands for the page at iova + n *
        page_size.

        Args:
            iova: first DMA address.
            size: bytes.
            page_size: bytes per bit.

        Returns:
            The bitmap, in whole 64-bit words.

        Raises:
            BadReply: the bitmap has the wrong size.
        """
        room = bitmap_size(size, page_size)
        flags = int(DirtyPagesFlags.GET_BITMAP)
        request = DirtyPages(DIRTY_BITMAP_OFFSET + room, flags, iova, size, page_size, room)
        reply = await self.request(Command.DIRTY_PAGES, encode(request))
        return checked_bitmap(decode_reply(DirtyPages, Command.DIRTY_PAGES, reply).bitmap, room, Command.DIRTY_PAGES)
