"""What a function writes while its VM migrates: reasons to refuse, limits, logs and the moments that count."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from memorybed import PAGE, Clock, Guest, MemoryOnly
from vfiouser_oob.memory.recorder import GENERATION_S, GENERATIONS, DmaRoute, PageJournal
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_oob.vm.untracked import FunctionMemory, UntrackedRefused
from vfiouser_protocol.dirty import DirtyLog
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.messages import DmaUnmap

PAGES = 16


class Machine:
    """A function and its client's memory."""

    def __init__(self, **how: bool) -> None:
        self.clock = Clock()
        self.guest = Guest(PAGES, 1)
        self.device = MemoryOnly(self.guest, self.clock, **how)
        self.memory = self.look_at()

    def look_at(self, *, reports: bool = False) -> FunctionMemory:
        """As its VM's migration sees it."""
        reporter = self.device if reports else None
        self.memory = FunctionMemory("f0", self.device, reports=reporter, clock=self.clock, wall_clock=self.clock)
        return self.memory

    @property
    def route(self) -> DmaRoute:
        """The way of its writes."""
        assert self.device.memory.recorder is not None
        return self.device.memory.recorder.route

    def close(self) -> None:
        """Give everything back."""
        self.device.memory.close()
        self.guest.close()


@asynccontextmanager
async def machine(**how: bool) -> AsyncIterator[Machine]:
    """One that is given back."""
    made = Machine(**how)
    try:
        yield made
    finally:
        made.close()


# The journal


def test_the_journal_knows_the_last_seconds() -> None:
    """What was written in them is there, whatever was written before them is forgotten in time."""
    clock = Clock()
    journal = PageJournal(clock)
    window = GENERATION_S * (GENERATIONS - 2)
    for number in range(100):
        journal.wrote(number * PAGE, 1)
        clock.now += 0.3
    assert clock.now - journal.complete_from >= window
    assert clock.now - journal.complete_from < 2 * window
    ((first, length),) = journal.pages().ranges()
    assert (first + length) // PAGE == 100
    assert (100 - first // PAGE) * 0.3 >= window


def test_a_quiet_journal_remembers_for_long() -> None:
    """Without writes nothing is forgotten, and it knows that there were none."""
    clock = Clock()
    journal = PageJournal(clock)
    journal.wrote(0, 1)
    clock.now += 3600
    assert journal.keep(clock.now - 1)
    assert 1 == journal.pages().pages


def test_from_a_moment_on_everything_is_kept() -> None:
    """What is older goes, as far as that is certain; afterwards nothing does, until it is released."""
    clock = Clock()
    journal = PageJournal(clock)
    journal.wrote(0, 1)
    clock.now += 2
    journal.wrote(PAGE, 1)
    clock.now += 0.1
    since = clock.now
    assert journal.keep(since)
    clock.now += 3600
    journal.wrote(2 * PAGE, 1)
    assert [(PAGE, 2 * PAGE)] == list(journal.pages().ranges())
    journal.release()
    for _ in range(GENERATIONS + 2):
        clock.now += 1
        journal.wrote(3 * PAGE, 1)
    assert [(3 * PAGE, PAGE)] == list(journal.pages().ranges())


# Arming


async def test_recorded_too_late() -> None:
    """A migration that began before the journal reaches back is refused, and so is one of unknown beginning."""
    async with machine() as it:
        for _ in range(40):
            await it.device.write(0, b"x")
            it.clock.now += 0.5
        await it.memory.arm(it.clock.now - 15)
        with pytest.raises(UntrackedRefused, match="may have begun before the daemon recorded what f0 writes"):
            await it.memory.take(1 << 20)
        await it.memory.arm(it.clock.now - 0.01)
        assert it.memory.refusal == ""
        await it.memory.arm(None)
        assert it.memory.refusal


async def test_an_unknown_beginning_is_no_matter_for_a_young_function() -> None:
    """All that it has ever written for this client is known."""
    async with machine() as it:
        await it.device.write(0, b"x")
        await it.memory.arm(None)
        assert [(0, PAGE)] == [(address, len(data)) for address, data in (await it.memory.take(PAGE)).parts]


async def test_a_stamp_from_the_future_is_not_believed() -> None:
    """The clock was set meanwhile, so everything counts."""
    async with machine() as it:
        await it.device.write(0, b"x")
        it.clock.now += 1
        await it.memory.arm(it.clock.now + 5)
        assert 1 == len((await it.memory.take(PAGE)).parts)


async def test_a_function_that_stood_before() -> None:
    """What stands writes nothing, so nothing can have been missed."""
    async with machine(seen=False) as it:
        await it.memory.stands()
        it.clock.now += 1
        await it.memory.arm(it.clock.now)
        assert () == (await it.memory.take(0)).parts


async def test_a_device_that_can_do_nothing_of_it() -> None:
    """It writes past us, by nobody's report and by no message: refused at once."""
    async with machine(seen=False, routable=False) as it:
        with pytest.raises(UntrackedRefused, match="nothing shows what f0 writes: it cannot"):
            await it.memory.arm(it.clock.now)
        assert (False, DmaRoute.FILES) == (it.memory.armed, it.route)
        with pytest.raises(UntrackedRefused, match="the daemon did not record"):
            await it.memory.take(1 << 20)


async def test_only_a_device_that_is_disturbed_has_to_stand() -> None:
    """And only if it does not stand already."""
    stood = 0

    @asynccontextmanager
    async def still() -> AsyncIterator[None]:
        nonlocal stood
        stood += 1
        await trio.lowlevel.checkpoint()
        yield

    async with machine() as it:
        await it.memory.arm(it.clock.now, still)
        await it.memory.disarm(still)
        assert stood == 0
    async with machine(seen=False, disturbs=True) as it:
        await it.memory.arm(it.clock.now, still)
        await it.memory.arm(it.clock.now, still)
        assert stood == 1
        await it.memory.stands()
        await it.memory.disarm(still)
        it.memory.runs()
        assert (1, False) == (stood, it.device.by_message)


# Taking


async def test_too_much_is_refused_with_both_numbers() -> None:
    """And nothing is read before that."""
    async with machine() as it:
        await it.memory.arm(it.clock.now)
        it.memory.hold()
        await it.device.write(0, bytes(3 * PAGE))
        await it.memory.stands()
        with pytest.raises(UntrackedRefused, match=r"f0 wrote 12 KiB of guest memory .* 8 KiB may travel"):
            await it.memory.take(2 * PAGE)
        assert 3 * PAGE == (await it.memory.take(3 * PAGE)).size


async def test_a_page_that_is_not_mapped_any_more() -> None:
    """Its content cannot be read, so it is a reason."""
    async with machine() as it:
        await it.memory.arm(it.clock.now)
        it.memory.hold()
        await it.device.write(PAGE, b"x")
        it.device.dma_unmap(DmaUnmap(24, 0, 0, it.guest.size))
        with pytest.raises(UntrackedRefused, match="f0 wrote guest memory at 0x1000, which is not mapped any more"):
            await it.memory.take(1 << 20)


async def test_contents_for_memory_that_is_not_there() -> None:
    """A destination without it refuses."""
    async with machine() as it:
        with pytest.raises(UntrackedRefused, match="that f0 wrote cannot be written here: DMA write of 0x40000000"):
            await it.memory.apply(PageContents(((1 << 30, b"x"),)))


# Reports


class Everything:
    """An IOMMU that cannot tell: all pages, every time."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.fails = False

    async def collect(self) -> DirtyLog:
        """All of it."""
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise CommandError("its agent is away")
        found = DirtyLog(PAGE)
        found.mark(0, self.guest.size)
        return found


async def test_who_reports_everything_is_believed_in_the_end() -> None:
    """While the guest runs the log is not told again and again; at the end it is, or too much would travel."""
    async with machine(seen=False, routable=False) as it:
        memory = FunctionMemory("f0", it.device, reports=Everything(it.guest), clock=it.clock, wall_clock=it.clock)
        it.guest.begin()
        it.guest.dirty = set()
        await memory.arm(it.clock.now)
        memory.use_log(it.guest)
        await memory.look()
        assert it.guest.dirty == set()
        await memory.stands()
        assert it.guest.dirty == set(range(PAGES))
        assert () == (await memory.take(0)).parts
        memory.use_log(None)
        await memory.disarm()
        memory.runs()
        await memory.arm(it.clock.now)
        await memory.stands()
        with pytest.raises(UntrackedRefused, match="64 KiB of guest memory"):
            await memory.take(15 * PAGE)


async def test_who_cannot_be_asked_leaves_a_gap() -> None:
    """Unless QEMU has a log, in which everything is marked."""
    async with machine(seen=False, routable=False) as it:
        reports = Everything(it.guest)
        reports.fails = True
        memory = FunctionMemory("f0", it.device, reports=reports, clock=it.clock, wall_clock=it.clock)
        await memory.arm(it.clock.now)
        with pytest.raises(UntrackedRefused, match="nothing shows what f0 has written: its agent is away"):
            await memory.take(1 << 20)
        it.guest.begin()
        it.guest.dirty = set()
        memory.use_log(it.guest)
        assert it.guest.dirty == set(range(PAGES + 1))
        assert memory.refusal == ""


async def test_reports_are_asked_for_now_and_then(autojump_clock: trio.testing.MockClock) -> None:
    """So what was written long before a migration is not taken for a part of it."""
    async with machine(seen=False, routable=False) as it:
        memory = it.look_at(reports=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(memory.watch, 1.0)
            await it.device.write(0, b"long ago")
            await trio.sleep(1.5)
            for _ in range(2 * GENERATIONS):
                it.clock.now += 1
                await it.device.write(PAGE, b"x")
                await trio.sleep(1)
            await memory.arm(it.clock.now - 0.01)
            await it.device.write(2 * PAGE, b"x")
            await memory.stands()
            contents = await memory.take(1 << 20)
            assert 0 not in {address for address, _ in contents.parts}
            assert any(address <= 2 * PAGE < address + len(data) for address, data in contents.parts)
            nursery.cancel_scope.cancel()


async def test_nothing_is_recorded() -> None:
    """Then there is no way to migrate it so."""
    async with machine() as it:
        it.device.memory.recorder = None
        with pytest.raises(ValueError, match="the daemon does not record what f0 writes"):
            it.look_at()
