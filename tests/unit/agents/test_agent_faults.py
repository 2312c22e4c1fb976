"""The fault-injecting agent: each fault does what it says, and the rest goes on as with an agent far away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing
from xxhash import xxh3_128_digest

from vfiouser_agents.api import Agent, AgentState, Phase, Range, Role, Session
from vfiouser_agents.errors import ERRORS, AgentError, CorruptState, InvalidArgument, InvalidState, TransportLost
from vfiouser_agents.faults import (
    AGENT_OPS,
    SESSION_OPS,
    ChangesResult,
    Delay,
    Drops,
    Fails,
    Fault,
    FaultyAgent,
    NeverAnswers,
    Twice,
    corrupt_load,
    corrupt_save,
    duplicated_load,
    duplicated_save,
    every_error,
    short_load,
    short_report,
    short_save,
    wrong_descriptor,
)
from vfiouser_agents.memory import MemoryAgent, MemoryFunction


@pytest.fixture
def function() -> MemoryFunction:
    """The function of the agent inside."""
    return MemoryFunction(state_size=8192)


@pytest.fixture
async def agent(function: MemoryFunction) -> AsyncIterator[FaultyAgent]:
    """An agent that does as it is told, badly."""
    async with FaultyAgent(MemoryAgent([function])) as agent:
        yield agent


@pytest.fixture
async def session(agent: FaultyAgent) -> Session:
    """A session for its function."""
    return await agent.open("f0")


def test_every_method_can_fail() -> None:
    """The lists of calls that can be spoiled are those of the interface."""
    abstract = Session.__abstractmethods__ - {"function_id", "caps"}
    assert abstract == set(SESSION_OPS)
    assert {"connect", "functions", "open"} == set(AGENT_OPS)
    assert Agent.__abstractmethods__ - {"aclose"} <= set(AGENT_OPS)


async def test_unknown_call(agent: FaultyAgent) -> None:
    """A fault for a call that does not exist is refused rather than never striking."""
    with pytest.raises(ValueError, match="allowed: describe"):
        agent.inject("freeze", Delay(1))


async def test_delay(agent: FaultyAgent, session: Session, autojump_clock: trio.abc.Clock) -> None:
    """A late call is late, its effect before or after the wait, and the calls around it are not."""
    agent.inject("stop", Delay(3), after=1)
    begin = trio.current_time()
    await session.stop()
    assert begin == trio.current_time()
    await session.stop()
    assert 3 == pytest.approx(trio.current_time() - begin)
    await session.stop()
    assert 3 == pytest.approx(trio.current_time() - begin)


async def test_a_call_goes_on_without_its_caller(
    agent: FaultyAgent, session: Session, autojump_clock: trio.abc.Clock
) -> None:
    """A cancelled stop still takes effect, status shows it pending, and a resume sent meanwhile comes after it."""
    agent.inject("stop", Delay(3))
    with trio.move_on_after(1):
        await session.stop()
    status = await session.status()
    assert (AgentState.RUNNING, "stop") == (status.state, status.pending)
    await session.resume()
    assert 3 == pytest.approx(trio.current_time())
    assert AgentState.RUNNING is (await session.status()).state


@pytest.mark.parametrize("executed", [False, True])
async def test_never_answers(
    agent: FaultyAgent, session: Session, executed: bool, autojump_clock: trio.abc.Clock
) -> None:
    """No answer comes, the effect is there or not, and a reset frees the function."""
    agent.inject("stop", NeverAnswers(executed=executed))
    with trio.move_on_after(1) as scope:
        await session.stop()
    assert scope.cancelled_caught
    assert (AgentState.STOPPED if executed else AgentState.RUNNING) is (await session.status()).state
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def behind() -> None:
            with pytest.raises(InvalidState, match="reset dropped"):
                await session.quiesce()

        await trio.testing.wait_all_tasks_blocked()
        await session.reset()
    assert AgentState.RUNNING is (await session.status()).state
    await session.stop()


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("code", ERRORS)
async def test_each_class_of_error(agent: FaultyAgent, session: Session, code: str, executed: bool) -> None:
    """An error of each class comes out as that class, with the effect or without."""
    fault = next(fault for fault in every_error(executed=executed) if fault.error.code == code)
    agent.inject("stop", fault)
    with pytest.raises(ERRORS[code]) as caught:
        await session.stop()
    assert type(caught.value) is ERRORS[code]
    assert (AgentState.STOPPED if executed else AgentState.RUNNING) is (await session.status()).state


async def test_a_dropped_connection(agent: FaultyAgent, session: Session, autojump_clock: trio.abc.Clock) -> None:
    """It takes every call under way with it, and the next call finds it restored."""
    agent.inject("quiesce", NeverAnswers())
    agent.inject("status", Drops())
    async with trio.open_nursery() as nursery, agent.connection.feed.watch() as events:

        @nursery.start_soon
        async def lost() -> None:
            with pytest.raises(TransportLost):
                await session.quiesce()

        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(TransportLost):
            await session.status()
        assert "connection-lost" == (await anext(events)).kind.value
    assert AgentState.RUNNING is (await session.status()).state


@pytest.mark.parametrize(("fault", "length"), [(short_save(), 99), (corrupt_save(), 100), (duplicated_save(), 200)])
async def test_spoiled_saves(agent: FaultyAgent, session: Session, fault: Fault, length: int) -> None:
    """A chunk is short, wrong or double, and the same one asked for again is right."""
    await session.begin(Role.SOURCE, "m")
    await session.stop()
    agent.inject("save", fault)
    bad = await session.save(0, 100, Phase.FINAL)
    good = await session.save(0, 100, Phase.FINAL)
    assert (length, 100) == (len(bad.data), len(good.data))
    assert bad.data != good.data


@pytest.mark.parametrize("fault", [short_load(), corrupt_load(), duplicated_load()])
async def test_spoiled_loads(agent: FaultyAgent, session: Session, fault: Fault) -> None:
    """Bytes that are lost, wrong or double on their way are found at the commit at the latest."""
    await session.begin(Role.DESTINATION, "m")
    await session.stop()
    await session.load_begin(None)
    agent.inject("load", fault)
    await session.load(0, bytes(50))
    try:
        await session.load(50, bytes(50))
    except InvalidArgument:
        return
    with pytest.raises(CorruptState):
        await session.load_commit(100, xxh3_128_digest(bytes(100)))


async def test_twice(agent: FaultyAgent, session: Session, function: MemoryFunction) -> None:
    """A call can arrive twice."""
    agent.inject("stop", Twice())
    await session.stop()
    assert ["stop", "stop"] == function.calls


async def test_lies(agent: FaultyAgent, session: Session) -> None:
    """Descriptors and dirty reports can be other than true."""
    agent.inject("describe", wrong_descriptor())
    agent.inject("describe", wrong_descriptor(model="x"))
    assert "other" == (await session.describe()).firmware
    agent.inject("dirty_report", short_report())
    await session.dirty_start([Range(0, 1 << 20)], 4096)
    assert b"" != (await session.dirty_report(0, 1 << 20)).bitmap
    agent.inject("estimate", ChangesResult(lambda estimate: None))
    assert await session.estimate() is None


async def test_counts(agent: FaultyAgent, session: Session) -> None:
    """A fault strikes as often as was said, for the function that was said, and not after `heal`."""
    injection = agent.inject("stop", Fails(AgentError("x")), count=2, function_id="f0")
    agent.inject("resume", Fails(AgentError("x")), count=None)
    agent.inject("quiesce", Fails(AgentError("x")), function_id="f1")
    for _ in range(2):
        with pytest.raises(AgentError):
            await session.stop()
    await session.stop()
    await session.quiesce()
    assert (2, 3) == (injection.struck, agent.seen["stop"])
    for _ in range(5):
        with pytest.raises(AgentError):
            await session.resume()
    agent.heal()
    await session.resume()


async def test_restart(
    agent: FaultyAgent, session: Session, function: MemoryFunction, autojump_clock: trio.abc.Clock
) -> None:
    """A new life of the agent ends what hangs, a reset included; the function is where it was."""
    agent.inject("reset", NeverAnswers())
    agent.inject("stop", Delay(1.0))
    await session.quiesce()
    async with trio.open_nursery() as nursery:
        for call in (session.reset, session.stop):
            nursery.start_soon(expect_loss, call)
            await trio.testing.wait_all_tasks_blocked()
        assert "reset" == (await session.status()).pending
        agent.restart()
    assert ("", AgentState.QUIESCED) == ((await session.status()).pending, function.state)
    await trio.sleep(5)
    assert [AgentState.QUIESCED] == [function.state]
    await session.resume()
    assert AgentState.RUNNING is function.state


async def expect_loss(call: Callable[[], Awaitable[None]]) -> None:
    """The call ends with its connection."""
    with pytest.raises(TransportLost):
        await call()
