"""While nobody knows what a function does: what a client reads, what `status` says, and what is done about it."""

from __future__ import annotations

import errno
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from migrationkit import FAST, RUNNING, STOP, STOP_COPY, V1_RUNNING, V1_STOPPED, Side, bed, until
from rawclient import RESET
from vfiouser_agents.api import AgentState
from vfiouser_agents.errors import DeadlineExceeded, InvalidState
from vfiouser_agents.faults import Drops, Fails, Fault, NeverAnswers
from vfiouser_oob.migration.record import Certainty

SLOW = Fails(DeadlineExceeded("the device is slow"))
#: Nothing is repeated by itself within a test.
PATIENT = replace(FAST, retry_s=60.0)


def migration_of(side: Side) -> Any:
    """What `status` says."""
    return next(item for item in side.daemon.status()["functions"] if item["name"] == side.name)["migration"]


@pytest.mark.parametrize(
    ("agent_state", "v2", "v1"),
    [
        (AgentState.RUNNING, RUNNING, V1_RUNNING),
        # Neither RUNNING nor STOP is true; the last state that was known stands, in both generations.
        (AgentState.QUIESCED, RUNNING, V1_RUNNING),
        # What v2's client reads is what the agent says; v1's reads the old value until it is settled.
        (AgentState.STOPPED, STOP, V1_RUNNING),
        (AgentState.ERROR, 0, V1_RUNNING),
    ],
)
async def test_a_stop_with_an_unknown_end(tmp_path: Path, agent_state: AgentState, v2: int, v1: int) -> None:
    """A function that was RUNNING and may be stopped: each generation reads as it must, and `status` says how long."""
    async with bed(tmp_path, config=PATIENT) as both, both.source.vmm() as client:
        side = both.source
        watcher = side.daemon.subscribe()
        before = datetime.now(UTC)
        for op, count in (("stop", 1), ("resume", 2)):
            both.agent.inject(op, SLOW, count=count)
        assert errno.ETIMEDOUT == await client.set_state_errno(STOP)
        await until(lambda: both.agent.seen["resume"] == 2)
        assert Certainty.UNKNOWN is side.runner.record.certainty
        side.device.state = agent_state
        assert (v2, v1) == (await client.state(), await client.v1_state())
        found = migration_of(side)
        assert ("RUNNING", False) == (found["state"], found["known"])
        assert before <= datetime.fromisoformat(found["unknown_since"]) <= datetime.now(UTC)
        told = [event["state"] for event in events_of(watcher, "migration-state")]
        assert ["UNKNOWN"] == told
        side.device.state = AgentState.RUNNING
        await client.succeed(RESET)
        found = migration_of(side)
        assert ("RUNNING", True, None) == (found["state"], found["known"], found["unknown_since"])
        (event,) = events_of(watcher, "migration-state")
        assert ("UNKNOWN", "RUNNING") == (event["old"], event["state"])


def events_of(channel: trio.MemoryReceiveChannel[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The events of a kind that have come so far."""
    found = []
    while True:
        try:
            found.append(channel.receive_nowait())
        except trio.WouldBlock:
            return [event for event in found if event["type"] == kind]


async def test_unknown_since_the_first_doubt(tmp_path: Path) -> None:
    """Attempts that fail do not make the doubt younger; without `status` v2 reads ERROR and v1 the old value."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        side = both.source
        for op in ("stop", "resume", "status"):
            both.agent.inject(op, Drops(), count=None)
        assert await client.set_state_errno(STOP)
        since = migration_of(side)["unknown_since"]
        tries = both.agent.seen["resume"]
        await until(lambda: both.agent.seen["resume"] > tries + 2)
        assert (0, V1_RUNNING) == (await client.state(), await client.v1_state())
        assert errno.EIO == await client.set_state_errno(STOP)
        assert since == migration_of(side)["unknown_since"]
        both.agent.heal()
        await until(lambda: side.runner.record.certainty is Certainty.KNOWN)
        assert (RUNNING, V1_RUNNING, side.runs) == (await client.state(), await client.v1_state(), True)


@pytest.mark.parametrize("fault", [SLOW, Drops(), NeverAnswers()])
async def test_quiesced_after_the_point_of_no_return(tmp_path: Path, fault: Fault) -> None:
    """A resume that got half-way, on a source whose state the client has: the function is stopped, never started."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        side = both.source
        await client.set_state(STOP_COPY)
        await client.read_stream()
        await client.set_state(STOP)
        both.agent.inject("resume", fault, count=None)
        both.agent.inject("status", Drops(), count=1)
        resumed = side.device.calls.count("resume")
        assert await client.set_state_errno(RUNNING)
        assert Certainty.UNKNOWN is side.runner.record.certainty
        assert "STOP" == migration_of(side)["state"]
        side.device.state = AgentState.QUIESCED
        both.agent.heal()
        if isinstance(fault, NeverAnswers):
            # What hangs at the agent ends there before anything else of this function does.
            assert (STOP, V1_STOPPED) == (await client.state(), await client.v1_state())
            await client.succeed(RESET)
            assert side.runs
            return
        await until(lambda: side.runner.record.certainty is Certainty.KNOWN)
        assert AgentState.STOPPED is side.device.state
        assert (STOP, V1_STOPPED) == (await client.state(), await client.v1_state())
        assert resumed == side.device.calls.count("resume")
        await client.set_state(RUNNING)
        assert side.runs


async def test_quiesced_after_a_clear_refusal(tmp_path: Path) -> None:
    """A resume that the agent refuses, leaving the function quiesced, is no RUNNING."""
    async with bed(tmp_path) as both, both.source.vmm() as client:
        side = both.source
        await client.set_state(STOP_COPY)
        await client.read_stream()
        both.agent.inject("resume", Quiesces(side))
        assert await client.set_state_errno(RUNNING)
        await until(lambda: side.runner.record.certainty is Certainty.KNOWN)
        assert (STOP, AgentState.STOPPED) == (await client.state(), side.device.state)


class Quiesces(Fault):
    """A resume that goes half-way and is refused then."""

    def __init__(self, side: Side) -> None:
        self.side = side

    async def strike(self, work: Any, args: tuple[Any, ...], connection: Any) -> Any:
        """Go half-way."""
        await trio.lowlevel.checkpoint()
        self.side.device.state = AgentState.QUIESCED
        raise InvalidState("half-way")
