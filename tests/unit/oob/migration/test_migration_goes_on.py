"""A daemon goes on with a client's migration that another one has left: over models and agents in memory.

Each daemon is a runner of its own; what the next one gets is what the one before has taken down, and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial

import pytest
import trio
import trio.testing

from vfiouser_agents.api import AgentState
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.base import ClientLink
from vfiouser_oob.devices.model_backend import ModelBackend
from vfiouser_oob.devices.models.test_device import build
from vfiouser_oob.migration.inherited import KeptClient, StreamMark
from vfiouser_oob.migration.port import attach
from vfiouser_oob.migration.record import MigrationRecord, Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v2 import require_path

S = DeviceState
CONFIG = MigrationConfig(chunk_size=16 << 10, call_s=1.0, stop_s=1.0, data_s=1.0, retry_s=0.02)
SIZE = 100 << 10


class Client(ClientLink):
    """A client without memory."""

    capabilities = VersionCapabilities()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Nothing is there."""
        raise AssertionError

    async def dma_write(self, address: int, data: bytes) -> None:
        """Nothing is there."""
        raise AssertionError

    def fail(self, reason: str) -> None:
        """The device is never lost here."""
        raise AssertionError(reason)


class Notebook:
    """What daemons take down: text, as in a journal."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.mark = StreamMark()
        #: All that the record ever was.
        self.history: list[str] = []

    def migration(self, record: MigrationRecord) -> None:
        """What the migration is from now on."""
        self.text = record.to_json()
        self.history.append(self.text)

    def stream_moved(self, before: StreamMark, after: StreamMark) -> None:
        """The client takes a portion, and gets it."""
        self.mark = after

    def config_written(self, offset: int, data: bytes) -> None:
        """Configuration space is not looked at here."""

    def config_forgotten(self) -> None:
        """Likewise."""


class Daemon:
    """One daemon's part of a function.

    Args:
        runner: the migration.
    """

    def __init__(self, runner: MigrationRunner) -> None:
        self.runner = runner
        self.transfer = Transfer(runner, Owner.V2)

    @property
    def state(self) -> DeviceState:
        """What the client reads, if nobody is to be asked."""
        return self.transfer.state

    async def go(self, state: DeviceState) -> None:
        """Ask for a state."""
        await self.transfer.request(partial(require_path, target=state))

    async def read(self, size: int) -> bytes:
        """Read a portion, and have it."""
        await self.transfer.prepare(size)
        part = b"".join(self.transfer.read(size))
        self.transfer.delivered()
        return part

    async def read_all(self) -> bytes:
        """Read what is left."""
        stream = b""
        while part := await self.read(10_000):
            stream += part
        return stream

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Wait until the background has done its work."""
        await self.runner._until(wanted)


class Place:
    """A function whose daemons follow each other under a client that is there all the time."""

    def __init__(self, seed: int = 1) -> None:
        self.function = MemoryFunction(state_size=SIZE, seed=seed)
        self.notes = Notebook()
        self._backend = ModelBackend(build("f0", None))

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        """Another daemon, which is killed at the end: nothing is done then, and nothing taken down."""
        left = None if self.notes.text is None else MigrationRecord.from_json(self.notes.text)
        agent = MemoryAgent([self.function])
        runner = MigrationRunner(
            "f0", agent, "f0", CONFIG, EventHub(), log.get("function"), notes=self.notes, left=left
        )
        with trio.fail_after(60):
            async with agent, trio.open_nursery() as nursery:
                nursery.start_soon(self._backend.run)
                nursery.start_soon(runner.run)
                session = await self._backend.open(Client())
                kept = KeptClient(self.notes, left is not None, {}, self.notes.mark)
                with trio.fail_after(5):
                    await attach(runner, session, "f0", VersionCapabilities(), kept)
                yield Daemon(runner)
                text, mark = self.notes.text, self.notes.mark
                nursery.cancel_scope.cancel()
        self.notes.text, self.notes.mark = text, mark

    def close(self) -> None:
        """Close the device."""
        self._backend.close()


async def load(stream: bytes, size: int = 7000) -> bytes:
    """Load a state into another function and let it run; returns what that one is then."""
    with closing(Place(seed=2)) as there:
        async with there.daemon() as daemon:
            await daemon.go(S.RESUMING)
            for start in range(0, len(stream), size):
                await daemon.transfer.write(stream[start : start + size])
            await daemon.go(S.RUNNING)
        return there.function.digest()


#: Portions that a client takes before its daemon is killed: nothing, ends within a head, a payload, at their ends.
CUTS = (0, 1, 39, 40, 41, 80, 500, 20_000, 33_333)


@pytest.mark.parametrize("state", [S.PRE_COPY, S.STOP_COPY])
@pytest.mark.parametrize("cut", CUTS)
async def test_a_source_goes_on(state: DeviceState, cut: int) -> None:
    """Whatever the client has of the stream, what follows makes a whole one of it, and the state arrives."""
    with closing(Place()) as here:
        async with here.daemon() as daemon:
            await daemon.go(state)
            stream = await daemon.read(cut) if cut else b""
        async with here.daemon() as daemon:
            assert (state, True) == (daemon.state, daemon.transfer.certain)
            stream += await daemon.read(5000)
        async with here.daemon() as daemon:
            await daemon.go(S.STOP_COPY)
            stream += await daemon.read_all()
            assert daemon.runner.record.handed
            assert len(stream) == daemon.runner.record.stream.position  # type: ignore[union-attr]
            assert AgentState.STOPPED is here.function.state
        assert here.function.digest() == await load(stream)


async def test_a_source_that_gave_everything_stays_so() -> None:
    """Its client reads the end again, and the function runs again only when that says so."""
    with closing(Place()) as here:
        async with here.daemon() as daemon:
            await daemon.go(S.STOP_COPY)
            stream = await daemon.read_all()
        for _ in range(2):
            async with here.daemon() as daemon:
                assert (S.STOP_COPY, b"") == (daemon.state, await daemon.read(1000))
                left = daemon.transfer.left
                assert left is not None
                assert (0, True) == (left.buffered, left.exhausted)
                assert AgentState.STOPPED is here.function.state
        assert here.function.digest() == await load(stream)
        async with here.daemon() as daemon:
            await daemon.go(S.RUNNING)
            assert AgentState.RUNNING is here.function.state
            await daemon.go(S.STOP_COPY)
            stream = await daemon.read_all()
        assert here.function.digest() == await load(stream)


async def test_the_end_that_did_not_reach_its_client() -> None:
    """Nobody can say whether it was told, so nothing more is given, and the function waits for its client's word."""
    with closing(Place()) as here:
        async with here.daemon() as daemon:
            await daemon.go(S.STOP_COPY)
            await daemon.read(100)
            before = here.notes.mark
            while not daemon.runner.record.handed:
                before = here.notes.mark
                await daemon.read(10_000)
        here.notes.mark = StreamMark(before.epoch, before.taken, before.head, before.done, undelivered=True)
        async with here.daemon() as daemon:
            with pytest.raises(CommandError, match="lost with a daemon"):
                await daemon.read(1000)
            assert (S.STOP_COPY, AgentState.STOPPED) == (daemon.state, here.function.state)
            await daemon.go(S.RUNNING)
            assert AgentState.RUNNING is here.function.state


async def test_a_source_is_brought_back_by_its_client() -> None:
    """From each state to RUNNING, by another daemon than the one that came there; then it can be saved."""
    for state in (S.PRE_COPY, S.STOP_COPY, S.STOP):
        with closing(Place()) as here:
            async with here.daemon() as daemon:
                await daemon.go(state)
            async with here.daemon() as daemon:
                assert state is daemon.state
                await daemon.go(S.RUNNING)
                assert AgentState.RUNNING is here.function.state
            async with here.daemon() as daemon:
                await daemon.go(S.STOP_COPY)
                stream = await daemon.read_all()
            assert here.function.digest() == await load(stream)


async def test_a_load_of_nothing_goes_on() -> None:
    """What was not begun is not lost."""
    with closing(Place()) as here, closing(Place(seed=2)) as there:
        async with here.daemon() as daemon:
            await daemon.go(S.STOP_COPY)
            stream = await daemon.read_all()
        async with there.daemon() as daemon:
            await daemon.go(S.RESUMING)
        async with there.daemon() as daemon:
            assert S.RESUMING is daemon.state
            await daemon.transfer.write(stream)
            await daemon.go(S.STOP)
        async with there.daemon() as daemon:
            assert (S.STOP, AgentState.LOADED) == (daemon.state, there.function.state)
            await daemon.go(S.RUNNING)
            assert AgentState.RUNNING is there.function.state
        assert here.function.digest() == there.function.digest()


async def test_a_load_that_is_cancelled_after_a_restart() -> None:
    """Nothing came, so nothing is applied."""
    with closing(Place()) as here:
        before = here.function.digest()
        async with here.daemon() as daemon:
            await daemon.go(S.RESUMING)
        async with here.daemon() as daemon:
            await daemon.go(S.RUNNING)
            assert AgentState.RUNNING is here.function.state
        assert before == here.function.digest()


@pytest.mark.parametrize("size", [1, 5000, None])
async def test_a_load_of_which_something_came_is_lost(size: int | None) -> None:
    """How far it came is known to nobody: it never runs, and only its client's reset leads out."""
    with closing(Place()) as here, closing(Place(seed=2)) as there:
        async with here.daemon() as daemon:
            await daemon.go(S.STOP_COPY)
            stream = await daemon.read_all()
        async with there.daemon() as daemon:
            await daemon.go(S.RESUMING)
            await daemon.transfer.write(stream[:size])
        for _ in range(2):
            async with there.daemon() as daemon:
                assert S.RESUMING is daemon.state
                for attempt in (daemon.transfer.write(stream), daemon.go(S.RUNNING)):
                    with pytest.raises(CommandError, match=r"the daemon was started anew.*only a reset leads out"):
                        await attempt
                assert AgentState.RUNNING is not there.function.state
        async with there.daemon() as daemon:
            await daemon.runner.reset()
            assert (S.RUNNING, AgentState.RUNNING) == (daemon.state, there.function.state)
            await daemon.go(S.RESUMING)
            await daemon.transfer.write(stream)
            await daemon.go(S.RUNNING)
        assert here.function.digest() == there.function.digest()
