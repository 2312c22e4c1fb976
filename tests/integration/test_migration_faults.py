"""Every call to the agent × every way to fail, on both sides, in both generations.

For each the end is checked: what the client reads is what the function does, never do two copies run, the client finds
a way back to RUNNING, and the function can be migrated again.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

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
    Bed,
    Side,
    Vmm,
    bed,
    until,
)
from rawclient import RESET
from vfiouser_agents.faults import Delay, Drops, Fails, Fault, NeverAnswers, every_error
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.standing import Truth

#: Long enough for a busy machine. Where calls hang, time is skipped: see `skipping`.
QUICK = MigrationConfig(chunk_size=64 << 10, v1_data_size=64 << 10, call_s=0.5, stop_s=0.5, data_s=0.5, retry_s=0.01)
BUDGET_S = 2.5
#: Seconds in which nothing happens at all before time is skipped.
IDLE_S = 0.01
FAULTS: Sequence[Fault] = [
    Delay(0.02),
    NeverAnswers(),
    NeverAnswers(executed=True),
    Drops(),
    Drops(executed=True),
    *every_error(),
]
SOURCE_OPS = ("open", "begin", "describe", "estimate", "quiesce", "stop", "save", "resume", "abort", "end")
DESTINATION_OPS = ("open", "begin", "stop", "load_begin", "describe", "check", "load", "load_commit", "resume", "end")


def name_of(fault: Fault) -> str:
    """A test id."""
    if isinstance(fault, Fails):
        return type(fault.error).__name__
    return type(fault).__name__ + ("-executed" if getattr(fault, "executed", False) else "")


@pytest.fixture
def clock() -> MockClock:
    """The time of day, which `skipping` can make go faster."""
    return MockClock(rate=1.0)


@contextmanager
def skipping(clock: MockClock, fault: Fault) -> Iterator[None]:
    """Skip to the next deadline while nothing happens, if calls hang by this fault; others cost next to no time."""
    clock.autojump_threshold = IDLE_S if isinstance(fault, NeverAnswers) else inf
    try:
        yield
    finally:
        clock.autojump_threshold = inf


class Moves:
    """The same moves of a VMM in one of the generations; those that may fail return an error number."""

    def __init__(self, client: Vmm, v1: bool) -> None:
        self.client = client
        self.v1 = v1

    async def set(self, v2_state: int) -> int:
        """Change the state."""
        if self.v1:
            return await self.client.v1_set_errno(TO_V1[v2_state])
        return await self.client.set_state_errno(v2_state)

    async def state(self) -> int:
        """Read the state, as v2 numbers."""
        if not self.v1:
            return await self.client.state()
        return FROM_V1[await self.client.v1_state()]

    async def read(self) -> bytes | None:
        """Read to the end or until drained; None if it failed."""
        stream = b""
        while True:
            data = await (self._chunk() if self.v1 else self._read())
            if data is None:
                return None
            stream += data
            if not data or (not self.v1 and len(data) < 65536):
                return stream

    async def _read(self) -> bytes | None:
        answer = await self.client.command(17, (8 + 65536).to_bytes(4, "little") + (65536).to_bytes(4, "little"))
        return None if answer.error else answer.payload[8:]

    async def _chunk(self) -> bytes | None:
        for offset in (8, 16, 24):
            answer = await self.client.command(9, offset.to_bytes(8, "little") + b"\x09\0\0\0\x08\0\0\0")
            if answer.error:
                return None
            value = int.from_bytes(answer.payload[16:], "little")
            if offset == 8 and not value:
                return b""
        return await self.client.read(9, 4096, value) if value else b""

    async def write(self, stream: bytes) -> int:
        """Write everything; returns the first error number."""
        for start in range(0, len(stream), 60_000):
            part = stream[start : start + 60_000]
            error = await (self.client.v1_write(part) if self.v1 else self.client.data_write_errno(part))
            if error:
                return error
        return 0


TO_V1 = {
    STOP: V1_STOPPED,
    RUNNING: V1_RUNNING,
    STOP_COPY: V1_STOP_COPY,
    PRE_COPY: V1_PRE_COPY,
    RESUMING: V1_RESUMING,
    0: V1_ERROR,
}
FROM_V1 = {value: state for state, value in TO_V1.items()}


async def check_truth(side: Side, moves: Moves) -> None:
    """What the client reads is what the function does, as far as anybody can know."""
    state = await moves.state()
    if side.engine.truth is Truth.KNOWN:
        assert side.runs == (state in (RUNNING, PRE_COPY)), (state, side.device.state)


async def save(side: Side, moves: Moves) -> bytes | None:
    """Pre-copy, stop-and-copy; None as soon as something failed."""
    stream = b""
    for state in (PRE_COPY, STOP_COPY):
        if await moves.set(state):
            return None
        await check_truth(side, moves)
        part = await moves.read()
        if part is None:
            return None
        stream += part
    return None if await moves.set(STOP) else stream


async def load(side: Side, moves: Moves, stream: bytes) -> bool:
    """Load and run; False as soon as something failed."""
    if await moves.set(RESUMING):
        return False
    await check_truth(side, moves)
    if await moves.write(stream) or await moves.set(RUNNING):
        return False
    await check_truth(side, moves)
    return True


async def find_back(side: Side, moves: Moves) -> None:
    """What a VMM does after a failure: try to run, else reset; in the end the function runs and says so."""
    if await moves.set(RUNNING):
        await check_truth(side, moves)
        with trio.fail_after(10):
            while (await moves.client.command(RESET)).error:
                await check_truth(side, moves)
    assert RUNNING == await moves.state()
    assert side.runs


async def migrate_again(both: Bed, src: Moves, dst: Moves) -> None:
    """The function can be migrated once more, from reset on both sides."""
    for moves in (src, dst):
        await moves.client.succeed(RESET)
    both.source.device.work(changes=1000)
    stream = await save(both.source, src)
    assert stream is not None
    assert await load(both.destination, dst, stream)
    assert both.migrated()
    assert (False, True) == (both.source.runs, both.destination.runs)
    for moves in (src, dst):
        assert 0 == await moves.set(RUNNING)


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_source(tmp_path: Path, clock: MockClock, fault: Fault, v1: bool) -> None:
    """A source whose agent fails at any call is brought back, or stands still and says so."""
    async with (
        bed(tmp_path, config=QUICK, reply_budget_s=BUDGET_S, state_size=100 << 10) as both,
        both.source.vmm() as a,
        both.destination.vmm() as b,
    ):
        src, dst = Moves(a, v1), Moves(b, v1)
        for op in SOURCE_OPS:
            injection = both.agent.inject(op, fault, function_id=None if op == "open" else "src")
            stream = None
            with skipping(clock, fault):
                if op != "abort":
                    stream = await save(both.source, src)
                elif not await src.set(PRE_COPY) and await src.read() is not None:
                    await src.set(RUNNING)
                await check_truth(both.source, src)
            if stream is not None and op not in ("resume", "end"):
                assert await load(both.destination, dst, stream), op
                assert both.migrated()
                assert not both.source.runs
            with skipping(clock, fault):
                await find_back(both.source, src)
            both.agent.heal()
            assert injection.struck or op == "open", f"{op} was not called"
            await migrate_again(both, src, dst)


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_destination(tmp_path: Path, clock: MockClock, fault: Fault, v1: bool) -> None:
    """A destination whose agent fails at any call runs only what was loaded whole; else a reset leads out."""
    async with (
        bed(tmp_path, config=QUICK, reply_budget_s=BUDGET_S, state_size=100 << 10) as both,
        both.source.vmm() as a,
        both.destination.vmm() as b,
    ):
        src, dst = Moves(a, v1), Moves(b, v1)
        for op in DESTINATION_OPS:
            both.source.device.work(changes=500)
            stream = await save(both.source, src)
            assert stream is not None
            injection = both.agent.inject(op, fault, function_id=None if op == "open" else "dst")
            with skipping(clock, fault):
                good = await load(both.destination, dst, stream)
                await check_truth(both.destination, dst)
                assert not good or both.migrated()
                assert not both.source.runs
                await find_back(both.destination, dst)
            both.agent.heal()
            assert injection.struck or op == "open", f"{op} was not called"
            await migrate_again(both, src, dst)


async def test_device_failed_is_an_error_in_both_generations(tmp_path: Path) -> None:
    """Only the agent's word that the function is broken makes v1 read 6; v2 reads ERROR, and a reset leads out."""
    failed = next(fault for fault in every_error() if type(fault.error).__name__ == "DeviceFailed")
    async with bed(tmp_path, config=QUICK, reply_budget_s=BUDGET_S) as both, both.source.vmm() as src:
        both.agent.inject("stop", failed)
        assert errno.EIO == await src.set_state_errno(STOP)
        assert (0, V1_ERROR) == (await src.state(), await src.v1_state())
        for state in (STOP, RUNNING, PRE_COPY, STOP_COPY, RESUMING):
            assert errno.EINVAL == await src.set_state_errno(state)
        for state in (0, 1, 2, 3, 4):
            assert errno.EINVAL == await src.v1_set_errno(state)
        await src.succeed(RESET)
        assert (RUNNING, V1_RUNNING) == (await src.state(), await src.v1_state())


async def test_unknown_state(tmp_path: Path) -> None:
    """While nobody knows, v2 says what `status` says, or ERROR without it, and v1 the old value; then it is settled."""
    async with bed(tmp_path, config=QUICK, reply_budget_s=0.6) as both, both.source.vmm() as src:
        for op in ("stop", "resume"):
            both.agent.inject(op, Drops(), count=None)
        both.agent.inject("status", Drops(), count=None)
        assert await src.set_state_errno(STOP)
        assert (0, V1_RUNNING) == (await src.state(), await src.v1_state())
        assert await src.set_state_errno(STOP)
        assert await src.v1_set_errno(V1_STOPPED)
        both.agent.heal()
        await until(lambda: both.source.engine.truth is Truth.KNOWN)
        assert RUNNING == await src.state()
        assert both.source.runs
        await src.set_state(STOP)
