"""A live migration's order, its way back from every phase, and the carrying of memory; its sides only take notes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fakeserver import FakeServer, connected
from vfiouser_oob.client.client import ClientRegion
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.nvme.processors import Processors
from vfiouser_oob.lab.vmm.attachment import Attachment, ConfigState
from vfiouser_oob.lab.vmm.live import LiveMigration, LiveOptions, LiveProgress, MigrationPhase, VirtualMachine
from vfiouser_oob.lab.vmm.pages import MemoryCopier
from vfiouser_oob.lab.vmm.side import Generation, MigrationLost, MigrationSide, Portion
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.regions import RegionDescription

PAGES = 24
BASE = 1 << 32
CONFIG = ConfigState(0x406, (0xE000_0004, 0, 0, 0, 0, 0), 0)


class Machine(VirtualMachine):
    """A VM that notes what happens to it."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.on_stop: Callable[[], None] = lambda: None
        self.runs = True

    async def stop(self) -> None:
        """Note it: stop."""
        self.notes.append("machine stops")
        self.on_stop()
        self.runs = False

    def go(self) -> None:
        """Note it: go."""
        self.runs = True

    async def save(self) -> ConfigState:
        """Note it: save."""
        assert not self.runs
        return CONFIG

    async def arrive(self, place: Attachment) -> None:
        """Note it: arrive."""
        self.notes.append("machine arrives")
        self.runs = True


@dataclass(eq=False)
class Side(MigrationSide):
    """A side that notes its calls, gives its portions, and fails where it is told to."""

    notes: list[str]
    name: str
    before: list[bytes] = field(default_factory=list)
    after: list[bytes] = field(default_factory=list)
    dirty_pages: list[int] = field(default_factory=list)
    fails: dict[str, Exception] = field(default_factory=dict)
    runs: bool = True
    stopped: bool = False
    loaded: bytes = b""
    precopy: bool = True
    generation = Generation.V2

    def note(self, what: str) -> None:
        """Note it: note."""
        self.notes.append(f"{self.name} {what}")
        if what in self.fails:
            raise self.fails[what]

    async def save_setup(self) -> bool:
        """Note it: save setup."""
        self.note("save_setup")
        return self.precopy

    async def read(self) -> Portion:
        """Note it: read."""
        await trio.lowlevel.checkpoint()
        if "read" in self.fails:
            raise self.fails["read"]
        source = self.after if self.stopped else self.before
        return Portion(source.pop(0), False) if source else Portion(b"", True)

    async def stop(self) -> None:
        """Note it: stop."""
        self.note("stop")
        self.stopped, self.runs = True, False

    async def save_cleanup(self) -> None:
        """Note it: save cleanup."""
        self.note("save_cleanup")

    async def cancel(self) -> None:
        """Note it: cancel."""
        self.note("cancel")
        self.runs = True

    async def load_setup(self) -> None:
        """Note it: load setup."""
        self.note("load_setup")
        self.runs = False

    async def load(self, data: bytes) -> None:
        """Note it: load."""
        await trio.lowlevel.checkpoint()
        if "load" in self.fails:
            raise self.fails["load"]
        self.loaded += data

    async def start(self) -> None:
        """Note it: start."""
        self.note("start")
        self.runs = True

    async def start_logging(self, memory: ClientMemory) -> None:
        """Note it: start logging."""
        self.note("start_logging")

    async def dirty(self, memory: ClientMemory) -> bytes:
        """Note it: dirty."""
        self.note("dirty")
        bits = sum(1 << page for page in set(self.dirty_pages))
        self.dirty_pages = []
        return bits.to_bytes(8, "little")

    async def stop_logging(self) -> None:
        """Note it: stop logging."""
        self.note("stop_logging")


@dataclass
class Stage:
    """Everything that takes part."""

    notes: list[str]
    machine: Machine
    source: Side
    destination: Side
    here: ClientMemory
    there: ClientMemory
    place: Attachment
    server: FakeServer

    def migration(self, observe: Callable[[LiveProgress], None] | None = None, **options: object) -> LiveMigration:
        """A migration of it."""
        return LiveMigration(
            self.machine,
            self.source,
            self.destination,
            self.here,
            self.place,
            options=LiveOptions(**options),  # type: ignore[arg-type]
            observe=observe,
        )

    @property
    def running(self) -> list[str]:
        """Where the function runs."""
        return [side.name for side in (self.source, self.destination) if side.runs]


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """A stage whose destination is attached to a server with plain memory for configuration space."""
    notes: list[str] = []
    nothing = ClientRegion(RegionDescription(0, 0, 0, 0, 32), None)
    with ClientMemory(PAGES * PAGE_SIZE, BASE) as here, ClientMemory(PAGES * PAGE_SIZE, BASE) as there:
        here.store(BASE, os.urandom(here.size))
        async with connected() as (client, server):
            place = Attachment(client, there, MappedRegion(client, nothing))
            source = Side(notes, "source", [b"one", b"two"], [b"three"])
            yield Stage(notes, Machine(notes), source, Side(notes, "destination"), here, there, place, server)


def contents(memory: ClientMemory) -> bytes:
    """All of a memory."""
    return bytes(memory.view(BASE, memory.size))


async def test_order_of_a_migration() -> None:
    """Logging starts before anything is copied, the last dirty pages are asked for after the stop, the destination
    starts last, with the configuration that was saved.
    """
    async with stage() as at:
        at.machine.on_stop = lambda: at.here.store(BASE + PAGE_SIZE, b"written by the guest at the last moment")
        progress = await at.migration(compare=True).run()
        assert at.notes == [
            "source start_logging",
            "destination load_setup",
            "source save_setup",
            "source dirty",
            "machine stops",
            "source stop",
            "source save_cleanup",
            "source dirty",
            "source stop_logging",
            "destination start",
            "machine arrives",
        ]
        assert b"onetwothree" == at.destination.loaded
        assert {"pre-copy": 6, "stop-copy": 5} == progress.state_bytes
        assert {"pre-copy": PAGES * PAGE_SIZE, "stop-copy": PAGE_SIZE} == progress.memory_bytes
        assert progress.memory_equal
        assert contents(at.here) == contents(at.there)
        assert at.machine.runs
        assert ["destination"] == at.running
        assert MigrationPhase.DONE is progress.phase
        assert b"\x06\x04" == at.server.memory[4:6]
        assert b"\x04\x00\x00\xe0" == at.server.memory[16:20]


async def test_rounds_of_precopy() -> None:
    """Pre-copy goes on while many pages get dirty, up to the number of rounds; what a round copied is copied again."""
    async with stage() as at:

        def dirty(progress: LiveProgress) -> None:
            at.source.dirty_pages = list(range(8))

        progress = await at.migration(dirty, rounds=3, enough_pages=7).run()
        assert 3 == progress.rounds
        assert (PAGES + 8 + 8) * PAGE_SIZE == progress.memory_bytes["pre-copy"]
        assert 8 * PAGE_SIZE == progress.memory_bytes["stop-copy"]
        assert 8 * 4 == progress.dirty_by_device


@pytest.mark.parametrize("asked", [True, False])
async def test_without_precopy(asked: bool) -> None:
    """Without pre-copy, wished for or not to be had, everything moves after the stop."""
    async with stage() as at:
        at.source.precopy = False
        at.source.before, at.source.after = [], [b"all"]
        progress = await at.migration(precopy=asked).run()
        assert asked == ("source save_setup" in at.notes)
        assert {"stop-copy": 3} == progress.state_bytes
        assert {"stop-copy": PAGES * PAGE_SIZE} == progress.memory_bytes


class Changed(Exception):
    """Somebody has changed their mind."""


@pytest.mark.parametrize(
    "phase", [phase for phase in MigrationPhase if phase not in (MigrationPhase.DONE, MigrationPhase.CANCELLED)]
)
async def test_cancel_in_each_phase(phase: MigrationPhase) -> None:
    """Whoever cancels in whatever phase finds the VM and the function running at the source, and nobody logging."""
    async with stage() as at:

        def observe(progress: LiveProgress) -> None:
            if progress.phase is phase:
                raise Changed

        migration = at.migration(observe)
        with pytest.raises(Changed):
            await migration.run()
        assert "source" in at.running
        assert at.machine.runs
        assert "destination start" not in at.notes
        assert "machine arrives" not in at.notes
        assert at.notes.count("source start_logging") == at.notes.count("source stop_logging")
        assert "source cancel" in at.notes
        assert MigrationPhase.CANCELLED is migration.progress.phase
        # The same VM can try again.
        await at.migration().run()
        assert ["destination"] == at.running


@pytest.mark.parametrize(
    ("side", "call"),
    [
        ("source", "start_logging"),
        ("destination", "load_setup"),
        ("source", "save_setup"),
        ("source", "read"),
        ("destination", "load"),
        ("source", "dirty"),
        ("source", "stop"),
        ("source", "save_cleanup"),
        ("destination", "start"),
    ],
)
async def test_refusal_of_each_call(side: str, call: str) -> None:
    """A refusal on either side is passed on, not in a group, and the VM goes on at the source."""
    async with stage() as at:
        refusal = ReplyError(f"{call} is refused", 5)
        {"source": at.source, "destination": at.destination}[side].fails[call] = refusal
        with pytest.raises(ReplyError) as caught:
            await at.migration().run()
        assert refusal is caught.value
        assert "source" in at.running
        assert at.machine.runs
        assert "machine arrives" not in at.notes


async def test_refused_read_is_never_lost() -> None:
    """Whichever task goes first, a refused read ends the migration: the state that came before it is not the whole."""
    for _ in range(60):
        async with stage() as at:
            at.source.fails["read"] = ReplyError("read is refused", 5)
            with pytest.raises(ReplyError):
                await at.migration().run()


async def test_lost_destination() -> None:
    """If nobody knows whether the destination runs, the source does not go on, and nor does the VM."""
    async with stage() as at:
        at.destination.fails["start"] = ServerGone("it was killed")
        with pytest.raises(MigrationLost):
            await at.migration().run()
        assert "source cancel" not in at.notes
        assert not at.machine.runs
        assert [] == at.running


async def test_lost_source() -> None:
    """If the source cannot be brought back, the VM must not go on."""
    async with stage() as at:
        at.source.fails |= {"stop": ReplyError("no", 5), "cancel": ServerGone("it was killed")}
        with pytest.raises(MigrationLost):
            await at.migration().run()
        assert not at.machine.runs


async def test_cancelled_from_outside() -> None:
    """A cancelled task brings the source back before it goes."""
    async with stage() as at:
        with trio.CancelScope() as scope:
            await at.migration(lambda progress: scope.cancel() if progress.state_bytes else None).run()
        assert scope.cancelled_caught
        assert "source cancel" in at.notes
        assert at.machine.runs


async def test_processors() -> None:
    """Whoever stops the processors waits for the step under way, and later steps wait until they go on."""
    processors = Processors()
    order: list[str] = []
    may_end = trio.Event()

    async def step(name: str, until: trio.Event | None = None) -> None:
        async with processors.running:
            order.append(name)
            if until is not None:
                await until.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(step, "first", may_end)
        await trio.testing.wait_all_tasks_blocked()

        async def stop() -> None:
            await processors.stop()
            order.append("stopped")

        nursery.start_soon(stop)
        await trio.testing.wait_all_tasks_blocked()
        assert ["first"] == order
        nursery.start_soon(step, "second")
        may_end.set()
        await trio.testing.wait_all_tasks_blocked()
        assert ["first", "stopped"] == order
        assert processors.stopped
        processors.go()
    assert ["first", "stopped", "second"] == order


@given(st.lists(st.lists(st.integers(0, PAGES - 1), max_size=PAGES), max_size=4))
def test_dirty_pages_are_carried(rounds: list[list[int]]) -> None:
    """Whatever pages are written, those that are marked are equal afterwards, and only those were copied."""
    with ClientMemory(PAGES * PAGE_SIZE, BASE) as here, ClientMemory(PAGES * PAGE_SIZE, BASE) as there:
        copier = MemoryCopier(here, there)
        for number, written in enumerate(rounds, 1):
            for page in written:
                here.view(BASE + page * PAGE_SIZE, PAGE_SIZE)[:] = bytes([number]) * PAGE_SIZE
            assert copier.equal() == (not written)
            bitmap = sum(1 << page for page in set(written)).to_bytes(8, "little")
            assert len(set(written)) == copier.mark(bitmap)
            assert len(set(written)) == copier.dirty_pages
            assert len(set(written)) * PAGE_SIZE == copier.copy()
            assert copier.equal()
            assert 0 == copier.dirty_pages


def test_bits_beyond_memory_are_ignored() -> None:
    """A bitmap has whole words; what stands behind the last page means nothing."""
    with ClientMemory(3 * PAGE_SIZE, BASE) as here, ClientMemory(3 * PAGE_SIZE, BASE) as there:
        copier = MemoryCopier(here, there)
        assert 3 == copier.mark(b"\xff" * 8)
        assert 3 * PAGE_SIZE == copier.copy()
    with (
        ClientMemory(PAGE_SIZE, 0) as other,
        ClientMemory(PAGE_SIZE, BASE) as memory,
        pytest.raises(ValueError, match="cannot be carried"),
    ):
        MemoryCopier(memory, other)


@given(st.lists(st.tuples(st.integers(0, 4 * PAGE_SIZE - 1), st.integers(0, PAGE_SIZE + 1)), max_size=5))
def test_writes_of_this_side_are_logged(writes: list[tuple[int, int]]) -> None:
    """Exactly the pages that `store` touched are named, once."""
    with ClientMemory(6 * PAGE_SIZE, BASE) as memory:
        memory.store(BASE, b"before the log")
        memory.log_writes()
        for offset, count in writes:
            memory.store(BASE + offset, bytes(count))
        touched = {
            page
            for offset, count in writes
            if count
            for page in range(offset // PAGE_SIZE, (offset + count - 1) // PAGE_SIZE + 1)
        }
        assert sum(1 << page for page in touched) == memory.take_written()
        assert 0 == memory.take_written()
        memory.log_writes(False)
        memory.store(BASE, b"after the log")
        assert 0 == memory.take_written()
