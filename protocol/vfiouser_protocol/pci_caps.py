"""PCI capabilities of a function, as register layouts.

Each class describes one capability by the values after power-on and by what may be written; `ConfigSpace`
places them and links the chain. They are made to look right to an operating system's PCI core: Linux reads
the whole PCI Express capability and believes it.

Spec: PCI Local Bus 3.0 (MSI, MSI-X), PCI Bus Power Management 1.2, PCI Express Base 3.0.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from .pci_registers import Registers


class CapabilityId(IntEnum):
    """Ids in the capability chain of the first 256 bytes."""

    POWER_MANAGEMENT = 0x01
    MSI = 0x05
    VENDOR_SPECIFIC = 0x09
    PCI_EXPRESS = 0x10
    MSIX = 0x11


class ExtendedCapabilityId(IntEnum):
    """Ids in the chain that starts at 0x100."""

    SERIAL_NUMBER = 0x0003


class Capability(abc.ABC):
    """One entry of the capability chain."""

    capability_id: ClassVar[int]

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Its length in bytes, with the two bytes of id and next pointer."""

    @abc.abstractmethod
    def define(self, registers: Registers, base: int) -> None:
        """Fill in everything behind id and next pointer.

        Args:
            registers: the config space under construction.
            base: where the capability starts.
        """


class ExtendedCapability(abc.ABC):
    """One entry of the extended capability chain."""

    capability_id: ClassVar[int]
    version: ClassVar[int] = 1

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Its length in bytes, with the four bytes of its header."""

    @abc.abstractmethod
    def define(self, registers: Registers, base: int) -> None:
        """Fill in everything behind the header.

        Args:
            registers: the config space under construction.
            base: where the capability starts.
        """


class PowerControl(IntEnum):
    """Offsets in the power management capability, and the fields of its control register."""

    CAPABILITIES = 2
    CONTROL = 4
    STATE_MASK = 0x0003
    NO_SOFT_RESET = 0x0008


@dataclass(frozen=True, slots=True)
class PowerManagement(Capability):
    """Power management with D0 and D3hot; the function keeps its registers in D3hot and raises no PME."""

    capability_id: ClassVar[int] = CapabilityId.POWER_MANAGEMENT

    @property
    def size(self) -> int:
        """8 bytes."""
        return 8

    def define(self, registers: Registers, base: int) -> None:
        """Fill in version 3 and state D0; arguments as for `Capability.define`."""
        registers.define(base + PowerControl.CAPABILITIES, 2, 0x0003)
        registers.define(base + PowerControl.CONTROL, 2, PowerControl.NO_SOFT_RESET, writable=PowerControl.STATE_MASK)


class MsiControl(IntEnum):
    """Offset of MSI's message control, and its fields."""

    OFFSET = 2
    ENABLE = 0x0001
    CAPABLE_SHIFT = 1
    ENABLED_SHIFT = 4
    COUNT_MASK = 0x7
    IS_64 = 0x0080
    MASKABLE = 0x0100


@dataclass(frozen=True, slots=True)
class Msi(Capability):
    """Message signalled interrupts.

    Args:
        vectors: 1, 2, 4, 8, 16 or 32.
        is_64: the message address has 64 bits.
        maskable: each vector has a mask and a pending bit.
    """

    capability_id: ClassVar[int] = CapabilityId.MSI

    vectors: int = 1
    is_64: bool = True
    maskable: bool = False

    def __post_init__(self) -> None:
        if self.vectors not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"MSI with {self.vectors} vectors; 1, 2, 4, 8, 16 and 32 are possible")

    @property
    def size(self) -> int:
        """10 to 24 bytes."""
        return self.data_offset + (12 if self.maskable else 2)

    @property
    def data_offset(self) -> int:
        """Where message data is, from the start of the capability."""
        return 12 if self.is_64 else 8

    def define(self, registers: Registers, base: int) -> None:
        """Fill in MSI as disabled, with one vector enabled and no address; arguments as for `Capability.define`."""
        control = (self.vectors.bit_length() - 1) << MsiControl.CAPABLE_SHIFT
        control |= MsiControl.IS_64 if self.is_64 else 0
        control |= MsiControl.MASKABLE if self.maskable else 0
        writable = MsiControl.ENABLE | MsiControl.COUNT_MASK << MsiControl.ENABLED_SHIFT
        registers.define(base + MsiControl.OFFSET, 2, control, writable=writable)
        registers.define(base + 4, 4, 0, writable=0xFFFF_FFFC)
        if self.is_64:
            registers.define(base + 8, 4, 0, writable=0xFFFF_FFFF)
        registers.define(base + self.data_offset, 2, 0, writable=0xFFFF)
        if self.maskable:
            registers.define(base + self.data_offset + 4, 4, 0, writable=(1 << self.vectors) - 1)


class MsixControl(IntEnum):
    """Offset of MSI-X's message control, and its fields."""

    OFFSET = 2
    SIZE_MASK = 0x07FF
    FUNCTION_MASK = 0x4000
    ENABLE = 0x8000


#: Bytes of one MSI-X table entry.
MSIX_ENTRY_SIZE = 16
MSIX_MAX_VECTORS = 2048


def msix_pba_size(vectors: int) -> int:
    """Return the bytes of the pending bit array: one bit per vector, in whole 64-bit words.

    Args:
        vectors: how many there are.
    """
    return (vectors + 63) // 64 * 8


@dataclass(frozen=True, slots=True)
class Msix(Capability):
    """MSI-X.

    Args:
        vectors: 1 to 2048.
        table_bar: BAR that holds the table.
        table_offset: its offset there, a multiple of 8.
        pba_bar: BAR that holds the pending bits.
        pba_offset: their offset there, a multiple of 8.
    """

    capability_id: ClassVar[int] = CapabilityId.MSIX

    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    def __post_init__(self) -> None:
        if not 1 <= self.vectors <= MSIX_MAX_VECTORS:
            raise ValueError(f"MSI-X with {self.vectors} vectors; 1 to {MSIX_MAX_VECTORS} are possible")
        if self.table_offset % 8 or self.pba_offset % 8:
            raise ValueError("MSI-X table and pending bits must start at multiples of 8")
        if self.table_bar == self.pba_bar and (
            self.table_offset < self.pba_offset + self.pba_size
            and self.pba_offset < self.table_offset + self.table_size
        ):
            raise ValueError("MSI-X table and pending bits overlap")

    @property
    def size(self) -> int:
        """12 bytes."""
        return 12

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return self.vectors * MSIX_ENTRY_SIZE

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bit array."""
        return msix_pba_size(self.vectors)

    def define(self, registers: Registers, base: int) -> None:
        """Fill in MSI-X as disabled and not masked; arguments as for `Capability.define`."""
        writable = MsixControl.FUNCTION_MASK | MsixControl.ENABLE
        registers.define(base + MsixControl.OFFSET, 2, self.vectors - 1, writable=writable)
        registers.define(base + 4, 4, self.table_offset | self.table_bar)
        registers.define(base + 8, 4, self.pba_offset | self.pba_bar)


class ExpressControl(IntEnum):
    """Offset of Device Control in the PCI Express capability, and the bit that starts a function-level
    reset."""

    DEVICE_CONTROL = 8
    INITIATE_FLR = 0x8000


@dataclass(frozen=True, slots=True)
class PciExpress(Capability):
    """PCI Express capability, version 2, of an endpoint behind an 8 GT/s x4 link.

    Args:
        flr: function-level reset is supported.
    """

    capability_id: ClassVar[int] = CapabilityId.PCI_EXPRESS

    flr: bool = True

    @property
    def size(self) -> int:
        """60 bytes: with all registers of version 2, as the version demands."""
        return 0x3C

    def define(self, registers: Registers, base: int) -> None:
        """Fill in the state after power-on: link up, relaxed ordering and no-snoop allowed, 512-byte read requests.

        Arguments as for `Capability.define`.
        """
        registers.define(base + 0x02, 2, 0x0002)  # version 2, type endpoint
        # Payloads up to 256 bytes, extended tags, role-based error reporting.
        registers.define(base + 0x04, 4, 0x0000_8021 | (1 << 28 if self.flr else 0))
        # Initiate FLR (bit 15) reads as 0, so it is not writable; ConfigSpace looks for it in what is
        # written.
        registers.define(base + ExpressControl.DEVICE_CONTROL, 2, 0x2810, writable=0x79FF)
        registers.define(base + 0x0A, 2, 0x0000, clearable=0x000F)  # device status: error bits
        registers.define(base + 0x0C, 4, 0x0040_0043)  # link: 8 GT/s, x4, no ASPM, optionality compliance
        registers.define(base + 0x10, 2, 0x0000, writable=0x01CB)  # link control: ASPM, RCB, clocks, synch
        registers.define(base + 0x12, 2, 0x1043)  # link status: 8 GT/s, x4, slot clock
        registers.define(base + 0x24, 4, 0x0000_001F)  # completion timeout: all ranges, may be disabled
        registers.define(base + 0x28, 2, 0x0000, writable=0x001F)
        registers.define(base + 0x2C, 4, 0x0000_000E)  # link speeds 2.5, 5 and 8 GT/s
        registers.define(base + 0x30, 2, 0x0003, writable=0x000F)  # target link speed


@dataclass(frozen=True, slots=True)
class VendorSpecific(Capability):
    """A read-only vendor-specific capability.

    Args:
        body: what follows id, next pointer and length.
    """

    capability_id: ClassVar[int] = CapabilityId.VENDOR_SPECIFIC

    body: bytes

    @property
    def size(self) -> int:
        """3 bytes and the body."""
        return 3 + len(self.body)

    def define(self, registers: Registers, base: int) -> None:
        """Fill in the length, and the body as given; arguments as for `Capability.define`."""
        registers.define(base + 2, 1, self.size)
        registers.values[base + 3 : base + self.size] = self.body


@dataclass(frozen=True, slots=True)
class SerialNumber(ExtendedCapability):
    """Device serial number.

    Args:
        number: an EUI-64.
    """

    capability_id: ClassVar[int] = ExtendedCapabilityId.SERIAL_NUMBER

    number: int

    @property
    def size(self) -> int:
        """12 bytes."""
        return 12

    def define(self, registers: Registers, base: int) -> None:
        """Fill in the number, low half first; arguments as for `ExtendedCapability.define`."""
        registers.define(base + 4, 8, self.number)
