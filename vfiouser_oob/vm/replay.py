"""What is written at the destination so that QEMU has of a function what it had at the source, as a plan.

Stock QEMU's stream has nothing of a vfio-user function: its BARs are where reset left them, its MSI-X table is empty.
So all of what QEMU keeps itself is written anew, by the function: DMA to its own registers, by ECAM and its own BAR.

    BARs, ROM ─► COMMAND with memory and DMA on ─► line ─► MSI-X table ─► MSI ─► MSI-X control ─► reading back
    ─► power state ─► COMMAND as the guest left it

Rule 1: *as written, not as read*. Values read back have bits that mean something else when written. What the guest
        wrote last is known (`migration.config_shadow`), and QEMU turns it into the same view.
Rule 2: *the table before its switch*: QEMU then sends one SET_IRQS for all vectors.
Rule 3: *what would end our own way comes last*: the power state, which takes the BARs away, and COMMAND, which may take
        DMA away. What comes before is read back before; what comes last is seen in the writes that QEMU forwards to us.

Spec: PCI Local Bus 3.0, 6.2 and 6.8; PCI Bus Power Management 1.2, 3.2.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vfiouser_oob.vm.topology import Bdf
from vfiouser_protocol.pci_caps import (
    MSIX_ENTRY_SIZE,
    CapabilityId,
    MsiControl,
    MsixControl,
    PowerControl,
)
from vfiouser_protocol.pci_header import ROM_ENABLE, CommandBits, ConfigOffset

_BARS = 6
_HEAD = 256
_CAP_LIST = 0x10
#: PCI capabilities are dwords in 256 bytes: more links than this are a circle.
_CAPS_MAX = 48
_IO_BAR, _WIDE_BAR = 0x1, 0x4
_KIND_BITS, _IO_KIND_BITS = 0xF, 0x3
#: What the table, and DMA to it, need.
_REACH = CommandBits.MEMORY | CommandBits.BUS_MASTER
_MSIX_SWITCHES = MsixControl.ENABLE | MsixControl.FUNCTION_MASK
_MSI_SWITCHES = MsiControl.ENABLE | MsiControl.COUNT_MASK << MsiControl.ENABLED_SHIFT
_ADDRESS_LOW = 0xFFFF_FFFC
_ROM_ADDRESS = 0xFFFF_F800
#: What of a table's entry can be read back: the reserved bits of its control cannot.
_ENTRY_MASK = _ADDRESS_LOW.to_bytes(4, "little") + b"\xff" * 8 + b"\1\0\0\0"
#: What is left of the written value of the power register: a written 1 clears PME_Status.
_POWER_WRITTEN = 0x7FFF


@dataclass(frozen=True, slots=True)
class SourceView:
    """What is known of a function at the source.

    Args:
        written: configuration space as the guest last wrote it: byte by offset.
        table: the MSI-X table; empty if there is none, or it could not be read.
    """

    written: Mapping[int, int]
    table: bytes = b""


@dataclass(frozen=True, slots=True)
class FunctionShape:
    """What a function looks like.

    Args:
        head: the first 256 bytes of its configuration space, as read at the source when it stood.
        sizes: bytes of its BARs, by number; none for those that it does not have.
        rom_size: bytes of its expansion ROM; 0 if it has none.
    """

    head: bytes
    sizes: Mapping[int, int]
    rom_size: int = 0


@dataclass(frozen=True, slots=True)
class ConfigWrite:
    """A write to configuration space.

    Args:
        offset: the register's.
        data: 1, 2 or 4 bytes.
        mask: which bits of it can be read back; nothing is read back if empty.
    """

    offset: int
    data: bytes
    mask: bytes = b""


@dataclass(frozen=True, slots=True)
class MemoryWrite:
    """A write to the function's own memory.

    Args:
        address: the guest's.
        data: what is written.
        mask: which bits of it can be read back.
    """

    address: int
    data: bytes
    mask: bytes = b""


@dataclass(frozen=True, slots=True)
class ReadBack:
    """Something to be read back.

    Args:
        address: the guest's.
        data: what should be there.
        mask: of these bits.
        what: for people.
    """

    address: int
    data: bytes
    mask: bytes
    what: str

    def failure(self, found: bytes) -> str:
        """What is wrong with what was read; empty if nothing is.

        Args:
            found: what was read.
        """
        wanted = bytes(map(int.__and__, self.data, self.mask))
        read = bytes(map(int.__and__, found, self.mask))
        if len(found) == len(self.data) and read == wanted:
            return ""
        if len(found) != len(self.data):
            return f"{self.what} gave {len(found)} bytes of {len(self.data)}"
        at = next(index for index, (a, b) in enumerate(zip(wanted, read, strict=True)) if a != b) & ~3
        return f"{self.what}+{at:#x} is {read[at : at + 4].hex()} instead of {wanted[at : at + 4].hex()}"


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """All of a replay, in order.

    Args:
        steps: what is written while the function can still be reached.
        closing: what is written after that was read back.
        missing: what is not replayed, for people; empty if nothing is.
    """

    steps: tuple[ConfigWrite | MemoryWrite, ...]
    closing: tuple[ConfigWrite, ...] = ()
    missing: tuple[str, ...] = field(default=())


def written_bytes(writes: Iterable[tuple[int, bytes]]) -> dict[int, int]:
    """Bytes by offset, of writes as `ConfigShadow.writes` gives them.

    Args:
        writes: offsets and data.
    """
    return {offset + index: byte for offset, data in writes for index, byte in enumerate(data)}


def plan_replay(source: SourceView, shape: FunctionShape) -> ReplayPlan:
    """Plan what is written at the destination.

    Args:
        source: what is known from the source.
        shape: what the function looks like.

    Raises:
        ValueError: the source's table is not of this function's size.
    """
    return _Planner(source, shape).plan()


def is_as_reset(written: Mapping[int, int], shape: FunctionShape) -> bool:
    """Whether a function is as its reset left it: nobody has set it up since, so nothing has to be written for it.

    Its VM may have no ECAM at this moment, which firmware turns on before it writes to any function.

    Args:
        written: configuration space as the guest last wrote it.
        shape: what the function looks like.
    """
    return _Planner(SourceView(written), shape).is_as_reset()


def table_at(written: Mapping[int, int], shape: FunctionShape) -> tuple[int, int] | None:
    """Where the source's MSI-X table can be read by DMA, as long as COMMAND has memory and DMA on.

    Args:
        written: configuration space as the guest last wrote it.
        shape: what the function looks like.

    Returns:
        The guest's address and the bytes; None if there is no table, or it is at no address.
    """
    table = _Planner(SourceView(written), shape).table()
    return None if table is None or table.address is None else (table.address, table.size)


@dataclass(frozen=True, slots=True)
class _VectorTable:
    """An MSI-X table: the BAR that it is in, its address if that has one, and its bytes."""

    bar: int
    address: int | None
    size: int


class _Planner:
    """The work on one plan."""

    def __init__(self, source: SourceView, shape: FunctionShape) -> None:
        self._written = source.written
        self._table = source.table
        self._shape = shape
        self._head = shape.head.ljust(_HEAD, b"\0")
        self._capabilities = dict(_capabilities(self._head))
        self._missing: list[str] = []

    def plan(self) -> ReplayPlan:
        command = self._value(ConfigOffset.COMMAND, 2) or 0
        table = list(self._table_writes())
        steps: list[ConfigWrite | MemoryWrite] = self._addresses()
        # With the memory off its BARs may be anywhere, and are only turned on for the table's sake.
        opened = command | (_REACH if table else CommandBits.BUS_MASTER)
        checked = _REACH if table else CommandBits.BUS_MASTER
        steps.append(_config(ConfigOffset.COMMAND, opened, 2, checked))
        steps += self._line()
        steps += table
        steps += self._switches()
        closing = list(self._power())
        if command != opened:
            closing.append(_config(ConfigOffset.COMMAND, command, 2))
        return ReplayPlan(tuple(steps), tuple(closing), tuple(self._missing))

    def is_as_reset(self) -> bool:
        written = (*self._addresses(), *self._line(), *self._switches(), *self._power())
        return not self._value(ConfigOffset.COMMAND, 2) and not any(any(each.data) for each in written)

    def _addresses(self) -> list[ConfigWrite | MemoryWrite]:
        return [*self._bars(), *self._rom()]

    def _line(self) -> Iterator[ConfigWrite]:
        return self._register(ConfigOffset.INTERRUPT_LINE, 1, 0xFF)

    def _switches(self) -> list[ConfigWrite]:
        return [*self._msi(), *self._msix_control()]

    def _value(self, offset: int, size: int) -> int | None:
        """What was written to a register; bytes that were not are as reset leaves them. None if none was."""
        places = range(offset, offset + size)
        if not any(place in self._written for place in places):
            return None
        return int.from_bytes(bytes(self._written.get(place, 0) for place in places), "little")

    def _register(self, offset: int, size: int, mask: int, keep: int = -1) -> Iterator[ConfigWrite]:
        value = self._value(offset, size)
        if value is not None:
            yield _config(offset, value & keep & ((1 << 8 * size) - 1), size, mask)

    def _bars(self) -> Iterator[ConfigWrite]:
        for bar, size in self._shape.sizes.items():
            offset = ConfigOffset.BAR0 + 4 * bar
            kind = self._head[offset]
            fixed = _IO_KIND_BITS if kind & _IO_BAR else _KIND_BITS
            mask = ~(size - 1) & ~fixed
            yield from self._register(offset, 4, mask & 0xFFFF_FFFF)
            if self._is_wide(bar):
                yield from self._register(offset + 4, 4, mask >> 32 & 0xFFFF_FFFF)

    def _is_wide(self, bar: int) -> bool:
        kind = self._head[ConfigOffset.BAR0 + 4 * bar]
        return bar < _BARS - 1 and not kind & _IO_BAR and bool(kind & _WIDE_BAR)

    def _rom(self) -> Iterator[ConfigWrite]:
        if self._shape.rom_size:
            yield from self._register(
                ConfigOffset.ROM, 4, ~(self._shape.rom_size - 1) & _ROM_ADDRESS | ROM_ENABLE, _ROM_ADDRESS | ROM_ENABLE
            )

    def _address(self, bar: int) -> int | None:
        """Where the guest has put a BAR; None if it has not, or is finding out its size."""
        offset = ConfigOffset.BAR0 + 4 * bar
        low = self._value(offset, 4) or 0
        high = (self._value(offset + 4, 4) or 0) if self._is_wide(bar) else 0
        size = self._shape.sizes.get(bar, 0)
        highest = 0xFFFF_FFFF & ~_KIND_BITS
        if not size or low & highest == highest:
            return None
        address = (high << 32 | low) & ~(size - 1)
        return address or None

    def table(self) -> _VectorTable | None:
        """Where the table is; None if the function has none."""
        position = self._capabilities.get(CapabilityId.MSIX)
        if position is None:
            return None
        control = int.from_bytes(self._head[position + 2 : position + 4], "little")
        where = int.from_bytes(self._head[position + 4 : position + 8], "little")
        size = ((control & MsixControl.SIZE_MASK) + 1) * MSIX_ENTRY_SIZE
        base = self._address(where & 7)
        return _VectorTable(where & 7, None if base is None else base + (where & ~7), size)

    def _table_writes(self) -> Iterator[MemoryWrite]:
        table = self.table()
        if table is None or not self._table:
            return
        if len(self._table) != table.size:
            raise ValueError(f"an MSI-X table of {len(self._table)} bytes; the function's has {table.size}")
        if table.address is None:
            self._missing.append(f"the MSI-X table, since BAR {table.bar} has no address")
            return
        yield MemoryWrite(table.address, self._table, _ENTRY_MASK * (table.size // MSIX_ENTRY_SIZE))

    def _msi(self) -> Iterator[ConfigWrite]:
        position = self._capabilities.get(CapabilityId.MSI)
        if position is None:
            return
        control = int.from_bytes(self._head[position + 2 : position + 4], "little")
        wide = bool(control & MsiControl.IS_64)
        data = position + (12 if wide else 8)
        yield from self._register(position + 4, 4, _ADDRESS_LOW, _ADDRESS_LOW)
        if wide:
            yield from self._register(position + 8, 4, 0xFFFF_FFFF)
        yield from self._register(data, 2, 0xFFFF)
        if control & MsiControl.MASKABLE:
            vectors = 1 << (control >> MsiControl.CAPABLE_SHIFT & MsiControl.COUNT_MASK)
            yield from self._register(data + 4, 4, (1 << vectors) - 1)
        yield from self._register(position + MsiControl.OFFSET, 2, _MSI_SWITCHES)

    def _msix_control(self) -> Iterator[ConfigWrite]:
        position = self._capabilities.get(CapabilityId.MSIX)
        if position is not None:
            yield from self._register(position + MsixControl.OFFSET, 2, _MSIX_SWITCHES)

    def _power(self) -> Iterator[ConfigWrite]:
        position = self._capabilities.get(CapabilityId.POWER_MANAGEMENT)
        if position is not None:
            offset = position + PowerControl.CONTROL
            value = self._value(offset, 2)
            if value is not None:
                # A state that there is no way into was written in vain: here what is read counts.
                state = self._head[offset] & PowerControl.STATE_MASK
                yield _config(offset, value & _POWER_WRITTEN & ~PowerControl.STATE_MASK | state, 2)


def _config(offset: int, value: int, size: int, mask: int = 0) -> ConfigWrite:
    return ConfigWrite(offset, value.to_bytes(size, "little"), mask.to_bytes(size, "little") if mask else b"")


def _capabilities(head: bytes) -> Iterator[tuple[int, int]]:
    """Ids and places of the capabilities; of several of a kind the last."""
    if not head[ConfigOffset.STATUS] & _CAP_LIST:
        return
    position = head[ConfigOffset.CAPABILITIES] & ~3
    for _ in range(_CAPS_MAX):
        if not 0x40 <= position <= _HEAD - 4:
            return
        yield head[position], position
        position = head[position + 1] & ~3


# How it is carried out


def through_ecam(steps: Sequence[ConfigWrite | MemoryWrite], place: Bdf, base: int) -> list[MemoryWrite]:
    """The writes as DMA of the function itself, where the machine has ECAM.

    Args:
        steps: of a plan.
        place: where the function is once the stream is loaded.
        base: where ECAM begins.
    """
    return [
        step if isinstance(step, MemoryWrite) else MemoryWrite(place.ecam(base, step.offset), step.data, step.mask)
        for step in steps
    ]


def checks(writes: Sequence[MemoryWrite]) -> list[ReadBack]:
    """What is to be read back of writes.

    Args:
        writes: as DMA.
    """
    return [ReadBack(each.address, each.data, each.mask, f"{each.address:#x}") for each in writes if any(each.mask)]
