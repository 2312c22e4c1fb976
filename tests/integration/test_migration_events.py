"""What an agent tells by itself: a function that breaks, or that somebody else moves, is seen at once."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from agentbed import Served, served
from daemonkit import function, serving
from migrationkit import (
    ERROR,
    FAST,
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    V1_ERROR,
    V1_RUNNING,
    V1_STOPPED,
    Side,
    bed,
    until,
)
from rawclient import RESET
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import AgentState, Event, EventKind, Status
from vfiouser_agents.errors import Busy, ConnectError, DeadlineExceeded, TransportLost, Unsupported
from vfiouser_agents.faults import Drops, Fails, FaultyAgent, NeverAnswers
from vfiouser_agents.memory import MemoryAgent, MemoryFunction, MemorySession
from vfiouser_oob.config.schema import AgentConfig, MigrationConfig
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.migration.record import Certainty

STATES = [STOP, PRE_COPY, STOP_COPY, RESUMING]


@dataclass
class Far:
    """A function whose agent is behind a server."""

    side: Side
    server: Served
    client: MsgpackRpcAgent


@asynccontextmanager
async def far(directory: Path, migration: MigrationConfig = FAST) -> AsyncIterator[Far]:
    """A daemon that reaches its agent by the reference protocol."""
    device = MemoryFunction("x")
    inner = FaultyAgent(MemoryAgent([device]))
    async with served(inner, "unix", directory / "agent") as server:
        agent = server.client()
        assert isinstance(agent, MsgpackRpcAgent)
        config = function(directory, agent=AgentConfig(kind="test", function="x"), migration=migration)
        control = directory / "control.sock"
        async with serving(config, reply_budget_s=2.0, agents={"test": agent}, control_socket=control) as daemon:
            yield Far(Side("f0", directory / "f0.sock", device, daemon, inner), server, agent)


async def watched(side: Side) -> None:
    """Wait until somebody listens."""
    await until(lambda: side.device.feed.watched)


# A function that breaks


@pytest.mark.parametrize("state", STATES)
async def test_a_failure_is_seen_without_a_call(tmp_path: Path, state: int) -> None:
    """In every state a broken function reads ERROR and 6, refuses what it is asked with EINVAL, and a reset helps."""
    async with far(tmp_path) as place, place.side.vmm() as client:
        side = place.side
        watcher = side.daemon.subscribe()
        await client.set_state(state)
        await watched(side)
        side.device.fail("a fuse has blown")
        await until(lambda: side.runner.record.certainty is Certainty.FAILED)
        assert (ERROR, V1_ERROR) == (await client.state(), await client.v1_state())
        assert errno.EINVAL == await client.set_state_errno(RUNNING)
        assert errno.EBUSY == await client.v1_set_errno(V1_RUNNING)
        assert await client.data_read_errno() or state == RESUMING
        told = [event for event in drain(watcher) if event["type"] in ("agent-event", "migration-state")]
        assert ("device-error", "a fuse has blown") in [(e.get("event"), e.get("detail")) for e in told]
        assert "ERROR" == told[-1].get("state")
        if state in (STOP, RESUMING):  # else the chunk that is being fetched may have brought the news
            assert "a fuse has blown" == told[-1].get("reason")
        await client.succeed(RESET)
        assert (RUNNING, V1_RUNNING) == (await client.state(), await client.v1_state())
        assert side.runs


def drain(channel: trio.MemoryReceiveChannel[dict[str, Any]]) -> list[dict[str, Any]]:
    """What has come so far."""
    found = []
    while True:
        try:
            found.append(channel.receive_nowait())
        except trio.WouldBlock:
            return found


@pytest.mark.parametrize("state", [0, 2, 3, 4])
async def test_a_failure_is_seen_in_v1(tmp_path: Path, state: int) -> None:
    """The owner in the older generation reads 6, is refused with EINVAL, and gets out by a reset."""
    async with far(tmp_path) as place, place.side.vmm() as client:
        side = place.side
        await client.v1_set(state)
        await watched(side)
        side.device.fail()
        await until(lambda: side.runner.record.certainty is Certainty.FAILED)
        assert (V1_ERROR, ERROR) == (await client.v1_state(), await client.state())
        assert errno.EINVAL == await client.v1_set_errno(V1_RUNNING)
        await client.succeed(RESET)
        assert (V1_RUNNING, RUNNING) == (await client.v1_state(), await client.state())


async def test_status_shows_a_failure(tmp_path: Path) -> None:
    """The control socket says ERROR without anybody having called the agent."""
    async with far(tmp_path) as place, place.side.vmm() as client:

        def ask() -> str:
            with ControlClient(tmp_path / "control.sock") as control:
                migration = control.status()["functions"][0]["migration"]
            assert migration is not None
            return migration["state"]

        await client.set_state(STOP)
        await watched(place.side)
        assert "STOP" == await trio.to_thread.run_sync(ask)
        place.side.device.fail()
        await until(lambda: place.side.runner.record.certainty is Certainty.FAILED)
        assert "ERROR" == await trio.to_thread.run_sync(ask)


async def test_a_read_under_way_fails_at_once(tmp_path: Path) -> None:
    """A client that waits for state from a function that breaks is answered long before its time is up."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        both.agent.inject("save", NeverAnswers(), count=None)
        await client.set_state(STOP_COPY)
        await watched(both.source)
        async with trio.open_nursery() as nursery:
            with trio.fail_after(0.3):

                async def read() -> None:
                    assert errno.EIO == await client.data_read_errno(200_000)

                nursery.start_soon(read)
                await until(lambda: "save" in both.agent.seen)
                both.source.device.fail()
                await until(lambda: both.source.runner.record.certainty is Certainty.FAILED)


async def test_a_failure_that_status_does_not_confirm_in_time(tmp_path: Path) -> None:
    """An agent that reports a broken function and then hangs is believed."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        await client.set_state(STOP)
        await watched(both.source)
        both.agent.inject("status", NeverAnswers(), count=None)
        both.source.device.fail("and nobody to ask")
        await until(lambda: both.source.runner.record.certainty is Certainty.FAILED)
        assert (ERROR, V1_ERROR) == (await client.state(), await client.v1_state())


async def test_a_failure_that_a_reset_has_mended(tmp_path: Path) -> None:
    """An event that is older than the client's reset changes nothing."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        for _ in range(20):
            await client.set_state(STOP)
            both.source.device.fail()
            await client.succeed(RESET)
            assert RUNNING == await client.state()
            await trio.testing.wait_all_tasks_blocked(0.005)
            assert (RUNNING, Certainty.KNOWN) == (await client.state(), both.source.runner.record.certainty)


# Somebody else at the agent


async def test_somebody_else_stops_the_function(tmp_path: Path) -> None:
    """What is stopped under a client in pre-copy reads STOP; from there the client goes on as from any STOP."""
    async with far(tmp_path) as place, place.side.vmm() as client:
        side = place.side
        await client.set_state(PRE_COPY)
        await watched(side)
        side.device.move(AgentState.STOPPED)
        await until(lambda: side.runner.record.state_shown == STOP)
        assert (STOP, V1_STOPPED) == (await client.state(), await client.v1_state())
        assert await client.data_read_errno()
        await client.set_state(STOP_COPY)
        assert await client.read_stream()
        await client.set_state(RUNNING)
        assert side.runs


async def test_somebody_else_resets_the_function(tmp_path: Path) -> None:
    """What runs again under a client that holds it stopped reads RUNNING, and can be migrated."""
    async with far(tmp_path) as place, place.side.vmm() as client:
        side = place.side
        for state in (STOP, STOP_COPY, RESUMING):
            await client.set_state(state)
            await watched(side)
            side.device.reset()
            await until(lambda: side.runner.record.state_shown == RUNNING)
            assert (RUNNING, V1_RUNNING) == (await client.state(), await client.v1_state())
            assert side.runs


async def test_somebody_else_quiesces_the_function(tmp_path: Path) -> None:
    """There is no such state on the wire; it is said in the log, and changes nothing."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        await client.set_state(PRE_COPY)
        await watched(both.source)
        both.source.device.move(AgentState.QUIESCED)
        await until(lambda: both.agent.seen["status"] > 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert PRE_COPY == await client.state()
        await client.set_state(RUNNING)


# Our own doings


@pytest.mark.parametrize("v1", [True, False])
async def test_own_changes_ask_nothing(tmp_path: Path, v1: bool) -> None:
    """The events of what the daemon itself has done cost no calls."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await trio.testing.wait_all_tasks_blocked(0.05)  # the questions of the daemon's beginning and at attach
        before = both.agent.seen["status"]
        if v1:
            await src.v1_set(3)
            await src.v1_set(2)
            stream = await src.v1_read_stream()
            await dst.v1_set(4)
            await dst.v1_write_stream(stream)
            await dst.v1_set(1)
        else:
            await src.set_state(PRE_COPY)
            await src.set_state(STOP_COPY)
            stream = await src.read_stream()
            await dst.set_state(RESUMING)
            await dst.write_stream(stream)
            await dst.set_state(RUNNING)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert both.migrated()
        assert before == both.agent.seen["status"]


async def test_nothing_is_watched_without_a_session(tmp_path: Path) -> None:
    """Listening ends with the session, and leaves neither task nor session behind, after losses neither."""
    async with far(tmp_path) as place:
        side = place.side
        await until(lambda: side.runner.record.asked and not side.runner.link.is_open)
        await until(lambda: not side.device.feed.watched and not place.client.sessions)
        async with side.vmm() as client:
            assert not side.device.feed.watched
            for _ in range(3):
                await client.set_state(STOP)
                await watched(side)
                side.agent.inject("resume", Drops())
                await client.set_state_errno(RUNNING)
                await until(lambda: side.runner.record.certainty is Certainty.KNOWN)
                await client.set_state(RUNNING)
        await until(lambda: not side.device.feed.watched and not place.client.sessions)
        assert not place.client.migrating


# An agent that tells nothing, or goes away


class DeafSession(MemorySession):
    """A session whose events are another matter."""

    how: Callable[[], AbstractAsyncContextManager[AsyncIterator[Event]]]

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Whatever the test wants."""
        return type(self).how()


class DeafAgent(MemoryAgent):
    """An agent with such sessions."""

    async def open(self, function_id: str) -> MemorySession:
        """A session."""
        inner = await super().open(function_id)
        session = DeafSession(inner.function)
        self._sessions.append(session)
        return session


def refuses() -> AbstractAsyncContextManager[AsyncIterator[Event]]:
    """As an adapter without events."""
    raise Unsupported("no events here")


@asynccontextmanager
async def ends_with(error: Exception | None, *, inside: bool, events: int = 0) -> AsyncIterator[AsyncIterator[Event]]:
    """Events that end, or fail, at once or in the middle, alone or in a group as trio's nurseries raise."""

    async def stream() -> AsyncIterator[Event]:
        for _ in range(events):
            yield Event(EventKind.SIZE_CHANGED)
        if error is not None:
            raise error

    if error is not None and not inside:
        raise ExceptionGroup("from a nursery", [error])
    await trio.lowlevel.checkpoint()
    yield stream()


@asynccontextmanager
async def silent() -> AsyncIterator[AsyncIterator[Event]]:
    """An agent that does not even answer whether there are events."""
    await trio.Event().wait()
    async with ends_with(None, inside=True) as events:
        yield events


WAYS: list[Callable[[], AbstractAsyncContextManager[AsyncIterator[Event]]]] = [
    refuses,
    silent,
    partial(ends_with, None, inside=True, events=3),
    partial(ends_with, TransportLost("gone"), inside=False),
    partial(ends_with, ConnectError("never there"), inside=True, events=1),
    partial(ends_with, Busy("no"), inside=True),
    partial(ends_with, OSError(5, "wire cut"), inside=True),
]


@pytest.mark.parametrize("way", WAYS)
async def test_without_events_all_is_as_before(
    tmp_path: Path, way: Callable[[], AbstractAsyncContextManager[AsyncIterator[Event]]]
) -> None:
    """An agent without events, or whose events fail or end, migrates; a broken function is seen with the next call."""
    DeafSession.how = staticmethod(way)
    device = MemoryFunction("x")
    agent = FaultyAgent(DeafAgent([device]))
    config = function(tmp_path, agent=AgentConfig(kind="test", function="x"), migration=FAST)
    async with serving(config, reply_budget_s=2.0, agents={"test": agent}) as daemon:
        side = Side("f0", tmp_path / "f0.sock", device, daemon, agent)
        async with side.vmm() as client:
            await client.set_state(STOP_COPY)
            assert await client.read_stream()
            await client.set_state(RUNNING)
            await client.set_state(STOP)
            device.fail()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert STOP == await client.state()
            assert await client.set_state_errno(RUNNING)
            assert ERROR == await client.state()
        assert not agent.connection.feed.watched


async def test_a_lost_contact_is_watched_again(tmp_path: Path) -> None:
    """After the agent's server was away its events are heard as before; what happened meanwhile is seen, too."""
    async with far(tmp_path) as place, place.side.vmm() as client:
        side = place.side
        await client.set_state(STOP)
        await watched(side)
        for meanwhile in (False, True):
            await place.server.stop()
            await until(lambda: not side.device.feed.watched)
            if meanwhile:
                side.device.fail("nobody saw it")
            await place.server.start()
            if not meanwhile:
                await watched(side)
                assert STOP == await client.state()
        await until(lambda: side.runner.record.certainty is Certainty.FAILED)
        assert (ERROR, V1_ERROR) == (await client.state(), await client.v1_state())


@pytest.mark.parametrize("op", ["save", "status"])
async def test_a_session_lost_in_a_call_is_watched_again(tmp_path: Path, op: str) -> None:
    """A call that finds the connection gone takes its session along; another is opened and watched unasked."""
    async with far(tmp_path) as place, place.side.vmm() as client:
        side = place.side
        await client.set_state(STOP_COPY if op == "save" else STOP)
        await watched(side)
        if op == "save":
            side.agent.inject("save", Fails(TransportLost("cut")))
            await client.data_read_errno(100_000)
        else:
            side.agent.inject("status", Fails(TransportLost("cut")))
            side.device.feed.put(Event(EventKind.STATE_CHANGED, "so it seems", Status(AgentState.RUNNING)))
        await until(lambda: side.agent.seen["open"] > 2)
        await until(lambda: side.runner.link.is_open)
        await watched(side)
        side.device.fail()
        await until(lambda: side.runner.record.certainty is Certainty.FAILED)


async def test_a_contact_that_nobody_needs_any_more(tmp_path: Path) -> None:
    """A session that was lost is not opened again for a function that runs and has no client."""
    async with far(tmp_path, replace(FAST, retry_s=0.2)) as place:
        side = place.side
        async with side.vmm() as client:
            await client.set_state(STOP)
            await watched(side)
            side.agent.inject("status", Fails(TransportLost("cut")))
            before = side.agent.seen["status"]
            side.device.feed.put(Event(EventKind.STATE_CHANGED, "so it seems", Status(AgentState.RUNNING)))
            await until(lambda: side.agent.seen["status"] > before)
        await until(lambda: side.runs and not side.runner.link.is_open)
        opened = side.agent.seen["open"]
        await trio.testing.wait_all_tasks_blocked(0.5)
        assert (opened, False) == (side.agent.seen["open"], side.runner.link.is_open)
        assert not place.client.sessions


async def test_a_contact_that_is_back_is_used_at_once(tmp_path: Path) -> None:
    """What waits for the agent tries again when the agent is back, not when its pause is over."""
    async with far(tmp_path, replace(FAST, retry_s=60.0)) as place, place.side.vmm() as client:
        side = place.side
        for op, count in (("stop", 1), ("resume", 2)):
            side.agent.inject(op, Fails(DeadlineExceeded("the device is slow")), count=count)
        assert errno.ETIMEDOUT == await client.set_state_errno(STOP)
        assert side.runner.record.certainty is Certainty.UNKNOWN
        await until(lambda: side.agent.seen["resume"] == 2)
        await trio.testing.wait_all_tasks_blocked(0.05)  # it has been answered, too
        await watched(side)
        await place.server.stop()
        await place.server.start()
        await until(lambda: side.runs and side.runner.record.certainty is Certainty.KNOWN)


async def test_a_flood_of_events(tmp_path: Path) -> None:
    """An agent that never stops telling costs neither memory nor a migration."""
    patient = replace(FAST, call_s=5.0, stop_s=5.0, data_s=5.0)  # 60 000 events take their time on a busy machine
    async with bed(tmp_path, config=patient, reply_budget_s=10.0) as both, both.source.vmm() as client:
        await client.set_state(STOP_COPY)
        await watched(both.source)
        for kind in (EventKind.SIZE_CHANGED, EventKind.STATE_CHANGED, EventKind.AGENT_RESTARTED):
            for _ in range(20_000):
                both.source.device.feed.put(Event(kind, "again", Status(AgentState.QUIESCED)))
        assert await client.read_stream()
        await client.set_state(RUNNING)
        assert 10 > both.agent.seen["status"]
