"""Random clients against the engine and agents that sometimes fail, over real sockets.

After every move: what a client reads is what the function does, as far as it can be known, and no function runs whose
state the client has taken away, or has begun to load, unless the client itself says so. At the end nothing is left.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from openfds import open_fds
from rawclient import CONFIG, RESET
from vfiouser_agents.errors import Busy
from vfiouser_agents.faults import Drops, Fails
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.migration.record import Certainty

CONFIGURED = MigrationConfig(chunk_size=4096, v1_data_size=4096, call_s=0.5, stop_s=0.5, data_s=0.5, retry_s=0.005)
V1 = {
    V1_STOPPED: STOP,
    V1_RUNNING: RUNNING,
    V1_STOP_COPY: STOP_COPY,
    V1_PRE_COPY: PRE_COPY,
    V1_RESUMING: RESUMING,
    V1_ERROR: 0,
}
OPS = ("begin", "describe", "stop", "resume", "save", "abort", "end", "load_begin", "load", "load_commit", "reset")
FAULTS = (Drops(), Drops(executed=True), Fails(Busy("not now")))

which = st.sampled_from(["src", "dst"])
moves = st.one_of(
    st.tuples(st.just("set"), which, st.sampled_from([STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY])),
    st.tuples(st.just("set_v1"), which, st.sampled_from([0, 1, 2, 3, 4])),
    st.tuples(st.just("read"), which, st.sampled_from([100, 5000, 1 << 19])),
    st.tuples(st.just("iterate"), which, st.integers(1, 4)),
    st.tuples(st.just("write"), which, st.sampled_from([1, 5000, 1 << 19])),
    st.tuples(st.just("write_v1"), which, st.sampled_from([1, 3000])),
    st.tuples(st.just("work"), which, st.integers(0, 5000)),
    st.tuples(st.just("reset"), which, st.just(0)),
    st.tuples(st.just("flr"), which, st.just(0)),
    st.tuples(st.just("reconnect"), which, st.just(0)),
    st.tuples(st.just("fault"), st.sampled_from(OPS), st.sampled_from(FAULTS)),
    st.tuples(st.just("heal"), which, st.just(0)),
)


@dataclass
class Player:
    """One side's client, and what must not happen to its function."""

    side: Side
    client: Vmm
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    must_stand: bool = False
    taken: bytes = b""

    async def look(self) -> None:
        """Compare what is read with what is."""
        state, v1 = await self.client.state(), V1[await self.client.v1_state()]
        engine, runs = self.side.runner, self.side.runs
        if engine.record.certainty is not Certainty.UNKNOWN:
            assert state == v1
            assert runs == (state in (RUNNING, PRE_COPY)), (state, self.side.device.state)
        self.must_stand |= engine.record.handed or state == RESUMING
        if self.must_stand:
            assert not runs


class Walk:
    """Both players and their moves."""

    def __init__(self, both: Bed) -> None:
        self.both = both
        self.players: dict[str, Player] = {}
        self.stream = b""

    async def come(self, side: Side) -> None:
        """A client attaches; a function that cannot be freed now is asked for again."""
        with trio.fail_after(5):
            while True:
                stack = contextlib.AsyncExitStack()
                try:
                    client = await stack.enter_async_context(side.vmm())
                except AssertionError:
                    self.both.agent.heal()
                    continue
                self.players[side.name] = Player(side, client, stack)
                return

    async def move(self, kind: str, name: str, value: object) -> None:
        """Make one move; the functions' own rules decide whether it works."""
        if kind == "fault":
            self.both.agent.inject(name, value)  # type: ignore[arg-type]
        elif kind == "heal":
            self.both.agent.heal()
        elif kind == "reconnect":
            side = self.players[name].side
            await self.players[name].stack.aclose()
            await self.come(side)
        else:
            await getattr(self, f"_{kind}")(self.players[name], value)

    async def _set(self, player: Player, state: int) -> None:
        player.must_stand &= state not in (RUNNING, PRE_COPY)
        await player.client.set_state_errno(state)

    async def _set_v1(self, player: Player, state: int) -> None:
        player.must_stand &= state not in (V1_RUNNING, V1_PRE_COPY)
        await player.client.v1_set_errno(state)

    async def _read(self, player: Player, size: int) -> None:
        answer = await player.client.command(17, (8 + size).to_bytes(4, "little") + size.to_bytes(4, "little"))
        player.taken += answer.payload[8:]
        if player.side.runner.record.handed:
            self.stream, player.taken = player.taken, b""

    async def _iterate(self, player: Player, count: int) -> None:
        for _ in range(count):
            for offset in (8, 16, 24):
                if await player.client.v1_register_errno(offset):
                    return

    async def _write(self, player: Player, size: int) -> None:
        stream = self.stream or b"VFUOOBST" + bytes(100)
        await player.client.data_write_errno(stream[:size])

    async def _write_v1(self, player: Player, size: int) -> None:
        request = (24).to_bytes(8, "little") + b"\x09\0\0\0\x08\0\0\0" + size.to_bytes(8, "little")
        await player.client.command(10, request)

    async def _work(self, player: Player, changes: int) -> None:
        if player.side.runs:
            player.side.device.work(changes=changes)

    async def _reset(self, player: Player, _: object) -> None:
        player.must_stand = False
        await player.client.command(RESET)

    async def _flr(self, player: Player, _: object) -> None:
        position = (await player.client.read(CONFIG, 0x34, 1))[0]
        while (header := await player.client.read(CONFIG, position, 2))[0] != 0x10:
            position = header[1]
        player.must_stand = False
        request = (position + 8).to_bytes(8, "little") + b"\x07\0\0\0\x02\0\0\0" + b"\0\x80"
        await player.client.command(10, request)


async def walk(steps: list[tuple[str, str, object]]) -> None:
    """Make the moves, look after each, and see that nothing is left at the end."""
    with tempfile.TemporaryDirectory() as directory:
        async with bed(Path(directory), config=CONFIGURED, reply_budget_s=1.5, state_size=20_000) as both:
            await until(lambda: both.source.runner.record.asked and both.destination.runner.record.asked)
            before = len(open_fds())
            walk_ = Walk(both)
            for side in (both.source, both.destination):
                await walk_.come(side)
            for step in steps:
                await walk_.move(*step)
                for player in walk_.players.values():
                    await player.look()
            both.agent.heal()
            for player in walk_.players.values():
                await player.stack.aclose()
            await until(lambda: all(item.connection is None for item in both.daemon.functions))
            await until(lambda: both.source.runner.record.certainty is not Certainty.UNKNOWN)
            await until(lambda: both.destination.runner.record.certainty is not Certainty.UNKNOWN)
            assert before == len(open_fds())
            for side in (both.source, both.destination):
                assert side.runner.steps.source is None
                assert side.runner.steps.destination is None
                async with side.vmm() as client:
                    assert RUNNING == await client.state()
                    assert side.runs
                    await client.set_state(STOP_COPY)
                    assert await client.read_stream()


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(moves, max_size=25))
def test_random_walks(steps: list[tuple[str, str, object]]) -> None:
    """No order of moves and faults makes a state a lie, two copies run, or leaves anything behind."""
    trio.run(walk, steps)
