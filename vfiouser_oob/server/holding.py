"""Guest writes that must not reach the device yet, because nobody knows whether it runs.

While the migration engine finds out what the function does, and brings it back, a write of the guest could reach a
device that stands still, and be lost or spoil what is being saved. So it is held back, until the agent has said that
the function runs.

Rule 1: no write goes on before that; if the function does not run in the end, none does at all.
Rule 2: replies stay in order, and nobody waits for a held write who did not have to. One that wants a reply waits while
        only accesses are behind it; as soon as any other command is, it is refused with EBUSY, and that command served.
Rule 3: one that wants no reply (a doorbell, usually) keeps its place until the function runs, is reset, or loses its
        client. A reset makes it void, as it would have been on the device.
Rule 4: a read goes on while no write is held; else it waits with them, for it must not overtake them.
Rule 5: while an agent owes a reset that the client was promised, configuration space is written at once as long as no
        write is held: VMMs set a function up right after its reset, and wait. It is written again behind the agent's.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from vfiouser_oob.migration.held_writes import HeldWrites
from vfiouser_oob.observability.log import Logger
from vfiouser_protocol.constants import Command, RegionIndex
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import layout_of
from vfiouser_protocol.messages import RegionRead
from vfiouser_protocol.packed import picked
from vfiouser_protocol.session import CommandReceived, MessageRefused

if TYPE_CHECKING:
    from vfiouser_oob.migration.runner import MigrationRunner

_WRITES = frozenset({Command.REGION_WRITE, Command.REGION_WRITE_MULTI})
_ACCESSES = _WRITES | {Command.REGION_READ}
#: Where a REGION_READ, and a REGION_WRITE just so, names its region.
REGION = picked(layout_of(RegionRead), "region")


class WriteHold:
    """The held accesses of one connection. `run` has to run while it is used.

    Args:
        runner: knows whether the function runs.
        held: what is held back.
        migration_region: index of the region that is the engine's own; -1 if there is none.
        carry_out: does a held write that wants no reply; its failure is the connection's to report.
        log: a logger with the function's fields.
    """

    def __init__(
        self,
        runner: MigrationRunner,
        held: HeldWrites,
        migration_region: int,
        carry_out: Callable[[CommandReceived], Awaitable[None]],
        log: Logger,
    ) -> None:
        self.runner = runner
        self._held = held
        self._migration_region = migration_region
        self._carry_out = carry_out
        self._log = log
        #: Commands other than accesses that queue behind what is being served.
        self._others = 0
        self._needed = trio.Event()
        self._changed = trio.Event()

    # What the connection tells

    def is_access(self, event: CommandReceived | MessageRefused) -> bool:
        """Whether it is an access to one of the device's own regions."""
        if not isinstance(event, CommandReceived) or event.header.command not in _ACCESSES:
            return False
        if event.header.command == Command.REGION_WRITE_MULTI or len(event.payload) < REGION.size:
            return True
        return bool(REGION.unpack_from(event.payload)[0] != self._migration_region)

    def queued(self, event: CommandReceived | MessageRefused) -> None:
        """A command queues behind another one."""
        if not self.is_access(event):
            self._others += 1
            self._notify()

    def unqueued(self, event: CommandReceived | MessageRefused) -> None:
        """It was served."""
        if not self.is_access(event):
            self._others -= 1

    def take(self, event: CommandReceived, serve: Callable[[], Awaitable[bytes]]) -> bytes | Awaitable[bytes] | None:
        """Hold an access back, if it has to be. To be asked only while the function is awaited, or something is held.

        Args:
            event: the command.
            serve: carries the access out, once it may be.

        Returns:
            The answer or what waits for it; None for what goes on at once.
        """
        command = event.header.command
        if command == Command.DEVICE_RESET:
            self._drop("the client resets the device")
        if not self.is_access(event) or (not self._held and self._goes_on(event)):
            return None
        if not self._needed.is_set():
            self._log.info("guest writes are held back until the daemon knows that the function runs")
            self._needed.set()
        if not event.header.no_reply:
            return self._wait(serve)
        if not self._held.add(event):
            raise CommandError(f"{len(self._held)} writes are held back already; this write is lost", errno.ENOBUFS)
        return b""

    def _goes_on(self, event: CommandReceived) -> bool:
        """Whether an access goes on while nothing is held: every read, and what sets configuration space up after a
        reset that its agent is still to do, since that is written again behind it."""
        if event.header.command not in _WRITES:
            return True
        single = event.header.command == Command.REGION_WRITE and len(event.payload) >= REGION.size
        return (
            self.runner.record.reset_due is not None
            and single
            and REGION.unpack_from(event.payload)[0] == RegionIndex.CONFIG
        )

    # Waiting

    @property
    def closed(self) -> bool:
        """Whether accesses are held back."""
        return self.runner.record.awaiting or bool(self._held)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait(self, serve: Callable[[], Awaitable[bytes]]) -> bytes:
        """Wait for the function to run, then carry an access out."""
        while self.closed:
            if self._others:
                raise CommandError(
                    "the daemon does not know whether the function runs, and other commands wait", errno.EBUSY
                )
            await self._changed.wait()
        self._require_running()
        return await serve()

    def _require_running(self) -> None:
        if not self.runner.record.runs:
            raise CommandError(f"the function does not run; it is {self.runner.record.state_shown.name}", errno.EIO)

    async def run(self) -> None:
        """Let go what is held, whenever the truth is known."""
        while True:
            await self._needed.wait()
            await self.runner.known()
            if self.runner.record.runs:
                await self._let_go()
            else:
                self._drop(f"the function does not run; it is {self.runner.record.state_shown.name}")
            if not self.closed:
                self._needed = trio.Event()
                self._notify()

    async def _let_go(self) -> None:
        while (write := self._held.first) is not None and self.runner.record.runs:
            await self._carry_out(write)
            self._held.done(write)

    def _drop(self, why: str) -> None:
        if count := self._held.void():
            self._log.warning("guest writes that were held back are dropped", writes=count, reason=why)
        self._notify()
