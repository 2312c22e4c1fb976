"""A replay that is carried out: in order, at once, read back, never after the VM runs; and what the source reads."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import trio

from memorybed import Clock, Guest, MemoryOnly
from vfiouser_oob.devices.base import ClientLink, DeviceDescription
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.vm.monitor import RefusedError
from vfiouser_oob.vm.page_contents import PageContents
from vfiouser_oob.vm.registers import FunctionRegisters, RegisterReader, RegistersUnknown
from vfiouser_oob.vm.replay import ConfigWrite, MemoryWrite, ReplayPlan, SourceView
from vfiouser_oob.vm.replaying import FunctionReplay, ReplayFailed, ReplayUnderWay, path_to, prepare, replay_of
from vfiouser_oob.vm.topology import Bdf, Slot, TopologyError
from vfiouser_protocol.constants import IrqIndex, RegionFlags
from vfiouser_protocol.errors import DmaFault
from vfiouser_protocol.regions import RegionSpec

ECAM = 0xB000_0000
PLACE = Bdf(0, 5, 0)
BASE = PLACE.ecam(ECAM)
TABLE = 0xFEB0_2000


class Answer:
    """What a message is answered with, as soon as QEMU gets to it."""

    def __init__(self, work: Callable[[], bytes]) -> None:
        self.work = work
        self.done = trio.Event()
        self.result = b""
        self.fault: DmaFault | None = None

    @property
    def answered(self) -> bool:
        """Whether it was."""
        return self.done.is_set()

    async def wait(self) -> Any:
        """Wait for it."""
        await self.done.wait()
        if self.fault is not None:
            raise DmaFault(str(self.fault), self.fault.errno)
        return self.result


class Bus(ClientLink):
    """A QEMU's bus: what was written can be read, where there is something."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}
        self.order: list[tuple[str, int, int]] = []
        self.queue: list[Answer] = []
        self.free = True
        #: What does not take a bit: masks by address.
        self.stuck: dict[int, int] = {}
        #: Whether the machine's own registers are loaded, without which there is nothing at ECAM.
        self.decodes = True

    def send_read(self, address: int, count: int) -> Answer:
        """Take a read."""

        def work() -> bytes:
            self.order.append(("read", address, count))
            return bytes(self.memory.get(address + index, 0) for index in range(count))

        return self._take(work)

    def bus_write(self, address: int, data: bytes) -> Answer:
        """Take a write."""

        def work() -> bytes:
            self.order.append(("write", address, len(data)))
            for index, byte in enumerate(data):
                self.memory[address + index] = byte & ~self.stuck.get(address + index, 0)
            return b""

        return self._take(work)

    def _take(self, work: Callable[[], bytes]) -> Answer:
        answer = Answer(work)
        self.queue.append(answer)
        if self.free:
            self.run()
        return answer

    def run(self) -> None:
        """Carry out what waits."""
        while self.queue:
            answer = self.queue.pop(0)
            if self.decodes:
                answer.result = answer.work()
            else:
                answer.fault = DmaFault("nothing is there", errno.ENODEV)
            answer.done.set()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Not used."""
        raise AssertionError

    async def dma_write(self, address: int, data: bytes) -> None:
        """Not used."""
        raise AssertionError

    def fail(self, reason: str) -> None:
        """Not used."""
        raise AssertionError(reason)


def word(offset: int, value: int, mask: int = 0) -> ConfigWrite:
    """A write of four bytes."""
    return ConfigWrite(offset, value.to_bytes(4, "little"), mask.to_bytes(4, "little") if mask else b"")


PLAN = ReplayPlan(
    (
        word(0x10, 0xFEB0_0000, 0xFFFF_C000),
        ConfigWrite(4, b"\6\4", b"\6\0"),
        MemoryWrite(TABLE, bytes(range(16)), b"\xff" * 16),
    ),
    (ConfigWrite(4, b"\0\4"),),
)
REPLAY = FunctionReplay("f0", PLAN, PLACE, ECAM)


async def test_all_is_sent_at_once_and_in_order() -> None:
    """A QEMU that answers nothing yet has everything, the reading back before what closes the way."""
    bus = Bus()
    bus.free = False
    under_way = ReplayUnderWay(REPLAY, bus)
    bus.run()
    assert [
        ("write", BASE + 0x10, 4),
        ("write", BASE + 4, 2),
        ("write", TABLE, 16),
        ("read", BASE + 0x10, 4),
        ("read", BASE + 4, 2),
        ("read", TABLE, 16),
        ("write", BASE + 4, 2),
    ] == bus.order
    with trio.fail_after(5):
        await under_way.finish(lambda: False)


async def test_what_is_wrong_is_named() -> None:
    """The register, what was written and what was read."""
    bus = Bus()
    bus.stuck[BASE + 0x12] = 0xFF
    with pytest.raises(ReplayFailed, match=r"f0: BAR 0 at 0xb0028010\+0x0 is 000000fe instead of 0000b0fe"):
        await ReplayUnderWay(REPLAY, bus).finish(lambda: False)


async def test_it_is_sent_again_while_the_machine_is_not_loaded() -> None:
    """QEMU may have carried it out before it loaded where ECAM is; once the VM runs, nothing is written any more."""
    bus = Bus()
    bus.decodes = False
    under_way = ReplayUnderWay(REPLAY, bus)
    with pytest.raises(ReplayFailed, match="writing 0xfeb00000 to BAR 0 at 0xb0028010 failed: nothing is there"):
        await under_way.finish(lambda: False)
    under_way = ReplayUnderWay(REPLAY, bus)
    bus.decodes = True
    with trio.fail_after(5):
        await under_way.finish(lambda: True)
    assert 0xFE == bus.memory[BASE + 0x13]


class PortMonitor:
    """A human monitor with ports, in front of a bus; and what QEMU says of its devices."""

    def __init__(self, bus: Bus, tree: Mapping[str, tuple[int, str]] | None = None) -> None:
        self.bus = bus
        self.address = 0x8000_2850
        self.tree = tree or {}
        self.lines: list[str] = []

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Answer qom-get."""
        await trio.lowlevel.checkpoint()
        assert command == "qom-get"
        assert arguments is not None
        name = arguments["path"].rsplit("/", 1)[1]
        return self.tree[name][("addr", "parent_bus").index(arguments["property"])]

    async def hmp(self, line: str) -> str:
        """Carry a line out."""
        await trio.lowlevel.checkpoint()
        self.lines.append(line)
        verb, size, *numbers = line.split()
        port, *values = (int(number, 16) for number in numbers)
        count = {"/b": 1, "/h": 2, "/w": 4}[size]
        if port == 0xCF8:
            if verb == "o":
                self.address = values[0]
            return f"portw[0x0cf8] = {self.address:#x}"
        where = ECAM + (self.address >> 16 & 0xFF) * 0x10_0000 + (self.address >> 8 & 0xFF) * 0x1000
        where += (self.address & 0xFC) + port - 0xCFC
        if verb == "o":
            self.bus.bus_write(where, values[0].to_bytes(count, "little"))
            return ""
        data = bytes(self.bus.memory.get(where + index, 0) for index in range(count))
        return f"portw[{port:#06x}] = {int.from_bytes(data, 'little'):#x}\n"


async def test_a_function_that_need_not_be_written() -> None:
    """One that is as its reset left it: if ECAM has just gone that is no failure, and without it nothing is sent."""
    bus = Bus()
    bus.decodes = False
    await ReplayUnderWay(FunctionReplay("f0", PLAN, PLACE, ECAM, needed=False), bus).finish(lambda: True)
    bus.free = False
    await ReplayUnderWay(FunctionReplay("f0", PLAN, PLACE, None, needed=False), bus).finish(lambda: True)
    assert not bus.queue


TREE = {
    "f0": (0, "/machine/peripheral/rp1/rp1"),
    "rp1": (8 * 3, "/machine/q35/pcie.0"),
    "f1": (1, "/machine/peripheral/rp2/rp2"),
    "rp2": (8 * 4, "/machine/q35/pcie.0"),
    "loop": (8, "/machine/peripheral/loop/loop"),
}


async def test_functions_behind_root_ports_get_bus_numbers_of_their_own() -> None:
    """Two functions behind two root ports: the second is not looked for behind the first."""
    monitor = PortMonitor(Bus(), TREE)
    assert [Slot(3), Slot(0)] == await path_to(monitor, "f0")
    await prepare(monitor, ["f0", "f1"])
    memory = monitor.bus.memory
    secondary = [memory[Bdf(0, port).ecam(ECAM, 0x19)] for port in (3, 4)]
    assert len(set(secondary)) == 2
    for bus, function in zip(secondary, (0, 1), strict=True):
        assert 4 == memory[Bdf(bus, 0, function).ecam(ECAM, 4)]
    with pytest.raises(TopologyError, match="behind more than 16 bridges"):
        await path_to(monitor, "loop")


# The source


def head() -> bytes:
    """A function with MSI-X: three entries at 0x2000 of BAR 0."""
    found = bytearray(256)
    found[6], found[0x34] = 0x10, 0x40
    found[0x40:0x48] = bytes([0x11, 0, 2, 0]) + (0x2000).to_bytes(4, "little")
    return bytes(found)


class Registers(MemoryOnly):
    """A function with that configuration space."""

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        """Read it."""
        return head()[offset : offset + count]


#: What QEMU says before firmware has turned ECAM on.
NOWHERE = (1 << 64) - 1


class Source:
    """What a reader reads."""

    def __init__(self) -> None:
        self.ecam: int | None = ECAM
        self.name = "f0"
        self.guest = Guest(1)
        self.device = Registers(self.guest, Clock())
        absent = [RegionSpec.absent(index) for index in range(9)]
        absent[0] = RegionSpec(0, 0x4000, RegionFlags.READ | RegionFlags.WRITE)
        self.device.description = DeviceDescription(absent, (), 0)
        self.shadow = ConfigShadow()
        self.shadow.note(0x10, (0xFEB0_0000).to_bytes(4, "little"))
        self.bus = Bus()
        self.reader = RegisterReader("f0", self.device, self.shadow, self.bus)
        self.put(b"\x11" * 48)

    def put(self, table: bytes) -> None:
        """The guest writes the table."""
        self.bus.memory.update({TABLE + index: byte for index, byte in enumerate(table)})

    def command(self, value: int) -> None:
        """The guest writes the command register."""
        self.shadow.note(4, value.to_bytes(2, "little"))

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Say where the function is."""
        await trio.lowlevel.checkpoint()
        if command == "qom-get":
            if self.ecam is None:
                raise RefusedError(command, "GenericError", "no such property")
            return self.ecam
        return [{"devices": [{"qdev_id": self.name, "bus": 0, "slot": 5, "function": 0}]}]

    async def hmp(self, line: str) -> str:
        """Not used."""
        raise AssertionError(line)

    def close(self) -> None:
        """Give everything back."""
        self.device.memory.close()
        self.guest.close()


@pytest.fixture
def source() -> Any:
    """A source whose guest has memory and DMA on."""
    made = Source()
    made.command(6)
    yield made
    made.close()


async def test_what_travels_of_the_registers(source: Source) -> None:
    """Place, ECAM, configuration as written and the table, there and back."""
    await source.reader.locate(source)
    found = await source.reader.collect(1)
    assert (PLACE, ECAM, b"\x11" * 48, head()) == (found.place, found.ecam, found.view.table, found.head)
    assert found == FunctionRegisters.from_bytes(found.to_bytes())


async def test_a_qemu_that_cannot_answer_any_more(source: Source, autojump_clock: trio.testing.MockClock) -> None:
    """The table as read before counts, unless the client has set up vectors since."""
    await source.reader.locate(source)
    await source.reader.look()
    source.bus.free = False
    assert b"\x11" * 48 == (await source.reader.collect(0.01)).view.table
    source.shadow.note_interrupts(IrqIndex.MSIX)
    with pytest.raises(RegistersUnknown, match="QEMU did not answer what is in the MSI-X table of f0"):
        await source.reader.collect(0.01)


async def test_the_table_is_read_again_when_it_changes(source: Source, autojump_clock: trio.testing.MockClock) -> None:
    """Soon after vectors were set up, and now and then in any case."""
    await source.reader.locate(source)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.reader.watch)
        await trio.sleep(0.01)
        source.put(b"\x22" * 48)
        source.shadow.note_interrupts(IrqIndex.MSIX)
        await trio.sleep(0.1)
        source.bus.free = False
        assert b"\x22" * 48 == (await source.reader.collect(0.01)).view.table
        nursery.cancel_scope.cancel()


async def test_memory_that_the_guest_has_off(source: Source, autojump_clock: trio.testing.MockClock) -> None:
    """It is turned on for a moment, since nobody looks; without DMA there is no way, and that is told."""
    source.command(4)
    await source.reader.locate(source)
    assert b"\x11" * 48 == (await source.reader.collect(1)).view.table
    assert [("write", BASE + 4, 2), ("read", TABLE, 48), ("write", BASE + 4, 2)] == source.bus.order
    assert 4 == source.bus.memory[BASE + 4]
    source.shadow.note_interrupts(IrqIndex.MSIX)
    source.command(0)
    found = await source.reader.collect(1)
    assert (b"", ("the MSI-X table of f0, which the guest has switched off",)) == (found.view.table, found.missing)


async def test_a_machine_without_ecam(source: Source) -> None:
    """It is told at the beginning, when nothing is lost yet."""
    source.ecam = None
    with pytest.raises(RegistersUnknown, match="could not write the registers of f0: the machine has no ECAM"):
        await source.reader.locate(source)


async def test_a_function_that_is_set_up_needs_a_way(source: Source) -> None:
    """Before ECAM is on, or while it is on no bus, its registers could not be written."""
    source.ecam = NOWHERE
    with pytest.raises(RegistersUnknown, match="registers of f0: firmware has not turned ECAM on"):
        await source.reader.locate(source)
    source.ecam, source.name = ECAM, "other"
    with pytest.raises(RegistersUnknown, match="registers of f0: it is on no bus"):
        await source.reader.locate(source)


async def test_firmware_that_begins_anew(source: Source, autojump_clock: trio.testing.MockClock) -> None:
    """As long as nobody has set the function up it need not be found; as soon as somebody has, it is found again."""
    await source.reader.locate(source)
    source.shadow.clear()
    source.ecam, source.name = NOWHERE, "other"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.reader.watch)
        await trio.sleep(1)
        found = await source.reader.collect(1)
        assert (None, {}) == (found.ecam, found.view.written)
        source.ecam, source.name = 2 * ECAM, "f0"
        await trio.sleep(0.1)
        source.shadow.note(0x10, (0xFEB0_0000).to_bytes(4, "little"))
        assert (PLACE, 2 * ECAM) == ((found := await source.reader.collect(1)).place, found.ecam)
        nursery.cancel_scope.cancel()


async def test_a_replay_without_ecam(source: Source) -> None:
    """A function that is set up cannot be replayed; one that is not need not be."""
    await source.reader.locate(source)
    found = replace(await source.reader.collect(1), ecam=None)
    with pytest.raises(ReplayFailed, match="f0: its machine has no ECAM"):
        replay_of("f0", found, source.device)
    untouched = replace(found, view=SourceView({}))
    assert not replay_of("f0", untouched, source.device).needed


async def test_nobody_knows_where_it_is(source: Source) -> None:
    """Without that nothing can be replayed."""
    with pytest.raises(RegistersUnknown, match="not found out where f0 is"):
        await source.reader.collect(1)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"version": 2}',
        b'{"version": 1, "place": [0, 5, 999], "ecam": null, "written": {}, "table": "", "head": "", "missing": []}',
        b'{"version": 1, "place": [0, 5, 0], "ecam": null, "written": {"9999": 1}, "table": "", "head": "00"}',
        b'{"version": 1, "place": [0, 5, 0], "ecam": null, "written": {}, "table": "", "head": "00", "missing": []}',
        b"[" * 100_000,
    ],
)
def test_damaged_registers(payload: bytes) -> None:
    """Nothing but an error comes of them."""
    with pytest.raises(ValueError, match="damaged registers"):
        FunctionRegisters.from_bytes(payload)


CONTENTS = PageContents(((0x1000, b"abc"), ((1 << 64) - 4096, bytes(4096)))).to_bytes()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        CONTENTS[:-1],
        CONTENTS + b"\0",
        CONTENTS[:10],
        b"\2" + CONTENTS[1:],
        CONTENTS[:4] + b"\xff\xff\xff\xff" + CONTENTS[8:],
        PageContents(((1, b""),)).to_bytes(),
        PageContents((((1 << 64) - 1, b"ab"),)).to_bytes(),
    ],
)
def test_damaged_contents(payload: bytes) -> None:
    """Nothing but an error comes of them."""
    with pytest.raises(ValueError, match="contents of guest memory"):
        PageContents.from_bytes(payload)


def test_contents_there_and_back() -> None:
    """In their order."""
    contents = PageContents.from_bytes(CONTENTS)
    assert (0x1000, b"abc") == contents.parts[0]
    assert contents.size == 4099


def test_a_view_of_nothing() -> None:
    """Registers of a function that nobody has touched."""
    registers = FunctionRegisters(PLACE, None, SourceView({}), bytes(256))
    assert registers == FunctionRegisters.from_bytes(registers.to_bytes())
