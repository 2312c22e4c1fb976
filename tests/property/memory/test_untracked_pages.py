"""No page is lost, whatever a function writes while its VM migrates, and whenever anybody hears of anything.

A small machine: a device that writes one thing after the other, a QEMU that sends what it knows of and answers messages
when it likes, and a daemon that is told of the migration late. In the end the destination has the source's memory, or
the migration was refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from memorybed import PAGE, Clock, Guest, MemoryOnly
from vfiouser_oob.memory.recorder import GENERATION_S, GENERATIONS, PageJournal, WriteRecorder
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_oob.vm.untracked import FunctionMemory, UntrackedRefused

PAGES = 8
PRIVATE = 2
ROOMY = 1 << 30


@dataclass(frozen=True)
class Deed:
    """Something that happens.

    Args:
        kind: what.
        number: of what, or how many.
        tag: what is written.
    """

    kind: str
    number: int = 0
    tag: int = 0


#: Few places, so that writes meet: within a page, over two, without a file, and over the border of that.
PLACES = st.sampled_from([0, 3, PAGE - 4, PAGE, 3 * PAGE, PAGES * PAGE - 4, PAGES * PAGE, (PAGES + 1) * PAGE - 4])
WRITES = st.builds(Deed, st.sampled_from(["device", "device", "guest"]), PLACES, st.integers(1, 255))
RUNNING = st.one_of(
    WRITES,
    WRITES,
    st.builds(Deed, st.sampled_from(["send", "work", "pass"]), st.sampled_from([1, 2, 4, PAGES + PRIVATE])),
    st.sampled_from([Deed("busy"), Deed("free"), Deed("arm"), Deed("log"), Deed("no log"), Deed("ask")]),
)
LAST = st.one_of(
    st.builds(Deed, st.just("device"), PLACES, st.integers(1, 255)),
    st.builds(Deed, st.just("work"), st.integers(1, 4)),
)
#: Seconds of one unit of time that passes.
UNIT_S = 0.4


def forgotten(deeds: Sequence[Deed]) -> bool:
    """Whether so much time has passed that the journal need not know all of it."""
    return sum(deed.number for deed in deeds if deed.kind == "pass") * UNIT_S > GENERATION_S * (GENERATIONS - 2)


class Machine:
    """Both hosts.

    Args:
        seen: whether the device's writes are seen by us.
        routable: whether it can write by messages.
        reports: whether somebody reports what it writes.
    """

    def __init__(self, *, seen: bool = True, routable: bool = True, reports: bool = False) -> None:
        self.clock = Clock()
        self.source, self.destination = Guest(PAGES, PRIVATE), Guest(PAGES, PRIVATE)
        self.device = MemoryOnly(self.source, self.clock, seen=seen, routable=routable)
        self.arrived = MemoryOnly(self.destination, self.clock)
        reporter = self.device if reports else None
        self.memory = FunctionMemory("f0", self.device, reports=reporter, clock=self.clock, wall_clock=self.clock)
        self.began: float | None = None
        self.send, self.writes = trio.open_memory_channel[tuple[int, bytes]](1000)
        self.to_do = 0

    async def run_device(self) -> None:
        """The device: each write is done before the next one begins."""
        async for address, data in self.writes:
            await self.device.write(address, data)
            self.to_do -= 1

    async def settle(self) -> None:
        """Let everything happen that can."""
        await trio.testing.wait_all_tasks_blocked()
        while not self.device.memory.is_quiet:
            await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()

    async def do(self, deed: Deed) -> None:
        """Let something happen."""
        guest = self.source
        match deed.kind:
            case "device":
                self.to_do += 1
                self.send.send_nowait((deed.number, bytes([deed.tag]) * 8))
            case "guest":
                guest.poke(deed.number, bytes([deed.tag]) * 3)
                guest.mark(deed.number, 3)
            case "send" if guest.dirty is not None:
                guest.send(self.destination, deed.number)
            case "work":
                guest.work(deed.number)
            case "pass":
                self.clock.now += UNIT_S * deed.number
            case "busy" | "free":
                guest.free = deed.kind == "free"
                if guest.free:
                    guest.work()
            case "arm":
                await self.memory.arm(self.began if guest.dirty is not None else self.clock.now)
            case "ask":
                await self.memory.look()
            case "log" if guest.dirty is not None:
                self.memory.use_log(guest)
            case "no log":
                self.memory.use_log(None)
        await self.settle()

    async def move(self, before: Sequence[Deed], during: Sequence[Deed], last: Sequence[Deed]) -> None:
        """Migrate; raises UntrackedRefused."""
        for deed in before:
            await self.do(deed)
        self.clock.now += 0.001
        self.source.begin()
        self.began = self.clock.now
        for deed in during:
            await self.do(deed)
        # The processors stand; from here on QEMU need not answer.
        self.memory.hold()
        for deed in last:
            await self.do(deed)
        await self.stand()
        await self.memory.stands()
        self.source.free = False
        self.source.send(self.destination)
        contents = await self.memory.take(ROOMY)
        await self.arrived_with(contents)

    async def stand(self) -> None:
        """The device ends what it has begun; only what no file has may have to wait for QEMU."""
        await self.settle()
        while self.to_do:
            recorder = self.device.memory.recorder
            assert recorder is not None
            assert recorder.unanswered, "the device waits for nobody"
            assert all(each.address + len(each.data) > self.source.size for each in recorder.unanswered)
            self.source.work(1)
            await self.settle()

    async def arrived_with(self, contents: PageContents) -> None:
        """The destination's part."""
        other = FunctionMemory("f0", self.arrived, clock=self.clock, wall_clock=self.clock)
        await other.apply(PageContents.from_bytes(contents.to_bytes()))

    def close(self) -> None:
        """Give everything back."""
        for each in (self.device, self.arrived):
            each.memory.close()
        for guest in (self.source, self.destination):
            guest.close()


def played(play: Callable[[Machine], Awaitable[None]], **how: bool) -> None:
    """Run a play."""

    async def run() -> None:
        machine = Machine(**how)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine.run_device)
                await play(machine)
                nursery.cancel_scope.cancel()
        finally:
            machine.close()

    trio.run(run)


@settings(max_examples=60)
@given(st.lists(RUNNING, max_size=8), st.lists(RUNNING, max_size=14), st.lists(LAST, max_size=6))
def test_no_page_is_lost(before: list[Deed], during: list[Deed], last: list[Deed]) -> None:
    """Whatever a model writes is at the destination, or the migration was refused."""

    async def play(machine: Machine) -> None:
        try:
            await machine.move([deed for deed in before if deed.kind != "no log"], [*during, Deed("arm")], last)
        except UntrackedRefused:
            assert forgotten([*before, *during])
            return
        machine.source.work()  # what was under way is carried out after all, and must not have been more
        assert machine.source.content == machine.destination.content

    played(play)


@settings(max_examples=40)
@given(st.lists(RUNNING, max_size=6), st.lists(RUNNING, max_size=10), st.lists(LAST, max_size=4), st.booleans())
def test_no_page_of_an_unseen_device_is_lost(
    before: list[Deed], during: list[Deed], last: list[Deed], early: bool
) -> None:
    """What an upstream writes past us is at the destination, or the migration was refused; armed early, all is."""

    async def play(machine: Machine) -> None:
        first = [Deed("arm")] if early else []
        try:
            await machine.move([*before, *first], [*during, Deed("arm")], last)
        except UntrackedRefused:
            assert not early
            return
        machine.source.work()
        assert machine.source.content == machine.destination.content

    played(play, seen=False)


@settings(max_examples=40)
@given(st.lists(RUNNING, max_size=6), st.lists(RUNNING, max_size=10), st.lists(LAST, max_size=4), st.booleans())
def test_no_page_of_a_reported_device_is_lost(
    before: list[Deed], during: list[Deed], last: list[Deed], routable: bool
) -> None:
    """What an agent or the IOMMU reports travels or is marked, whether the device can write by messages or not."""

    async def play(machine: Machine) -> None:
        try:
            await machine.move(before, [*during, Deed("arm")], last)
        except UntrackedRefused:
            assert forgotten([*before, *during])
            return
        machine.source.work()
        assert machine.source.content == machine.destination.content

    played(play, seen=False, routable=routable, reports=True)


@settings(max_examples=60)
@given(st.lists(RUNNING, max_size=10), st.lists(LAST, max_size=5), st.lists(WRITES, max_size=8))
def test_a_source_that_comes_back_has_what_it_wrote(during: list[Deed], last: list[Deed], after: list[Deed]) -> None:
    """After a migration that was given up, memory is what the device and the guest wrote, one after the other."""

    async def play(machine: Machine) -> None:
        machine.source.begin()
        machine.began = machine.clock.now
        wanted = Guest(PAGES, PRIVATE)
        machine.clock.now += 0.001

        def expect(deed: Deed) -> None:
            if deed.kind in {"device", "guest"}:
                wanted.poke(deed.number, bytes([deed.tag]) * (8 if deed.kind == "device" else 3))

        for deed in [*[each for each in during if each.kind != "guest"], Deed("arm")]:
            expect(deed)
            await machine.do(deed)
        machine.memory.hold()
        for deed in last:
            expect(deed)
            await machine.do(deed)
        await machine.stand()
        await machine.memory.stands()
        with suppress(UntrackedRefused):
            await machine.memory.take(ROOMY)
        # QEMU goes on: what waited is carried out before the processors run.
        machine.source.free = True
        machine.source.work()
        machine.source.dirty = None
        await machine.memory.disarm()
        machine.memory.runs()
        for deed in after:
            expect(deed)
            await machine.do(deed)
        await machine.stand()
        try:
            assert wanted.content == machine.source.content
        finally:
            wanted.close()

    played(play)


def test_an_old_message_does_not_win_at_the_destination() -> None:
    """QEMU carries out what nobody waits for any more, over what was written later, and then no more: both travel."""

    async def play(machine: Machine) -> None:
        before = [Deed("busy"), Deed("arm"), Deed("device", 0, 1), Deed("device", 0, 2)]
        await machine.move(before, [Deed("arm")], [Deed("work", 1), Deed("work", 1)])
        machine.source.work()
        assert machine.source.content == machine.destination.content

    played(play, seen=False)


GAP = [Deed("device", 100, 7)]


@pytest.mark.parametrize("journal", [True, False])
def test_without_the_journal_a_page_is_lost(monkeypatch: pytest.MonkeyPatch, journal: bool) -> None:
    """The control: the write between a migration's beginning and our hearing of it needs the journal."""
    if not journal:
        monkeypatch.setattr(PageJournal, "wrote", lambda self, address, length: None)

    async def play(machine: Machine) -> None:
        await machine.move([], [Deed("send", PAGES + PRIVATE), *GAP, Deed("arm")], [])
        assert journal == (machine.source.content == machine.destination.content)

    played(play)


@pytest.mark.parametrize("seen", [True, False])
def test_without_the_unanswered_a_page_is_lost(seen: bool) -> None:
    """The control: what QEMU has not carried out when it asks for the state is in nobody's memory."""

    async def play(machine: Machine) -> None:
        private = PAGES * PAGE
        await machine.memory.arm(machine.clock.now)
        machine.clock.now += 1
        machine.source.begin()
        await machine.memory.arm(machine.clock.now)
        machine.source.free = False
        await machine.do(Deed("device", private, 9))
        machine.memory.hold()
        machine.source.send(machine.destination)
        contents = await machine.memory.take(ROOMY)
        machine.source.work()
        assert machine.source.content != machine.destination.content
        await machine.arrived_with(contents)
        machine.destination.work()
        assert machine.source.content == machine.destination.content

    played(play, seen=seen)


@pytest.mark.parametrize("seen", [True, False])
async def test_a_log_that_comes_late_is_told_of_the_gap(seen: bool) -> None:
    """What was written since the beginning and is only in the journal, or unknown, is marked, and nothing travels."""
    machine = Machine(seen=seen)
    try:
        machine.source.begin()
        began = machine.clock.now
        machine.source.send(machine.destination)
        await machine.device.write(100, b"gap")
        await machine.memory.arm(began)
        machine.memory.use_log(machine.source)
        machine.memory.hold()
        await machine.device.write(PAGE, b"last")
        await machine.memory.stands()
        machine.source.send(machine.destination)
        assert () == (await machine.memory.take(0)).parts
        assert machine.source.content == machine.destination.content
    finally:
        machine.close()


@pytest.mark.parametrize("resent", [True, False])
def test_an_old_message_does_not_win(monkeypatch: pytest.MonkeyPatch, resent: bool) -> None:
    """QEMU carries a message out that nobody waits for any more; what was written later is sent behind it."""
    if not resent:
        monkeypatch.setattr(WriteRecorder, "contested", lambda self, address, length: False)

    async def play(machine: Machine) -> None:
        machine.source.begin()
        await machine.memory.arm(machine.clock.now)
        machine.source.free = False
        await machine.do(Deed("device", PAGE, 1))
        machine.memory.hold()
        await machine.do(Deed("device", PAGE, 2))
        await machine.stand()
        await machine.memory.stands()
        assert b"\2" * 8 == machine.source.peek(PAGE, 8)
        machine.source.work()
        assert (b"\2" if resent else b"\1") * 8 == machine.source.peek(PAGE, 8)

    played(play)
