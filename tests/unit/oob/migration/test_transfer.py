"""The one interface of whoever moves the state, over a real runner, a model and an agent in memory."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from memoryless import MemorylessClient
from vfiouser_agents.errors import Incompatible, TransportLost
from vfiouser_agents.faults import Fails, Fault, FaultyAgent, NeverAnswers, PretendedConnection, Work
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.model_backend import ModelBackend
from vfiouser_oob.devices.models.test_device import build
from vfiouser_oob.migration.port import attach
from vfiouser_oob.migration.record import Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.source import SourcePipeline
from vfiouser_oob.migration.steps import Steps
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v2 import require_path

S = DeviceState
CONFIG = MigrationConfig(chunk_size=16 << 10, call_s=1.0, stop_s=1.0, data_s=1.0, retry_s=0.02)
SIZE = 100 << 10


class Place:
    """One function with a client.

    Args:
        runner: its migration.
        agent: its agent, which fails when told to.
    """

    def __init__(self, runner: MigrationRunner, agent: FaultyAgent) -> None:
        self.runner = runner
        self.agent = agent
        self.v1, self.v2 = (Transfer(runner, owner) for owner in (Owner.V1, Owner.V2))

    async def go(self, state: DeviceState, mover: Transfer | None = None) -> None:
        """Ask for a state."""
        await (mover or self.v2).request(partial(require_path, target=state))

    async def read_all(self, size: int = 10_000) -> bytes:
        """Read the whole stream, and have it."""
        stream = b""
        while True:
            await self.v2.prepare(size)
            part = b"".join(self.v2.read(size))
            stream += part
            self.v2.delivered()
            if len(part) < size:
                return stream


@asynccontextmanager
async def place(seed: int = 1) -> AsyncIterator[Place]:
    """A function whose client has come."""
    agent = FaultyAgent(MemoryAgent([MemoryFunction(state_size=SIZE, seed=seed)]))
    backend = ModelBackend(build("f0", None))
    runner = MigrationRunner("f0", agent, "f0", CONFIG, EventHub(), log.get("function"))
    with closing(backend), trio.fail_after(60):
        async with agent, trio.open_nursery() as nursery:
            nursery.start_soon(backend.run)
            nursery.start_soon(runner.run)
            session = await backend.open(MemorylessClient())
            await attach(runner, session, "f0", VersionCapabilities())
            try:
                yield Place(runner, agent)
            finally:
                with trio.CancelScope(shield=True):
                    await session.close()
                nursery.cancel_scope.cancel()


async def test_a_state_is_moved() -> None:
    """From one function to another, which is then what the first one was."""
    async with place(seed=1) as here, place(seed=2) as there:
        assert (S.RUNNING, True, True, None) == (here.v2.state, here.v2.certain, here.v2.mine, here.v2.left)
        await here.go(S.STOP_COPY)
        left = here.v2.left
        assert left is not None
        assert (True, False) == (left.final, left.exhausted)
        assert not here.v2.has(SIZE + (1 << 20))
        stream = await here.read_all()
        left = here.v2.left
        assert left is not None
        assert (0, True, True) == (left.buffered, left.exhausted, here.runner.record.handed)
        assert here.runner.record.stream is not None
        assert len(stream) == here.runner.record.stream.position
        await there.go(S.RESUMING)
        assert [True] == [there.v2.loading]
        for start in range(0, len(stream), 7000):
            await there.v2.write(stream[start : start + 7000])
        await there.go(S.RUNNING)
        assert not there.v2.loading
        assert (S.RUNNING, S.STOP_COPY) == (await there.v2.state_now(), await here.v2.state_now())


async def test_a_migration_has_one_owner() -> None:
    """The first to leave RUNNING has it, until RUNNING; the other one reads the state and is refused."""
    async with place() as here:
        await here.go(S.PRE_COPY, here.v1)
        assert (True, False, S.PRE_COPY) == (here.v1.mine, here.v2.mine, here.v2.state)
        for attempt in (here.go(S.STOP_COPY, here.v2), here.go(S.RUNNING, here.v2)):
            with pytest.raises(CommandError, match="belongs to generation v1") as refused:
                await attempt
            assert errno.EBUSY == refused.value.errno
        with pytest.raises(CommandError, match="MIG_DATA_READ: the migration belongs"):
            here.v2.require("MIG_DATA_READ")
        await here.go(S.RUNNING, here.v1)
        here.v2.require("MIG_DATA_READ")
        await here.go(S.STOP, here.v2)


async def test_the_point_of_no_return() -> None:
    """It is passed when the client has the last byte, and not when that was read."""
    async with place() as here:
        await here.go(S.STOP_COPY)
        here.v2.delivered()
        await here.v2.prepare(1 << 20)
        assert here.v2.read(1 << 20)
        assert not here.runner.record.handed
        here.v2.delivered()
        here.v2.delivered()
        assert here.runner.record.handed


async def test_a_state_is_not_handed_over_while_its_function_is_brought_back() -> None:
    """The client wanted it to run here again, and its agent is away: whoever read the rest could run a second one."""
    async with place() as here:
        await here.go(S.STOP_COPY)
        await here.v2.prepare(1000)
        assert here.v2.read(1000)
        here.agent.inject("resume", NeverAnswers())
        with pytest.raises(CommandError):
            await here.go(S.RUNNING)
        assert not here.v2.certain
        for attempt in (lambda: here.v2.read(1000), lambda: here.v2.has(1000)):
            with pytest.raises(CommandError, match="no state is being saved"):
                attempt()
        with pytest.raises(CommandError, match="no state is being saved"):
            await here.v2.prepare(1000)
        assert not here.runner.record.handed


async def test_nothing_is_read_or_written_where_nothing_is_moved() -> None:
    """Each says so."""
    async with place() as here:
        assert not here.v2.loading
        here.v2.delivered()
        for call in (partial(here.v2.has, 1), partial(here.v2.read, 1)):
            with pytest.raises(CommandError, match="no state is being saved"):
                call()
        with pytest.raises(CommandError, match="no state is being saved"):
            await here.v2.prepare(1)
        with pytest.raises(CommandError, match="no state is being loaded"):
            await here.v2.write(b"x")


async def test_a_load_that_failed_stays_so() -> None:
    """Whatever comes after the first damaged byte is refused with the first reason, and so is the end."""
    async with place() as here:
        await here.go(S.RESUMING)
        with pytest.raises(CommandError, match="the stream begins with"):
            await here.v2.write(bytes(100))
        reason = here.runner.record.load_failure
        assert reason
        for attempt in (here.v2.write(bytes(100)), here.go(S.RUNNING)):
            with pytest.raises(CommandError, match="only a reset ends this"):
                await attempt
        assert (S.RESUMING, reason) == (here.v2.state, here.runner.record.load_failure)
        await here.runner.reset()
        assert (S.RUNNING, None) == (here.v2.state, here.runner.record.load_failure)


async def test_an_agent_that_refuses_a_state() -> None:
    """Its reason is the client's."""
    async with place(seed=1) as here, place(seed=2) as there:
        await here.go(S.STOP_COPY)
        stream = await here.read_all()
        await there.go(S.RESUMING)
        there.agent.inject("check", Fails(Incompatible(["firmware 1.0 here, 2.0 there"])))
        with pytest.raises(CommandError, match=r"the state was refused: incompatible: firmware"):
            await there.v2.write(stream)
        assert "incompatible: firmware 1.0 here, 2.0 there" == there.runner.record.load_failure


async def test_a_write_that_is_given_up() -> None:
    """Nobody knows how much of it arrived, so the load is lost."""
    async with place(seed=1) as here, place(seed=2) as there:
        await here.go(S.STOP_COPY)
        stream = await here.read_all()
        await there.go(S.RESUMING)
        there.agent.inject("check", NeverAnswers())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.v2.write, stream)
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()
        assert "a write was given up half-way" == there.runner.record.load_failure


class LostMeanwhile(Fault):
    """The contact is lost while a call is under way, after others have been answered.

    Args:
        steps: whose source's pipeline is noted.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.source: SourcePipeline | None = None

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Lose it, once the first pieces have come."""
        self.source = self._steps.source
        await trio.testing.wait_all_tasks_blocked(0.05)
        connection.drop()
        raise TransportLost("the contact was lost")


async def test_a_stream_whose_opening_is_attempted_again() -> None:
    """What was fetched before the contact was lost goes, and only one pipeline fetches from then on."""
    async with place(seed=1) as here, place(seed=2) as there:
        fault = LostMeanwhile(here.runner.steps)
        here.agent.inject("describe", fault)
        await here.go(S.STOP_COPY)
        assert fault.source is not None
        assert fault.source is not here.runner.steps.source
        assert 0 == fault.source.buffered
        stream = await here.read_all()
        await there.go(S.RESUMING)
        await there.v2.write(stream)
        await there.go(S.RUNNING)
        assert S.RUNNING is there.v2.state
