"""Doorbells: trapped (every write is an access to the model) or polled (the host writes shared memory).

Doorbell 2y is the tail of submission queue y, 2y + 1 the head of completion queue y; each has 4 bytes
(CAP.DSTRD = 0).

Spec: NVMe 1.4, 3.1.24 and 3.1.25.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import trio

from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_soc.nvme.spec import DOORBELLS_OFFSET, PAGE

DoorbellSink = Callable[[int, int], None]
DOORBELL_SIZE = 4
_STRIDE = 64
_STRIDE_FORMAT = f"<{_STRIDE // DOORBELL_SIZE}I"


@dataclass(frozen=True, slots=True)
class PollTimes:
    """How often shared doorbells are looked at, in seconds.

    Args:
        spin_s: after activity, look all the time for this long; waiting in the kernel takes at least a
            millisecond.
        busy_s: first pause after that; doubled with every look that finds nothing.
        idle_s: longest pause.
    """

    spin_s: float = 0.0005
    busy_s: float = 0.001
    idle_s: float = 0.01


class TrappedDoorbells:
    """Doorbells whose writes arrive one by one.

    Args:
        sink: takes (doorbell number, value).
        count: how many doorbells there are; of the rest of the page one number stands for all.
    """

    def __init__(self, sink: DoorbellSink, count: int) -> None:
        self._sink = sink
        self._count = count

    def read(self, offset: int, count: int) -> bytes:
        """Return zeros: what a doorbell reads as is not defined."""
        return bytes(count)

    def write(self, offset: int, data: bytes) -> None:
        """Take a write; a 64-bit one rings two doorbells.

        Args:
            offset: bytes into the doorbell page.
            data: what was written.
        """
        if offset % DOORBELL_SIZE or len(data) % DOORBELL_SIZE:
            self._sink(-1, 0)
            return
        first = offset // DOORBELL_SIZE
        inside = max(0, min(len(data), (self._count - first) * DOORBELL_SIZE))
        for number, (value,) in enumerate(struct.iter_unpack("<I", data[:inside]), first):
            self._sink(number, value)
        if inside < len(data):
            self._sink(-1, 0)

    def clear(self, number: int | None = None) -> None:
        """Nothing is kept, so there is nothing to clear."""


class PolledDoorbells(TrappedDoorbells):
    """Doorbells in shared memory, which the host writes without anyone noticing.

    Args:
        sink: takes (doorbell number, value).
        count: how many doorbells there are.
        memory: BAR0's shared memory; only its doorbell page is offered for mapping.
        times: how often to look.
    """

    def __init__(self, sink: DoorbellSink, count: int, memory: SharedMemory, times: PollTimes) -> None:
        super().__init__(sink, count)
        self._memory = memory
        self._page = memory.view[DOORBELLS_OFFSET : DOORBELLS_OFFSET + PAGE]
        self._seen = bytes(PAGE)
        self._times = times

    def read(self, offset: int, count: int) -> bytes:
        """Read the page; clients may do so even though they can map it."""
        return bytes(self._page[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Take a trapped write, which is noticed at once."""
        self.write_unnoticed(offset, data)
        self.poll()

    def write_unnoticed(self, offset: int, data: bytes) -> None:
        """Write as a client that maps the page does."""
        self._page[offset : offset + len(data)] = data

    def state(self) -> tuple[bytes, bytes]:
        """The page as it is, and as it was when it was last looked at."""
        return bytes(self._page), self._seen

    def load(self, page: bytes, noticed: bytes) -> None:
        """Take over a state; the next look finds what changed between the two."""
        self._page[:] = page
        self._seen = noticed

    def adopt(self, noticed: bytes) -> None:
        """Go on with a page that another process has left and the host goes on writing.

        Args:
            noticed: the page as that process looked at it last.
        """
        self._page = self._memory.view[DOORBELLS_OFFSET : DOORBELLS_OFFSET + PAGE]
        self._seen = noticed

    def clear(self, number: int | None = None) -> None:
        """Zero one doorbell, as creating its queue does, or all of them, as enabling the controller does."""
        start, count = (0, PAGE) if number is None else (number * DOORBELL_SIZE, DOORBELL_SIZE)
        if number is None:  # the memory may be another one since
            self._page = self._memory.view[DOORBELLS_OFFSET : DOORBELLS_OFFSET + PAGE]
        self._page[start : start + count] = bytes(count)
        seen = bytearray(self._seen)
        seen[start : start + count] = bytes(count)
        self._seen = bytes(seen)

    def poll(self) -> bool:
        """Look once and pass on what changed.

        Returns:
            Whether anything had changed.
        """
        now = bytes(self._page)
        if now == self._seen:
            return False
        seen, self._seen = self._seen, now
        used = self._count * DOORBELL_SIZE
        for start in range(0, used, _STRIDE):  # most of them never change; skip them in big steps
            if now[start : start + _STRIDE] != seen[start : start + _STRIDE]:
                self._ring_changed(now, seen, start)
        if now[used:] != seen[used:]:
            self._sink(-1, 0)
        return True

    def _ring_changed(self, now: bytes, seen: bytes, start: int) -> None:
        old_values = struct.unpack_from(_STRIDE_FORMAT, seen, start)
        new_values = struct.unpack_from(_STRIDE_FORMAT, now, start)
        for number, (old, new) in enumerate(zip(old_values, new_values, strict=True), start // DOORBELL_SIZE):
            if old != new and number < self._count:
                self._sink(number, new)

    async def watch(self, is_busy: Callable[[], bool]) -> None:
        """Look while the controller is enabled: all the time while there is work, ever more seldom without.

        Args:
            is_busy: whether commands are under way, so that new doorbells are likely.
        """
        # A task that was cancelled before it began runs up to here: whatever it noticed would be lost.
        await trio.lowlevel.checkpoint()
        pause = self._times.busy_s
        spin_until = trio.current_time() + self._times.spin_s
        while True:
            if self.poll():
                spin_until = trio.current_time() + self._times.spin_s
                pause = self._times.busy_s
            if trio.current_time() < spin_until:
                await trio.lowlevel.checkpoint()
                continue
            await trio.sleep(pause)
            pause = self._times.busy_s if is_busy() else min(pause * 2, self._times.idle_s)

    def close(self) -> None:
        """Let go of the shared memory."""
        self._page.release()
