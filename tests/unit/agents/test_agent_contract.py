"""The contract suite passes on the reference agent, applies only what is claimed, and finds planted faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio

from vfiouser_agents.api import (
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    FunctionInfo,
    Outcome,
    Phase,
    Range,
    Role,
    Status,
)
from vfiouser_agents.errors import InvalidState, NotFound
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


def broken(name: str, replacement: Callable[..., Any]) -> Callable[[], MemoryAgent]:
    """Agents whose sessions have one method that is wrong; it gets the session and the right method first."""
    function = MemoryFunction(state_size=20_000, churn=100)

    class Session(MemorySession):
        pass

    right = getattr(MemorySession, name)
    if isinstance(right, property):
        setattr(Session, name, property(replacement))
    else:

        async def wrong(self: MemorySession, *args: Any) -> Any:
            return await replacement(self, right, *args)

        setattr(Session, name, wrong)

    class Agent(MemoryAgent):
        async def open(self, function_id: str) -> MemorySession:
            inner = await super().open(function_id)
            return Session(inner.function)

        async def aclose(self) -> None:
            # The handles are ours, not the ones that the agent knows.
            function.owner = None
            await super().aclose()

    return lambda: Agent([function])


async def _nothing(self: MemorySession, right: Any, *args: Any) -> None:
    await trio.lowlevel.checkpoint()


async def _hangs(self: MemorySession, right: Any, *args: Any) -> None:
    await trio.sleep_forever()


async def _wrong_type(self: MemorySession, right: Any, *args: Any) -> None:
    raise KeyError("oops")


async def _stop_keeps_changing(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    chunk: Chunk = await right(self, offset, limit, phase)
    if chunk.eof:
        self.function.content.write(0, bytes([self.function.content.block(0)[0] ^ 1]))
    return chunk


async def _never_eof(self: MemorySession, right: Any, *args: Any) -> Chunk:
    return replace(await right(self, *args), eof=False)


async def _too_much(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    return await right(self, offset, limit + 1, phase)


async def _skips(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    chunk: Chunk = await right(self, offset, limit, phase)
    self.function.outgoing._last = Chunk(b"")  # type: ignore[union-attr]
    self.function.outgoing._last_offset = offset + len(chunk.data)  # type: ignore[union-attr]
    return chunk


async def _commits_anything(self: MemorySession, right: Any, total: int, sha256: bytes) -> None:
    self.function.spoiled = False
    self.function.move(AgentState.LOADED)


async def _ignores_digest(self: MemorySession, right: Any, total: int, sha256: bytes) -> None:
    incoming = self.function.incoming
    digest = sha256 if incoming is None else incoming._hash.digest()
    await right(self, total, digest)


async def _load_ignores_offset(self: MemorySession, right: Any, offset: int, data: bytes) -> None:
    incoming = self.function.incoming
    await right(self, offset if incoming is None else incoming._total, data)


async def _resumes_anything(self: MemorySession, right: Any) -> None:
    self.function.spoiled = False
    await right(self)


async def _compatible_with_all(self: MemorySession, right: Any, descriptor: Descriptor) -> None:
    await trio.lowlevel.checkpoint()


async def _estimates_wrong(self: MemorySession, right: Any) -> Estimate:
    estimate: Estimate = await right(self)
    return replace(estimate, stop_copy_bytes=estimate.stop_copy_bytes - 1)


async def _always_running(self: MemorySession, right: Any) -> Status:
    return replace(await right(self), state=AgentState.RUNNING)


async def _abort_fails(self: MemorySession, right: Any) -> None:
    raise InvalidState("nothing to abort")


async def _begin_steals(self: MemorySession, right: Any, role: Role, migration_id: str) -> None:
    self.function.forget_migration()
    await right(self, role, migration_id)


async def _end_resumes(self: MemorySession, right: Any, outcome: Outcome) -> None:
    await right(self, outcome)
    self.function.spoiled = False
    self.function.move(AgentState.RUNNING)


async def _report_repeats(self: MemorySession, right: Any, iova: int, length: int) -> DirtyReport:
    report: DirtyReport = await right(self, iova, length)
    return replace(report, bitmap=b"\xff" * len(report.bitmap or b""))


async def _report_short(self: MemorySession, right: Any, iova: int, length: int) -> DirtyReport:
    report: DirtyReport = await right(self, iova, length)
    return replace(report, bitmap=(report.bitmap or b"")[:-1])


async def _any_page_size(self: MemorySession, right: Any, ranges: Sequence[Range], page_size: int) -> int:
    await right(self, ranges, page_size)
    return 12345


async def _reset_keeps_log(self: MemorySession, right: Any) -> None:
    log = self.function.log
    await right(self)
    self.function.log = log


def _claims_too_little_room(self: MemorySession) -> Capabilities:
    return replace(ALL_CAPABILITIES, max_state=1000)


def _claims_odd_pages(self: MemorySession) -> Capabilities:
    return replace(ALL_CAPABILITIES, page_sizes=(65536, 4096))


@pytest.mark.parametrize(
    ("op", "fault", "finds"),
    [
        ("stop", _nothing, "stop-resume"),
        ("resume", _nothing, "stop-resume"),
        ("quiesce", _nothing, "quiesce"),
        ("stop", _wrong_type, "stop-resume"),
        ("stop", _hangs, "stop-resume"),
        ("describe", _hangs, "describe"),
        ("save", _stop_keeps_changing, "save-constant"),
        ("save", _never_eof, "save-constant"),
        ("save", _too_much, "save-constant"),
        ("save", _skips, "save-repeat"),
        ("load_commit", _commits_anything, "commit-truncated"),
        ("load_commit", _ignores_digest, "commit-digest"),
        ("load", _load_ignores_offset, "load-order"),
        ("load", _nothing, "round-trip"),
        ("resume", _resumes_anything, "load-abort"),
        ("check", _compatible_with_all, "check-foreign"),
        ("estimate", _estimates_wrong, "estimate"),
        ("status", _always_running, "stop-resume"),
        ("abort", _abort_fails, "abort-idle"),
        ("begin", _begin_steals, "begin-other"),
        ("end", _end_resumes, "end"),
        ("dirty_report", _report_repeats, "dirty-clears"),
        ("dirty_report", _report_short, "dirty"),
        ("dirty_start", _any_page_size, "dirty"),
        ("dirty_stop", _nothing, "dirty"),
        ("reset", _reset_keeps_log, "reset-states"),
        ("caps", _claims_too_little_room, "describe"),
        ("caps", _claims_odd_pages, "capabilities"),
    ],
)
async def test_planted_faults_are_found(
    op: str, fault: Callable[..., Any], finds: str, autojump_clock: trio.abc.Clock
) -> None:
    """An agent with one wrong method fails at least the check that is about it."""
    found = await failures(broken(op, fault), names=[finds, "connect-again"])
    assert finds in found
    assert found[finds]


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

    class Agent(MemoryAgent):
        async def aclose(self) -> None:
            function.forget_migration()
            function.move(AgentState.RUNNING)
            await super().aclose()

    function = MemoryFunction()
    assert "survives-connection" in await failures(lambda: Agent([function]))


async def test_no_agent() -> None:
    """Where nothing answers, that is said once, and not by each check."""

    class Agent(MemoryAgent):
        async def open(self, function_id: str) -> MemorySession:
            raise NotFound("no such thing")

    with pytest.raises(NotUsable, match="NotFound: no such thing"):
        await check_agent(Agent, function_id="f0")
