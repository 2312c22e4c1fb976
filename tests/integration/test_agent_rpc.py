"""The reference protocol end to end: every transport, losses, many sessions, cancelled calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from xxhash import xxh3_128

from agentbed import TRANSPORTS, served, silent_agent
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import AgentInfo, AgentState, EventKind, Outcome, Phase, Range, Role, Session
from vfiouser_agents.delivery import followed
from vfiouser_agents.errors import ConnectError, DeviceFailed, InvalidState, TransportLost
from vfiouser_agents.faults import Delay, FaultyAgent, NeverAnswers
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_agents.testing import CheckOutcome, check_agent


async def migrate(source: Session, target: Session, limit: int = 1 << 20) -> None:
    """Move a function's state from one session to the other, with one pass of pre-copy."""
    await source.begin(Role.SOURCE, "m")
    await target.begin(Role.DESTINATION, "m")
    await target.check(await source.describe())
    await target.stop()
    await target.load_begin(None)
    digest, offset = xxh3_128(), 0
    phase = Phase.PRECOPY
    while True:
        chunk = await source.save(offset, limit, phase)
        await target.load(offset, chunk.data)
        digest.update(chunk.data)
        offset += len(chunk.data)
        if chunk.eof:
            break
        if chunk.drained:
            await source.stop()
            phase = Phase.FINAL
    await target.load_commit(offset, digest.digest())
    await target.resume()
    await source.end(Outcome.SUCCESS)
    await target.end(Outcome.SUCCESS)


def pair(count: int, *, state_size: int, churn: int) -> tuple[MemoryAgent, MemoryAgent]:
    """Two agents with functions that fit each other."""

    def agent(seed: int) -> MemoryAgent:
        numbers = range(count)
        return MemoryAgent(
            [MemoryFunction(f"f{i}", seed=i + seed, state_size=state_size, churn=churn) for i in numbers]
        )

    return agent(1), agent(1000)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_migration_over_every_transport(transport: str, tmp_path: Path) -> None:
    """A function's state arrives over UNIX sockets, TCP, TLS and mTLS."""
    here, there = pair(1, state_size=3 << 20, churn=10000)
    async with (
        served(here, transport, tmp_path / "a") as first,
        served(there, transport, tmp_path / "b") as second,
        first.client() as source,
        second.client() as target,
    ):
        assert "memory agent" == (await source.connect()).product
        assert ["f0"] == [function.function_id for function in await source.functions()]
        await migrate(await source.open("f0"), await target.open("f0"))
    assert here.by_id["f0"].digest() == there.by_id["f0"].digest()
    assert (AgentState.STOPPED, AgentState.RUNNING) == (here.by_id["f0"].state, there.by_id["f0"].state)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_contract_over_every_transport(transport: str, tmp_path: Path) -> None:
    """The reference agent keeps the contract also through client, wire and server."""
    function = MemoryFunction("nvme0", state_size=50_000, churn=5000)
    async with served(MemoryAgent([function]), transport, tmp_path) as server:
        results = await check_agent(server.client, function_id="nvme0")
    assert [] == [result for result in results if result.outcome is CheckOutcome.FAILED]
    assert {CheckOutcome.PASSED} == {result.outcome for result in results}


async def test_sixteen_sessions_on_one_connection(tmp_path: Path) -> None:
    """Sixteen functions migrate at the same time through one connection on each side, none waits for another."""
    here, there = pair(16, state_size=600_000, churn=5000)
    async with (
        served(here, "tcp", tmp_path / "a") as first,
        served(there, "unix", tmp_path / "b") as second,
        first.client(chunk_size=16384) as source,
        second.client(chunk_size=16384) as target,
        trio.open_nursery() as nursery,
    ):
        for name in here.by_id:
            nursery.start_soon(migrate, await source.open(name), await target.open(name))
    for name, function in here.by_id.items():
        assert function.digest() == there.by_id[name].digest()
        assert AgentState.RUNNING is there.by_id[name].state


async def test_a_function_that_hangs_holds_up_no_other(tmp_path: Path) -> None:
    """While one function's stop never ends, others on the same connection are served, and reset frees the first."""
    agent = FaultyAgent(MemoryAgent([MemoryFunction("f0"), MemoryFunction("f1")]))
    agent.inject("stop", NeverAnswers(), function_id="f0")
    async with served(agent, "unix", tmp_path) as server, server.client() as client:
        hanging, other = await client.open("f0"), await client.open("f1")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def hangs() -> None:
                with pytest.raises(InvalidState, match="reset ended"):
                    await hanging.stop()

            await other.stop()
            await other.resume()
            while "stop" != (await hanging.status()).pending:
                pass
            await hanging.reset()
        await hanging.stop()


async def test_calls_of_one_function_keep_their_order(tmp_path: Path) -> None:
    """A resume sent while a given-up stop is under way comes after it, also from another connection."""
    function = MemoryFunction()
    agent = FaultyAgent(MemoryAgent([function]))
    agent.inject("stop", Delay(0.2))
    async with served(agent, "unix", tmp_path) as server, server.client() as client, server.client() as second:
        session, late = await client.open("f0"), await second.open("f0")
        with trio.move_on_after(0.05) as scope:
            await session.stop()
        assert scope.cancelled_caught
        assert ("stop", AgentState.RUNNING) == ((status := await session.status()).pending, status.state)
        await late.resume()
    assert ["stop", "resume"] == function.calls
    assert function.running


async def test_cancelled_calls_leave_the_connection_usable(tmp_path: Path) -> None:
    """Calls cancelled at any moment cost neither the connection nor later calls, and late answers are dropped."""
    agent = FaultyAgent(MemoryAgent([MemoryFunction(state_size=1 << 20)]))
    async with served(agent, "unix", tmp_path) as server, server.client() as client:
        session = await client.open("f0")
        info = await client.connect()
        assert isinstance(client, MsgpackRpcAgent)
        link = await client.link()
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        agent.inject("save", Delay(0.002), count=None)
        for step in range(30):
            with trio.move_on_after(step / 10_000):
                await session.save(0, 1 << 20, Phase.FINAL)
        agent.heal()
        chunk = await session.save(0, 1000, Phase.FINAL)
        assert 1000 == len(chunk.data)
        assert (info, link) == (await client.connect(), await client.link())
        assert 0 == link.connection.unanswered


async def test_events_reach_the_watcher(tmp_path: Path) -> None:
    """Changes of the state are told to whoever watches, as they happen, and to nobody else."""
    first, second = MemoryFunction("f0"), MemoryFunction("f1")
    async with served(MemoryAgent([first, second]), "unix", tmp_path) as server, server.client() as client:
        session, other = await client.open("f0"), await client.open("f1")
        async with session.watch() as events, other.watch() as others:
            await session.stop()
            event = await anext(events)
            assert (EventKind.STATE_CHANGED, AgentState.STOPPED) == (event.kind, event.status and event.status.state)
            second.fail("a bit flipped")
            event = await anext(others)
            assert (EventKind.DEVICE_ERROR, "a bit flipped") == (
                (event.kind, event.detail)
                if event.kind is EventKind.DEVICE_ERROR
                else ((event := await anext(others)).kind, event.detail)
            )
        with pytest.raises(DeviceFailed):
            await other.stop()


@pytest.mark.parametrize("transport", ["unix", "tls"])
async def test_reconnect(transport: str, tmp_path: Path) -> None:
    """A session ends with its connection, and its watcher is told; another one takes the migration over and goes on."""
    function = MemoryFunction(state_size=100_000)
    async with served(MemoryAgent([function]), transport, tmp_path) as server, server.client() as client:
        session = await client.open("f0")
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        first = await session.save(0, 1000, Phase.FINAL)
        async with session.watch() as events:
            await server.stop()
            assert EventKind.CONNECTION_LOST is (await anext(events)).kind
        await server.start()
        with pytest.raises(TransportLost, match="another session is needed") as caught, followed() as delivery:
            await session.status()
        delivery.judge(caught.value)
        assert delivery.unsent
        session = await client.open("f0")
        status = await session.status()
        assert (AgentState.STOPPED, "m") == (status.state, status.migration_id)
        await session.begin(Role.SOURCE, "m")
        assert first == await session.save(0, 1000, Phase.FINAL)
        await session.resume()
        await session.end(Outcome.CANCELLED)
    assert function.running


async def test_calls_under_way_are_lost_with_the_connection(tmp_path: Path) -> None:
    """A call without an answer fails as lost, at once, and `status` then tells what became of it."""
    agent = FaultyAgent(MemoryAgent())
    agent.inject("stop", NeverAnswers(executed=True))
    async with served(agent, "unix", tmp_path) as server, server.client() as client:
        session = await client.open("f0")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def lost() -> None:
                with pytest.raises(TransportLost):
                    await session.stop()

            while "stop" != (await session.status()).pending:
                pass
            await server.stop()
        await server.start()
        assert AgentState.STOPPED is (await (await client.open("f0")).status()).state


async def test_an_agent_that_forgot(tmp_path: Path) -> None:
    """An agent that was started anew without the migration says so; nothing starts over by itself."""
    agent = MemoryAgent()
    async with served(agent, "unix", tmp_path) as server, server.client() as client:
        session = await client.open("f0")
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        await server.stop()
        agent.by_id["f0"].forget_migration()
        await server.start()
        with pytest.raises(TransportLost):
            await session.load(0, b"x")
        session = await client.open("f0")
        assert "" == (await session.status()).migration_id
        with pytest.raises(InvalidState):
            await session.load(0, b"x")
        await session.begin(Role.DESTINATION, "n")
        await session.load_begin(None)


async def test_restarted_agent(tmp_path: Path) -> None:
    """An agent with another instance is told apart from one that was merely out of reach."""
    function = MemoryFunction()
    async with served(MemoryAgent([function]), "unix", tmp_path) as server, server.client() as client:
        before = (await client.connect()).instance
        session = await client.open("f0")
        async with session.watch() as events:
            await server.stop()
            server.agent = MemoryAgent([function], AgentInfo("v", "p", instance="another"))
            await server.start()
            assert EventKind.CONNECTION_LOST is (await anext(events)).kind
        assert before != "another" == (await client.connect()).instance


async def test_nobody_there(tmp_path: Path) -> None:
    """A missing agent is a ConnectError each time, and reached as soon as it is there."""
    async with served(MemoryAgent(), "unix", tmp_path) as server, server.client() as client:
        await server.stop()
        with pytest.raises(ConnectError, match="cannot reach"):
            await client.connect()
        with pytest.raises(ConnectError):
            await client.open("f0")
        await server.start()
        await client.open("f0")


async def test_dirty_pages_over_the_wire(tmp_path: Path) -> None:
    """Ranges, page size and bitmap arrive as they were meant."""
    function = MemoryFunction()
    async with served(MemoryAgent([function]), "unix", tmp_path) as server, server.client() as client:
        session = await client.open("f0")
        assert 4096 == await session.dirty_start([Range(1 << 40, 1 << 20), Range(0, 8192)], 4096)
        function.work((1 << 40) + 4096 * 9, 1)
        report = await session.dirty_report(1 << 40, 1 << 20)
        assert (b"\0\2" + bytes(30), False) == (report.bitmap, report.final)


async def test_keepalive_only_while_it_matters(tmp_path: Path, autojump_clock: trio.abc.Clock) -> None:
    """An idle connection is silent for ever; with a migration the agent is asked, and a silent one is given up."""
    async with silent_agent(tmp_path) as silent, MsgpackRpcAgent(silent.address, keepalive_s=5) as client:
        session = await client.open("f0")
        seen = len(silent.methods)
        await trio.sleep(1000)
        assert seen == len(silent.methods)
        await session.begin(Role.SOURCE, "m")
        await trio.sleep(101)
        pings = silent.methods[seen + 1 :]
        assert {"agent.ping"} == set(pings)
        assert 18 <= len(pings) <= 20
        async with session.watch() as events:
            silent.answers = False
            begin = trio.current_time()
            event = await anext(events)
            assert (EventKind.CONNECTION_LOST, "the agent sent nothing for 10 s") == (event.kind, event.detail)
            assert 5 <= trio.current_time() - begin <= 15
        silent.answers = True
