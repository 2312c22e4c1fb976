"""The one interface of whoever moves a function's state: a generation's view, and whatever else comes to move it.

It owns the rules of ownership and of the point of no return, so that nobody who moves state has a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio

from vfiouser_agents.errors import AgentError
from vfiouser_oob.migration.events import ClientMigrates, LoadFailed, Moved
from vfiouser_oob.migration.message_time import message_deadline
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
        self._runner.require_owner(self._owner, what)

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
            return None
        return Left(source.buffered, source.remaining, source.final, source.exhausted)

    def has(self, size: int) -> bool:
        """Whether a read of so many bytes can be answered at once.

        Args:
            size: bytes wanted.

        Raises:
            CommandError: no state is being saved.
        """
        return self._source().has(size)

    async def prepare(self, size: int) -> None:
        """Wait until a read of so many bytes can be answered, or the message's time is over.

        Args:
            size: bytes wanted.

        Raises:
            CommandError: no state is being saved, or what is missing of it does not come in time.
        """
        await self._source().prepare(size, message_deadline())

    def read(self, size: int) -> list[memoryview]:
        """Take up to so many bytes of the stream; `delivered` is to be told once the client has them.

        Args:
            size: bytes wanted.

        Raises:
            CommandError: no state is being saved.
        """
        source = self._source()
        data = source.take(size)
        self._runner.feed(Moved(source.taken))
        return data

    def delivered(self) -> None:
        """The client has what was read; with the trailer that is the point of no return."""
        source = self._runner.steps.source
        if source is not None and source.exhausted and not self._runner.record.handed:
            self._runner.feed(Moved(source.taken, handed=True))

    def _source(self) -> SourcePipeline:
        source = self._runner.steps.source
        if source is None:
            raise CommandError("no state is being saved")
        return source

    # Loading

    @property
    def loading(self) -> bool:
        """Whether a state is being loaded."""
        return self._runner.steps.destination is not None

    async def write(self, data: bytes | memoryview) -> None:
        """Give the next bytes of the stream.

        Args:
            data: the bytes; nobody changes them any more.

        Raises:
            CommandError: no state is being loaded, or this one is refused; after that the load has failed.
        """
        destination, record = self._runner.steps.destination, self._runner.record
        if destination is None or record.stream is None:
            raise CommandError("no state is being loaded")
        if record.load_failure is not None:
            raise CommandError(f"the load has failed ({record.load_failure}); only a reset ends this")
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
