"""An agent that is away, through every adapter and a socket that is refused: it costs time, and never a VM.

What QEMU's v2 client does is the measure: a change of state that fails is followed by DEVICE_RESET, and a reset that
fails aborts the VM. So a VM is paused and goes on without its agent, and no reset fails for want of one.
"""

from __future__ import annotations

import errno
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import vendors
from migrationkit import (
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    V1_ERROR,
    V1_PRE_COPY,
    V1_RESUMING,
    V1_RUNNING,
    V1_STOP_COPY,
    V1_STOPPED,
    Vmm,
    bed,
    until,
)
from migrationkit.away import CONFIG, Place, place, warnings
from rawclient import CONFIG as CONFIG_REGION
from rawclient import NO_REPLY, REGION_WRITE, RESET
from vfiouser_agents.faults import NeverAnswers
from vfiouser_oob.migration.record import Certainty

#: Every way to an agent; the library is a client of the same server as `legacy-tcp`.
ADAPTERS = ("msgpack-rpc", "jsonrpc", "grpc", "legacy-tcp", "plugin-so")
TO_V1 = {
    STOP: V1_STOPPED,
    RUNNING: V1_RUNNING,
    STOP_COPY: V1_STOP_COPY,
    PRE_COPY: V1_PRE_COPY,
    RESUMING: V1_RESUMING,
    0: V1_ERROR,
}
FROM_V1 = {value: state for state, value in TO_V1.items()}
SCRATCH = 4
#: Where nobody is to be waited for in vain for long.
BUDGET_S = 1.0
QUICK = replace(CONFIG, call_s=0.4, stop_s=0.5, data_s=0.5, retry_s=0.02)
#: A library has a process, which takes a while to begin on a busy machine.
PLUGIN_BUDGET_S = 3.0
PLUGIN = replace(CONFIG, call_s=1.5, stop_s=2.0, data_s=2.0, retry_s=0.02)
STATES = (STOP, PRE_COPY, STOP_COPY, RESUMING)

both_generations = pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])


def case(kind: str, v1: bool, *more: object) -> Any:
    """A case with a name."""
    return pytest.param(kind, v1, *more, id="-".join([kind, "v1" if v1 else "v2", *map(str, more)]))


#: Each adapter in one of the generations, in turns, and the first one in both.
every_adapter = pytest.mark.parametrize(
    ("kind", "v1"), [case(ADAPTERS[0], True), *(case(kind, bool(row % 2)) for row, kind in enumerate(ADAPTERS))]
)
#: The first one in every state and both generations, the others in those where their agents are needed.
every_reset = pytest.mark.parametrize(
    ("kind", "v1", "state"),
    [
        *(case(ADAPTERS[0], v1, state) for v1 in (True, False) for state in (RUNNING, *STATES)),
        *(
            case(kind, bool((row + column) % 2), state)
            for row, kind in enumerate(ADAPTERS[1:])
            for column, state in enumerate((STOP, STOP_COPY, RESUMING))
        ),
    ],
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled plug-in."""
    made = tmp_path_factory.mktemp("plugin") / "remote_plugin.so"
    source = Path(vendors.__file__).with_name("remote_plugin.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(made), str(source)], check=True)
    return made


class Moves:
    """The moves of a VMM in one of the generations."""

    def __init__(self, client: Vmm, v1: bool) -> None:
        self.client = client
        self.v1 = v1

    async def set(self, state: int) -> int:
        """Change the state; returns the error number."""
        return await (self.client.v1_set_errno(TO_V1[state]) if self.v1 else self.client.set_state_errno(state))

    async def state(self) -> int:
        """Read the state."""
        return FROM_V1[await self.client.v1_state()] if self.v1 else await self.client.state()

    async def reset(self) -> int:
        """DEVICE_RESET; returns the error number."""
        return (await self.client.command(RESET)).error

    async def stream(self) -> bytes:
        """All of the state."""
        return await (self.client.v1_read_stream() if self.v1 else self.client.read_stream())

    async def load(self, stream: bytes) -> None:
        """Give a state."""
        await (self.client.v1_write_stream(stream) if self.v1 else self.client.write_stream(stream))


def budget_of(kind: str) -> float:
    """Seconds that each message has."""
    return PLUGIN_BUDGET_S if kind == "plugin-so" else BUDGET_S


@asynccontextmanager
async def used(
    directory: Path, kind: str, library: Path, v1: bool, *, budget_s: float | None = None, start: bool = True
) -> AsyncIterator[tuple[Place, Moves]]:
    """A function with a client, whose agent has been heard."""
    plugin = kind == "plugin-so"
    config = CONFIG if budget_s is not None else PLUGIN if plugin else QUICK
    async with place(
        directory,
        "legacy-tcp" if plugin else kind,
        library=library if plugin else None,
        reply_budget_s=budget_s or budget_of(kind),
        config=config,
        start=start,
    ) as there:
        if start:
            with trio.fail_after(10):
                await until(lambda: there.runner.record.asked and not there.runner.link.is_open, 10)
        async with there.vmm() as client:
            yield there, Moves(client, v1)


async def writes_go_on(there: Place, client: Vmm, value: int) -> None:
    """The guest's registers can be written and read."""
    await client.write32(0, SCRATCH, value)
    assert value == await client.read32(0, SCRATCH)
    assert there.runs


# A VM that is paused and goes on


@every_adapter
async def test_a_pause_without_an_agent(
    tmp_path: Path, kind: str, library: Path, v1: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that was never stopped is paused and goes on, as often as its VM likes, and is told of once."""
    async with used(tmp_path, kind, library, v1) as (there, moves):
        await moves.client.write32(0, SCRATCH, 7)
        caplog.clear()
        await there.leave()
        for round_ in range(4):
            begun = trio.current_time()
            assert 0 == await moves.set(STOP)
            assert (STOP, True) == (await moves.state(), there.status["paused_over_link"])
            # Whoever has waited once does not wait again.
            assert trio.current_time() - begun < budget_of(kind) * (1 if round_ == 0 or kind == "plugin-so" else 0.5)
            assert 0 == await moves.set(RUNNING)
            assert RUNNING == await moves.state()
        assert Certainty.KNOWN is there.runner.record.certainty
        assert ["no contact with the agent"] == warnings(caplog.records)
        assert there.status["agent_away_since"] is not None
        assert 7 == await moves.client.read32(0, SCRATCH)
        await writes_go_on(there, moves.client, 8)
        # It is back, and everything is as ever.
        await there.come_back()
        assert 0 == await moves.set(STOP)
        assert (STOP, False, False) == (await moves.state(), there.runs, there.status["paused_over_link"])
        assert None is there.status["agent_away_since"]
        assert 0 == await moves.set(RUNNING)
        await writes_go_on(there, moves.client, 9)


@pytest.mark.slow
@every_adapter
async def test_an_agent_that_is_away_for_a_moment(tmp_path: Path, kind: str, library: Path, v1: bool) -> None:
    """1.5 s without an agent cost time and nothing else: at stop, at cont, and at a reset of a stopped function."""
    async with used(tmp_path, kind, library, v1, budget_s=4.0) as (there, moves):
        for state in (STOP, RUNNING):
            await there.leave_for(1.5)
            assert 0 == await moves.set(state)
            assert (state, state == RUNNING) == (await moves.state(), there.runs)
            assert not there.status["paused_over_link"]
        assert 0 == await moves.set(STOP)
        await there.leave_for(1.5)
        assert 0 == await moves.reset()
        assert RUNNING == await moves.state()
        assert there.runs
        assert not there.status["reset_due"]
        await writes_go_on(there, moves.client, 5)


@every_adapter
async def test_cont_without_an_agent(tmp_path: Path, kind: str, library: Path, v1: bool) -> None:
    """What its agent has stopped cannot go on without it: it reads STOP, can be reset, and is brought back."""
    async with used(tmp_path, kind, library, v1) as (there, moves):
        assert 0 == await moves.set(STOP)
        await there.leave()
        assert await moves.set(RUNNING)
        assert STOP == await moves.state()
        # The VM may just as well be paused again, which changes nothing.
        assert 0 == await moves.set(STOP)
        assert Certainty.KNOWN is there.runner.record.certainty
        assert await moves.set(RUNNING)
        assert STOP == await moves.state()
        # A guest that was let go all the same loses no write.
        await moves.client.send(moves.client.pack(REGION_WRITE, posted(77), flags=NO_REPLY))
        assert there.status["held_back"]
        await there.come_back()
        await until(lambda: there.runner.record.runs, 10)
        assert RUNNING == await moves.state()
        assert 77 == await moves.client.read32(0, SCRATCH)


def posted(value: int, offset: int = SCRATCH, region: int = 0) -> bytes:
    """A REGION_WRITE's payload."""
    return struct.pack("<QIII", offset, region, 4, value)


# Resets


@every_reset
async def test_a_reset_without_an_agent(
    tmp_path: Path, kind: str, library: Path, v1: bool, state: int, caplog: pytest.LogCaptureFixture
) -> None:
    """DEVICE_RESET succeeds in every state; what the agent owes is done when it is back, and no write is lost."""
    async with used(tmp_path, kind, library, v1) as (there, moves):
        await moves.client.write32(0, SCRATCH, 7)
        if state != RUNNING:
            assert 0 == await moves.set(state)
        ran = there.runs
        assert ran == (state in (RUNNING, PRE_COPY))
        caplog.clear()
        await there.leave()
        begun = trio.current_time()
        assert 0 == await moves.reset()
        assert trio.current_time() - begun < budget_of(kind)
        assert RUNNING == await moves.state()
        assert 0 == await moves.client.read32(0, SCRATCH)
        assert there.status["reset_due"] == there.status["held_back"] == (not ran)
        # Whoever waited once waits no more, and the VM is paused and goes on all the same.
        begun = trio.current_time()
        for _ in range(2):
            assert 0 == await moves.set(STOP)
            assert STOP == await moves.state()
            assert 0 == await moves.set(RUNNING)
            assert RUNNING == await moves.state()
            assert 0 == await moves.reset()
        assert ran or kind == "plugin-so" or trio.current_time() - begun < BUDGET_S
        # Configuration space is set up at once; a doorbell waits.
        await moves.client.write(CONFIG_REGION, 0x3C, b"\x0b")
        await moves.client.send(moves.client.pack(REGION_WRITE, posted(99), flags=NO_REPLY))
        told = warnings(caplog.records)
        assert 1 == told.count("no contact with the agent")
        assert len(told) <= (1 if ran else 4), told
        await there.come_back()
        await until(lambda: there.runs and not there.status["held_back"] and not there.status["reset_due"], 10)
        assert 99 == await moves.client.read32(0, SCRATCH)
        assert b"\x0b" == await moves.client.read(CONFIG_REGION, 0x3C, 1)
        await until(lambda: there.runner.record.begun is None, 10)
        await whole_round(there, moves)


async def whole_round(there: Place, moves: Moves) -> None:
    """The function can be saved whole, and goes on."""
    assert 0 == await moves.set(STOP_COPY)
    assert len(await moves.stream()) > 64 << 10
    assert 0 == await moves.set(RUNNING)
    await writes_go_on(there, moves.client, 1)


@both_generations
async def test_a_reset_of_what_may_live_elsewhere(tmp_path: Path, library: Path, v1: bool) -> None:
    """A source whose state the client has never runs before its agent has reset it, also when the client goes."""
    async with used(tmp_path, "msgpack-rpc", library, v1) as (there, moves):
        assert 0 == await moves.set(STOP_COPY)
        await moves.stream()
        await there.leave()
        assert await moves.set(RUNNING)
        assert STOP == await moves.state()
        assert 0 == await moves.reset()
        assert RUNNING == await moves.state()
        assert not there.runs
        moves.client.close()
        await until(lambda: there.daemon.functions[0].connection is None)
        await there.come_back()
        await until(lambda: there.runs, 10)
        assert "reset" in there.device.calls
        assert "resume" not in there.device.calls


async def test_an_agent_that_holds_still(tmp_path: Path) -> None:
    """One that takes the call and never answers is away, too: the reset is answered, and done when it is back."""
    async with bed(tmp_path, reply_budget_s=BUDGET_S) as both, both.source.vmm() as client:
        await client.set_state(STOP)
        both.agent.inject("reset", NeverAnswers(), function_id="src")
        await client.succeed(RESET)
        assert RUNNING == await client.state()
        assert (True, False) == (both.source.runner.record.reset_due is not None, both.source.runs)
        both.agent.restart()
        await until(lambda: both.source.runs and not both.source.runner.record.reset_due, 10)
        await client.write32(0, SCRATCH, 3)


# Migrations


@every_adapter
async def test_a_source_whose_agent_goes_in_precopy(tmp_path: Path, kind: str, library: Path, v1: bool) -> None:
    """The function was never stopped: the change of state fails, it reads PRE_COPY or RUNNING, runs, and is reset."""
    async with used(tmp_path, kind, library, v1) as (there, moves):
        assert 0 == await moves.set(PRE_COPY)
        await there.leave()
        assert await moves.set(STOP_COPY)
        assert PRE_COPY == await moves.state()
        assert there.runs
        assert Certainty.KNOWN is there.runner.record.certainty
        await writes_go_on(there, moves.client, 4)
        assert 0 == await moves.reset()
        assert RUNNING == await moves.state()
        await writes_go_on(there, moves.client, 5)
        await there.come_back()
        await until(lambda: there.runner.record.begun is None, 10)
        await whole_round(there, moves)


@every_adapter
async def test_a_source_that_waits_out_its_agent_in_precopy(tmp_path: Path, kind: str, library: Path, v1: bool) -> None:
    """A moment without an agent at the stop is waited out, and the migration goes on."""
    async with used(tmp_path, kind, library, v1, budget_s=4.0) as (there, moves):
        assert 0 == await moves.set(PRE_COPY)
        await there.leave_for(1.5)
        assert 0 == await moves.set(STOP_COPY)
        assert not there.runs
        assert len(await moves.stream()) > 64 << 10
        assert 0 == await moves.set(STOP)


@pytest.mark.parametrize("handed", [False, True], ids=["before the trailer", "after the trailer"])
@every_adapter
async def test_a_source_whose_agent_goes_in_stop_copy(
    tmp_path: Path, kind: str, library: Path, v1: bool, handed: bool
) -> None:
    """Before the trailer it is brought back; after it, only RUNNING or a reset of the client's does so."""
    async with used(tmp_path, kind, library, v1) as (there, moves):
        assert 0 == await moves.set(STOP_COPY)
        if handed:
            await moves.stream()
        await there.leave()
        assert 0 == await moves.set(STOP)
        assert STOP == await moves.state()
        assert await moves.set(RUNNING)
        assert STOP == await moves.state()
        await there.come_back()
        if handed:
            await trio.sleep(0.3)
            assert not there.runs
            assert 0 == await moves.set(RUNNING)
        else:
            await until(lambda: there.runner.record.runs, 10)
        assert RUNNING == await moves.state()
        await writes_go_on(there, moves.client, 5)


@every_adapter
async def test_a_destination_whose_agent_goes_in_load(tmp_path: Path, kind: str, library: Path, v1: bool) -> None:
    """The load is lost, the reset succeeds, and the function runs, reset, as soon as its agent is back."""
    async with used(tmp_path, kind, library, v1) as (there, moves):
        assert 0 == await moves.set(STOP_COPY)
        stream = await moves.stream()
        assert 0 == await moves.reset()
        assert 0 == await moves.set(RESUMING)
        await moves.load(stream[: len(stream) // 2])
        await there.leave()
        assert await moves.set(STOP)
        assert RESUMING == await moves.state()
        assert 0 == await moves.reset()
        assert RUNNING == await moves.state()
        assert not there.runs
        if kind in ("legacy-tcp", "plugin-so"):
            there.device.reset()  # as the device's own reset does, of which such an agent is not told
        await there.come_back()
        await until(lambda: there.runs and not there.status["reset_due"], 10)
        await whole_round(there, moves)


# A function-level reset, attach


async def function_level_reset(client: Vmm) -> int:
    """Set Initiate Function Level Reset; returns the error number."""
    position = (await client.read(CONFIG_REGION, 0x34, 1))[0]
    while (header := await client.read(CONFIG_REGION, position, 2))[0] != 0x10:
        position = header[1]
    control = struct.unpack("<H", await client.read(CONFIG_REGION, position + 8, 2))[0]
    request = struct.pack("<QIIH", position + 8, CONFIG_REGION, 2, control | 0x8000)
    return (await client.command(REGION_WRITE, request)).error


@both_generations
@pytest.mark.parametrize("state", [RUNNING, *STATES])
async def test_a_function_level_reset_without_an_agent(tmp_path: Path, library: Path, v1: bool, state: int) -> None:
    """The guest's reset succeeds; a stream that cannot begin anew has no end, so its migration fails."""
    async with used(tmp_path, "msgpack-rpc", library, v1) as (there, moves):
        if state != RUNNING:
            assert 0 == await moves.set(state)
        await there.leave()
        await moves.client.write32(0, SCRATCH, 7) if state in (RUNNING, PRE_COPY) else None
        assert 0 == await function_level_reset(moves.client)
        assert 0 == await moves.client.read32(0, SCRATCH)
        assert (PRE_COPY if state == PRE_COPY else RUNNING) == await moves.state()
        if state == PRE_COPY:
            if not v1:
                assert errno.EIO == await moves.client.data_read_errno()
            assert 0 == await moves.set(RUNNING)
        await there.come_back()
        await until(lambda: there.runner.record.runs, 10)
        await until(lambda: there.runner.record.begun is None, 10)
        await whole_round(there, moves)


@every_adapter
async def test_attach_without_an_agent(tmp_path: Path, kind: str, library: Path, v1: bool) -> None:
    """A client is let in, uses and pauses its function, and resets it, though nobody ever heard of the agent."""
    async with used(tmp_path, kind, library, v1, start=False) as (there, moves):
        assert RUNNING == await moves.state()
        await writes_go_on(there, moves.client, 5)
        assert 0 == await moves.set(STOP)
        assert 0 == await moves.set(RUNNING)
        assert 0 == await moves.reset()
        await writes_go_on(there, moves.client, 6)
        await there.come_back()
        await until(lambda: there.runner.record.asked, 10)
        await whole_round(there, moves)


async def test_attach_waits_out_a_moment(tmp_path: Path) -> None:
    """A fenced function is reset for its next client though the agent is away when it comes."""
    async with place(tmp_path) as there:
        async with there.vmm() as client:
            await client.set_state(STOP_COPY)
            await client.read_stream()
        await until(lambda: there.runner.record.fenced)
        await there.leave_for(1.5)
        async with there.vmm() as client:
            assert RUNNING == await client.state()
            await writes_go_on(there, client, 5)


async def test_the_end_of_an_outage_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning when the agent goes, one line when it is back, however often it was asked in between."""
    caplog.set_level("INFO")
    async with place(tmp_path, reply_budget_s=BUDGET_S, config=QUICK) as there, there.vmm() as client:
        await client.set_state(STOP_COPY)
        caplog.clear()
        await there.leave()
        for _ in range(20):
            await client.state()
        for _ in range(3):
            await client.data_read_errno()
        await trio.sleep(0.5)
        assert ["no contact with the agent"] == warnings(caplog.records)
        await there.come_back()
        await until(lambda: there.status["agent_away_since"] is None, 10)
        assert 1 == [record.getMessage() for record in caplog.records].count("the agent answers again")
