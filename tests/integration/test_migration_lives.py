"""What becomes of a migration when clients go, functions are reset, and daemons begin anew: the fence, above all."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from migrationkit import (
    FAST,
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    V1_PRE_COPY,
    V1_REGION,
    V1_RUNNING,
    Side,
    Vmm,
    bed,
    until,
    with_caps,
)
from openfds import open_fds
from rawclient import CONFIG, RESET, connect
from vfiouser_agents.api import AgentState, Role
from vfiouser_agents.errors import AgentError, Busy, DeviceFailed
from vfiouser_agents.faults import Fails, FaultyAgent, NeverAnswers
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import AgentConfig


@asynccontextmanager
async def one(directory: Path, device: MemoryFunction, reply_budget_s: float = 2.0) -> AsyncIterator[Side]:
    """A daemon with one function, whose agent may have been there before."""
    agent = FaultyAgent(MemoryAgent([device]))
    config = function(directory, agent=AgentConfig(kind="test", function=device.function_id), migration=FAST)
    async with serving(config, reply_budget_s=reply_budget_s, agents={"test": agent}) as daemon:
        yield Side("f0", directory / "f0.sock", device, daemon, agent)


# The client goes


@pytest.mark.parametrize("state", [STOP, PRE_COPY, STOP_COPY])
async def test_source_without_its_trailer_comes_back(tmp_path: Path, state: int) -> None:
    """A client that goes before it has the whole state leaves a function that goes on as it was."""
    async with bed(tmp_path) as both:
        both.source.device.work(changes=100)
        before = both.source.device.digest()
        async with both.source.vmm() as src:
            await src.set_state(state)
            if state != STOP:
                await src.data_read(100_000)
        await until(lambda: both.source.runs and both.source.device.role is None)
        async with both.source.vmm() as src:
            assert RUNNING == await src.state()
        assert before == both.source.device.digest()


@pytest.mark.parametrize("leave_stop_copy", [True, False])
async def test_source_with_its_trailer_stays_stopped(tmp_path: Path, leave_stop_copy: bool) -> None:
    """The trailer is the point of no return: the function stands still until its next client, who finds it reset."""
    async with bed(tmp_path) as both:
        async with both.source.vmm() as src:
            await src.set_state(STOP_COPY)
            await src.read_stream()
            if leave_stop_copy:
                await src.set_state(STOP)
        await until(lambda: both.source.runner.record.fenced)
        assert AgentState.STOPPED is both.source.device.state
        async with both.source.vmm() as src:
            assert RUNNING == await src.state()
            assert both.source.runs
            assert "reset" in both.source.device.calls
            await src.set_state(STOP_COPY)


async def test_source_with_its_trailer_runs_when_told(tmp_path: Path) -> None:
    """The client itself may still let the source go on."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(STOP_COPY)
        await src.read_stream()
        await src.set_state(RUNNING)
        assert both.source.runs
        assert "reset" not in both.source.device.calls


@pytest.mark.parametrize("loaded", [0, 1000, None])
async def test_destination_stays_stopped(tmp_path: Path, loaded: int | None) -> None:
    """A client that goes while it loads, or before it runs what it loaded, leaves a function that is reset later."""
    async with bed(tmp_path) as both:
        async with both.source.vmm() as src, both.destination.vmm() as dst:
            await src.set_state(STOP_COPY)
            stream = await src.read_stream()
            await dst.set_state(RESUMING)
            await dst.write_stream(stream[:loaded])
            if loaded is None:
                await dst.set_state(STOP)
        await until(lambda: both.destination.runner.record.fenced)
        stands_still = not both.destination.runs
        assert stands_still
        async with both.destination.vmm() as dst:
            assert RUNNING == await dst.state()
            assert both.destination.runs
            assert not both.migrated()


async def test_next_client_waits_for_the_source_to_come_back(tmp_path: Path) -> None:
    """A client that comes while the agent is being asked to resume is answered when it has."""
    async with bed(tmp_path) as both:
        async with both.source.vmm() as src:
            await src.set_state(STOP)
            both.agent.inject("resume", Fails(Busy("not now")), count=3)
        async with both.source.vmm() as src:
            assert RUNNING == await src.state()
            assert both.source.runs


# The daemon begins anew


@pytest.mark.parametrize("state", list(AgentState))
@pytest.mark.parametrize("migrating", [True, False])
async def test_fence_is_asked_of_the_agent(tmp_path: Path, state: AgentState, migrating: bool) -> None:
    """A new daemon resets what must not go on, resumes what was only paused, and leaves alone what runs."""
    device = MemoryFunction("x")
    device.work()
    device.state = state
    if migrating:
        device.role, device.migration_id = Role.SOURCE, "m"
    async with one(tmp_path, device) as side:
        await until(lambda: side.runner.record.asked)
        paused = state is AgentState.QUIESCED or (state is AgentState.STOPPED and not migrating)
        free = state is AgentState.RUNNING
        assert state is device.state
        async with side.vmm() as client:
            assert RUNNING == await client.state()
            assert side.runs
            assert (0 if not (paused or free) else 1) == device.counter
            await client.set_state(STOP_COPY)
            await client.set_state(RUNNING)
            assert "reset" not in device.calls or not (paused or free)


async def test_client_is_turned_away_while_a_fenced_function_cannot_be_reset(tmp_path: Path) -> None:
    """What must not run is not given to anybody; as soon as the agent can, it is."""
    device = MemoryFunction("x")
    device.state, device.role, device.migration_id = AgentState.STOPPED, Role.SOURCE, "m"
    async with one(tmp_path, device) as side:
        side.agent.inject("reset", Fails(Busy("no")))
        client = await connect(side.path)
        assert errno.ENODEV == (await client.negotiate()).error
        client.close()
        assert AgentState.STOPPED is device.state
        async with side.vmm() as client:
            assert RUNNING == await client.state()
            assert side.runs


async def test_attach_and_reset_without_an_agent(tmp_path: Path) -> None:
    """A function that runs is used and reset without its agent, and is taken for migratable."""
    device = MemoryFunction("x")
    async with one(tmp_path, device) as side:
        await until(lambda: side.runner.record.asked)
        for op in ("connect", "open", "status"):
            side.agent.inject(op, NeverAnswers(), count=None)
        with trio.fail_after(0.3):
            async with side.vmm() as client:
                await client.succeed(RESET)
                assert RUNNING == await client.state()
                assert V1_RUNNING == await client.v1_state()


async def test_agent_that_was_away_is_asked_when_it_is_back(tmp_path: Path) -> None:
    """A client that came while nobody knew gets a fenced function reset under it as soon as that is known."""
    device = MemoryFunction("x")
    device.state, device.role, device.migration_id = AgentState.STOPPED, Role.SOURCE, "m"
    async with one(tmp_path, device) as side:
        side.agent.inject("status", Fails(Busy("no")), count=None)
        async with side.vmm() as client:
            assert not side.runs
            side.agent.heal()
            await until(lambda: side.runs)
            await until(lambda: not side.runner.record.fenced)
            assert RUNNING == await client.state()


async def test_function_that_cannot_be_saved_says_so(tmp_path: Path) -> None:
    """Without `stop_copy` there is no migration in either generation; found out late, it is a clear error."""
    device = MemoryFunction("x")
    with_caps(device, stop_copy=False)
    async with one(tmp_path, device) as side:
        side.agent.inject("open", Fails(Busy("no")), count=None)
        async with side.vmm() as client:
            side.agent.heal()
            assert errno.ENOTSUP == await client.set_state_errno(STOP_COPY)
            assert RUNNING == await client.state()
            assert side.runs
        async with side.vmm() as client:
            assert errno.EINVAL == await client.set_state_errno(STOP_COPY)
            assert errno.EINVAL == await client.v1_set_errno(V1_RUNNING)


# Resets


@pytest.mark.parametrize("state", [STOP, PRE_COPY, STOP_COPY, RESUMING])
async def test_device_reset(tmp_path: Path, state: int) -> None:
    """DEVICE_RESET leads from every state to RUNNING, and drops what was being moved."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(state)
        if state in (PRE_COPY, STOP_COPY):
            await src.data_read(1000)
        await src.write32(0, 4, 0x1234)
        await src.succeed(RESET)
        assert (RUNNING, V1_RUNNING) == (await src.state(), await src.v1_state())
        assert 0 == await src.read32(0, 4)
        assert both.source.runs
        assert both.source.device.role is None
        await src.set_state(STOP_COPY)
        await src.read_stream()


async def function_level_reset(client: Vmm) -> None:
    """Set Initiate Function Level Reset in the PCI Express capability."""
    position = (await client.read(CONFIG, 0x34, 1))[0]
    while (header := await client.read(CONFIG, position, 2))[0] != 0x10:
        position = header[1]
    control = struct.unpack("<H", await client.read(CONFIG, position + 8, 2))[0]
    await client.write(CONFIG, position + 8, struct.pack("<H", control | 0x8000))


@pytest.mark.parametrize("v1", [True, False])
async def test_guest_resets_the_function_in_precopy(tmp_path: Path, v1: bool) -> None:
    """A function-level reset begins the stream anew, in a higher epoch, and the destination follows."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await dst.set_state(RESUMING)
        stream = b""
        if v1:
            await src.v1_set(V1_PRE_COPY)
            stream += (await src.v1_chunk() or b"") + (await src.v1_chunk() or b"")
        else:
            await src.set_state(PRE_COPY)
            stream += await src.data_read(100_001)
        await src.write32(0, 4, 77)
        await function_level_reset(src)
        assert 0 == await src.read32(0, 4)
        both.source.device.work(changes=999)
        if v1:
            assert V1_PRE_COPY == await src.v1_state()
            await src.v1_set(2)
            stream += await src.v1_read_stream()
        else:
            assert PRE_COPY == await src.state()
            await src.set_state(STOP_COPY)
            stream += await src.read_stream()
        await dst.write_stream(stream)
        await dst.set_state(RUNNING)
        assert both.migrated()
        assert 2 == stream.count(b"VFUOOBST")


@pytest.mark.parametrize(("op", "error"), [("describe", Busy("no")), ("abort", DeviceFailed("smoke"))])
async def test_guest_reset_that_the_agent_does_not_follow(tmp_path: Path, op: str, error: AgentError) -> None:
    """If the stream cannot begin anew, what was fetched before the reset is of no use to anybody."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(PRE_COPY)
        await src.data_read(1000)
        both.agent.inject(op, Fails(error), function_id="src")
        with pytest.raises(AssertionError):
            await function_level_reset(src)
        assert (errno.EIO if op == "describe" else errno.EINVAL) == await src.data_read_errno(1000)
        if op == "abort":
            assert 0 == await src.state()
            await src.succeed(RESET)
        else:
            assert PRE_COPY == await src.state()
            await src.set_state(STOP_COPY)
            assert errno.EIO == await src.data_read_errno(1000)
            await src.set_state(RUNNING)
        assert both.source.runs
        await src.set_state(STOP_COPY)
        assert await src.read_stream()


async def test_guest_reset_without_migration_leaves_the_agent_alone(tmp_path: Path) -> None:
    """A function-level reset in RUNNING is the device's own business."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await until(lambda: both.source.runner.record.asked)
        before = list(both.source.device.calls)
        await function_level_reset(src)
        assert before == both.source.device.calls


# Configuration space


async def test_config_space_as_last_written(tmp_path: Path) -> None:
    """The stream brings what the source's client wrote; what the destination's client writes while loading wins."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await src.write(CONFIG, 0x10, struct.pack("<I", 0xFEB00000))
        await src.write(CONFIG, 0x14, struct.pack("<I", 0xFEC00000))
        await src.write(CONFIG, 0x3C, b"\x0a")
        await src.write(CONFIG, 0x04, b"\x06\x04")
        await dst.write(CONFIG, 0x14, struct.pack("<I", 0xAAA00000))
        await src.set_state(STOP_COPY)
        stream = await src.read_stream()
        await dst.set_state(RESUMING)
        await dst.write(CONFIG, 0x10, struct.pack("<I", 0xFED00000))
        await dst.write_stream(stream)
        await dst.set_state(RUNNING)
        bars = struct.unpack("<II", await dst.read(CONFIG, 0x10, 8))
        assert (0xFED00000, 0xFEC00000) == bars
        assert b"\x06\x04" == await dst.read(CONFIG, 0x04, 2)
        assert b"\x0a" == await dst.read(CONFIG, 0x3C, 1)


# Nothing is left


async def test_nothing_is_left(tmp_path: Path) -> None:
    """Migrations that end well, badly or not at all leave no descriptor and no session."""
    async with bed(tmp_path) as both:
        await until(lambda: both.source.runner.record.asked and both.destination.runner.record.asked)
        before = None
        for round_ in range(3):
            async with both.source.vmm() as src, both.destination.vmm() as dst:
                await src.v1_set(V1_PRE_COPY)
                await src.v1_chunk()
                await dst.set_state(RESUMING)
                await dst.read(V1_REGION, 4096, 8)
                if round_ == 1:
                    await dst.data_write(b"V")
            await until(lambda: both.source.runs and not both.source.runner.link.is_open)
            await until(lambda: all(item.connection is None for item in both.daemon.functions))
            after = len(open_fds())
            assert before in (None, after)
            before = after


async def test_nothing_is_left_by_a_client_that_is_waited_for_in_vain(tmp_path: Path) -> None:
    """A function that cannot be let go within the time that a client has keeps nothing of the client's region."""
    async with bed(tmp_path, reply_budget_s=0.2) as both:
        (function_,) = (item for item in both.daemon.functions if item.name == "src")
        async with both.source.vmm() as src:
            await src.read(V1_REGION, 4096, 8)
            assert any("src-migration" in target for target in open_fds().values())
            await both.source.runner._lock.acquire()
        await until(lambda: function_.connection is None)
        both.source.runner._lock.release()
        assert [] == [target for target in open_fds().values() if "-migration" in target]


async def test_daemon_that_ends_brings_its_functions_back(tmp_path: Path) -> None:
    """A daemon that is stopped in the middle of a migration has let its function go on before it is gone."""
    async with bed(tmp_path) as both:
        source = both.source
        async with source.vmm() as src:
            await src.set_state(STOP)
            both.agent.inject("resume", Fails(Busy("later")), count=2)
            os.kill(os.getpid(), 15)
            await until(lambda: source.runs)


async def test_end_of_migration_is_told(tmp_path: Path) -> None:
    """Both agents learn how it ended."""
    told: list[str] = []

    def tell(name: str, forget: Callable[[], None]) -> None:
        told.append(name)
        forget()

    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        for side in (both.source, both.destination):
            forget = partial(tell, side.name, side.device.forget_migration)
            side.device.forget_migration = forget  # type: ignore[method-assign]
        await src.set_state(STOP_COPY)
        await dst.set_state(RESUMING)
        await dst.write_stream(await src.read_stream())
        await dst.set_state(RUNNING)
        await src.set_state(STOP)
        assert ["dst"] == told
        assert both.source.device.role is Role.SOURCE
