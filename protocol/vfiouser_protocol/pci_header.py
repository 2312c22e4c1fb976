"""The type 0 header of a PCI function and its capability chains, as register layouts.

Spec: PCI Local Bus 3.0, 6.1 and 6.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from .pci_caps import Capability, ExtendedCapability, Msix
from .pci_registers import Registers

STANDARD_SIZE = 256
EXTENDED_SIZE = 4096
#: Functions of one bus, without ARI: 32 devices of 8.
FUNCTIONS_PER_BUS = 256
_FIRST_CAPABILITY = 0x40


class ConfigOffset(IntEnum):
    """Registers of the type 0 header."""

    VENDOR_ID = 0x00
    DEVICE_ID = 0x02
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    CLASS_CODE = 0x09
    CACHE_LINE_SIZE = 0x0C
    BAR0 = 0x10
    SUBSYSTEM_VENDOR_ID = 0x2C
    SUBSYSTEM_ID = 0x2E
    ROM = 0x30
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D


class CommandBits(IntEnum):
    """Bits of the command register."""

    IO = 0x0001
    MEMORY = 0x0002
    BUS_MASTER = 0x0004
    PARITY = 0x0040
    SERR = 0x0100
    INTX_DISABLE = 0x0400


STATUS_INTERRUPT = 0x08
_STATUS_HAS_CAPABILITIES = 0x10
#: Error bits of the status register.
_STATUS_CLEARABLE = 0xF900
ROM_ENABLE = 0x1
_ROM_ADDRESS = 0xFFFF_F800


class PciIdentity(NamedTuple):
    """Who a function says it is.

    Args:
        vendor: vendor id.
        device: device id.
        class_code: 24 bits: base class, sub-class, programming interface.
        revision: revision id.
        subsystem_vendor: subsystem vendor id.
        subsystem: subsystem id.
    """

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class BarSpec(NamedTuple):
    """A base address register.

    Args:
        index: 0 to 5; a 64-bit BAR takes the next one too.
        size: bytes, a power of two: at least 16 for memory, 4 for I/O.
        is_64: the address has 64 bits.
        prefetchable: reads have no side effects.
        io: I/O space instead of memory.
    """

    index: int  # type: ignore[assignment]
    size: int
    is_64: bool = False
    prefetchable: bool = False
    io: bool = False


def define_header(
    registers: Registers, identity: PciIdentity, bars: Sequence[BarSpec], rom_size: int, interrupt_pin: int
) -> None:
    """Set up ids, command, status and interrupt registers.

    Args:
        registers: the config space under construction.
        identity: the ids.
        bars: they decide which address spaces the driver can enable.
        rom_size: bytes of the expansion ROM; 0 = none.
        interrupt_pin: 1 to 4 for INTA# to INTD#; 0 = none.

    Raises:
        ValueError: no such interrupt pin, or a class code of more than 24 bits.
    """
    if not 0 <= interrupt_pin <= 4:
        raise ValueError(f"interrupt pin {interrupt_pin}; 0 to 4 are possible")
    if not 0 <= identity.class_code < 1 << 24:
        raise ValueError(f"class code {identity.class_code:#x} has more than 24 bits")
    registers.define(ConfigOffset.VENDOR_ID, 2, identity.vendor)
    registers.define(ConfigOffset.DEVICE_ID, 2, identity.device)
    command = CommandBits.BUS_MASTER | CommandBits.PARITY | CommandBits.SERR | CommandBits.INTX_DISABLE
    command |= CommandBits.IO if any(bar.io for bar in bars) else 0
    command |= CommandBits.MEMORY if rom_size or any(not bar.io for bar in bars) else 0
    registers.define(ConfigOffset.COMMAND, 2, 0, writable=command)
    registers.define(ConfigOffset.STATUS, 2, 0, clearable=_STATUS_CLEARABLE)
    registers.define(ConfigOffset.REVISION, 1, identity.revision)
    registers.define(ConfigOffset.CLASS_CODE, 3, identity.class_code)
    registers.define(ConfigOffset.CACHE_LINE_SIZE, 1, 0, writable=0xFF)
    registers.define(ConfigOffset.SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
    registers.define(ConfigOffset.SUBSYSTEM_ID, 2, identity.subsystem)
    registers.define(ConfigOffset.INTERRUPT_LINE, 1, 0, writable=0xFF)
    registers.define(ConfigOffset.INTERRUPT_PIN, 1, interrupt_pin)


def define_bars(registers: Registers, bars: Sequence[BarSpec]) -> None:
    """Set up the base address registers.

    Args:
        registers: the config space under construction.
        bars: in any order.

    Raises:
        ValueError: a BAR has an impossible index, size or kind, or two BARs overlap.
    """
    taken: set[int] = set()
    for bar in bars:
        places = {bar.index, bar.index + 1} if bar.is_64 else {bar.index}
        if not places <= set(range(6)) or places & taken:
            raise ValueError(f"{bar} does not fit beside the other BARs")
        if bar.size & (bar.size - 1) or bar.size < (4 if bar.io else 16):
            raise ValueError(f"{bar} has a size that is not a power of two, or is too small")
        if bar.io and (bar.is_64 or bar.prefetchable or bar.size > 256):
            raise ValueError(f"{bar}: an I/O BAR has 32 bits, is not prefetchable and has up to 256 bytes")
        taken |= places
        width = 8 if bar.is_64 else 4
        if bar.size > 1 << (8 * width - 1):
            raise ValueError(f"{bar} is too big for its address")
        kind = 0x1 if bar.io else (0x4 if bar.is_64 else 0) | (0x8 if bar.prefetchable else 0)
        address = -bar.size & ((1 << 8 * width) - 1)
        registers.define(ConfigOffset.BAR0 + 4 * bar.index, width, kind, writable=address)


def define_rom(registers: Registers, size: int) -> None:
    """Set up the expansion ROM's register.

    Args:
        registers: the config space under construction.
        size: bytes, a power of two from 2 KiB to 16 MiB; 0 = no ROM.

    Raises:
        ValueError: any other size.
    """
    if not size:
        return
    if size & (size - 1) or not 2048 <= size <= 16 << 20:
        raise ValueError(f"ROM of {size} bytes; powers of two from 2 KiB to 16 MiB are possible")
    registers.define(ConfigOffset.ROM, 4, 0, writable=-size & _ROM_ADDRESS | ROM_ENABLE)


def define_capabilities(registers: Registers, capabilities: Sequence[Capability]) -> tuple[tuple[int, int], ...]:
    """Place the capabilities from 0x40 on, and link the chain.

    Args:
        registers: the config space under construction.
        capabilities: in the order of the chain.

    Returns:
        The id and the offset in config space of each, in the same order.

    Raises:
        ValueError: they do not fit into the first 256 bytes.
    """
    offsets = []
    position = _FIRST_CAPABILITY
    pointer = int(ConfigOffset.CAPABILITIES)
    for capability in capabilities:
        if position + capability.size > STANDARD_SIZE:
            raise ValueError(f"no room for {capability}")
        registers.values[pointer] = position
        registers.values[position] = capability.capability_id
        capability.define(registers, position)
        offsets.append((capability.capability_id, position))
        pointer = position + 1
        position += (capability.size + 3) & ~3
    if offsets:
        registers.values[ConfigOffset.STATUS] |= _STATUS_HAS_CAPABILITIES
    return tuple(offsets)


def define_extended(registers: Registers, capabilities: Sequence[ExtendedCapability]) -> None:
    """Place the extended capabilities from 0x100 on, and link the chain.

    Args:
        registers: the config space under construction.
        capabilities: in the order of the chain.

    Raises:
        ValueError: they do not fit into config space.
    """
    position = STANDARD_SIZE
    rounded = [(capability.size + 3) & ~3 for capability in capabilities]
    if STANDARD_SIZE + sum(rounded) > max(registers.size, STANDARD_SIZE):
        raise ValueError(f"no room for {len(capabilities)} extended capabilities of {sum(rounded)} bytes")
    for number, (capability, length) in enumerate(zip(capabilities, rounded, strict=True), 1):
        link = position + length if number < len(capabilities) else 0
        header = capability.capability_id | capability.version << 16 | link << 20
        registers.define(position, 4, header)
        capability.define(registers, position)
        position += length


def check_msix(capabilities: Sequence[Capability], bars: Mapping[int, BarSpec]) -> None:
    """Check that each MSI-X table and its pending bits lie inside the BARs that they name.

    Args:
        capabilities: all capabilities of the function; any but MSI-X is passed over.
        bars: the function's BARs by index.

    Raises:
        ValueError: there is no such BAR, it is an I/O BAR, or it ends too early.
    """
    for msix in capabilities:
        if not isinstance(msix, Msix):
            continue
        for what, bar, offset, size in (
            ("table", msix.table_bar, msix.table_offset, msix.table_size),
            ("pending bits", msix.pba_bar, msix.pba_offset, msix.pba_size),
        ):
            if bar not in bars or bars[bar].io or offset + size > bars[bar].size:
                raise ValueError(f"the MSI-X {what} at {offset:#x}+{size:#x} of BAR {bar} is not inside it")
