"""The dirty log of a client that another daemon has served: nothing is missed, and the agent goes on."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio

from vfiouser_agents.api import Capabilities, DirtyReport
from vfiouser_agents.errors import InvalidState
from vfiouser_agents.operations import Op, Operation
from vfiouser_oob.migration.agent_link import AgentLink
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.host import MigrationHost
from vfiouser_oob.migration.inherited import LogMark, TransferNotes
from vfiouser_oob.migration.trace import Tracer
from vfiouser_protocol.dma import DmaTable
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.messages import LoggingRange

PAGE, BASE, PAGES = 4096, 0x10000, 64
ALL, ONE = b"\xff" * 8, b"\2" + bytes(7)


class AgentPart:
    """A link to an agent that logs; it may have been started anew, and then it does not.

    Args:
        logs: whether it can.
    """

    def __init__(self, *, logs: bool = True) -> None:
        self.asked, self.caps = True, Capabilities(dirty=logs)
        self.knows = False
        self.calls: list[str] = []

    async def call(self, op: Op[..., Any], deadline: float, *args: int) -> DirtyReport | int | None:
        """Answer: the second page is dirty."""
        await trio.lowlevel.checkpoint()
        self.calls.append(op.name)
        if op is Operation.DIRTY_START:
            self.knows = True
            return PAGE
        if op is Operation.DIRTY_REPORT and not self.knows:
            raise InvalidState("no pages are logged")
        return DirtyReport(bitmap=ONE) if op is Operation.DIRTY_REPORT else None


class LogNotes:
    """Takes down what is logged, and hears what the machine would."""

    def __init__(self) -> None:
        self.log: LogMark | None = None

    def logs(self, mark: LogMark | None) -> None:
        """Dirty pages are logged, or not any more."""
        self.log = mark

    def feed(self, event: object) -> None:
        """Take it."""

    def note(self, text: str, **fields: object) -> None:
        """Say it to nobody."""


def tracker(agent: AgentPart, journal: LogNotes) -> DirtyTracker:
    """One daemon's log."""
    memory = DmaTable()
    memory.map(BASE, PAGES * PAGE, 3, file="file")
    return DirtyTracker(
        cast(AgentLink, agent),
        cast(Tracer, journal),
        cast(MigrationHost, journal),
        memory,
        DmaLogging(1 << 20),
        device_seen=False,
        by_message=False,
        call_s=1,
        notes=cast(TransferNotes, journal),
    )


def resumed(agent: AgentPart, journal: LogNotes) -> DirtyTracker:
    """Another daemon's log."""
    second = tracker(agent, journal)
    assert journal.log is not None
    second.resume(journal.log)
    return second


async def report(log: DirtyTracker) -> bytes:
    """Read and clear it."""
    return bytes(await log.report(BASE, PAGES * PAGE, PAGE, trio.current_time() + 1))


@pytest.mark.parametrize("ranges", [(), (LoggingRange(BASE, PAGES * PAGE),)], ids=["all", "some"])
async def test_everything_is_dirty_once(ranges: tuple[LoggingRange, ...]) -> None:
    """What the agent had told, and nobody remembers, is told again with all the rest; then its word counts again."""
    agent, journal = AgentPart(), LogNotes()
    first = tracker(agent, journal)
    await first.start(PAGE, ranges, trio.current_time() + 1)
    assert ONE == await report(first)
    second = resumed(agent, journal)
    assert ranges == () or ranges == second.log.ranges
    assert [ALL, ONE] == [await report(second), await report(second)]
    assert 1 == agent.calls.count("dirty_start")
    await second.stop(trio.current_time() + 1)
    assert [None] == [journal.log]
    assert "dirty_stop" == agent.calls[-1]


async def test_an_agent_that_was_started_anew_as_well() -> None:
    """It knows nothing of a log: everything is dirty, every time."""
    agent, journal = AgentPart(), LogNotes()
    await tracker(agent, journal).start(PAGE, (), trio.current_time() + 1)
    agent.knows = False
    second = resumed(agent, journal)
    assert [ALL, ALL] == [await report(second), await report(second)]


async def test_an_agent_that_does_not_log() -> None:
    """Everything stays dirty every time."""
    agent, journal = AgentPart(logs=False), LogNotes()
    await tracker(agent, journal).start(PAGE, (), trio.current_time() + 1)
    assert LogMark(PAGE, (), 0, blind=True) == journal.log
    second = resumed(agent, journal)
    assert [ALL, ALL] == [await report(second), await report(second)]
    assert "dirty_report" not in agent.calls


async def test_what_is_lent_is_not_the_clients() -> None:
    """Who has borrowed the log sees to it; a client that takes it back begins anew."""
    agent, journal = AgentPart(), LogNotes()
    log = tracker(agent, journal)
    await log.lend(PAGE, trio.current_time() + 1)
    assert [None] == [journal.log]
    await log.reclaim(trio.current_time() + 1)
    await log.start(PAGE, (), trio.current_time() + 1)
    assert journal.log is not None
    with pytest.raises(CommandError, match="logs dirty pages by itself"):
        await log.lend(PAGE, trio.current_time() + 1)
