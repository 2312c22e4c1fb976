"""The VMM's two ways to migrate against a scripted function: what is asked in which order, and what comes of it."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fakeserver import connected
from scriptedfunction import PAGE, ScriptedFunction
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.vmm.side import MigrationFailed, MigrationSide
from vfiouser_oob.lab.vmm.v1 import V1Side
from vfiouser_oob.lab.vmm.v2 import V2Side
from vfiouser_protocol.constants import DeviceState, MigrationFlags
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.regions import SparseArea

ALL_MAPPED = (SparseArea(PAGE, 4 * PAGE),)
HALF_MAPPED = (SparseArea(2 * PAGE, PAGE),)


@asynccontextmanager
async def attached(function: ScriptedFunction) -> AsyncIterator[Client]:
    """A client of the function."""
    try:
        async with connected() as (client, server):
            function.serve(server)
            yield client
    finally:
        function.close()


@asynccontextmanager
async def v1(function: ScriptedFunction, **options: Any) -> AsyncIterator[V1Side]:
    """The function's v1 interface, its discovery forgotten."""
    async with attached(function) as client:
        side = await V1Side.open(client, **options)
        function.steps.clear()
        yield side
        side.close()


async def drain(side: MigrationSide) -> bytes:
    """Read until there is no more."""
    data = b""
    while True:
        portion = await side.read()
        data += portion.data
        if portion.last:
            return data


async def test_v1_saves_as_qemu_does() -> None:
    """Every state change is read, modify, write; every chunk is pending, offset, size; 2 is written twice."""
    function = ScriptedFunction([b"abc"], [b"defg"], v1_state=0xF1)
    async with v1(function) as side:
        assert await side.save_setup()
        assert b"abc" == await drain(side)
        await side.stop()
        assert b"defg" == await drain(side)
        await side.save_cleanup()
    chunk = ["read pending", "read offset", "read size"]
    assert function.steps == [
        "read state", "state = 0xf3", *chunk, "read pending",
        "read state", "state = 0xf2", "read state", "state = 0xf2", *chunk, "read pending",
        "read state", "state = 0xf0",
    ]  # fmt: skip


@pytest.mark.parametrize("state", [0xF3, 0xF2, 0xF0, 0xF4])
async def test_v1_cancel_clears_saving_and_resuming(state: int) -> None:
    """Whatever the state was, RUNNING alone remains, and reserved bits stay."""
    function = ScriptedFunction(v1_state=state)
    async with v1(function) as side:
        await side.cancel()
    assert function.steps == ["read state", "state = 0xf1"]


async def test_v1_empty_chunk_is_the_end() -> None:
    """A data_size of 0 ends the reading even though something is said to be pending."""
    function = ScriptedFunction([], [b"", b"x"])
    async with v1(function) as side:
        await side.stop()
        assert b"" == await drain(side)


@pytest.mark.parametrize(
    ("mapped", "natural", "messages"),
    [
        (ALL_MAPPED, True, []),
        ((), False, [(PAGE, 4101), (PAGE, 4101)]),
        (HALF_MAPPED, False, [(PAGE, 4096), (PAGE, 4096)]),
    ],
)
async def test_v1_data_by_memory_or_messages(
    mapped: tuple[SparseArea, ...], natural: bool, messages: list[tuple[int, int]]
) -> None:
    """What is mapped goes by memory, the rest by messages, within one chunk as well; both ways bring the same."""
    data = bytes(range(241)) * 17 + b"tail"
    function = ScriptedFunction([], [data], mapped=mapped)
    async with v1(function, natural=natural) as side:
        await side.stop()
        assert data == await drain(side)
        await side.load(data)
        assert data == function.loaded
    assert messages == function.accesses


async def test_v1_natural_pieces() -> None:
    """In QEMU's manner every message has 8, 4, 2 or 1 bytes, aligned to its size, and all bytes arrive."""
    data = bytes(range(1, 48))
    function = ScriptedFunction([], [data], mapped=(SparseArea(PAGE, 4 * PAGE),))
    async with v1(function, natural=True, use_mapping=False) as side:
        await side.stop()
        assert data == await drain(side)
        await side.load(data)
        assert data == function.loaded
    assert {1, 2, 4, 8} == {count for _, count in function.accesses}
    assert all(offset % count == 0 for offset, count in function.accesses)
    assert 2 * len(data) == sum(count for _, count in function.accesses)


@pytest.mark.parametrize(("chunk", "sizes"), [(None, [PAGE, PAGE, 808]), (3000, [3000, 3000, 3000])])
async def test_v1_rounds_of_a_small_destination(chunk: int | None, sizes: list[int]) -> None:
    """A piece larger than the data section is given in rounds, each with data_offset first and data_size last."""
    data = bytes(2 * PAGE + 808)
    function = ScriptedFunction(room=PAGE)
    async with v1(function, chunk_size=chunk) as side:
        await side.load_setup()
        await side.load(data)
        await side.start()
    rounds = [step for size in sizes for step in ("read offset", f"size = {size}")]
    assert function.steps == ["read state", "state = 0x4", *rounds, "read state", "state = 0x1"]
    assert data == function.loaded


async def test_v1_error_state_is_named() -> None:
    """Where QEMU would abort after a failed write, the error says so; a mere refusal is passed on."""
    function = ScriptedFunction(fails={"state = 0x3": errno.EIO})
    async with v1(function) as side:
        with pytest.raises(ReplyError):
            await side.save_setup()
        function.v1_state = 6
        function.fails["state = 0x2"] = errno.EIO
        with pytest.raises(MigrationFailed, match="error state"):
            await side.stop()


async def test_v1_needs_a_region() -> None:
    """A function without the region is refused with a reason."""
    function = ScriptedFunction(room=0)
    async with attached(function) as client:
        with pytest.raises(MigrationFailed, match="no migration region"):
            await V1Side.open(client)


async def test_v1_nonsense_of_the_function() -> None:
    """A chunk that ends beyond the region is an error, not an access."""
    function = ScriptedFunction([], [b"x"], mapped=ALL_MAPPED)
    async with v1(function) as side:
        await side.stop()
        function.register = lambda name: 1 << 40  # type: ignore[method-assign]
        with pytest.raises(MigrationFailed, match="of a region of"):
            await side.read()


@pytest.mark.parametrize("chunk", [1, 7, 4096])
async def test_v2_saves_and_loads(chunk: int) -> None:
    """Pre-copy is read until a short read, the rest until an empty one, and loading cuts by its own size."""
    before, after = b"abcdefgh" * 3, b"the end" * 5
    function = ScriptedFunction([before], [after])
    async with attached(function) as client:
        side = V2Side(client, chunk_size=chunk)
        assert await side.save_setup()
        assert before == await drain(side)
        await side.stop()
        assert after == await drain(side)
        await side.save_cleanup()
        first, last = -(-(len(before) + 1) // chunk), -(-len(after) // chunk) + 1
        reads = [step for step in function.steps if step.startswith("read")]
        assert first + last == len(reads)
        assert f"read 0 of {chunk}" == reads[-1]
        states = [step for step in function.steps if step.startswith("→")]
        assert ["→ PRE_COPY", "→ STOP_COPY", "→ STOP"] == states
        function.steps.clear()
        await side.load_setup()
        await side.load(before + after)
        await side.start()
        assert before + after == function.loaded
        assert ["GET MIGRATION", "→ RESUMING"] == function.steps[:2]
        assert "→ RUNNING" == function.steps[-1]


async def test_v2_without_precopy() -> None:
    """A function without PRE_COPY is saved after the stop only; one without STOP_COPY not at all."""
    function = ScriptedFunction([], [b"x"], flags=MigrationFlags.STOP_COPY)
    async with attached(function) as client:
        side = V2Side(client)
        assert not await side.save_setup()
        assert DeviceState.RUNNING is function.v2_state
        function.flags = MigrationFlags.PRE_COPY
        with pytest.raises(MigrationFailed, match="lack STOP_COPY"):
            await side.save_setup()
        function.fails["GET MIGRATION"] = errno.EINVAL
        with pytest.raises(MigrationFailed, match="v2 cannot migrate the function"):
            await side.load_setup()


async def test_v2_cancel() -> None:
    """A cancelled function runs again; if it refuses to, it is reset."""
    function = ScriptedFunction(v2_state=DeviceState.STOP_COPY)
    async with attached(function) as client:
        side = V2Side(client)
        await side.cancel()
        function.fails["→ RUNNING"] = errno.EIO
        await side.cancel()
    assert ["→ RUNNING", "→ RUNNING", "reset"] == function.steps


@pytest.mark.parametrize("generation", ["v1", "v2"])
async def test_dirty_log(generation: str) -> None:
    """The log is started for all of guest memory, read as one bitmap, and stopped."""
    function = ScriptedFunction(dirty=b"\x05" + bytes(7))
    with ClientMemory(10 * PAGE, 1 << 32) as memory:
        async with attached(function) as client:
            side = V2Side(client) if generation == "v2" else await V1Side.open(client)
            await side.start_logging(memory)
            assert b"\x05" + bytes(7) == await side.dirty(memory)
            await side.stop_logging()
            side.close()
        with ClientMemory(PAGE, 0x800) as crooked, pytest.raises(ValueError, match="does not begin with a page"):
            await side.dirty(crooked)
    assert 3 == len(function.steps)
