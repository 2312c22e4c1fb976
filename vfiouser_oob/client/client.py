"""Every command of vfio-user as a method, checked, split to the server's limits, its reply decoded."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self, Unpack

from vfiouser_oob.client.calls import PendingCall, Reply
from vfiouser_oob.client.connecting import ClientOptions, connect_socket
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.client.interrupts import InterruptCommands
from vfiouser_oob.client.migration import MigrationCommands
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.client.replies import (
    DIRTY_BITMAP_OFFSET,
    bitmap_size,
    check_length,
    check_written,
    checked_bitmap,
    close_all,
    closing_on_error,
    decode_reply,
    region_data,
)
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import Command, DmaMapFlags, DmaUnmapFlags
from vfiouser_protocol.errors import LocalProtocolError, RemoteProtocolError
from vfiouser_protocol.limits import MAX_IO_FDS, MAX_SPARSE_AREAS
from vfiouser_protocol.messages import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    RegionWriteMulti,
    RegionWriteMultiReply,
)
from vfiouser_protocol.messages_device import REGION_IO_FDS_FIXED
from vfiouser_protocol.regions import RegionDescription, parse_region_info

_DEVICE_INFO_SIZE = 16
_DMA_MAP_SIZE = 32
_DMA_UNMAP_SIZE = 24
_MULTI_WRITE_SIZE = 24
#: Room for the capabilities of most regions, so that one exchange is enough for them.
_REGION_INFO_ROOM = 1024
#: What a server may ask us to make room for in GET_REGION_INFO: every area that is believed, and other capabilities.
_MAX_REGION_INFO = _REGION_INFO_ROOM + 16 * MAX_SPARSE_AREAS
#: The same for GET_REGION_IO_FDS, with entries of the longer form.
_MAX_IO_FDS_INFO = REGION_IO_FDS_FIXED + 48 * MAX_IO_FDS
_READ_WRITE = DmaMapFlags.READ | DmaMapFlags.WRITE
#: Plain numbers for the hot path.
_REGION_READ = int(Command.REGION_READ)
_REGION_WRITE = int(Command.REGION_WRITE)


@dataclass(frozen=True, slots=True)
class ClientRegion:
    """A region as the server describes it.

    Args:
        description: size, flags, areas that may be mapped.
        fd: what to map, owned by the caller; None if the region cannot be mapped.
    """

    description: RegionDescription
    fd: OwnedFd | None

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        if self.fd is not None:
            self.fd.close()


@dataclass(frozen=True, slots=True)
class ClientIoFds:
    """Sub-regions of a region that have descriptors of their own.

    Args:
        reply: the decoded reply.
        fds: its descriptors, owned by the caller.
    """

    reply: RegionIoFds
    fds: Sequence[OwnedFd]

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self.fds:
            fd.close()


class Client(InterruptCommands, MigrationCommands):
    """A vfio-user client: `connect` or `from_socket`, or `run` in a nursery of the caller's.

    Every method raises `ReplyError` with the server's errno when it refuses, `BadReply` when its answer makes
    no sense, and `ServerGone` when the connection has ended. A deadline is the caller's cancel scope.
    """

    @classmethod
    @asynccontextmanager
    async def from_socket(cls, sock: socket.socket, **options: Unpack[ClientOptions]) -> AsyncIterator[Self]:
        """Use a connected socket, negotiated, in a block.

        Args:
            sock: a connected UNIX stream socket; owned from now on.
            options: the keyword arguments of `Connection`.

        Raises:
            ReplyError: the server refused VERSION.
            ServerGone: it went away meanwhile.
        """
        client = cls(sock, **options)
        async with background_nursery() as nursery:
            await nursery.start(client.run)
            try:
                yield client
            finally:
                client.close()

    @classmethod
    @asynccontextmanager
    async def connect(cls, path: str | os.PathLike[str], **options: Unpack[ClientOptions]) -> AsyncIterator[Self]:
        """Connect to a server's socket and use the connection, negotiated, in a block.

        Args:
            path: where the server listens.
            options: the keyword arguments of `Connection`.

        Raises:
            OSError: nobody listens there, or it is not permitted.
            ReplyError: the server refused VERSION.
            ServerGone: it went away meanwhile.
        """
        async with cls.from_socket(await connect_socket(path), **options) as client:
            yield client

    # The device

    async def get_info(self) -> DeviceInfo:
        """Ask for the device's flags and numbers of regions and IRQ indices."""
        return await self.take_info(self.submit_info())

    def submit_info(self) -> PendingCall:
        """Ask what `get_info` asks without waiting; `take_info` takes the answer."""
        return self.submit(Command.DEVICE_GET_INFO, encode(DeviceInfo(_DEVICE_INFO_SIZE)))

    async def take_info(self, call: PendingCall) -> DeviceInfo:
        """Wait for what `submit_info` asked for.

        Args:
            call: the question.
        """
        return decode_reply(DeviceInfo, Command.DEVICE_GET_INFO, await call.wait())

    async def reset(self) -> None:
        """Reset the device; mappings and interrupts' set-up stay."""
        await self.request(Command.DEVICE_RESET)

    async def get_region_info(self, index: int) -> ClientRegion:
        """Ask for a region, a second time with more room when its description needs it.

        Args:
            index: region index.

        Returns:
            The region; its descriptor is the caller's.

        Raises:
            BadReply: the description is malformed, of another region, or larger than any region's can be.
        """
        return await self.take_region_info(self.submit_region_info(index), index)

    def submit_region_info(self, index: int, room: int = _REGION_INFO_ROOM) -> PendingCall:
        """Ask for a region without waiting; `take_region_info` takes the answer.

        Args:
            index: region index.
            room: bytes that its description may have.
        """
        return self.submit(Command.DEVICE_GET_REGION_INFO, encode(RegionInfo(room, 0, index)))

    async def take_region_info(self, call: PendingCall, index: int) -> ClientRegion:
        """Wait for what `submit_region_info` asked for; otherwise like `get_region_info`.

        Args:
            call: the question.
            index: which region it is about.

        Returns:
            The region; its descriptor is the caller's.

        Raises:
            BadReply: the server's description makes no sense.
        """
        reply, info = await _region_info(call)
        if info.argsz > _REGION_INFO_ROOM:
            close_all(reply.fds)
            reply, info = await _region_info(self.submit_region_info(index, info.argsz))
        with closing_on_error(reply.fds):
            try:
                description = parse_region_info(reply.payload)
            except RemoteProtocolError as error:
                raise BadReply(f"the server's description of region {index} is malformed: {error}") from error
            if description.size and description.index != index:
                raise BadReply(f"the server described region {description.index} when asked for {index}")
        return ClientRegion(description, reply.fds[0] if reply.fds else None)

    async def get_region_io_fds(self, index: int) -> ClientIoFds:
        """Ask for the sub-regions of a region that have eventfds or ioregionfds of their own.

        Args:
            index: region index.

        Returns:
            The sub-regions; the descriptors are the caller's.

        Raises:
            BadReply: the answer is malformed, about another region, or longer than any region's can be.
        """
        reply, info = await self._io_fds(index, _REGION_INFO_ROOM)
        if info.argsz > _REGION_INFO_ROOM:
            close_all(reply.fds)
            reply, info = await self._io_fds(index, info.argsz)
        return ClientIoFds(info, reply.fds)

    async def _io_fds(self, index: int, argsz: int) -> tuple[Reply, RegionIoFds]:
        command = Command.DEVICE_GET_REGION_IO_FDS
        request = encode(RegionIoFds(argsz, 0, index))
        reply = await self.request(command, request)
        with closing_on_error(reply.fds):
            check_length(command, reply.payload, _MAX_IO_FDS_INFO)
            return reply, decode_reply(RegionIoFds, command, reply)

    # Regions

    async def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read from a region, in as many commands as the server's limit needs.

        Args:
            region: region index.
            offset: offset inside the region.
            count: bytes.
        """
        limit = self.max_data_xfer_size
        if count <= limit:
            request = encode(RegionRead(offset, region, count))
            data = region_data(await self.request(Command.REGION_READ, request), offset, region, count)
            if len(data) == count:
                return data
        else:
            data = b""
        parts = [data]
        done = len(data)
        while done < count:
            want = min(limit, count - done)
            request = encode(RegionRead(offset + done, region, want))
            data = region_data(await self.request(Command.REGION_READ, request), offset + done, region, want)
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def region_read_now(self, region: int, offset: int, count: int) -> bytes | Awaitable[bytes]:
        """Read from a region, looking for the reply for a moment before giving something to wait for.

        Args:
            region: region index.
            offset: offset inside the region.
            count: bytes, at most `max_data_xfer_size`.
        """
        call = self.exchange_now(_REGION_READ, encode(RegionRead(offset, region, count)))
        if call.done:
            data = region_data(call.take(), offset, region, count)
            if len(data) == count:
                return data
            return self._rest_of_read(data, region, offset, count)
        return self._finish_read(call, region, offset, count)

    async def _finish_read(self, call: PendingCall, region: int, offset: int, count: int) -> bytes:
        data = region_data(await call.wait(), offset, region, count)
        return data if len(data) == count else await self._rest_of_read(data, region, offset, count)

    async def _rest_of_read(self, data: bytes, region: int, offset: int, count: int) -> bytes:
        return data + await self.region_read(region, offset + len(data), count - len(data))

    async def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write to a region, in as many commands as the server's limit, or ours, needs.

        Args:
            region: region index.
            offset: offset inside the region.
            data: the bytes.
            posted: send with NO_REPLY: returns at once, and no reply comes, not even for an error.
        """
        limit = self.max_write_size
        if len(data) <= limit:
            await self._write_part(region, offset, data, posted)
            return
        view = memoryview(data)
        for done in range(0, len(data), limit):
            await self._write_part(region, offset + done, bytes(view[done : done + limit]), posted)

    async def _write_part(self, region: int, offset: int, data: bytes, posted: bool) -> None:
        request = encode(RegionWrite(offset, region, len(data), data))
        if posted:
            await self.post_when_possible(Command.REGION_WRITE, request)
            return
        check_written(await self.request(Command.REGION_WRITE, request), len(data))

    def region_write_now(self, region: int, offset: int, data: bytes) -> Awaitable[None] | None:
        """Write to a region, looking for the reply for a moment before giving something to wait for.

        Args:
            region: region index.
            offset: offset inside the region.
            data: the bytes, at most `max_write_size`.

        Returns:
            None when it is done.
        """
        call = self.exchange_now(_REGION_WRITE, encode(RegionWrite(offset, region, len(data), data)))
        if call.done:
            check_written(call.take(), len(data))
            return None
        return self._finish_write(call, len(data))

    async def _finish_write(self, call: PendingCall, count: int) -> None:
        check_written(await call.wait(), count)

    async def region_write_multi(self, writes: Sequence[RegionWrite], *, posted: bool = False) -> int:
        """Write several times in one command, or in as few as our limit needs; usable when
        `capabilities.write_multiple` is set.

        Args:
            writes: writes of one to eight bytes each, done in order.
            posted: send with NO_REPLY.

        Returns:
            How many writes were done, as far as the server says.

        Raises:
            LocalProtocolError: the server does not offer the command.
            BadReply: the server says that it did more writes than it was sent.
        """
        if not self.capabilities.write_multiple:
            raise LocalProtocolError("REGION_WRITE_MULTI was not negotiated")
        step = max(1, self.max_write_size // _MULTI_WRITE_SIZE)
        done = 0
        for start in range(0, len(writes), step):
            part = tuple(writes[start : start + step])
            request = encode(RegionWriteMulti(part))
            if posted:
                await self.post_when_possible(Command.REGION_WRITE_MULTI, request)
                done += len(part)
                continue
            reply = await self.request(Command.REGION_WRITE_MULTI, request)
            written = decode_reply(RegionWriteMultiReply, Command.REGION_WRITE_MULTI, reply).wr_cnt
            if written > len(part):
                raise BadReply(f"the server says that it did {written} of {len(part)} writes", errno.EIO)
            done += written
            if written < len(part):
                break
        return done

    # Memory

    async def dma_map(
        self, address: int, size: int, *, flags: int = _READ_WRITE, fd: HasFileno | None = None, offset: int = 0
    ) -> None:
        """Let the device use memory.

        Args:
            address: DMA address.
            size: bytes.
            flags: `DmaMapFlags`.
            fd: the memory's file; stays the caller's. None: the device reaches it by messages.
            offset: where in the file the memory begins.
        """
        await self.submit_dma_map(address, size, flags=flags, fd=fd, offset=offset).wait()

    def submit_dma_map(
        self, address: int, size: int, *, flags: int = _READ_WRITE, fd: HasFileno | None = None, offset: int = 0
    ) -> PendingCall:
        """Send a DMA_MAP without waiting, as VMMs do in bursts; arguments as for `dma_map`.

        Args:
            address: DMA address of the first byte.
            size: bytes.
            flags: `DmaMapFlags`.
            fd: the file behind it; None: the device reaches it by messages.
            offset: where it starts in the file, bytes.

        Returns:
            The call; wait for it to learn whether the server agreed.
        """
        request = encode(DmaMap(_DMA_MAP_SIZE, int(flags), offset, address, size))
        return self.submit(Command.DMA_MAP, request, () if fd is None else (fd,))

    async def dma_unmap(self, address: int, size: int) -> None:
        """Take memory back; address and size must be those of one mapping.

        Args:
            address: DMA address of the first byte.
            size: bytes.
        """
        await self.submit_dma_unmap(address, size).wait()

    def submit_dma_unmap(self, address: int, size: int) -> PendingCall:
        """Send a DMA_UNMAP without waiting; arguments as for `dma_unmap`.

        Args:
            address: DMA address of the first byte.
            size: bytes.

        Returns:
            The call; wait for it before you use the memory otherwise.
        """
        return self.submit(Command.DMA_UNMAP, encode(DmaUnmap(_DMA_UNMAP_SIZE, 0, address, size)))

    async def dma_unmap_dirty(self, address: int, size: int, page_size: int) -> bytes:
        """Take memory back and learn which pages the device wrote (v1 generation).

        Args:
            address: DMA address.
            size: bytes.
            page_size: bytes per bit of the bitmap.
        """
        room = bitmap_size(size, page_size)
        flags = int(DmaUnmapFlags.GET_DIRTY_BITMAP)
        request = DmaUnmap(DIRTY_BITMAP_OFFSET + room, flags, address, size, page_size, room)
        reply = await self.request(Command.DMA_UNMAP, encode(request))
        return checked_bitmap(decode_reply(DmaUnmap, Command.DMA_UNMAP, reply).bitmap, room, Command.DMA_UNMAP)

    async def dma_unmap_all(self) -> None:
        """Take all memory back (v1 generation and libvfio-user)."""
        request = encode(DmaUnmap(_DMA_UNMAP_SIZE, int(DmaUnmapFlags.ALL), 0, 0))
        await self.request(Command.DMA_UNMAP, request)


async def _region_info(call: PendingCall) -> tuple[Reply, RegionInfo]:
    command = Command.DEVICE_GET_REGION_INFO
    reply = await call.wait()
    with closing_on_error(reply.fds):
        check_length(command, reply.payload, _MAX_REGION_INFO)
        return reply, decode_reply(RegionInfo, command, reply)
