"""Suspending a controller: finish what is under way, hold still, and go on as if nothing had been.

    suspend ─► no more fetching ─► commands finish, or are cancelled and carried over ─► still
    unsuspend ─► new tasks for the queues as they are ─► writes that came meanwhile are carried out

Registers can be read all the time. Writes to them are kept for later, so that the state can be saved at leisure.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from vfiouser_protocol.errors import CommandError

if TYPE_CHECKING:
    from vfiouser_soc.nvme.engine import QueueEngine

_log = logging.getLogger(__name__)
#: Register writes that are kept; a guest that is running while its function is not would make ever more.
MAX_KEPT_WRITES = 1024
#: Their bytes: a driver writes 4 or 8 at a time.
MAX_KEPT_BYTES = 64 << 10


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
        self._kept_bytes = 0
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
        before = self._kept.pop(key, b"")
        size = self._kept_bytes - len(before) + len(data)
        if len(self._kept) >= MAX_KEPT_WRITES or size > MAX_KEPT_BYTES:
            self._kept_bytes -= len(before)
            raise CommandError(
                f"write of {len(data)} bytes to register {offset:#x} of a suspended controller, which keeps "
                f"{MAX_KEPT_WRITES} writes of {MAX_KEPT_BYTES} bytes in all; not done",
                errno.EBUSY,
            )
        self._kept_bytes = size
        self._kept[key] = bytes(data)

    @property
    def kept(self) -> list[tuple[int, bytes]]:
        """The writes to carry out, in order: offset into BAR0, data."""
        return [(offset, data) for (offset, _, _), data in self._kept.items()]

    @kept.setter
    def kept(self, writes: list[tuple[int, bytes]]) -> None:
        self._kept = {(offset, len(data), number): data for number, (offset, data) in enumerate(writes, 1)}
        self._kept_bytes = sum(len(data) for _, data in writes)


class Suspendable(Protocol):
    """The controller as its suspender sees it."""

    @property
    def live_engine(self) -> QueueEngine | None:
        """The queues, if anything may happen in them."""
        ...

    def wake(self) -> None:
        """Have the controller's main task look at what there is to do."""
        ...

    async def quiet(self) -> None:
        """Wait for accesses to the client's memory that outlive their tasks."""
        ...

    def hold_still(self) -> Clocks:
        """Every task has ended: prepare the state for being saved."""
        ...

    def go_on(self, suspension: Suspension) -> None:
        """Go on with the queues that the state holds."""
        ...

    def replay(self, offset: int, data: bytes) -> None:
        """Carry out a write to BAR0 that was kept."""
        ...

    def freeze(self) -> None:
        """The client that owned the queues has gone."""
        ...


class Suspender:
    """Suspends one controller.

    Args:
        owner: the controller.
        name: what to call it in the log.
    """

    def __init__(self, owner: Suspendable, name: str) -> None:
        self._owner = owner
        self._name = name
        self._suspension: Suspension | None = None

    @property
    def suspended(self) -> bool:
        """Whether a suspension is under way or complete: registers answer, but writes to them are to be kept."""
        return self._suspension is not None

    async def suspend(self, drain_s: float) -> None:
        """Finish what is under way, then hold still: no DMA, no interrupt, no change, until `unsuspend`.

        The controller's main task has to be running. If this is cancelled, the controller stays as it was before.

        Args:
            drain_s: seconds for the commands in execution; those that take longer are cancelled and begin anew after
                the suspension.

        Raises:
            SuspensionEnded: `unsuspend` or a reset came first.
        """
        suspension = self._suspension
        if suspension is None:
            suspension = self._suspension = Suspension()
        suspension.release_wanted = False
        was_still = suspension.still
        try:
            await self._drain(suspension, drain_s)
            while not suspension.still and self._goes_on_with(suspension):
                await suspension.wait()
            await self._owner.quiet()
        except BaseException:
            if suspension is self._suspension and not was_still:
                self.unsuspend()
            raise
        if not self._goes_on_with(suspension):
            raise SuspensionEnded("a reset or a resumption ended the suspension")

    def _goes_on_with(self, suspension: Suspension) -> bool:
        return suspension is self._suspension and not suspension.release_wanted

    async def _drain(self, suspension: Suspension, drain_s: float) -> None:
        engine = self._owner.live_engine
        if engine is not None:
            engine.close()
            with trio.move_on_after(drain_s) as scope:
                await engine.drain()
            if not self._goes_on_with(suspension):
                return
            if scope.cancelled_caught:
                _log.info("%s: commands take longer than %g s; the state carries them over", self._name, drain_s)
            engine.epoch.end()
        self._owner.wake()

    def every_task_has_ended(self) -> bool:
        """Take note of that.

        Returns:
            Whether to hold still; False if a resumption has been waiting for this.
        """
        suspension = self._suspension
        assert suspension is not None
        if not suspension.still:
            suspension.clocks = self._owner.hold_still()
            suspension.still = True
            suspension.changed()
        if suspension.release_wanted:
            self._go_on(suspension)
        return self.suspended

    def unsuspend(self) -> None:
        """Go on; with the queues as they are, at once or as soon as the last task of before has ended."""
        suspension = self._suspension
        if suspension is None:
            return
        suspension.release_wanted = True
        suspension.changed()
        engine = self._owner.live_engine
        if suspension.still:
            self._go_on(suspension)
        elif engine is not None:
            engine.reopen()
            self._finish(suspension)
        self._owner.wake()

    def _go_on(self, suspension: Suspension) -> None:
        self._suspension = None
        self._owner.go_on(suspension)
        self._finish(suspension)
        self._owner.wake()

    def _finish(self, suspension: Suspension) -> None:
        self._suspension = None
        if suspension.client_lost:
            self._owner.freeze()
        for offset, data in suspension.kept:
            self._owner.replay(offset, data)

    def end(self) -> None:
        """A reset ends the suspension, and with it what was kept."""
        if self._suspension is not None:
            self._suspension.changed()
            self._suspension = None
            self._owner.wake()

    # During a suspension

    def note_client_lost(self) -> None:
        """The client that owned the queues went away; the controller will be frozen when it goes on."""
        if self._suspension is not None:
            self._suspension.client_lost = True

    def replaced(self, kept_writes: list[tuple[int, bytes]], clocks: Clocks) -> None:
        """The state was replaced by that of another controller.

        Args:
            kept_writes: what that one had kept.
            clocks: as they stood there.
        """
        assert self._suspension is not None
        assert self._suspension.still
        self._suspension.client_lost = False
        self._suspension.kept = kept_writes
        self._suspension.clocks = clocks
        self._suspension.replaced = True

    def write_later(self, offset: int, data: bytes, *, last_counts: bool) -> None:
        """Keep a write to BAR0 for after the suspension; see `Suspension.keep`."""
        assert self._suspension is not None
        self._suspension.keep(offset, data, last_counts=last_counts)

    @property
    def kept_writes(self) -> list[tuple[int, bytes]]:
        """Writes to BAR0 that came during the suspension: offset, data."""
        return [] if self._suspension is None else self._suspension.kept

    @property
    def client_lost(self) -> bool:
        """Whether the client that owned the queues went away during the suspension."""
        return self._suspension is not None and self._suspension.client_lost

    @property
    def clocks(self) -> Clocks | None:
        """What counts time, while it stands still; None while it does not."""
        return self._suspension.clocks if self._suspension is not None and self._suspension.still else None
