"""Agents with one planted fault each, for the contract suite to find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import trio

from vfiouser_agents.api import (
    AgentState,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    Outcome,
    Phase,
    Range,
    Role,
    Status,
)
from vfiouser_agents.dirtylog import PageLog
from vfiouser_agents.errors import Busy, Incompatible, InvalidState
from vfiouser_agents.memory import ALL_CAPABILITIES, MemoryAgent, MemoryFunction, MemorySession


def broken(
    name: str, replacement: Callable[..., Any], caps: Capabilities = ALL_CAPABILITIES
) -> Callable[[], MemoryAgent]:
    """Agents whose sessions have one method that is wrong; it gets the session and the right method first."""
    function = MemoryFunction(state_size=20_000, churn=100, caps=caps)

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
    chunk: Chunk = await right(self, *args)
    return replace(chunk, eof=False)


async def _too_much(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    chunk: Chunk = await right(self, offset, limit + 1, phase)
    return chunk


async def _skips(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    chunk: Chunk = await right(self, offset, limit, phase)
    self.function.outgoing._last = Chunk(b"")  # type: ignore[union-attr]
    self.function.outgoing._last_offset = offset + len(chunk.data)  # type: ignore[union-attr]
    return chunk


async def _commits_anything(self: MemorySession, right: Any, total: int, digest: bytes) -> None:
    self.function.spoiled = False
    self.function.move(AgentState.LOADED)


async def _ignores_digest(self: MemorySession, right: Any, total: int, digest: bytes) -> None:
    incoming = self.function.incoming
    right_digest = digest if incoming is None else incoming._hash.digest()
    await right(self, total, right_digest)


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
    status: Status = await right(self)
    return replace(status, state=AgentState.RUNNING)


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


async def _refuses_all(self: MemorySession, right: Any, descriptor: Descriptor) -> None:
    raise Incompatible(["not today"])


async def _begin_names_it(self: MemorySession, right: Any, role: Role, migration_id: str) -> None:
    await right(self, role, migration_id or "nameless")


async def _begin_takes_what_lies_about(self: MemorySession, right: Any, role: Role, migration_id: str) -> None:
    if self.function.owner is None:
        self.function.forget_migration()
    await right(self, role, migration_id)


async def _closing_resumes(self: MemorySession, right: Any) -> None:
    await right(self)
    self.function.move(AgentState.RUNNING)


async def _breaks_when_given_up(self: MemorySession, right: Any) -> None:
    try:
        await trio.sleep(0.01)
    except trio.Cancelled:
        self.function.move(AgentState.ERROR)
        raise
    await right(self)


async def _one_question_at_a_time(self: MemorySession, right: Any) -> Status:
    if "asked" in self.function.calls:
        raise Busy("one at a time")
    self.function.calls.append("asked")
    try:
        return await right(self)  # type: ignore[no-any-return]
    finally:
        self.function.calls.remove("asked")


async def logs_all_the_same(self: MemorySession, right: Any, ranges: Sequence[Range], page_size: int) -> int:
    """dirty_start that works, whatever the capabilities say."""
    self.function.log = PageLog(ranges, page_size, (4096,))
    return 4096


async def _save_for_anybody(self: MemorySession, right: Any, *args: Any) -> Chunk:
    self.function.role, self.function.owner = Role.SOURCE, self
    return await right(self, *args)  # type: ignore[no-any-return]


async def _save_whatever_it_does(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    before = self.function.state
    self.function.state = AgentState.RUNNING if phase is Phase.PRECOPY else AgentState.STOPPED
    try:
        return await right(self, offset, limit, phase)  # type: ignore[no-any-return]
    finally:
        self.function.state = before


async def _save_of_nothing(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    return await right(self, offset, max(1, limit), phase)  # type: ignore[no-any-return]


async def _save_ignores_offset(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    outgoing = self.function.outgoing
    next_one = 0 if outgoing is None else outgoing._last_offset + len(outgoing._last.data)
    return await right(self, next_one, limit, phase)  # type: ignore[no-any-return]


async def _sources_stay_stopped(self: MemorySession, right: Any) -> None:
    if self.function.role is Role.SOURCE:
        raise InvalidState("it was saved already")
    await right(self)


async def _nothing_after_precopy(self: MemorySession, right: Any, offset: int, limit: int, phase: Phase) -> Chunk:
    if phase is Phase.FINAL and offset:
        return Chunk(b"", eof=True)
    return await right(self, offset, limit, phase)  # type: ignore[no-any-return]


async def _load_begin_anywhere(self: MemorySession, right: Any, total: int | None) -> None:
    self.function.role, self.function.owner, self.function.state = Role.DESTINATION, self, AgentState.STOPPED
    await right(self, total)


async def _any_total(self: MemorySession, right: Any, total: int | None) -> None:
    await right(self, None)


async def _ignores_total(self: MemorySession, right: Any, total: int, digest: bytes) -> None:
    incoming = self.function.incoming
    await right(self, total if incoming is None else incoming._total, digest)


async def _logs_anew(self: MemorySession, right: Any, ranges: Sequence[Range], page_size: int) -> int:
    self.function.log = None
    return await right(self, ranges, page_size)  # type: ignore[no-any-return]


async def _reports_without_a_log(self: MemorySession, right: Any, iova: int, length: int) -> DirtyReport:
    if self.function.log is None:
        return DirtyReport(bytes(length // 4096 // 8))
    return await right(self, iova, length)  # type: ignore[no-any-return]


async def _no_page_size_is_wrong(self: MemorySession, right: Any, ranges: Sequence[Range], page_size: int) -> int:
    return await right(self, ranges, 4096)  # type: ignore[no-any-return]


#: The method, what is wrong with it, and the check that has to find it.
PLANTED: list[tuple[str, Callable[..., Any], str]] = [
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
    ("check", _refuses_all, "check-itself"),
    ("begin", _nothing, "begin"),
    ("begin", _begin_names_it, "begin-nameless"),
    ("begin", _begin_takes_what_lies_about, "takeover-other"),
    ("aclose", _closing_resumes, "two-sessions"),
    ("stop", _breaks_when_given_up, "cancelled-call"),
    ("status", _one_question_at_a_time, "concurrent-status"),
    ("save", _save_for_anybody, "save-role"),
    ("save", _save_whatever_it_does, "save-running"),
    ("save", _save_whatever_it_does, "save-precopy-stopped"),
    ("save", _save_of_nothing, "save-arguments"),
    ("save", _save_ignores_offset, "save-gap"),
    ("resume", _sources_stay_stopped, "resume-after-save"),
    ("save", _nothing_after_precopy, "precopy"),
    ("abort", _abort_fails, "precopy-cancel"),
    ("load_begin", _load_begin_anywhere, "load-role"),
    ("load_begin", _any_total, "load-too-large"),
    ("load_commit", _ignores_total, "commit-total"),
    ("load_commit", _commits_anything, "commit-garbage"),
    ("dirty_start", _logs_anew, "dirty-twice"),
    ("dirty_report", _reports_without_a_log, "dirty-off"),
    ("dirty_start", _no_page_size_is_wrong, "dirty-arguments"),
]
