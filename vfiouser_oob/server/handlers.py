"""What each command of the client does: decode, check, ask the device, encode.

One method per command, found through `Handlers.table`. A method returns the reply's payload, or a `ReplyWithFds` when
descriptors go with it, or an awaitable of either when the device has to be waited for; a refusal is a `CommandError`.
Ranges, counts and argsz are checked here once, for every kind of device.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from vfiouser_oob.devices.base import Answer, BackendSession, IoFds
from vfiouser_oob.migration.no_migration import Port
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import (
    Command,
    DmaUnmapFlags,
    RegionFlags,
    RegionIndex,
)
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.limits import MAX_MULTI_WRITES
from vfiouser_protocol.messages import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    Payload,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteMulti,
    RegionWriteMultiReply,
    RegionWriteReply,
    SetIrqs,
)
from vfiouser_protocol.regions import RegionSpec, region_info_reply
from vfiouser_protocol.rules import check_request, region_io_fds_reply

if TYPE_CHECKING:
    from vfiouser_oob.migration.v1_view import V1View

P = TypeVar("P", bound=Payload)

#: Plain numbers: an IntFlag costs a microsecond per operation, which a register access would pay.
_READ = int(RegionFlags.READ)
_WRITE = int(RegionFlags.WRITE)
NO_PAYLOAD = b""
_UNMAP_BITMAP = int(DmaUnmapFlags.GET_DIRTY_BITMAP)
_UNMAP_ALL = int(DmaUnmapFlags.ALL)
_UNMAP_KNOWN = _UNMAP_BITMAP | _UNMAP_ALL
_MAP_SIZE = 32
_UNMAP_SIZE = 24
_INFO_SIZE = 16
#: Writes of one REGION_WRITE_MULTI that are done in one turn; a VMM sends fewer.
_WRITES_PER_TURN = 64


class ReplyWithFds(NamedTuple):
    """A reply that carries descriptors.

    Args:
        payload: the reply's payload.
        fds: descriptors that go with it; they stay the device's.
    """

    payload: bytes
    fds: Sequence[HasFileno]


Result: TypeAlias = "bytes | ReplyWithFds | Pieces | Awaitable[bytes | ReplyWithFds | Pieces]"
#: What a handler returns when there is nothing to wait for.
READY = (bytes, ReplyWithFds, Pieces)
#: Payload, descriptors that mean something to the command (lent; what is kept is taken), and whether nobody waits for
#: the result.
_CONFIG = int(RegionIndex.CONFIG)
Handler: TypeAlias = Callable[[bytes, Sequence[OwnedFd], bool], Result]


class Handlers:
    """The commands of one negotiated connection.

    Args:
        session: the device, as opened for this client.
        max_transfer: largest `count` that we take, in bytes.
        port: the function's migration, as far as this client may use it.
    """

    def __init__(self, session: BackendSession, max_transfer: int, port: Port) -> None:
        self._session = session
        self._port = port
        self._v1 = port.v1
        self._regions = _with_migration(session.description.regions, self._v1)
        #: Index of the migration region; no region has the number that stands for none.
        self._v1_index = -1 if self._v1 is None else self._v1.index
        self._irqs = session.description.irqs
        self._max_transfer = max_transfer
        self._lane = FunctionQueue()
        #: Size and access of each region as plain numbers, for the hot path.
        self._bounds = [(region.size, int(region.flags)) for region in self._regions]
        named: dict[Command, Handler] = {
            Command.DMA_MAP: self.dma_map,
            Command.DMA_UNMAP: self.dma_unmap,
            Command.DEVICE_GET_INFO: self.get_info,
            Command.DEVICE_GET_REGION_INFO: self.get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self.get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self.get_irq_info,
            Command.DEVICE_SET_IRQS: self.set_irqs,
            Command.REGION_READ: self.region_read,
            Command.REGION_WRITE: self.region_write,
            Command.DEVICE_RESET: self.reset,
            Command.DIRTY_PAGES: self.dirty_pages,
            Command.REGION_WRITE_MULTI: self.region_write_multi,
            Command.DEVICE_FEATURE: self.device_feature,
            Command.MIG_DATA_READ: self.mig_data_read,
            Command.MIG_DATA_WRITE: self.mig_data_write,
        }
        #: Handlers by command number.
        self.table: dict[int, Handler] = {int(command): handler for command, handler in named.items()}

    # What the device is

    def get_info(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_GET_INFO."""
        self._decode(DeviceInfo, payload)
        flags = self._session.description.flags
        return encode(DeviceInfo(_INFO_SIZE, flags, len(self._regions), len(self._irqs)))

    def get_region_info(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_GET_REGION_INFO."""
        request = self._decode(RegionInfo, payload)
        spec = self._region(request.index)
        reply, attach = region_info_reply(spec, request.argsz)
        if attach and self._v1 is not None and request.index == self._v1_index:
            return ReplyWithFds(reply, (self._v1,))
        fd = self._session.region_fd(request.index) if attach else None
        return reply if fd is None else ReplyWithFds(reply, (fd,))

    def get_region_io_fds(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_GET_REGION_IO_FDS: a region without ioeventfds says so with count 0."""
        request = self._decode(RegionIoFds, payload)
        self._region(request.index)
        io_fds = self._session.io_fds(request.index)
        return _io_fds_reply(request, io_fds) if isinstance(io_fds, IoFds) else _io_fds_later(request, io_fds)

    def get_irq_info(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_GET_IRQ_INFO."""
        request = self._decode(IrqInfo, payload)
        if request.index >= len(self._irqs):
            raise CommandError(f"IRQ index {request.index} does not exist; the function has {len(self._irqs)}")
        irq = self._irqs[request.index]
        return encode(IrqInfo(_INFO_SIZE, irq.flags, request.index, irq.count))

    # Interrupts and reset

    def set_irqs(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_SET_IRQS."""
        request = decode(SetIrqs, payload)
        self._port.shadow.note_interrupts(request.index)
        return _empty(self._session.set_irqs(request, fds))

    def reset(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_RESET."""
        return _empty(self._port.reset())

    # Registers

    def region_read(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """REGION_READ."""
        offset, region, count = decode(RegionRead, payload)
        self._check_access(region, offset, count, _READ)
        data: Answer[bytes]
        if region == self._v1_index and self._v1 is not None and count:
            data = self._v1.read(offset, count)
        else:
            data = self._session.region_read(region, offset, count) if count else b""
        if isinstance(data, bytes):
            return encode(RegionReadReply(offset, region, count, data))
        return _read_later(data, offset, region, count)

    def region_write(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """REGION_WRITE."""
        offset, region, count, data = decode(RegionWrite, payload)
        self._check_access(region, offset, count, _WRITE)
        done = self._write(region, offset, data, no_reply) if count else None
        reply = encode(RegionWriteReply(offset, region, count))
        return reply if done is None else _then(done, reply)

    def region_write_multi(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """REGION_WRITE_MULTI: the writes in order, up to the first that fails."""
        count = int.from_bytes(payload[:8], "little")
        if count > MAX_MULTI_WRITES:
            raise CommandError(
                f"REGION_WRITE_MULTI of {count} writes; at most {MAX_MULTI_WRITES} are taken; none is done"
            )
        return self._write_in_order(decode(RegionWriteMulti, payload).writes, no_reply)

    async def _write_in_order(self, writes: Sequence[RegionWrite], posted: bool) -> bytes:
        done = 0
        try:
            for offset, region, count, data in writes:
                if done and not done % _WRITES_PER_TURN:
                    await self._lane.turn()
                self._check_access(region, offset, count, _WRITE)
                result = self._write(region, offset, data, posted)
                if result is not None:
                    await result
                done += 1
        except CommandError:
            if not done:
                raise
        return encode(RegionWriteMultiReply(done))

    def _write(self, region: int, offset: int, data: bytes, posted: bool) -> Answer[None]:
        if region == self._v1_index and self._v1 is not None:
            return self._v1.write(offset, data)
        if region == _CONFIG and self._port.config_written(offset, data):
            return self._function_reset(offset, data)
        return self._session.region_write(region, offset, data, posted=posted)

    async def _function_reset(self, offset: int, data: bytes) -> None:
        """The guest resets the function: the device first, then what its migration makes of it."""
        done = self._session.region_write(RegionIndex.CONFIG, offset, data, posted=False)
        if done is not None:
            await done
        await self._port.function_reset()

    def _region(self, index: int) -> RegionSpec:
        if index >= len(self._regions):
            raise CommandError(f"region {index} does not exist; the function has {len(self._regions)}")
        return self._regions[index]

    def _check_access(self, region: int, offset: int, count: int, access: int) -> None:
        """Refuse an access outside its region, too long, or of a kind that the region does not allow."""
        if region >= len(self._bounds):
            raise CommandError(f"region {region} does not exist; the function has {len(self._bounds)}")
        size, allowed = self._bounds[region]
        if count > self._max_transfer:
            raise CommandError(f"an access of {count} bytes, of at most {self._max_transfer}")
        if offset + count > size:
            raise CommandError(f"an access of {offset:#x}+{count:#x} in region {region} of {size:#x} bytes")
        if not allowed & access and count:
            raise CommandError(f"region {region} does not allow {RegionFlags(access).name}")

    # Client memory

    def dma_map(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DMA_MAP."""
        request = decode(DmaMap, payload)
        if request.argsz != _MAP_SIZE:  # the rules are asked only about what is not as everybody sends it
            check_request(request, self._max_transfer)
        return _empty(self._session.dma_map(request, fds))

    def dma_unmap(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DMA_UNMAP."""
        request = decode(DmaUnmap, payload)
        flags = request.flags
        if flags or request.argsz != _UNMAP_SIZE:
            check_request(request, self._max_transfer)
        if flags & ~_UNMAP_KNOWN or flags == _UNMAP_KNOWN:
            raise CommandError(f"DMA_UNMAP flags {flags:#x}; allowed are one of GET_DIRTY_BITMAP 0x1 and ALL 0x2")
        if flags & _UNMAP_BITMAP:
            return self._port.unmap_dirty(request)
        if flags & _UNMAP_ALL:
            if request.address or request.size:
                raise CommandError("DMA_UNMAP of everything with an address or size")
            done = self._session.dma_unmap_all()
        else:
            done = self._session.dma_unmap(request)
            forgotten = self._port.unmapped(request.address, request.size)
            if forgotten is not None:
                done = forgotten if done is None else _both(done, forgotten)
        reply = payload[:_UNMAP_SIZE]
        return reply if done is None else _then(done, reply)

    # Migration

    def dirty_pages(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DIRTY_PAGES."""
        return self._port.dirty_pages(payload, posted=no_reply)

    def device_feature(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """DEVICE_FEATURE."""
        return self._port.device_feature(payload, posted=no_reply)

    def mig_data_read(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """MIG_DATA_READ."""
        return self._port.mig_data_read(payload, posted=no_reply)

    def mig_data_write(self, payload: bytes, fds: Sequence[OwnedFd], no_reply: bool) -> Result:
        """MIG_DATA_WRITE."""
        return self._port.mig_data_write(payload)

    def _decode(self, kind: type[P], payload: bytes) -> P:
        """Decode a request and check its argsz."""
        request = decode(kind, payload)
        check_request(request, self._max_transfer)
        return request


def _with_migration(regions: Sequence[RegionSpec], view: V1View | None) -> Sequence[RegionSpec]:
    """The device's regions, and behind them the migration region."""
    if view is None:
        return regions
    absent = [RegionSpec.absent(index) for index in range(len(regions), view.index)]
    return [*regions, *absent, view.spec]


def _empty(done: Answer[None]) -> Result:
    return NO_PAYLOAD if done is None else _then(done, NO_PAYLOAD)


async def _both(first: Awaitable[None], second: Awaitable[None]) -> None:
    await first
    await second


async def _then(done: Awaitable[None], reply: bytes) -> bytes:
    await done
    return reply


def _io_fds_reply(request: RegionIoFds, io_fds: IoFds) -> Result:
    reply, complete = region_io_fds_reply(request, io_fds.entries)
    return ReplyWithFds(encode(reply), io_fds.fds) if complete and io_fds.fds else encode(reply)


async def _io_fds_later(request: RegionIoFds, io_fds: Awaitable[IoFds]) -> bytes | ReplyWithFds | Pieces:
    result = _io_fds_reply(request, await io_fds)
    assert isinstance(result, bytes | ReplyWithFds)
    return result


async def _read_later(data: Awaitable[bytes], offset: int, region: int, count: int) -> bytes:
    return encode(RegionReadReply(offset, region, count, await data))
