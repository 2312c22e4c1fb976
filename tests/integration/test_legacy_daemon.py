"""A daemon with servers of the 2022 example as they were: one client, no patience, and only the usual states."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from daemonkit import TEST_DEVICE, function, serving
from migrationkit import FAST, PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY, V2_CAPABILITIES, Vmm, until
from rawclient import RESET, connect
from vendors.legacy import LegacyServer
from vfiouser_agents.registry import make_agent
from vfiouser_oob.config.schema import AgentConfig
from vfiouser_oob.server.daemon import Daemon

SAVE, LOAD, FINISH = 4, 5, 7
STATE = bytes(range(256)) * 40


@asynccontextmanager
async def hosted(directory: Path, **servers: LegacyServer) -> AsyncIterator[Daemon]:
    """A daemon whose functions have these servers for agents."""
    async with trio.open_nursery() as nursery:
        agents = {}
        for name, server in servers.items():
            port = await nursery.start(server.serve)
            agents[name] = make_agent("legacy-tcp", {"address": f"tcp://127.0.0.1:{port}", "chunk_size": 4096})
        functions = [
            function(directory, name, TEST_DEVICE, agent=AgentConfig(kind=name, function="device"), migration=FAST)
            for name in servers
        ]
        async with serving(*functions, agents=agents) as daemon:
            yield daemon
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def vmm(directory: Path, name: str) -> AsyncIterator[Vmm]:
    """A client of the v2 generation."""
    client = Vmm((await connect(directory / f"{name}.sock")).sock)
    try:
        assert 1 == (await client.negotiate(V2_CAPABILITIES)).flags
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("way", [[STOP_COPY], [PRE_COPY, STOP_COPY]], ids=["at once", "pre-copy"])
async def test_the_states_are_those_of_the_series(way: list[int], tmp_path: Path) -> None:
    """1 → 3 → 2 → 0 and 1 → 4 → 1, and the source's server has room for others while its client still stands there."""
    here, there = LegacyServer(STATE, faithful=True), LegacyServer(b"other", faithful=True)
    async with hosted(tmp_path, src=here, dst=there), vmm(tmp_path, "src") as src, vmm(tmp_path, "dst") as dst:
        for state in way:
            await src.set_state(state)
        await dst.set_state(RESUMING)
        await dst.write_stream(await src.read_stream(), 5000)
        await src.set_state(STOP)
        assert FINISH == here.requests[-1]
        await dst.set_state(RUNNING)
    assert ([3, 2, 0], [4, 1]) == (here.states, there.states)
    assert STATE == there.content
    assert [] == [server for server in (here, there) if server.spins]


@pytest.mark.parametrize("way", [[STOP_COPY], [PRE_COPY, STOP_COPY]], ids=["at once", "pre-copy"])
async def test_a_source_cancelled_in_stop_copy_runs(way: list[int], tmp_path: Path) -> None:
    """The read-ahead comes to its end before anything else is said, so the server lives, and is told FINISH."""
    server = LegacyServer(STATE, faithful=True)
    reached, go_on = trio.Event(), trio.Event()

    async def hold() -> None:
        reached.set()
        await go_on.wait()

    async with hosted(tmp_path, src=server), vmm(tmp_path, "src") as src:
        server.before[SAVE] = hold
        for state in way:
            await src.set_state(state)
        await reached.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(src.set_state, RUNNING)
            await trio.sleep(0.05)  # too early is no error, but proves nothing
            go_on.set()
        assert RUNNING == await src.state()
        await until(lambda: server.requests[-1] == FINISH)
    assert [3, 2, 1] == server.states
    assert not server.spins


@pytest.mark.parametrize("left", [0, 2, 4])
async def test_what_an_earlier_daemon_left_is_reset_before_its_next_client(left: int, tmp_path: Path) -> None:
    """Whatever stands still may run elsewhere: nothing is told to run before a client has come."""
    server = LegacyServer(STATE)
    server.state = left
    async with hosted(tmp_path, src=server) as daemon:
        [engine] = [each.migration for each in daemon.functions]
        assert engine is not None
        await until(lambda: engine.record.fenced)
        assert [] == server.states
        async with vmm(tmp_path, "src") as src:
            assert RUNNING == await src.state()
            assert not engine.record.fenced
    assert ([0, 1] if left == 4 else [1]) == server.states


async def test_half_a_load_is_left_by_a_reset(tmp_path: Path) -> None:
    """The device has a part of the state, and an agent that cannot reset it: the device's own reset leads out."""
    here, there = LegacyServer(STATE, faithful=True), LegacyServer(b"other")
    async with hosted(tmp_path, src=here, dst=there), vmm(tmp_path, "src") as src, vmm(tmp_path, "dst") as dst:
        await src.set_state(STOP_COPY)
        stream = await src.read_stream()
        await dst.set_state(RESUMING)
        await dst.write_stream(stream[:-3000], 5000)
        await until(lambda: LOAD in there.requests)
        await dst.succeed(RESET)
        assert RUNNING == await dst.state()
    assert [4, 0, 1] == there.states
