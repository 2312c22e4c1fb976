"""The kernel's own migration behind the agents' interface: the whole contract, and what is special to a driver."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from xxhash import xxh3_128_digest

from fakevfio import FakeKernel, FakeMigration
from fakevfio.bed import NoMessages, running
from fakevfio.kernel import BDF
from vfiouser_agents.api import Agent, AgentState, Outcome, Phase, Range, Role, Session
from vfiouser_agents.errors import Busy, CorruptState, Incompatible, InvalidState, Unsupported
from vfiouser_agents.testing import CHECKS, CheckOutcome, check_agent

CONFIG = 7
CHUNK = 1 << 20


def machine(root: Path) -> FakeKernel:
    """A machine whose function has a driver that migrates."""
    kernel = FakeKernel(root)
    kernel.migration = FakeMigration()
    return kernel


@asynccontextmanager
async def used_function(kernel: FakeKernel) -> AsyncIterator[Agent]:
    """The agent of a function that a client uses."""
    async with running(kernel) as backend:
        client = await backend.open(NoMessages())
        try:
            yield backend.agent()
        finally:
            await client.close()


async def save(session: Session, phase: Phase = Phase.FINAL, offset: int = 0) -> bytes:
    """Take all that a phase gives."""
    stream = bytearray()
    while True:
        chunk = await session.save(offset + len(stream), 1000, phase)
        stream += chunk.data
        if chunk.eof or chunk.drained:
            return bytes(stream)


async def load(session: Session, stream: bytes) -> None:
    """Load and commit."""
    await session.begin(Role.DESTINATION, "m")
    await session.stop()
    await session.load_begin(len(stream))
    for offset in range(0, len(stream), 1000):
        await session.load(offset, stream[offset : offset + 1000])
    await session.load_commit(len(stream), xxh3_128_digest(stream))


def mtty(kernel: FakeKernel, driver: FakeMigration) -> None:
    """As a driver of the kernel's samples has it, on a kernel that cannot read its log."""
    kernel.device.tells_reset = False
    driver.sticky, driver.nothing_errno, driver.log_errno = True, None, errno.EOPNOTSUPP


def stop_copy(kernel: FakeKernel, driver: FakeMigration) -> None:
    """A driver that can do no more than it must."""
    driver.flags, driver.has_log = 1, False


@pytest.mark.parametrize("name", [check.name for check in CHECKS])
@pytest.mark.parametrize("kind", [None, stop_copy, mtty])
async def test_the_contract_of_agents(
    tmp_path: Path, name: str, kind: Callable[[FakeKernel, FakeMigration], None] | None
) -> None:
    """What holds for any agent holds for the kernel's: the public contract, check by check."""
    kernel = machine(tmp_path)
    assert kernel.migration is not None
    if kind is not None:
        kind(kernel, kernel.migration)
    async with used_function(kernel) as agent:
        (result,) = await check_agent(lambda: agent, function_id=BDF, names=[name])
        assert result.outcome is not CheckOutcome.FAILED, result.detail


async def test_from_one_function_to_another(tmp_path: Path) -> None:
    """State goes with pre-copy, quiesce and stop from one driver to another, in one stream."""
    source, destination = machine(tmp_path / "a"), machine(tmp_path / "b")
    assert source.migration is not None
    assert destination.migration is not None
    source.migration.content = b"what the guest did" * 100
    async with used_function(source) as here, used_function(destination) as there:
        leaving, coming = await here.open(BDF), await there.open(BDF)
        await coming.check(await leaving.describe())
        await leaving.begin(Role.SOURCE, "m")
        stream = await save(leaving, Phase.PRECOPY)
        estimate = await leaving.estimate()
        assert (12 + 1800, 0) == (estimate.stop_copy_bytes, estimate.initial_bytes)
        await leaving.quiesce()
        await leaving.stop()
        stream += await save(leaving, Phase.FINAL, len(stream))
        await leaving.end(Outcome.SUCCESS)
        await load(coming, stream)
        await coming.resume()
        assert source.migration.content == destination.migration.content
        assert AgentState.STOPPED is (await leaving.status()).state
        assert AgentState.RUNNING is (await coming.status()).state
    assert {} == source.nodes
    assert {} == destination.nodes


async def test_another_kind_of_function_is_incompatible(tmp_path: Path) -> None:
    """Vendor, model and class must be the same; the reasons name both sides."""
    source, destination = machine(tmp_path / "a"), machine(tmp_path / "b")
    destination.device.config[2:4] = b"\x11\x11"
    async with used_function(source) as here, used_function(destination) as there:
        descriptor = await (await here.open(BDF)).describe()
        with pytest.raises(Incompatible, match="model is '0010' there and '1111' here"):
            await (await there.open(BDF)).check(descriptor)


async def test_a_driver_without_migration(tmp_path: Path) -> None:
    """Plain vfio-pci cannot; every call says so, and the function is used without it."""
    kernel = FakeKernel(tmp_path)
    async with used_function(kernel) as agent:
        session = await agent.open(BDF)
        assert not session.caps.stop_copy
        assert () == session.caps.formats
        for call in (session.stop, session.quiesce, lambda: session.begin(Role.SOURCE, "m")):
            with pytest.raises(Unsupported, match="no migration of its own"):
                await call()
        assert AgentState.RUNNING is (await session.status()).state


async def test_corrupt_states_are_refused_by_whoever_notices(tmp_path: Path) -> None:
    """A wrong beginning, which the driver refuses at once, and a short state, which it refuses at the end."""
    kernel = machine(tmp_path)
    async with used_function(kernel) as agent:
        session = await agent.open(BDF)
        await session.begin(Role.SOURCE, "m")
        await session.stop()
        stream = await save(session)
        await session.end(Outcome.SUCCESS)
        for bad, words in ((b"x" + stream[1:], "refused it at 0"), (stream[:-1], "does not accept")):
            with pytest.raises(CorruptState, match=words):
                await load(session, bad)
            with pytest.raises(InvalidState):
                await session.resume()
            await session.reset()
            assert AgentState.RUNNING is (await session.status()).state


async def test_a_reset_by_the_client_is_noticed(tmp_path: Path) -> None:
    """The guest's reset makes the driver RUNNING behind the agent's back; `status` tells the truth."""
    kernel = machine(tmp_path)
    async with running(kernel) as backend:
        client = await backend.open(NoMessages())
        session = await backend.agent().open(BDF)
        await session.begin(Role.DESTINATION, "m")
        await session.stop()
        await session.load_begin(None)
        done = client.reset()
        assert done is not None
        await done
        assert AgentState.RUNNING is (await session.status()).state
        await session.resume()
        await client.close()


async def test_without_a_client(tmp_path: Path) -> None:
    """The device is opened for a moment to learn what it can do; then it is closed, and nothing can be saved of it."""
    kernel = machine(tmp_path)
    async with running(kernel) as backend:
        session = await backend.agent().open(BDF)
        assert session.caps.precopy
        assert {} == kernel.nodes
        assert AgentState.RUNNING is (await session.status()).state
        with pytest.raises(InvalidState, match="has no client"):
            await session.stop()
        await session.reset()


async def test_a_client_that_goes_ends_the_migration(tmp_path: Path) -> None:
    """The device is reset and closed: no stream, no role, no log is left, and no descriptor."""
    kernel = machine(tmp_path)
    async with running(kernel) as backend:
        client = await backend.open(NoMessages())
        session = await backend.agent().open(BDF)
        await session.begin(Role.SOURCE, "m")
        await session.save(0, 4, Phase.PRECOPY)
        await session.dirty_start([Range(0, CHUNK)], 4096)
        await client.close()
        status = await session.status()
        assert (AgentState.RUNNING, None, False) == (status.state, status.role, status.dirty_active)
        assert {} == kernel.nodes


async def test_dirty_pages_come_from_the_device(tmp_path: Path) -> None:
    """The driver's log: a bit for each page that was written, once."""
    kernel = machine(tmp_path)
    assert kernel.migration is not None
    async with used_function(kernel) as agent:
        session = await agent.open(BDF)
        assert 4096 == await session.dirty_start([Range(0x10_0000, 0x10_0000)], 4096)
        kernel.migration.dirty |= {0x10_0000, 0x10_9000, 0x1F_F000}
        report = await session.dirty_report(0x10_0000, 0x10_0000)
        assert report.bitmap is not None
        assert {0, 9, 255} == {bit for bit in range(256) if report.bitmap[bit // 8] >> bit % 8 & 1}
        assert not any((await session.dirty_report(0x10_0000, 0x10_0000)).bitmap or b"")
        await session.dirty_stop()


async def test_a_driver_that_is_busy(tmp_path: Path) -> None:
    """EBUSY of the driver is Busy, and the same call works afterwards."""
    kernel = machine(tmp_path)
    assert kernel.migration is not None
    async with used_function(kernel) as agent:
        session = await agent.open(BDF)
        kernel.migration.busy = 1
        with pytest.raises(Busy):
            await session.stop()
        await session.stop()
        assert AgentState.STOPPED is (await session.status()).state
