"""A suspended controller: what it keeps for the time when it goes on."""

from __future__ import annotations

import errno
from typing import NamedTuple

import trio

from vfiouser_protocol.errors import CommandError

#: Register writes that are kept; a guest that is running while its function is not would make ever more.
MAX_KEPT_WRITES = 1024


class SuspensionEnded(Exception):
    """The controller was to hold still, but was reset or resumed first."""


class Clocks(NamedTuple):
    """What counts time in a controller.

    Args:
        power_on_s: how long it has been powered.
        timestamp_ms: the timestamp feature; None unless the host has set it.
    """

    power_on_s: float
    timestamp_ms: int | None


class Suspension:
    """One suspension, from its beginning to its end."""

    def __init__(self) -> None:
        #: Every task has ended; nothing changes any more.
        self.still = False
        #: `unsuspend` came; the controller goes on as soon as it is still.
        self.release_wanted = False
        #: The client that owned the queues went away meanwhile.
        self.client_lost = False
        #: The state was replaced meanwhile, so interrupts of before may never have reached this host.
        self.replaced = False
        #: Clocks as they stood when it became still; they go on from there.
        self.clocks = Clocks(0.0, None)
        #: Offset, bytes and a number (0 where only the last write counts) to data, in the order of the writes.
        self._kept: dict[tuple[int, int, int], bytes] = {}
        self._changed = trio.Event()

    def changed(self) -> None:
        """Wake whoever waits for this to become still, or to end."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()

    def keep(self, offset: int, data: bytes, *, last_counts: bool) -> None:
        """Remember a write to BAR0.

        Args:
            offset: bytes into BAR0.
            data: what is written.
            last_counts: an earlier write to the same place need not be remembered.

        Raises:
            CommandError: EBUSY; too many are kept already.
        """
        key = (offset, len(data), 0 if last_counts else len(self._kept) + 1)
        self._kept.pop(key, None)
        if len(self._kept) >= MAX_KEPT_WRITES:
            raise CommandError(
                f"write to register {offset:#x} of a suspended controller, which keeps {MAX_KEPT_WRITES} writes; "
                "not done",
                errno.EBUSY,
            )
        self._kept[key] = bytes(data)

    @property
    def kept(self) -> list[tuple[int, bytes]]:
        """The writes to carry out, in order: offset into BAR0, data."""
        return [(offset, data) for (offset, _, _), data in self._kept.items()]

    @kept.setter
    def kept(self, writes: list[tuple[int, bytes]]) -> None:
        self._kept = {(offset, len(data), number): data for number, (offset, data) in enumerate(writes, 1)}
