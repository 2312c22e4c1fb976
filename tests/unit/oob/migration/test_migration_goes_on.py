"""A daemon goes on with a client's migration that another one has left: over models and agents in memory.

Each daemon is a runner of its own; what the next one gets is what the one before has taken down, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import trio

from memoryless import MemorylessClient
from vfiouser_agents.api import AgentState
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.devices.model_backend import ModelBackend
from vfiouser_oob.devices.models.test_device import build
from vfiouser_oob.migration.inherited import KeptClient, LogMark, StreamMark, V1Mark
from vfiouser_oob.migration.port import MigrationPort, attach
from vfiouser_oob.migration.record import MigrationRecord, Owner
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.transfer import Transfer
from vfiouser_oob.migration.v1_view import V1View
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.capabilities import MigrationCapability, VersionCapabilities
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.migration_v1 import PRE_COPY, REGISTERS, STOP_COPY, MigrationRegister
from vfiouser_protocol.migration_v2 import require_path

S = DeviceState
CONFIG = MigrationConfig(chunk_size=16 << 10, call_s=1.0, stop_s=1.0, data_s=1.0, retry_s=0.02, v1_data_size=32 << 10)
SIZE = 100 << 10
CAPABILITIES = VersionCapabilities(migration=MigrationCapability())


@dataclass
class Notebook:
    """What daemons take down: the record as text; and by which command the client went on, and from where to where."""

    text: str | None = None
    #: Number of the client's command.
    number: int = 0
    stream: tuple[int, StreamMark, StreamMark] = (0, StreamMark(), StreamMark())
    v1: tuple[int, V1Mark, V1Mark] = (0, V1Mark(), V1Mark())
    memory: OwnedFd | None = None
    log: LogMark | None = None

    def migration(self, record: MigrationRecord) -> None:
        """What the migration is from now on."""
        self.text = record.to_json()

    def stream_moved(self, before: StreamMark, after: StreamMark) -> None:
        """The client takes a portion."""
        self.stream = (self.number, before, after)

    def iterated(self, before: V1Mark, after: V1Mark) -> None:
        """It goes on in the migration region."""
        self.v1 = (self.number, before, after)

    def left(self, *, unanswered: bool) -> tuple[StreamMark, V1Mark]:
        """How far the client has come, with the last answer or without."""
        undone = self.number if unanswered else -1
        stream, v1 = self.stream, self.v1
        return stream[1] if stream[0] == undone else stream[2], v1[1] if v1[0] == undone else v1[2]

    def logs(self, mark: LogMark | None) -> None:
        """Dirty pages are logged, or not any more."""
        self.log = mark

    def region(self, index: int, memory: SharedMemory) -> None:
        """It may map that."""
        self.memory = OwnedFd(os.dup(memory.fileno()))

    def config_written(self, offset: int, data: bytes) -> None:
        """Configuration space is not looked at here."""

    def config_forgotten(self) -> None:
        """Likewise."""


class Daemon:
    """One daemon's part of a function.

    Args:
        runner: the migration.
        port: the client's way into it.
    """

    def __init__(self, runner: MigrationRunner, port: MigrationPort) -> None:
        self.runner = runner
        self.port = port
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
    async def runner(self, left: MigrationRecord) -> AsyncIterator[MigrationRunner]:
        """A daemon's part without any client."""
        agent = MemoryAgent([self.function])
        runner = MigrationRunner(
            "f0", agent, "f0", CONFIG, EventHub(), log.get("function"), notes=self.notes, left=left
        )
        with trio.fail_after(60):
            async with agent, trio.open_nursery() as nursery:
                nursery.start_soon(runner.run)
                yield runner
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def daemon(self, *, unanswered: bool = False) -> AsyncIterator[Daemon]:
        """Another daemon, which is killed at the end: nothing is done then, and nothing taken down.

        Args:
            unanswered: the client did not get the last answer of the daemon before.
        """
        left = None if self.notes.text is None else MigrationRecord.from_json(self.notes.text)
        agent = MemoryAgent([self.function])
        runner = MigrationRunner(
            "f0", agent, "f0", CONFIG, EventHub(), log.get("function"), notes=self.notes, left=left
        )
        with trio.fail_after(60):
            async with agent, trio.open_nursery() as nursery:
                nursery.start_soon(self._backend.run)
                nursery.start_soon(runner.run)
                session = await self._backend.open(MemorylessClient())
                stream, v1 = self.notes.left(unanswered=unanswered)
                kept = KeptClient(self.notes, left is not None, {}, stream, v1, self.notes.log)
                with trio.fail_after(5):
                    port = await attach(runner, session, "f0", CAPABILITIES, kept)
                if port.v1 is not None:
                    port.v1.on_memory = self.notes.region
                    if self.notes.memory is not None:
                        port.v1.adopt(OwnedFd(os.dup(self.notes.memory.fileno())))
                yield Daemon(runner, port)
                notes = replace(self.notes)
                if port.v1 is not None:
                    port.v1.close()
                nursery.cancel_scope.cancel()
        self.notes = notes

    def close(self) -> None:
        """Close the device, and what is kept."""
        self._backend.close()
        if self.notes.memory is not None:
            self.notes.memory.close()


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
            while not daemon.runner.record.handed:
                await daemon.read(10_000)
        async with here.daemon(unanswered=True) as daemon:
            with pytest.raises(CommandError, match="lost with a daemon"):
                await daemon.read(1000)
            assert (S.STOP_COPY, AgentState.STOPPED) == (daemon.state, here.function.state)
            await daemon.go(S.RUNNING)
            assert AgentState.RUNNING is here.function.state


@pytest.mark.parametrize("handed", [False, True])
async def test_a_client_that_went_with_its_daemon(handed: bool) -> None:
    """Its source is brought back, unless it gave everything; then it stays stopped, until the next client resets it."""
    with closing(Place()) as here:
        async with here.daemon() as daemon:
            await daemon.go(S.STOP_COPY)
            await (daemon.read_all() if handed else daemon.read(1000))
        async with here.runner(MigrationRecord.from_json(here.notes.text or "")) as runner:
            await runner.give_up_left()
            await runner.settle()
            assert (handed, not handed) == (runner.record.fenced, here.function.running)
            await runner.give_up_left()
        here.notes = Notebook()
        async with here.daemon() as daemon:
            assert (S.RUNNING, True) == (daemon.state, here.function.running)


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
                    with pytest.raises(CommandError, match=r"the daemon was started again.*only a reset ends this"):
                        await attempt
                assert AgentState.RUNNING is not there.function.state
        async with there.daemon() as daemon:
            await daemon.runner.reset()
            assert (S.RUNNING, AgentState.RUNNING) == (daemon.state, there.function.state)
            await daemon.go(S.RESUMING)
            await daemon.transfer.write(stream)
            await daemon.go(S.RUNNING)
        assert here.function.digest() == there.function.digest()


# The migration region


class Region:
    """A client of the migration region, whose daemon is killed at one of its accesses.

    Args:
        place: the function.
        fatal: number of that access; beyond the last one, none is.
        unanswered: whether the daemon dies before that is answered.
    """

    def __init__(self, place: Place, fatal: int, *, unanswered: bool) -> None:
        self._place = place
        self._left = fatal
        self._unanswered = unanswered
        self._stack = AsyncExitStack()
        self.daemon: Daemon | None = None

    async def __aenter__(self) -> Region:
        self.daemon = await self._stack.enter_async_context(self._place.daemon())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _access(self, work: Callable[[V1View], Any]) -> bytes:
        """Access it; once more, if the daemon was killed before it answered."""
        self._left -= 1
        self._place.notes.number += 1
        answer = await self._begun(work)
        if self._left == 0:
            await self._stack.aclose()
            daemon = self._place.daemon(unanswered=self._unanswered)
            self.daemon = await self._stack.enter_async_context(daemon)
            if self._unanswered:
                answer = await self._begun(work)
        return answer

    async def _begun(self, work: Callable[[V1View], Any]) -> bytes:
        assert self.daemon is not None
        assert self.daemon.port.v1 is not None
        answer = work(self.daemon.port.v1)
        return b"" if answer is None else answer if isinstance(answer, bytes) else await answer

    async def read(self, register: MigrationRegister) -> int:
        """Read a register."""
        rule = REGISTERS[register]
        return int.from_bytes(await self._access(lambda view: view.read(rule.offset, rule.size)), "little")

    async def enter(self, state: int) -> None:
        """Write device_state, which is not done twice."""
        rule = REGISTERS[MigrationRegister.DEVICE_STATE]
        assert self.daemon is not None
        assert self.daemon.port.v1 is not None
        done = self.daemon.port.v1.write(rule.offset, state.to_bytes(4, "little"))
        assert done is not None
        await done

    async def iterate(self) -> bytes:
        """Take a chunk as QEMU does: pending_bytes, data_offset, data_size, the data."""
        if not await self.read(MigrationRegister.PENDING_BYTES):
            return b""
        offset = await self.read(MigrationRegister.DATA_OFFSET)
        size = await self.read(MigrationRegister.DATA_SIZE)
        memory = self._place.notes.memory
        assert memory is not None
        return os.pread(memory.fileno(), size, offset)


@pytest.mark.parametrize("unanswered", [False, True])
@pytest.mark.parametrize("fatal", range(1, 18))
async def test_a_client_of_the_region_goes_on(fatal: int, unanswered: bool) -> None:
    """Killed at any register, before it has answered or after it: all of the state arrives."""
    with closing(Place()) as here:
        async with Region(here, fatal, unanswered=unanswered) as region:
            await region.enter(PRE_COPY)
            stream = await region.iterate() + await region.iterate()
            await region.enter(STOP_COPY)
            while part := await region.iterate():
                stream += part
            assert STOP_COPY == await region.read(MigrationRegister.DEVICE_STATE)
            assert region.daemon is not None
            assert region.daemon.runner.record.handed
        assert here.function.digest() == await load(stream)


async def test_a_client_of_the_region_whose_state_is_lost() -> None:
    """It never reads that everything was taken."""
    with closing(Place()) as here:
        async with Region(here, 0, unanswered=False) as region:
            await region.enter(STOP_COPY)
            await region.iterate()
            assert region.daemon is not None
            region.daemon.runner.steps.drop_pipelines()
            with pytest.raises(CommandError, match="what is left of the state was lost"):
                await region.read(MigrationRegister.PENDING_BYTES)
