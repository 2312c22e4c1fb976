"""Every call to the agent × every way to fail, on both sides, in both generations.

For each the end is checked: what the client reads is what the function does, never do two copies run, the client finds
a way back to RUNNING, and the function can be migrated again.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from daemonkit import function
from migrationkit import (
    GET,
    LOG_REPORT,
    LOG_START,
    PRE_COPY,
    RESUMING,
    RUNNING,
    SET,
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
from rawclient import DIRTY_PAGES, FEATURE, RESET, memfd
from vfiouser_agents.errors import Busy, DeadlineExceeded
from vfiouser_agents.faults import (
    ChangesResult,
    Delay,
    Drops,
    Fails,
    Fault,
    Injection,
    NeverAnswers,
    Twice,
    corrupt_load,
    duplicated_load,
    duplicated_save,
    every_error,
    short_load,
    short_save,
    wrong_descriptor,
)
from vfiouser_agents.memory import MemoryFunction
from vfiouser_oob.config.schema import MigrationConfig, UpstreamDevice
from vfiouser_oob.migration.record import Certainty

pytestmark = pytest.mark.slow

#: Short, since each hung call costs one of these.
QUICK = MigrationConfig(chunk_size=64 << 10, v1_data_size=64 << 10, call_s=0.2, stop_s=0.2, data_s=0.2, retry_s=0.01)
BUDGET_S = 1.0
#: Where nothing hangs, nothing is cut off on a busy machine either.
PATIENT = replace(QUICK, call_s=3.0, stop_s=3.0, data_s=3.0)
PATIENT_BUDGET_S = 10.0
FAULTS: Sequence[Fault] = [
    Delay(0.02),
    NeverAnswers(),
    NeverAnswers(executed=True),
    Drops(),
    Drops(executed=True),
    *every_error(),
]
#: Calls that belong to no function.
AGENT_WIDE = ("connect", "open")
#: What a source's daemon asks of its agent; the dirty log has a test of its own.
SOURCE_OPS = (
    *("connect", "open", "status", "begin", "describe", "estimate", "quiesce", "stop", "save", "resume", "abort"),
    *("end", "reset"),
)
#: What a destination's daemon asks of its agent.
DESTINATION_OPS = (
    *("connect", "open", "status", "begin", "quiesce", "stop", "load_begin", "describe", "check", "load"),
    *("load_commit", "resume", "abort", "end", "reset"),
)
#: And how many such calls go well before; a start ends the log that an earlier life may have left.
DIRTY_OPS = (("dirty_stop", 0), ("dirty_start", 0), ("dirty_report", 0), ("dirty_stop", 1))


def name_of(fault: Fault) -> str:
    """A test id."""
    if isinstance(fault, Fails):
        return type(fault.error).__name__
    return type(fault).__name__ + ("-executed" if getattr(fault, "executed", False) else "")


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

    async def log(self, *, start: bool) -> int:
        """Start or stop logging dirty pages; returns the error number."""
        if self.v1:
            request = struct.pack("<II", 8, 1 if start else 2)
            return (await self.client.command(DIRTY_PAGES, request)).error
        request = struct.pack("<IIQII", 24, LOG_START | SET, 4096, 0, 0) if start else struct.pack("<II", 8, 7 | SET)
        return (await self.client.command(FEATURE, request)).error

    async def report(self, length: int) -> Set[int]:
        """The dirty pages of the first so many bytes."""
        return await (self.client.v1_dirty(0, length) if self.v1 else self.client.report(0, length))

    async def report_errno(self, length: int) -> int:
        """The error number of such a report."""
        if self.v1:
            return (await self.client.command(DIRTY_PAGES, struct.pack("<IIQQQQ", 48, 4, 0, length, 4096, 8))).error
        request = struct.pack("<IIQQQ", 4096, LOG_REPORT | GET, 0, length, 4096)
        return (await self.client.command(FEATURE, request)).error

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
    if side.runner.record.certainty is Certainty.KNOWN:
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
    await until(lambda: side.runner.record.certainty is Certainty.KNOWN)
    assert RUNNING == await moves.state()
    assert side.runs


async def let_reset(both: Bed, side: Side, moves: Moves, fault: Fault) -> None:
    """A reset that hangs is the end of the agent's service: nothing helps but to begin it anew, and nothing runs."""
    if isinstance(fault, NeverAnswers):
        await moves.client.succeed(RESET)
        assert (True, RUNNING) == (side.runner.record.reset_due is not None, await moves.state())
        assert side.runs == fault.executed
        both.agent.restart()


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


@asynccontextmanager
async def sides(directory: Path, v1: bool, fault: Fault, **options: Any) -> AsyncIterator[tuple[Bed, Moves, Moves]]:
    """Both sides with a client each."""
    hangs = isinstance(fault, NeverAnswers)
    config, budget_s = (QUICK, BUDGET_S) if hangs else (PATIENT, PATIENT_BUDGET_S)
    async with (
        bed(directory, config=config, reply_budget_s=budget_s, state_size=100 << 10, **options) as both,
        both.source.vmm() as a,
        both.destination.vmm() as b,
    ):
        yield both, Moves(a, v1), Moves(b, v1)


async def inject(both: Bed, side: Side, op: str, fault: Fault) -> Injection:
    """Let the side's next call of that name fail."""
    if op in AGENT_WIDE:
        # Only a session that is not open yet is opened.
        await until(lambda: side.runner.record.begun is None)
        side.runner.link.close(force=True)
    if op == "status":
        # It is asked for when the effect of another call is not known, and nothing may be undone.
        both.agent.inject("resume", Fails(DeadlineExceeded("late")), function_id=side.name)
    return both.agent.inject(op, fault, function_id=None if op in AGENT_WIDE else side.name)


async def go_away(both: Bed, op: str, src: Moves) -> bytes | None:
    """The source's part of a migration, up to where the call is made; the stream, if there is a whole one."""
    if op == "abort":
        if not await src.set(PRE_COPY) and await src.read() is not None:
            await src.set(RUNNING)
        return None
    if op == "reset":
        assert 0 == await src.set(STOP_COPY)
        await src.client.command(RESET)
        return None
    stream = await save(both.source, src)
    if op == "status":
        assert stream is not None
        assert await src.set(RUNNING)
        return None
    return stream


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_source(tmp_path: Path, fault: Fault, v1: bool) -> None:
    """A source whose agent fails at any call is brought back, or stands still and says so."""
    async with sides(tmp_path, v1, fault) as (both, src, dst):
        for op in SOURCE_OPS:
            injection = await inject(both, both.source, op, fault)
            stream = await go_away(both, op, src)
            await check_truth(both.source, src)
            # Nothing that happens at the source changes the destination.
            assert (RUNNING, True) == (await dst.state(), both.destination.runs)
            if stream is not None and op not in ("resume", "end"):
                assert await load(both.destination, dst, stream), op
                assert both.migrated()
                assert not both.source.runs
            if op == "reset":
                await let_reset(both, both.source, src, fault)
            await find_back(both.source, src)
            both.agent.heal()
            assert injection.struck, f"{op} was not called"
            await migrate_again(both, src, dst)


async def stream_for(both: Bed, op: str, src: Moves) -> bytes:
    """A whole stream; for `abort` one that begins anew in between, which is when a destination is told to drop it."""
    both.source.device.work(changes=500)
    begun = b""
    if op == "abort":
        assert 0 == await src.set(PRE_COPY)
        begun = await src.read() or b""
        both.agent.inject("stop", Fails(Busy("not yet")), function_id="src")
        assert await src.set(STOP_COPY)
        assert PRE_COPY == await src.state()
    rest = await save(both.source, src)
    assert rest is not None
    assert (2 if op == "abort" else 1) == (begun + rest).count(b"VFUOOBST")
    return begun + rest


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_destination(tmp_path: Path, fault: Fault, v1: bool) -> None:
    """A destination whose agent fails at any call runs only what was loaded whole; else a reset leads out."""
    async with sides(tmp_path, v1, fault) as (both, src, dst):
        for op in DESTINATION_OPS:
            stream = await stream_for(both, op, src)
            before = both.destination.device.digest()
            injection = await inject(both, both.destination, op, fault)
            # Only a load of nothing is left by a reset of ours.
            good = await load(both.destination, dst, b"" if op == "reset" else stream)
            await check_truth(both.destination, dst)
            assert not good or both.migrated() or op == "reset"
            # What it holds is one or the other, never a mixture; and the source has handed its state over.
            assert both.destination.device.digest() in (before, both.source.device.digest(), reset_digest("dst")), op
            assert (STOP, False) == (await src.state(), both.source.runs)
            if op == "reset":
                await let_reset(both, both.destination, dst, fault)
            await find_back(both.destination, dst)
            both.agent.heal()
            assert injection.struck, f"{op} was not called"
            await migrate_again(both, src, dst)


def reset_digest(name: str) -> bytes:
    """Of a function that was reset."""
    return MemoryFunction(name, 100 << 10, {"src": 1, "dst": 2}[name]).digest()


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
async def test_dirty_log(tmp_path: Path, fault: Fault, v1: bool) -> None:
    """Whatever goes wrong with the log, no page is ever clean that was written; a log that did not begin is refused."""
    fd = memfd(1 << 16)
    async with sides(
        tmp_path,
        v1,
        fault,
        devices=lambda name: UpstreamDevice(socket=tmp_path / f"up-{name}.sock"),
        also=(function(tmp_path, "up-src"), function(tmp_path, "up-dst")),
    ) as (both, src, dst):
        await src.client.dma_map(0, 1 << 16, fd)
        for op, after in DIRTY_OPS:
            injection = both.agent.inject(op, fault, after=after, function_id="src")
            if await src.log(start=True):
                assert op != "dirty_report"
                assert errno.EINVAL == await src.report_errno(1 << 16)
            else:
                for page in (3, 5):
                    both.source.device.work(page << 12, 1)
                    assert page in await src.report(1 << 16)
                assert 0 == await src.log(start=False)
            assert injection.struck, f"{op} was not called"
            both.agent.heal()
            # A function that runs is reset without its agent, so what hangs there is over only with its process.
            both.agent.restart()
            await migrate_again(both, src, dst)
            assert 0 == await src.log(start=True)
            assert set() == await src.report(1 << 16)
            both.source.device.work(7 << 12, 1)
            assert {7} == await src.report(1 << 16)
            assert 0 == await src.log(start=False)
    os.close(fd)


def spoiled_end() -> Fault:
    """The last chunk of a state has one wrong bit."""
    return ChangesResult(
        lambda chunk: replace(chunk, data=chunk.data[:-1] + bytes([chunk.data[-1] ^ 1])) if chunk.eof else chunk
    )


WRONG_AT_SOURCE = [
    ("save", short_save()),
    ("save", duplicated_save()),
    ("save", spoiled_end()),
    ("describe", wrong_descriptor()),
    ("describe", wrong_descriptor(kind="other")),
    ("estimate", ChangesResult(lambda estimate: replace(estimate, stop_copy_bytes=1 << 62, initial_bytes=0))),
]
WRONG_AT_DESTINATION = [
    ("load", short_load()),
    ("load", corrupt_load()),
    ("load", duplicated_load()),
    ("load", Twice()),
    ("describe", wrong_descriptor(kind="other")),
    ("describe", wrong_descriptor(vendor="other")),
]


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize(("op", "fault"), WRONG_AT_SOURCE)
async def test_wrong_answers_at_the_source(tmp_path: Path, op: str, fault: Fault, v1: bool) -> None:
    """Data and descriptors that are not true are never run at the destination, and the source goes on."""
    async with sides(tmp_path, v1, fault) as (both, src, dst):
        before = both.destination.device.digest()
        injection = both.agent.inject(op, fault, count=None, function_id="src")
        stream = await save(both.source, src)
        loaded = stream is not None and await load(both.destination, dst, stream)
        assert injection.struck
        assert loaded == (op == "estimate")
        if loaded:
            assert both.migrated()
        else:
            assert before == both.destination.device.digest()
            assert both.destination.runs == (stream is None)
        await check_truth(both.source, src)
        await check_truth(both.destination, dst)
        both.agent.heal()
        for side, moves in ((both.source, src), (both.destination, dst)):
            await find_back(side, moves)
        await migrate_again(both, src, dst)


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize(("op", "fault"), WRONG_AT_DESTINATION)
async def test_wrong_data_at_the_destination(tmp_path: Path, op: str, fault: Fault, v1: bool) -> None:
    """What reaches the agent otherwise than it was sent is never run; a piece that comes twice does no harm."""
    async with sides(tmp_path, v1, fault) as (both, src, dst):
        before = both.destination.device.digest()
        stream = await save(both.source, src)
        assert stream is not None
        injection = both.agent.inject(op, fault, function_id="dst")
        loaded = await load(both.destination, dst, stream)
        assert injection.struck
        assert loaded == isinstance(fault, Twice)
        assert loaded == both.destination.runs == both.migrated()
        assert loaded or before == both.destination.device.digest()
        await check_truth(both.destination, dst)
        assert (STOP, False) == (await src.state(), both.source.runs)
        both.agent.heal()
        for side, moves in ((both.source, src), (both.destination, dst)):
            await find_back(side, moves)
        await migrate_again(both, src, dst)


async def test_device_failed_is_an_error_in_both_generations(tmp_path: Path) -> None:
    """Only the agent's word that the function is broken makes v1 read 6; v2 reads ERROR, and a reset leads out."""
    failed = next(fault for fault in every_error() if type(fault.error).__name__ == "DeviceFailed")
    async with bed(tmp_path, config=PATIENT, reply_budget_s=PATIENT_BUDGET_S) as both, both.source.vmm() as src:
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
    async with bed(tmp_path, config=QUICK, reply_budget_s=BUDGET_S) as both, both.source.vmm() as src:
        for op in ("stop", "resume"):
            both.agent.inject(op, Drops(), count=None)
        both.agent.inject("status", Drops(), count=None)
        assert await src.set_state_errno(STOP)
        assert (0, V1_RUNNING) == (await src.state(), await src.v1_state())
        assert await src.set_state_errno(STOP)
        assert await src.v1_set_errno(V1_STOPPED)
        both.agent.heal()
        await until(lambda: both.source.runner.record.certainty is Certainty.KNOWN)
        assert RUNNING == await src.state()
        assert both.source.runs
        await src.set_state(STOP)
