"""The in-memory agent: what a migration carries arrives, in any chunk size, with changes on the way, and no more."""

from __future__ import annotations

import pytest
from xxhash import xxh3_128_digest

from vfiouser_agents.api import AgentState, Outcome, Phase, Range, Role, Session
from vfiouser_agents.errors import Busy, InvalidArgument, InvalidState
from vfiouser_agents.memory import MemoryAgent, MemoryFunction


async def pull(session: Session, limit: int, phase: Phase, offset: int = 0, passes: int = 1) -> bytes:
    """Everything that a source gives, until it is at the end or drained some times."""
    stream = b""
    while passes:
        chunk = await session.save(offset + len(stream), limit, phase)
        stream += chunk.data
        passes -= chunk.eof or chunk.drained
    return stream


async def push(session: Session, stream: bytes, size: int) -> None:
    """Load a stream in pieces and commit it."""
    await session.load_begin(None)
    for offset in range(0, len(stream), size):
        await session.load(offset, stream[offset : offset + size])
    await session.load_commit(len(stream), xxh3_128_digest(stream))


@pytest.mark.parametrize("state_size", [1, 8, 4095, 4096, 4104, 100_000])
@pytest.mark.parametrize("limit", [1 << 20, 4096, 777])
async def test_round_trip(state_size: int, limit: int) -> None:
    """State and counter arrive in any chunk size, with changes during two passes of pre-copy."""
    source = MemoryFunction(state_size=state_size, churn=5000, seed=1)
    target = MemoryFunction("other", state_size=state_size, seed=2)
    here = await MemoryAgent([source]).open("f0")
    there = await MemoryAgent([target]).open("other")
    await here.begin(Role.SOURCE, "m")
    await there.begin(Role.DESTINATION, "m")
    await there.check(await here.describe())
    source.work(changes=100)
    stream = await pull(here, limit, Phase.PRECOPY, passes=2)
    source.work(changes=10)
    await here.quiesce()
    await here.stop()
    estimate = await here.estimate()
    rest = await pull(here, limit, Phase.FINAL, offset=len(stream))
    assert (estimate.stop_copy_bytes, True) == (len(rest), estimate.exact)
    await there.stop()
    await push(there, stream + rest, limit)
    assert AgentState.LOADED is (await there.status()).state
    assert (source.digest(), 2) == (target.digest(), target.counter)
    await there.resume()
    await there.end(Outcome.SUCCESS)
    assert target.running


async def test_a_stopped_function_does_not_work() -> None:
    """The test function refuses what a real one must not do."""
    function = MemoryFunction()
    session = await MemoryAgent([function]).open("f0")
    await session.quiesce()
    with pytest.raises(RuntimeError):
        function.work()


async def test_dirty_pages() -> None:
    """Pages written in the ranges are reported once, in whole pages; others are not."""
    function = MemoryFunction()
    session = await MemoryAgent([function]).open("f0")
    assert 4096 == await session.dirty_start([Range(0x10000, 0x10000), Range(0x20000, 0x8000)], 512)
    function.work(0x1FFFF, 2)
    function.work(0x0, 0x10)
    function.work(0x27FFF, 100)
    assert bytes([0, 0x80, 0x81]) == (await session.dirty_report(0x10000, 0x18000)).bitmap
    assert bytes(3) == (await session.dirty_report(0x10000, 0x18000)).bitmap
    with pytest.raises(InvalidArgument):
        await session.dirty_report(0x0, 0x1000)
    await session.dirty_stop()
    assert 65536 == await session.dirty_start([Range(0, 1 << 20)], 8192)


async def test_a_migration_has_one_session() -> None:
    """Another session is kept out until the first one is gone; then it may take over, or conclude."""
    function = MemoryFunction()
    agent = MemoryAgent([function])
    first, second = await agent.open("f0"), await agent.open("f0")
    await first.begin(Role.SOURCE, "m")
    await first.stop()
    with pytest.raises(Busy):
        await second.begin(Role.SOURCE, "n")
    with pytest.raises(Busy):
        await second.resume()
    await first.aclose()
    with pytest.raises(InvalidState):
        await second.begin(Role.SOURCE, "n")
    with pytest.raises(InvalidState):
        await second.save(0, 100, Phase.FINAL)
    await second.begin(Role.SOURCE, "m")
    assert 100 == len((await second.save(0, 100, Phase.FINAL)).data)
    assert AgentState.STOPPED is (await second.status()).state
    await second.resume()


async def test_a_large_state_takes_up_little() -> None:
    """A state of a gigabyte that nobody wrote costs next to nothing until it is read."""
    function = MemoryFunction(state_size=1 << 30)
    session = await MemoryAgent([function]).open("f0")
    await session.begin(Role.SOURCE, "m")
    assert (1 << 30) < (await session.estimate()).stop_copy_bytes
    assert 1 << 20 == len((await session.save(0, 1 << 20, Phase.PRECOPY)).data)
