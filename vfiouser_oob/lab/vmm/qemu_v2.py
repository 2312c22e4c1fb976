"""QEMU's client with migration, as its patches in review behave: it keeps the specification in ways that are not ours.

It takes what a server says of descriptors seriously, tracks the state itself, writes each piece as it read it, asks
about dirty pages in ranges that match no mapping, and maps and configures while the function is RESUMING. What it does
to single bytes (command 19, a write of which only a part arrives) the conformance suite and raw clients play.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_oob.client.replies import bitmap_size, decode_reply
from vfiouser_oob.lab.vmm.side import (
    Generation,
    MigrationFailed,
    MigrationLost,
    MigrationSide,
    Portion,
    check_pages,
)
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, DeviceState, Feature, FeatureFlags, MigrationFlags
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.messages import (
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
    LoggingRange,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
)

_S = DeviceState
_GET, _SET, _PROBE = (int(flag) for flag in (FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE))
#: What it reads at once, in bytes.
_CHUNK = 1 << 20
#: `x-msg-timeout`, in seconds.
_PATIENCE_S = 5.0
#: What it assumes to be left where MIG_DATA_SIZE is refused; a migration with so much left is not finished.
_ASSUMED = 100 << 30
_NO_DESCRIPTOR = 0xFFFF_FFFF
#: What it logs of the first 4 GiB, and where the pieces end that it asks about, in pages: those of a PC's low memory.
_LOW_MEMORY = LoggingRange(0, 0xFFFF_FFFF)
_CUTS = (0xC3, 0xE8, 0xF0, 0x100)
_P2P_OF = {_S.PRE_COPY: _S.PRE_COPY_P2P}


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuV2Habits:
    """What differs among the client's patches, and among VMs.

    Args:
        whole_buffer: an older patch: MIG_DATA_READ is sent with the buffer that its reply goes to.
        pointer: an older patch: DMA_LOGGING_START has a pointer in the place of its range.
        several: the VM has more functions, so P2P is demanded; it is used wherever it is offered.
        fills_up: what a failing source does not give any more of a piece is sent as zeros.
    """

    whole_buffer: bool = False
    pointer: bool = False
    several: bool = False
    fills_up: bool = False


class QemuV2Side(MigrationSide):
    """One function's v2 interface, as that client uses it.

    Args:
        client: connected to the function.
        habits: which of them it has.
        memory: guest memory that is mapped anew before the function runs; None: it is left alone.
    """

    generation = Generation.V2

    def __init__(
        self, client: Client, habits: QemuV2Habits | None = None, *, memory: ClientMemory | None = None
    ) -> None:
        super().__init__(client)
        self._habits = habits or QemuV2Habits()
        self._memory = memory
        #: What it believes; it never asks.
        self._state = DeviceState.RUNNING
        self._has_descriptor = False
        self._p2p = False
        #: What MIG_DATA_SIZE said last, in bytes.
        self.left = _ASSUMED

    # What it asks

    async def realize(self) -> MigrationFlags:
        """Decide whether migration is blocked.

        Raises:
            MigrationFailed: it is.
        """
        try:
            data = await self._feature(Feature.MIGRATION | _GET, room=8)
            await self._feature(Feature.DMA_LOGGING_START | _PROBE)
        except ReplyError as error:
            raise MigrationFailed(f"migration is blocked: {error}") from error
        flags = MigrationFlags(decode(FeatureMigration, data).flags)
        if MigrationFlags.STOP_COPY not in flags:
            raise MigrationFailed(f"migration is blocked: its flags {flags:#x} lack STOP_COPY")
        if self._habits.several and MigrationFlags.P2P not in flags:
            raise MigrationFailed("migration is blocked: multiple devices are supported only if all of them do P2P")
        self._p2p = MigrationFlags.P2P in flags
        return flags

    async def _feature(self, flags: int, data: bytes = b"", *, room: int = 0) -> bytes:
        with _patience():
            return await self._client.device_feature(flags, data, room=room)

    async def estimate(self) -> int:
        """Ask how much is left."""
        try:
            data = await self._feature(Feature.MIG_DATA_SIZE | _GET, room=8)
        except ReplyError:
            self.left = _ASSUMED
        else:
            self.left = int.from_bytes(data[:8], "little")
        return self.left

    # States

    async def _set(self, state: DeviceState) -> None:
        if self._has_descriptor:
            raise MigrationFailed(f"{state.name} cannot be asked for: a data_fd came with the last state")
        reply = await self._feature(Feature.MIG_DEVICE_STATE | _SET, encode(FeatureDeviceState(int(state))), room=8)
        self._has_descriptor = decode(FeatureDeviceState, reply).data_fd != _NO_DESCRIPTOR
        self._state = state

    async def _set_or_reset(self, state: DeviceState) -> None:
        """Go to a state; QEMU resets a function that does not, and ends the VM if that fails, too."""
        try:
            await self._set(state)
        except ReplyError as error:
            try:
                with _patience():
                    await self._client.reset()
            except ReplyError as second:
                raise MigrationLost(f"the VM is aborted: {error}, then {second}") from second
            self._state = DeviceState.RUNNING
            raise

    async def vm_runs(self, runs: bool) -> None:
        """Tell the function that its VM is stopped, or goes on, as every `stop` and `cont` does.

        Args:
            runs: which.

        Raises:
            ReplyError: the function does not follow; it was reset.
            MigrationLost: nor could it be reset.
        """
        saving = self._state in (_S.PRE_COPY, _S.PRE_COPY_P2P)
        if self._p2p:
            await self._set_or_reset(_P2P_OF.get(self._state, _S.RUNNING_P2P))
        if runs:
            await self._set_or_reset(_S.RUNNING)
        else:
            await self._set_or_reset(_S.STOP_COPY if saving else _S.STOP)

    # Source

    async def save_setup(self) -> bool:
        """RUNNING → PRE_COPY, if there is such a state."""
        if MigrationFlags.PRE_COPY not in await self.realize():
            return False
        await self.estimate()
        await self._set(_S.PRE_COPY)
        return True

    async def read(self) -> Portion:
        """One piece: before the stop that is all for this round, afterwards only an empty one is the end.

        Raises:
            MigrationFailed: the function does not say how much is left, so that this never ends.
        """
        if self._state is not _S.STOP_COPY and await self.estimate() >= _ASSUMED:
            raise MigrationFailed("never finished: 100 GiB are assumed to be left, since MIG_DATA_SIZE is refused")
        size = min(_CHUNK, self._client.max_data_xfer_size)
        request = encode(MigDataRead(8 + size, size))
        if self._habits.whole_buffer:
            request += bytes(size)
        try:
            with _patience():
                reply = await self._client.request(Command.MIG_DATA_READ, request)
        except ReplyError:
            if not self._habits.fills_up:
                raise
            return Portion(bytes(size), last=True)
        data = decode_reply(MigDataReadReply, Command.MIG_DATA_READ, reply).data
        return Portion(data, not data or self._state is not _S.STOP_COPY)

    async def stop(self) -> None:
        """→ STOP_COPY, with P2P by way of its sibling, without pre-copy by way of STOP."""
        await self.vm_runs(False)
        if self._state is not _S.STOP_COPY:
            await self._set(_S.STOP_COPY)
        await self.estimate()

    async def save_cleanup(self) -> None:
        """STOP_COPY → STOP."""
        await self._set(_S.STOP)

    async def cancel(self) -> None:
        """Leave what was begun; the VM goes on."""
        if self._state is _S.STOP_COPY:
            await self._set_or_reset(_S.STOP)
        if self._state is not _S.RUNNING:
            await self.vm_runs(True)

    # Destination

    async def load_setup(self) -> None:
        """RUNNING → RESUMING."""
        await self.realize()
        await self._set(_S.RESUMING)

    async def load(self, data: bytes) -> None:
        """One MIG_DATA_WRITE, of as many bytes as were read."""
        with _patience():
            await self._client.request(Command.MIG_DATA_WRITE, encode(MigDataWrite(8 + len(data), len(data), data)))

    async def start(self) -> None:
        """Still RESUMING, map the guest's memory as it has it; then → RUNNING."""
        if self._memory is not None:
            await self._client.dma_unmap(self._memory.base, self._memory.size)
            await self._memory.map(self._client)
        await self.vm_runs(True)

    # Dirty pages

    async def start_logging(self, memory: ClientMemory) -> None:
        """DMA_LOGGING_START of low memory, and of what is above it."""
        await self.realize()
        page_size, last = check_pages(memory), memory.base + memory.size
        high = (LoggingRange(1 << 32, last - (1 << 32)),) if last > 1 << 32 else ()
        request = encode(FeatureLoggingStart(page_size, (_LOW_MEMORY, *high)))
        if self._habits.pointer:
            request = encode(FeatureLoggingStart(page_size, (_LOW_MEMORY,)))[:16] + (0x7F00_1234_5678).to_bytes(
                8, "little"
            )
        await self._feature(Feature.DMA_LOGGING_START | _SET, request)

    async def dirty(self, memory: ClientMemory) -> bytes:
        """Several DMA_LOGGING_REPORTs of ranges that are no mapping's."""
        found, page_size = 0, check_pages(memory)
        pages = memory.size // page_size
        cuts = [0, *(cut for cut in _CUTS if cut < pages), pages]
        for begin, end in pairwise(cuts):
            found |= int.from_bytes(await self._report(memory.base, begin, end), "little") << begin
        return found.to_bytes(-(-pages // 8), "little")

    async def _report(self, base: int, begin: int, end: int) -> bytes:
        iova, length = base + begin * PAGE_SIZE, (end - begin) * PAGE_SIZE
        room = bitmap_size(length, PAGE_SIZE)
        request = encode(FeatureLoggingReport(iova, length, PAGE_SIZE))
        reply = await self._feature(Feature.DMA_LOGGING_REPORT | _GET, request, room=24 + room)
        bitmap = decode(FeatureLoggingReport, reply).bitmap
        if len(bitmap) != room:
            raise MigrationFailed(f"a report of {length:#x} bytes has {len(bitmap)} bytes of bitmap, not {room}")
        return bitmap

    async def stop_logging(self) -> None:
        """DMA_LOGGING_STOP, but not where the function has been migrated."""
        if self._state is not _S.STOP:
            await self._feature(Feature.DMA_LOGGING_STOP | _SET)


@contextmanager
def _patience() -> Iterator[None]:
    """Give a reply the time that QEMU gives.

    Raises:
        MigrationFailed: it did not come.
    """
    with trio.move_on_after(_PATIENCE_S) as scope:
        yield
    if scope.cancelled_caught:
        raise MigrationFailed(f"no reply came within {_PATIENCE_S:g} s, and the client has lost its place")
