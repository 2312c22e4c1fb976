"""Guest writes while a function is being brought back: none reaches the device before the agent said that it runs."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from migrationkit import FAST, RUNNING, STOP, V1_REGION, V1_RUNNING, Bed, Side, Vmm, bed, until
from rawclient import (
    CONFIG,
    FEATURE,
    GET_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    WRITE_MULTI,
    Answer,
)
from vfiouser_agents.api import AgentState
from vfiouser_agents.errors import Busy, DeadlineExceeded
from vfiouser_agents.faults import Fails
from vfiouser_oob.migration import held_writes
from vfiouser_oob.migration.record import Certainty

BUDGET_S = 1.0
SCRATCH, WIDE = 4, 8


def write(value: int, offset: int = SCRATCH, region: int = 0) -> bytes:
    """A REGION_WRITE's payload, of 32 bits."""
    return struct.pack("<QIII", offset, region, 4, value)


def read(offset: int = SCRATCH, region: int = 0) -> bytes:
    """A REGION_READ's payload, of 32 bits."""
    return struct.pack("<QII", offset, region, 4)


class Spy:
    """What reaches the device of a client, and what the function did then."""

    def __init__(self, side: Side) -> None:
        self.seen: list[tuple[int, bytes, AgentState]] = []
        served = next(function for function in side.daemon.functions if function.name == side.name)
        assert served.attached is not None
        session: Any = served.attached.backend
        through = session.region_write

        def region_write(region: int, offset: int, data: bytes, *, posted: bool) -> Any:
            self.seen.append((offset, data, side.device.state))
            return through(region, offset, data, posted=posted)

        session.region_write = region_write

    @property
    def values(self) -> Sequence[int]:
        """What was written, in order; every time the function ran."""
        assert all(state is AgentState.RUNNING for _, _, state in self.seen)
        return [int.from_bytes(data, "little") for _, data, _ in self.seen]


@asynccontextmanager
async def unknown(directory: Path) -> AsyncIterator[tuple[Bed, Vmm, Spy]]:
    """A source that is stopped though its client was told of a failure, and an agent that does not resume it yet."""
    async with bed(directory, config=FAST, reply_budget_s=BUDGET_S) as both, both.source.vmm() as client:
        spy = Spy(both.source)
        both.agent.inject("stop", Fails(DeadlineExceeded("slow"), executed=True))
        both.agent.inject("resume", Fails(Busy("not now")), count=None, function_id="src")
        assert await client.set_state_errno(STOP)
        assert Certainty.UNKNOWN is both.source.runner.record.certainty
        assert AgentState.STOPPED is both.source.device.state
        yield both, client, spy


async def nothing_comes(client: Vmm, seconds: float = 0.05) -> None:
    """No answer within a moment."""
    with trio.move_on_after(seconds) as scope:
        raise AssertionError(await client.receive())
    assert scope.cancelled_caught


@pytest.mark.parametrize("region", [0, CONFIG])
async def test_a_write_waits_for_the_function(tmp_path: Path, region: int) -> None:
    """A write with a reply is answered when the function runs, and done then."""
    async with unknown(tmp_path) as (both, client, spy):
        offset = SCRATCH if region == 0 else 0x10
        await client.send(client.pack(REGION_WRITE, write(0xFEB00000, offset, region)))
        await nothing_comes(client)
        assert [] == spy.values
        both.agent.heal()
        answer = await client.receive()
        assert (REGION_WRITE, 0) == (answer.command, answer.error)
        assert [0xFEB00000] == spy.values
        assert 0xFEB00000 == await client.read32(region, offset)


async def test_a_write_whose_time_is_up(tmp_path: Path) -> None:
    """It is answered at its deadline with ETIMEDOUT, and never done, also not when the function runs again."""
    async with unknown(tmp_path) as (both, client, spy):
        begun = trio.current_time()
        assert errno.ETIMEDOUT == await client.errno(REGION_WRITE, write(1))
        assert BUDGET_S * 0.9 <= trio.current_time() - begun <= BUDGET_S + 1
        both.agent.heal()
        await until(lambda: both.source.runs and both.source.runner.record.certainty is Certainty.KNOWN)
        await client.write32(0, SCRATCH, 2)
        assert [2] == spy.values


async def test_posted_writes_keep_their_order(tmp_path: Path) -> None:
    """Writes without reply are done in order once the function runs, before anything that came later."""
    async with unknown(tmp_path) as (both, client, spy):
        for value in range(1, 6):
            await client.send(client.pack(REGION_WRITE, write(value), flags=NO_REPLY))
        pairs = [struct.pack("<QIIQ", SCRATCH, 0, 4, value) for value in (6, 7)]
        multi = struct.pack("<Q", 2) + b"".join(pairs)
        await client.send(client.pack(WRITE_MULTI, multi, flags=NO_REPLY))
        await client.send(client.pack(REGION_WRITE, write(8)))
        await client.send(client.pack(REGION_READ, read()))
        await nothing_comes(client)
        both.agent.heal()
        assert REGION_WRITE == (await client.receive()).command
        assert 8 == int.from_bytes((await client.receive()).payload[16:], "little")
        assert list(range(1, 9)) == spy.values


async def test_reads_go_on(tmp_path: Path) -> None:
    """A read is answered at once while no write is held; behind one that is, it waits, and sees it."""
    async with unknown(tmp_path) as (both, client, _):
        with trio.fail_after(0.3):
            assert 0x75666F76 == await client.read32(0, 0)
            assert 4 == len(await client.read(CONFIG, 0, 4))
        await client.send(client.pack(REGION_WRITE, write(77), flags=NO_REPLY))
        await client.send(client.pack(REGION_READ, read()))
        await nothing_comes(client)
        both.agent.heal()
        assert 77 == int.from_bytes((await client.receive()).payload[16:], "little")


@pytest.mark.parametrize("held", [1, 3])
async def test_other_commands_are_not_delayed(tmp_path: Path, held: int) -> None:
    """As soon as another command is behind them, waiting accesses get EBUSY, in order, and it is served."""
    async with unknown(tmp_path) as (both, client, spy):
        for value in range(held):
            await client.send(client.pack(REGION_WRITE, write(value)))
        await nothing_comes(client)
        with trio.fail_after(0.5):
            await client.send(client.pack(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
            answers = [await client.receive() for _ in range(held + 1)]
            assert [*[(REGION_WRITE, errno.EBUSY)] * held, (GET_INFO, 0)] == kinds(answers)
            # Nobody is behind it any more, and so on.
            await client.send(client.pack(REGION_WRITE, write(9)))
            await nothing_comes(client)
        both.agent.heal()
        assert [(REGION_WRITE, 0)] == kinds([await client.receive()])
        assert [9] == spy.values


def kinds(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """Commands and error numbers."""
    return [(answer.command, answer.error) for answer in answers]


async def test_the_migration_interface_is_not_held(tmp_path: Path) -> None:
    """Both generations are asked and answered while writes are held."""
    async with unknown(tmp_path) as (both, client, spy):
        await client.send(client.pack(REGION_WRITE, write(1), flags=NO_REPLY))
        with trio.fail_after(0.5):
            assert V1_RUNNING == await client.v1_state()
            assert STOP == await client.state()
            assert errno.EINVAL == await client.errno(REGION_WRITE, write(1, 2, V1_REGION))
        with trio.fail_after(BUDGET_S):
            assert await client.v1_set_errno(V1_RUNNING)
        assert [] == spy.values
        both.agent.heal()
        await until(lambda: bool(spy.seen))
        assert [1] == spy.values


async def test_other_functions_are_not_delayed(tmp_path: Path) -> None:
    """The function next to it is written as ever."""
    async with unknown(tmp_path) as (both, client, spy), both.destination.vmm() as other:
        await client.send(client.pack(REGION_WRITE, write(1)))
        with trio.fail_after(0.5):
            for value in range(50):
                await other.write32(0, SCRATCH, value)
            assert 49 == await other.read32(0, SCRATCH)
        assert [] == spy.values


async def test_a_reset_makes_held_writes_void(tmp_path: Path) -> None:
    """What was written before DEVICE_RESET does not reach the device after it."""
    async with unknown(tmp_path) as (both, client, spy):
        for value in (1, 2):
            await client.send(client.pack(REGION_WRITE, write(value), flags=NO_REPLY))
        await client.send(client.pack(REGION_WRITE, write(3)))
        await client.send(client.pack(RESET))
        assert [(REGION_WRITE, errno.EBUSY), (RESET, 0)] == kinds([await client.receive(), await client.receive()])
        await client.write32(0, WIDE, 5)
        assert [5] == spy.values
        assert 0 == await client.read32(0, SCRATCH)
        both.agent.heal()


async def test_a_function_that_does_not_run_in_the_end(tmp_path: Path) -> None:
    """When the function is found broken, waiting writes fail with EIO, and posted ones are void."""
    async with unknown(tmp_path) as (both, client, spy):
        await client.send(client.pack(REGION_WRITE, write(1), flags=NO_REPLY))
        await client.send(client.pack(REGION_WRITE, write(2)))
        await nothing_comes(client)
        both.source.device.fail()
        both.agent.heal()
        assert [(REGION_WRITE, errno.EIO)] == kinds([await client.receive()])
        assert 0 == await client.state()
        await client.succeed(RESET)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert [] == spy.values


async def test_held_writes_are_done_before_the_next_stop(tmp_path: Path) -> None:
    """A stop that the client asks for behind held writes comes after them."""
    async with unknown(tmp_path) as (both, client, spy):
        for value in range(200):
            await client.send(client.pack(REGION_WRITE, write(value), flags=NO_REPLY))
        request = client.pack(FEATURE, struct.pack("<IIII", 16, 2 | 1 << 17, STOP, 0))
        await client.send(request)
        both.agent.heal()
        assert 0 == (await client.receive()).error
        assert AgentState.STOPPED is both.source.device.state
        assert list(range(200)) == spy.values
        await client.set_state(RUNNING)


async def test_held_writes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More writes than are held at most are lost and noted, in number and in bytes; those that are held are done."""
    monkeypatch.setattr(held_writes, "MAX_HELD", 3)
    monkeypatch.setattr(held_writes, "MAX_HELD_BYTES", 3 * 20 + 10)
    async with unknown(tmp_path) as (both, client, spy):
        for value in range(5):
            await client.send(client.pack(REGION_WRITE, write(value), flags=NO_REPLY))
        served = next(item for item in both.daemon.functions if item.name == "src")
        await until(lambda: "held back already" in (served.last_error or ""))
        both.agent.heal()
        await until(lambda: len(spy.seen) == 3)
        assert [0, 1, 2] == spy.values
        await client.write32(0, SCRATCH, 8)
        assert [0, 1, 2, 8] == spy.values


async def test_held_writes_go_with_their_client(tmp_path: Path) -> None:
    """A client that leaves takes its held writes along; the next one's function runs and was not written."""
    async with unknown(tmp_path) as (both, client, spy):
        await client.send(client.pack(REGION_WRITE, write(1), flags=NO_REPLY))
        await client.send(client.pack(REGION_WRITE, write(2)))
        await nothing_comes(client)
        client.close()
        await until(lambda: all(item.connection is None for item in both.daemon.functions))
        both.agent.heal()
        async with both.source.vmm() as other:
            await until(lambda: both.source.runs)
            assert 0 == await other.read32(0, SCRATCH)
        assert [] == spy.values


async def test_doubt_that_comes_back(tmp_path: Path) -> None:
    """Holding begins anew with each doubt."""
    async with unknown(tmp_path) as (both, client, spy):
        for value in range(3):
            await client.send(client.pack(REGION_WRITE, write(value), flags=NO_REPLY))
            await nothing_comes(client, 0.01)
            both.agent.heal()
            await until(lambda: len(spy.seen) == value + 1)  # noqa: B023  awaited before it changes
            both.agent.inject("stop", Fails(DeadlineExceeded("slow"), executed=True))
            both.agent.inject("resume", Fails(Busy("not now")), count=None, function_id="src")
            assert await client.set_state_errno(STOP)
        both.agent.heal()
        await until(lambda: both.source.runs)
        assert [0, 1, 2] == spy.values
