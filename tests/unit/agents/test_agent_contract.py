"""The contract suite passes on the reference agent, applies only what is claimed, and finds planted faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from plantedfaults import PLANTED, broken, logs_all_the_same
from vfiouser_agents.api import (
    AgentInfo,
    AgentState,
    Event,
    FunctionInfo,
    Role,
)
from vfiouser_agents.errors import NotFound, TransportLost
from vfiouser_agents.memory import ALL_CAPABILITIES, MemoryAgent, MemoryFunction, MemorySession
from vfiouser_agents.testing import CHECKS, CheckOutcome, NotUsable, check_agent

NOTHING = replace(
    ALL_CAPABILITIES, stop_copy=False, p2p=False, precopy=False, dirty=False, reset=False, formats=(), max_ranges=0
)


def factory(function: MemoryFunction) -> Callable[[], MemoryAgent]:
    """Agents for one and the same function."""
    return lambda: MemoryAgent([function])


async def failures(make: Callable[[], MemoryAgent], **options: Any) -> dict[str, str]:
    """The checks that fail, with what they say."""
    results = await check_agent(make, function_id="f0", **options)
    return {result.name: result.detail for result in results if result.outcome is CheckOutcome.FAILED}


@pytest.mark.parametrize(
    "function",
    [
        MemoryFunction(),
        MemoryFunction(state_size=3, churn=2),
        MemoryFunction(state_size=5 << 20, churn=100_000),
        MemoryFunction(caps=replace(ALL_CAPABILITIES, p2p=False, precopy=False, max_chunk=4096)),
    ],
    ids=["plain", "tiny", "large", "few capabilities"],
)
async def test_reference_agent_passes(function: MemoryFunction) -> None:
    """Every check that applies passes on the executable specification."""
    assert {} == await failures(factory(function))
    assert AgentState.RUNNING is function.state


async def test_what_is_not_claimed_does_not_apply() -> None:
    """An agent that can do nothing passes, and what it cannot do is not counted as passed."""
    results = await check_agent(factory(MemoryFunction(caps=NOTHING)), function_id="f0")
    by_name = {result.name: result.outcome for result in results}
    assert CheckOutcome.FAILED not in by_name.values()
    assert CheckOutcome.NOT_APPLICABLE is by_name["round-trip"]
    assert CheckOutcome.NOT_APPLICABLE is by_name["dirty"]
    assert CheckOutcome.PASSED is by_name["unsupported"]


def test_names_are_unique() -> None:
    """Each check can be chosen by its name, and says what it proves."""
    assert len(CHECKS) == len({check.name for check in CHECKS})
    assert all(check.says for check in CHECKS)


async def test_a_function_in_use_is_left_alone() -> None:
    """The suite does not touch a function that is stopped or in a migration, nor guess which one is meant."""
    function = MemoryFunction()
    session = await MemoryAgent([function]).open("f0")
    await session.begin(Role.SOURCE, "real")
    with pytest.raises(NotUsable, match="source of migration 'real'"):
        await check_agent(factory(function))
    with pytest.raises(NotUsable, match="f0, f1"):
        await check_agent(lambda: MemoryAgent([function, MemoryFunction("f1")]))
    assert "real" == function.migration_id


async def test_choice_of_checks() -> None:
    """Only the checks that were named run, and each result is told as it comes."""
    told: list[str] = []
    await check_agent(
        factory(MemoryFunction()), names=["dirty", "begin"], on_result=lambda result: told.append(result.name)
    )
    assert ["begin", "dirty"] == told


#: Checks whose faults are not in one method of a session; each has a test of its own below.
PLANTED_ELSEWHERE = {"connect-again", "functions", "open-unknown", "unsupported", "events", "survives-connection"}


@pytest.mark.parametrize(("op", "fault", "finds"), PLANTED)
async def test_planted_faults_are_found(
    op: str, fault: Callable[..., Any], finds: str, autojump_clock: trio.abc.Clock
) -> None:
    """An agent with one wrong method fails at least the check that is about it."""
    found = await failures(broken(op, fault), names=[finds, "connect-again"])
    assert finds in found
    assert found[finds]


def test_every_check_can_fail() -> None:
    """There is no check for which no fault is planted."""
    assert {check.name for check in CHECKS} == {finds for _, _, finds in PLANTED} | PLANTED_ELSEWHERE


async def test_more_than_was_claimed() -> None:
    """An agent that does what it says that it cannot do is found."""
    caps = replace(ALL_CAPABILITIES, dirty=False)
    assert "unsupported" in await failures(broken("dirty_start", logs_all_the_same, caps), names=["unsupported"])


async def test_an_agent_that_is_another_one_each_time() -> None:
    """What `connect` answers has to be the same again."""

    class Agent(MemoryAgent):
        async def connect(self) -> AgentInfo:
            serials.append(f"{len(serials)}")
            return replace(await super().connect(), instance=serials[-1])

    serials: list[str] = []
    assert "connect-again" in await failures(Agent, names=["connect-again"])


async def test_events_that_fail() -> None:
    """A function that is watched in vain is found."""

    class Session(MemorySession):
        @asynccontextmanager
        async def watch(self) -> AsyncIterator[AsyncIterator[Event]]:
            await nobody_tells()
            async with super().watch() as events:
                yield events

    async def nobody_tells() -> None:
        await trio.lowlevel.checkpoint()
        raise TransportLost("nobody tells")

    class Agent(MemoryAgent):
        async def open(self, function_id: str) -> MemorySession:
            return Session((await super().open(function_id)).function)

    assert "events" in await failures(Agent, names=["events"])


async def test_a_sound_agent_of_the_same_make_passes() -> None:
    """The way in which faults are planted is no fault itself."""

    async def right(self: MemorySession, method: Any, *args: Any) -> Any:
        return await method(self, *args)

    assert {} == await failures(broken("stop", right))


async def test_a_function_that_is_listed_wrongly() -> None:
    """A list without the function itself is found."""

    class Agent(MemoryAgent):
        async def functions(self) -> Sequence[FunctionInfo]:
            await trio.lowlevel.checkpoint()
            return [FunctionInfo("other")]

        async def open(self, function_id: str) -> MemorySession:
            return await super().open("f0")

    function = MemoryFunction()
    found = await failures(lambda: Agent([function]))
    assert {"functions", "open-unknown"} <= set(found)


async def test_an_agent_that_loses_functions_with_its_connection() -> None:
    """What was stopped must stay stopped: an agent that resumes when a client goes is found."""
    function = MemoryFunction()

    class Agent(MemoryAgent):
        async def aclose(self) -> None:
            function.forget_migration()
            function.move(AgentState.RUNNING)
            await super().aclose()

    assert "survives-connection" in await failures(lambda: Agent([function]))


async def test_no_agent() -> None:
    """Where nothing answers, that is said once, and not by each check."""

    class Agent(MemoryAgent):
        async def open(self, function_id: str) -> MemorySession:
            raise NotFound("no such thing")

    with pytest.raises(NotUsable, match="NotFound: no such thing"):
        await check_agent(Agent, function_id="f0")
