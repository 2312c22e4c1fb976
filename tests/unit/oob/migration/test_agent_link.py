"""The way to an agent: whose session is lost, who opens another, and what is taken over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from agentbed import Served, served
from vfiouser_agents.api import AgentState, Event, EventKind, Outcome, Phase, Role
from vfiouser_agents.errors import InvalidState
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.operations import Operation
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.record import Begun
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub

CONFIG = MigrationConfig(call_s=5.0, stop_s=5.0, data_s=5.0, retry_s=0.02)
BEGUN = Begun(Role.SOURCE, "m")


@asynccontextmanager
async def linked(tmp_path: Path, function: MemoryFunction) -> AsyncIterator[tuple[Served, MigrationRunner]]:
    """The runner of a function whose agent is another process, so to say."""
    async with served(MemoryAgent([function]), "unix", tmp_path) as server, server.client() as agent:
        runner = MigrationRunner("f0", agent, "f0", CONFIG, EventHub(), log.get("function"))
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runner.run)
                yield server, runner
                nursery.cancel_scope.cancel()


def soon() -> float:
    """A deadline."""
    return trio.current_time() + 10


async def test_a_session_whose_connection_has_gone_is_replaced_by_the_next_call(tmp_path: Path) -> None:
    """The caller notices nothing: nothing was sent on the old one; and the migration is taken over on the new one."""
    function = MemoryFunction(state_size=100_000)
    async with linked(tmp_path, function) as (server, runner):
        link = runner.link
        await link.begin(BEGUN, soon())
        await link.call(Operation.STOP, soon())
        first = await link.call(Operation.SAVE, soon(), 0, 1000, Phase.FINAL)
        await server.stop()
        await server.start()
        assert first == await link.call(Operation.SAVE, soon(), 0, 1000, Phase.FINAL)
        assert link.away_since is None


async def test_a_migration_is_begun_once_in_each_session(tmp_path: Path) -> None:
    """Whoever begins it again in the same session asks the agent nothing; another session takes it over."""
    function = MemoryFunction(state_size=100_000)
    async with linked(tmp_path, function) as (server, runner):
        link = runner.link
        for _ in range(2):
            await link.begin(BEGUN, soon())
        assert 1 == function.calls.count("begin")
        await link.call(Operation.STOP, soon())
        await server.stop()
        await server.start()
        await link.call(Operation.SAVE, soon(), 0, 1000, Phase.FINAL)
        await link.begin(BEGUN, soon())
        assert 2 == function.calls.count("begin")
        await link.leave(Outcome.CANCELLED, soon(), abort=True)
        await link.begin(BEGUN, soon())
        assert 3 == function.calls.count("begin")


async def test_a_migration_that_the_agent_forgot_is_not_begun_anew(tmp_path: Path) -> None:
    """What needs it is refused with the reason and not sent; what does not goes on."""
    function = MemoryFunction(state_size=100_000)
    async with linked(tmp_path, function) as (server, runner):
        link = runner.link
        await link.begin(BEGUN, soon())
        await link.call(Operation.STOP, soon())
        await server.stop()
        function.forget_migration()
        await server.start()
        with pytest.raises(InvalidState, match="no longer knows migration m of function f0; save") as caught:
            await link.call(Operation.SAVE, soon(), 0, 1000, Phase.FINAL)
        assert caught.value.unsent
        assert "" == (await link.status(soon())).migration_id
        await link.call(Operation.RESUME, soon())
        assert AgentState.RUNNING is (await link.status(soon())).state


async def test_an_agent_that_was_started_anew_within_a_session_is_told_again() -> None:
    """An adapter may keep its session over that; then only its capabilities tell that it knows nothing."""
    function = MemoryFunction(state_size=100_000)
    runner = MigrationRunner("f0", MemoryAgent([function]), "f0", CONFIG, EventHub(), log.get("function"))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runner.run)
            await wait_all_tasks_blocked()  # it has asked where the function is, and let go of the session
            link = runner.link
            await link.begin(BEGUN, soon())
            await wait_all_tasks_blocked()  # it listens to what the agent tells
            function.caps = replace(function.caps, max_chunk=function.caps.max_chunk // 2)
            function.forget_migration()
            function.feed.put(Event(EventKind.STATE_CHANGED, "started anew", function.status()))
            await wait_all_tasks_blocked()
            assert link.facts is not None
            await link.begin(BEGUN, soon())
            assert 2 == function.calls.count("begin")
            nursery.cancel_scope.cancel()
