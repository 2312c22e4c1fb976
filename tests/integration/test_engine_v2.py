"""The v2 generation over a real socket: states, streams, what is legal when, and what becomes of the functions."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from migrationkit import (
    FAST,
    GET,
    MIGRATION,
    PRE_COPY,
    PRE_COPY_P2P,
    PROBE,
    RESUMING,
    RUNNING,
    RUNNING_P2P,
    SET,
    STATE,
    STOP,
    STOP_COPY,
    V2_CAPABILITIES,
    bed,
)
from rawclient import FEATURE, GET_INFO, MIG_DATA_READ, RESET
from vfiouser_agents.api import AgentState
from vfiouser_oob.config.schema import P2p


@pytest.mark.parametrize("chunk", [1, 4096, 65536, 1 << 20])
async def test_stop_and_copy(tmp_path: Path, chunk: int) -> None:
    """A state saved in STOP_COPY and loaded elsewhere, in portions of any size, is the same state there."""
    size = 4 << 10 if chunk == 1 else 256 << 10
    async with bed(tmp_path, state_size=size) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        both.source.device.work(changes=3000)
        assert (RUNNING, RUNNING) == (await src.state(), await dst.state())
        await src.set_state(STOP_COPY)
        assert not both.source.runs
        stream = await src.read_stream(chunk)
        await src.set_state(STOP)
        await dst.set_state(RESUMING)
        await dst.write_stream(stream, chunk)
        assert not both.migrated()
        await dst.set_state(STOP)
        assert AgentState.LOADED is both.destination.device.state
        await dst.set_state(RUNNING)
        assert (STOP, RUNNING) == (await src.state(), await dst.state())
        assert (False, True) == (both.source.runs, both.destination.runs)
        assert both.migrated()


async def test_precopy(tmp_path: Path) -> None:
    """Pre-copy reads are short only when the agent has nothing now; what changed meanwhile comes after the stop."""
    async with bed(tmp_path, churn=8192) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await src.set_state(PRE_COPY)
        await dst.set_state(RESUMING)
        reads = []
        for _ in range(4):
            while True:
                data = await src.data_read(65536)
                reads.append(len(data))
                await dst.write_stream(data)
                if len(data) < 65536:
                    break
            both.source.device.work(changes=5000)
        assert both.source.runs
        assert 256 << 10 < sum(reads)
        await src.set_state(STOP_COPY)
        await dst.write_stream(await src.read_stream())
        await src.set_state(STOP)
        await dst.set_state(RUNNING)
        assert both.migrated()
        assert both.destination.runs
        assert not both.source.runs


async def test_every_request(tmp_path: Path) -> None:
    """All 25 pairs of states end as the specification says, and what is refused changes nothing."""
    states = (STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        for current in states:
            for target in states:
                if current != RUNNING:
                    await src.set_state(current)
                legal = (current, target) != (STOP_COPY, PRE_COPY)
                assert (0 if legal else errno.EINVAL) == await src.set_state_errno(target), (current, target)
                assert (target if legal else current) == await src.state()
                await src.succeed(RESET)
                assert RUNNING == await src.state()
                assert both.source.runs
        for nonsense in (0, 5, 7, 8, 255):
            assert errno.EINVAL == await src.set_state_errno(nonsense)
        assert RUNNING == await src.state()


async def test_data_where_there_is_none(tmp_path: Path) -> None:
    """Data commands are refused in other states, beyond limits and with a wrong argsz; size 0 is fine."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        for state in (RUNNING, STOP, RESUMING):
            await src.set_state(state)
            assert errno.EINVAL == await src.data_read_errno()
        assert 0 == await src.data_write_errno(b"")
        for state in (STOP, STOP_COPY, RUNNING, PRE_COPY):
            await src.set_state(state)
            assert errno.EINVAL == await src.data_write_errno(b"x")
        assert b"" == await src.data_read(0)
        assert errno.EINVAL == await src.data_read_errno((1 << 20) + 1)
        assert errno.EINVAL == await src.errno(MIG_DATA_READ, struct.pack("<II", 8, 1))
        assert errno.EINVAL == await src.errno(MIG_DATA_READ, b"1234567")


async def test_stream_begins_again(tmp_path: Path) -> None:
    """STOP_COPY entered twice gives the whole stream twice, and a cancelled pre-copy can be begun anew."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(STOP_COPY)
        first = await src.read_stream()
        await src.set_state(STOP)
        await src.set_state(STOP_COPY)
        assert len(first) == len(await src.read_stream())
        await src.set_state(RUNNING)
        assert both.source.runs
        for _ in range(2):
            await src.set_state(PRE_COPY)
            assert 0 < len(await src.data_read(1000))
            await src.set_state(RUNNING)
            assert both.source.runs
            assert both.source.device.role is None


async def test_features(tmp_path: Path) -> None:
    """Pre-copy is offered, P2P not here; without the capability there are nine regions, and migration all the same."""
    async with bed(tmp_path) as both, both.source.vmm(V2_CAPABILITIES) as src:
        answer = await src.succeed(FEATURE, struct.pack("<II", 16, MIGRATION | GET))
        assert struct.pack("<IIQ", 16, MIGRATION | GET, 5) == answer.payload
        await src.succeed(FEATURE, struct.pack("<II", 8, STATE | PROBE | GET | SET))
        assert 9 == struct.unpack("<4I", (await src.succeed(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))).payload)[2]
        await src.set_state(STOP_COPY)
        assert await src.read_stream()


async def test_p2p_states(tmp_path: Path) -> None:
    """Offered P2P, a client finds each state under the name that it asked for, and the function as beside it."""
    config = replace(FAST, p2p=P2p.ON)
    async with bed(tmp_path, config=config) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        answer = await src.succeed(FEATURE, struct.pack("<II", 16, MIGRATION | GET))
        assert struct.pack("<IIQ", 16, MIGRATION | GET, 7) == answer.payload
        for state in (RUNNING_P2P, PRE_COPY, PRE_COPY_P2P, RUNNING_P2P, RUNNING):
            await src.set_state(state)
            assert state == await src.state()
            assert both.source.runs
        await src.set_state(PRE_COPY_P2P)
        stream = await src.data_read(4096)
        await src.set_state(STOP_COPY)
        assert not both.source.runs
        assert errno.EINVAL == await src.set_state_errno(PRE_COPY_P2P)
        stream += await src.read_stream()
        await src.set_state(STOP)
        await dst.set_state(RUNNING_P2P)
        await dst.set_state(RESUMING)
        await dst.write_stream(stream)
        await dst.set_state(RUNNING_P2P)
        assert (RUNNING_P2P, True) == (await dst.state(), both.destination.runs)
        assert both.migrated()
        await dst.set_state(RUNNING)
        assert RUNNING == await dst.state()


async def test_a_reset_leaves_p2p(tmp_path: Path) -> None:
    """After a reset, and for the next client, the function is RUNNING and nothing else."""
    async with bed(tmp_path, config=replace(FAST, p2p=P2p.ON)) as both:
        async with both.source.vmm() as src:
            await src.set_state(RUNNING_P2P)
            await src.succeed(RESET)
            assert RUNNING == await src.state()
            await src.set_state(PRE_COPY_P2P)
        async with both.source.vmm() as src:
            assert RUNNING == await src.state()
            assert both.source.runs


async def test_capped_reads(tmp_path: Path) -> None:
    """A cap makes replies short, and the state is the same; a request with a whole buffer behind it is served too."""
    config = replace(FAST, read_cap=8192)
    async with bed(tmp_path, config=config) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        both.source.device.work(changes=3000)
        await src.set_state(STOP_COPY)
        await dst.set_state(RESUMING)
        while True:
            request = struct.pack("<II", 8 + (1 << 20), 1 << 20) + bytes(1 << 20)
            data = (await src.succeed(MIG_DATA_READ, request)).payload[8:]
            assert len(data) <= 8192
            if not data:
                break
            await dst.data_write(data)
        await src.set_state(STOP)
        await dst.set_state(RUNNING)
        assert both.migrated()


async def test_command_19_is_refused(tmp_path: Path) -> None:
    """Asked for pre-copy's figures, with an argsz of 0, the server says that there is no such command, and goes on."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        for state in (RUNNING, PRE_COPY, STOP_COPY):
            await src.set_state(state)
            assert errno.EINVAL == await src.errno(19, struct.pack("<IIQQ", 0, 0, 0, 0))
            assert state == await src.state()


async def test_vm_pause_is_no_migration(tmp_path: Path) -> None:
    """A pause stops and resumes the function and begins nothing at the agent."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(STOP)
        assert (AgentState.STOPPED, None) == (both.source.device.state, both.source.device.role)
        await src.set_state(RUNNING)
        assert both.source.runs
        assert "begin" not in both.source.device.calls


async def test_cancelled_load(tmp_path: Path) -> None:
    """A load of nothing can be left: the function is reset and goes on."""
    async with bed(tmp_path) as both, both.destination.vmm() as dst:
        both.destination.device.work()
        await dst.set_state(RESUMING)
        await dst.set_state(RUNNING)
        assert RUNNING == await dst.state()
        assert both.destination.runs
        assert 0 == both.destination.device.counter


async def test_incomplete_load(tmp_path: Path) -> None:
    """One byte without the rest is a failure out of which only a reset leads."""
    async with bed(tmp_path) as both, both.destination.vmm() as dst:
        await dst.set_state(RESUMING)
        await dst.data_write(b"V")
        for state in (STOP, RUNNING, STOP_COPY, PRE_COPY):
            assert await dst.set_state_errno(state)
            assert RESUMING == await dst.state()
            assert not both.destination.runs
        await dst.succeed(RESET)
        assert RUNNING == await dst.state()
        assert both.destination.runs


async def test_the_size_that_is_left(tmp_path: Path) -> None:
    """MIG_DATA_SIZE is a figure before a save, about the state's size when it begins, and nothing at its end."""

    async with bed(tmp_path) as both, both.source.vmm() as src:

        async def left() -> int:
            reply = (await src.succeed(FEATURE, struct.pack("<II", 16, GET | 9))).payload
            assert (16, GET | 9) == struct.unpack_from("<II", reply)
            return int(struct.unpack_from("<Q", reply, 8)[0])

        assert 1 << 20 == await left()
        await src.set_state(STOP_COPY)
        await src.data_read(1)
        begun = await left()
        stream = await src.read_stream()
        assert len(stream) // 2 < begun < 2 * len(stream)
        assert 0 == await left()
