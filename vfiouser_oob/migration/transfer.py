"""The one interface of whoever moves a function's state: a generation's view, and whatever else comes to move it.

It owns the rules of ownership and of the point of no return, so that nobody who moves state has a copy of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio

from vfiouser_agents.errors import AgentError
from vfiouser_oob.migration.events import ClientMigrates, LoadFailed, Moved
from vfiouser_oob.migration.message_time import message_deadline
from vfiouser_oob.migration.ownership import require_owner
from vfiouser_oob.migration.record import Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.source import SourcePipeline
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v2 import WITH_P2P, Arc


class Left(NamedTuple):
    """What is left of a state that is being saved.

    Args:
        buffered: bytes that can be read at once.
        remaining: bytes that are estimated to come.
        final: the function stands still, so that there is an end.
        exhausted: everything was read, trailer included.
    """

    buffered: int
    remaining: int
    final: bool
    exhausted: bool


class Transfer:
    """One mover's hold on a migration.

    Args:
        runner: the function's.
        owner: who moves.
    """

    def __init__(self, runner: MigrationRunner, owner: Owner) -> None:
        self._runner = runner
        self._owner = owner

    # The state

    @property
    def state(self) -> DeviceState:
        """The last state that was known; ERROR if the function is broken."""
        return self._runner.record.state_shown

    @property
    def certain(self) -> bool:
        """Whether that is what the function does at this moment."""
        return self._runner.certain

    @property
    def mine(self) -> bool:
        """Whether nobody else moves the state."""
        return self._runner.record.owner in (None, self._owner)

    async def state_now(self) -> DeviceState:
        """The state, asked of the agent if it is not certain."""
        return await self._runner.state_now()

    def require(self, what: str) -> None:
        """Refuse a command while somebody else moves the state.

        Args:
            what: the command's name.

        Raises:
            CommandError: EBUSY.
        """
        require_owner(self._runner.record, self._owner, what)

    def begin_use(self) -> None:
        """Note that the client moves the state itself, before it begins to."""
        if not self._runner.record.by_client:
            self._runner.feed(ClientMigrates())

    def named(self, state: DeviceState) -> DeviceState:
        """What the client calls a state: its P2P name, if that was asked for last.

        Args:
            state: the function's.
        """
        return WITH_P2P.get(state, state) if self._runner.record.p2p else state

    async def request(self, plan: Callable[[DeviceState], Sequence[Arc]], *, p2p: bool = False) -> None:
        """Change the state; to give a migration up, go to RUNNING.

        Args:
            plan: the arcs that lead from a state to where it should be.
            p2p: whether the client calls that state by its P2P name.

        Raises:
            CommandError: illegal, or it failed; the state that is read afterwards is the truth.
        """
        await self._runner.request(plan, self._owner, p2p=p2p)

    # Saving

    @property
    def left(self) -> Left | None:
        """What is left to be read; None while no state is being saved."""
        source = self._runner.steps.source
        if source is None:
            # Another daemon has handed it over.
            return Left(0, 0, True, True) if self._all_taken else None
        return Left(source.buffered, source.remaining, source.final, source.exhausted)

    def has(self, size: int) -> bool:
        """Whether a read of so many bytes can be answered at once.

        Args:
            size: bytes wanted.

        Raises:
            CommandError: no state is being saved.
        """
        return self._all_taken or self._source().has(size)

    async def prepare(self, size: int) -> None:
        """Wait until a read of so many bytes can be answered, or the message's time is over.

        Args:
            size: bytes wanted.

        Raises:
            CommandError: no state is being saved, or what is missing of it does not come in time.
        """
        if not self._all_taken:
            await self._source().prepare(size, message_deadline())

    def read(self, size: int) -> list[memoryview]:
        """Take up to so many bytes of the stream; `delivered` is to be told once the client has them.

        Args:
            size: bytes wanted.

        Raises:
            CommandError: no state is being saved.
        """
        if self._all_taken:
            return []
        source = self._source()
        before = source.mark
        data = source.take(size)
        self._runner.feed(Moved(source.taken))
        device = self._runner.steps.device
        if data and device is not None and device.notes is not None:
            device.notes.stream_moved(before, source.mark)
        return data

    def delivered(self) -> None:
        """The client has what was read; with the trailer that is the point of no return."""
        source, record = self._runner.steps.source, self._runner.record
        if record.stream is None or record.handed:
            return
        if self._all_taken or (source is not None and source.exhausted):
            self._runner.feed(Moved(record.stream.position, handed=True))

    @property
    def _all_taken(self) -> bool:
        """Whether the client has all of what another daemon has saved, so that nothing is left to be read."""
        stream = self._runner.record.stream
        return self._runner.steps.source is None and stream is not None and stream.whole

    def _source(self) -> SourcePipeline:
        source = self._runner.steps.source
        if source is None and self._runner.record.saves:
            raise CommandError("what is left of the state was lost with a daemon that has ended", errno.EIO)
        if source is None:
            raise CommandError("no state is being saved")
        return source

    # Loading

    @property
    def loading(self) -> bool:
        """Whether a state is being loaded."""
        return self._runner.record.loads

    async def write(self, data: bytes | memoryview) -> None:
        """Give the next bytes of the stream.

        Args:
            data: the bytes; nobody changes them any more.

        Raises:
            CommandError: no state is being loaded, or this one is refused; after that the load has failed.
        """
        destination, record = self._runner.steps.destination, self._runner.record
        if record.load_failure is not None:
            raise CommandError(f"the load has failed ({record.load_failure}); only a reset ends this")
        if destination is None or record.stream is None:
            raise CommandError("no state is being loaded")
        self._runner.feed(Moved(record.stream.position + len(data)))
        try:
            await destination.write(data, message_deadline())
        except AgentError as error:
            self._runner.feed(LoadFailed(str(error)))
            raise CommandError(f"the state was refused: {error}", error.errno) from error
        except CommandError as error:
            self._runner.feed(LoadFailed(str(error)))
            raise
        except trio.Cancelled:
            self._runner.feed(LoadFailed("a write was given up half-way"))
            raise
