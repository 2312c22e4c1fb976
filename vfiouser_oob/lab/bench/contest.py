"""What two servers are compared in, and how each is measured once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from statistics import median

from vfiouser_oob.lab.bench.foreign import ForeignClient, ServerTraits
from vfiouser_oob.lab.bench.migrating import PORTION
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import Command, DeviceState, Feature, FeatureFlags, RegionIndex
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.messages import DeviceFeature, DmaMap, DmaUnmap, FeatureDeviceState, MigDataRead, RegionRead

#: Maps that are sent before the first answer is waited for; fewer where a server takes fewer.
_BURSTS = (64, 16, 4, 1)
_PAGE = 4096
_FIRST = 0x1_0000_0000
#: Seconds of one server's turn, at most, and bytes of a state that is worth waiting for.
_TURN_S = 2.0
_STATE_S, _STATE_MAX = 10.0, 1 << 30
#: Bytes before the data of MIG_DATA_READ's answer.
_PORTION_HEAD = 8
_COMPARED_READ = 4


class Side(Enum):
    """Whose server it is."""

    OURS = "ours"
    THEIRS = "theirs"


@dataclass(frozen=True, slots=True)
class Contest:
    """One thing that both servers do.

    Args:
        name: what.
        unit: of the measurement.
        measure: takes one.
    """

    name: str
    unit: str
    measure: Callable[[ForeignClient, Side], float]


def contests_of(
    theirs: ServerTraits, ours: ServerTraits, reads: int, bursts: int, note: Callable[[str], None]
) -> list[Contest]:
    """What can be compared.

    Args:
        theirs: what the other server said of itself.
        ours: what ours did.
        reads: register reads in a turn.
        bursts: bursts of maps in a turn.
        note: told what cannot be, and why.
    """
    found = [Contest("read of configuration space", "us", _reads(RegionIndex.CONFIG, RegionIndex.CONFIG, reads))]
    if theirs.readable_bar is None or ours.readable_bar is None:
        note("no register was compared: it has no BAR that can be read")
    else:
        found.append(Contest("register read", "us", _reads(ours.readable_bar, theirs.readable_bar, reads)))
    if theirs.takes_fds:
        found.append(Contest("DMA maps with a descriptor", "messages/s", _Maps(theirs, bursts, with_fd=True).rate))
    else:
        note("no maps with a descriptor were compared: it takes no descriptors")
    found.append(Contest("DMA maps without one", "messages/s", _Maps(theirs, bursts, with_fd=False).rate))
    return found


def _reads(ours: int, theirs: int, count: int) -> Callable[[ForeignClient, Side], float]:
    """Reads of the first four bytes of a region; the median in microseconds."""

    def measure(client: ForeignClient, side: Side) -> float:
        region = ours if side is Side.OURS else theirs
        request = encode(RegionRead(0, region, _COMPARED_READ))
        return median(client.times(Command.REGION_READ, request, count, _TURN_S)) / 1000

    return measure


class _Maps:
    """DMA_MAP and DMA_UNMAP of a page each.

    Args:
        theirs: how many ranges the other server takes.
        bursts: how often, in a turn.
        with_fd: whether the memory's descriptor comes along.
    """

    def __init__(self, theirs: ServerTraits, bursts: int, *, with_fd: bool) -> None:
        self._limit = theirs.max_dma_maps
        self._bursts = bursts
        self._with_fd = with_fd
        #: How many at once; None until the other server was asked, which goes first.
        self._size: int | None = None

    def rate(self, client: ForeignClient, _side: Side) -> float:
        """Messages per second."""
        with OwnedFd(os.memfd_create("bench")) as memory:
            os.ftruncate(memory.fileno(), _PAGE)
            fds = [memory.fileno()] if self._with_fd else []
            if self._size is None:
                self._size = self._fitting(client, fds)
            size = self._size
            messages, began = 0, time.perf_counter()
            for _ in range(self._bursts):
                refused = self._burst(client, fds, size)
                if refused:
                    raise ReplyError(f"it refuses DMA_MAP: {os.strerror(refused)}", refused)
                messages += 2 * size
                if time.perf_counter() - began > _TURN_S:
                    break
            return messages / (time.perf_counter() - began)

    def _fitting(self, client: ForeignClient, fds: Sequence[int]) -> int:
        refused = 0
        for size in _BURSTS:
            if size <= max(1, self._limit):
                refused = self._burst(client, fds, size)
                if not refused:
                    return size
        raise ReplyError(f"it refuses DMA_MAP: {os.strerror(refused)}", refused)

    def _burst(self, client: ForeignClient, fds: Sequence[int], size: int) -> int:
        """Map so many pages, and unmap those that were mapped; returns the error number of a refusal, or 0."""
        # Each second page, so that no server can make one range of two.
        addresses = [_FIRST + 2 * _PAGE * number for number in range(size)]
        maps = [encode(DmaMap(32, 3, 0, address, _PAGE)) for address in addresses]
        errors = client.ask_all(Command.DMA_MAP, maps, fds)
        mapped = [address for address, error in zip(addresses, errors, strict=True) if not error]
        undone = client.ask_all(Command.DMA_UNMAP, [encode(DmaUnmap(24, 0, address, _PAGE)) for address in mapped])
        return next(filter(None, [*errors, *undone]), 0)


# The state


def _set_state(client: ForeignClient, state: DeviceState) -> None:
    data = encode(FeatureDeviceState(int(state)))
    flags = int(Feature.MIG_DEVICE_STATE | FeatureFlags.SET)
    client.ask(Command.DEVICE_FEATURE, encode(DeviceFeature(8 + len(data), flags, data)))


def saved_size(client: ForeignClient) -> int:
    """Stop the device, read its state to the end, and let it run again; returns the state's size in bytes.

    Args:
        client: who has it.

    Raises:
        ReplyError: it does not migrate, or refuses a step; it runs nevertheless, as far as it lets us.
        BenchFailed: its state has no end.
    """
    flags = int(Feature.MIGRATION | FeatureFlags.GET)
    try:
        client.ask(Command.DEVICE_FEATURE, encode(DeviceFeature(16, flags, b"")))
    except ReplyError as refusal:
        raise ReplyError(
            f"it does not migrate by the second generation's messages ({refusal})", refusal.errno
        ) from None
    return _saved(client)[0]


def _saved(client: ForeignClient) -> tuple[int, float]:
    """Bytes of the state, and seconds from the request to stop to the last one; the device runs again."""
    began = time.perf_counter()
    try:
        _set_state(client, DeviceState.STOP_COPY)
        total = _read_state(client)
    except ReplyError:
        with suppress(ReplyError):
            _set_state(client, DeviceState.RUNNING)
        raise
    took = time.perf_counter() - began
    _set_state(client, DeviceState.RUNNING)
    return total, took


def _read_state(client: ForeignClient) -> int:
    deadline = time.monotonic() + _STATE_S
    total = 0
    request = encode(MigDataRead(_PORTION_HEAD + PORTION, PORTION))
    while True:
        count = len(client.ask(Command.MIG_DATA_READ, request)) - _PORTION_HEAD
        total += max(0, count)
        if count < PORTION:
            return total
        if total > _STATE_MAX or time.monotonic() > deadline:
            raise BenchFailed(f"its state has no end: {total / 1e6:.0f} MB came")


def _saving_rate(client: ForeignClient, _side: Side) -> float:
    total, took = _saved(client)
    return total / took / 1e6


def saving(size: int) -> Contest:
    """To save a state: megabytes (10^6) per second.

    Args:
        size: its bytes.
    """
    return Contest(f"saving a state of {size:,} bytes", "MB/s", _saving_rate)
