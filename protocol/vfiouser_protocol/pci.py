"""PCI config space of a function that is not a kernel device: a standard header of type 0 with capabilities.

A read is a slice. A write goes through the masks of `Registers`, and then a few registers are compared with
what they held before, so that the device learns what happened (`ConfigEffects`) without knowing offsets.

Two things are kept apart:

* the *values*, which reads return: only writable bits of a write arrive there;
* the *shadow* (`as_written`): every byte as the client last wrote it. QEMU emulates some fields itself but
  forwards each guest write, so the shadow is what another QEMU has to be given to get the same guest view.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple

from .errors import CommandError, LocalProtocolError
from .msix import MsixTable
from .pci_caps import (
    Capability,
    ExpressControl,
    ExtendedCapability,
    Msi,
    MsiControl,
    Msix,
    MsixControl,
    PciExpress,
    PowerControl,
    PowerManagement,
    SerialNumber,
    VendorSpecific,
)
from .pci_header import (
    EXTENDED_SIZE,
    STANDARD_SIZE,
    STATUS_INTERRUPT,
    BarSpec,
    CommandBits,
    ConfigOffset,
    PciIdentity,
    check_msix,
    define_bars,
    define_capabilities,
    define_extended,
    define_header,
    define_rom,
)
from .pci_registers import Registers

__all__ = [
    "BarSpec",
    "Capability",
    "ConfigEffects",
    "ConfigOffset",
    "ConfigSnapshot",
    "ConfigSpace",
    "ExtendedCapability",
    "Msi",
    "Msix",
    "MsixTable",
    "PciExpress",
    "PciIdentity",
    "PowerManagement",
    "SerialNumber",
    "VendorSpecific",
]

# Plain integers for what is asked before every DMA access and for every config write.
_COMMAND = int(ConfigOffset.COMMAND)
_BUS_MASTER = int(CommandBits.BUS_MASTER)


class ConfigEffects(NamedTuple):
    """What one write to config space changed; false if nothing that a device cares about.

    Args:
        bus_master_changed: bus mastering (DMA) was switched.
        memory_changed: memory decoding was switched.
        intx_disable_changed: the INTx disable bit was switched.
        bars_changed: a BAR was written with a different address (or is being sized).
        rom_changed: the ROM's address or enable bit changed.
        msi_changed: anything in the MSI capability changed.
        msix_changed: MSI-X enable or function mask was switched.
        power_changed: the function goes to another power state.
        flr: a function-level reset was asked for; the caller carries it out.
    """

    bus_master_changed: bool = False
    memory_changed: bool = False
    intx_disable_changed: bool = False
    bars_changed: bool = False
    rom_changed: bool = False
    msi_changed: bool = False
    msix_changed: bool = False
    power_changed: bool = False
    flr: bool = False

    def __bool__(self) -> bool:
        return any(self)


_NO_EFFECTS = ConfigEffects()


class ConfigSnapshot(NamedTuple):
    """Config space at one moment, to be restored into the same kind of function.

    Args:
        values: what reads return.
        as_written: every byte as last written.
    """

    values: bytes
    as_written: bytes


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the capabilities are that config space itself looks at; None if there is none."""

    power: int | None
    msi: int | None
    msi_size: int
    msix: int | None
    flr: int | None


def _bits(offset: int, width: int, bits: int = -1) -> int:
    """Bits of a register at their place in the whole of config space."""
    return (bits & ((1 << 8 * width) - 1)) << 8 * offset


class _Masks(NamedTuple):
    """What to look for in a write, each as bits of the whole config space.

    Args:
        effects: for each field of ConfigEffects but `flr`, the bits whose change it reports.
        any_effect: all of these together.
        power: the power state.
        flr: the bit that asks for a function-level reset.
    """

    effects: tuple[int, ...]
    any_effect: int
    power: int
    flr: int

    @classmethod
    def of(cls, layout: _Layout) -> _Masks:
        power = msi = msix = flr = 0
        if layout.power is not None:
            power = _bits(layout.power + PowerControl.CONTROL, 2, PowerControl.STATE_MASK)
        if layout.msi is not None:
            msi = _bits(layout.msi, layout.msi_size)
        if layout.msix is not None:
            msix = _bits(layout.msix + MsixControl.OFFSET, 2)
        if layout.flr is not None:
            flr = _bits(layout.flr + ExpressControl.DEVICE_CONTROL, 2, ExpressControl.INITIATE_FLR)
        by_field = {
            "bus_master_changed": _bits(_COMMAND, 2, CommandBits.BUS_MASTER),
            "memory_changed": _bits(_COMMAND, 2, CommandBits.MEMORY),
            "intx_disable_changed": _bits(_COMMAND, 2, CommandBits.INTX_DISABLE),
            "bars_changed": _bits(ConfigOffset.BAR0, 24),
            "rom_changed": _bits(ConfigOffset.ROM, 4),
            "msi_changed": msi,
            "msix_changed": msix,
            "power_changed": power,
        }
        effects = tuple(by_field[field] for field in ConfigEffects._fields[:-1])
        return cls(effects, reduce(or_, effects), power, flr)


class ConfigSpace:
    """Region 7 of a function.

    Args:
        identity: ids and class.
        bars: its base address registers.
        rom_size: bytes of the expansion ROM, a power of two from 2048; 0 for none.
        interrupt_pin: 1 to 4 for INTA to INTD, 0 for none.
        capabilities: in the order of the chain.
        extended: extended capabilities, in the order of their chain; they need a size of 4096.
        size: 256 or 4096 bytes.

    Raises:
        ValueError: the description is not a possible function.
    """

    def __init__(
        self,
        identity: PciIdentity,
        bars: Sequence[BarSpec] = (),
        *,
        rom_size: int = 0,
        interrupt_pin: int = 0,
        capabilities: Sequence[Capability] = (),
        extended: Sequence[ExtendedCapability] = (),
        size: int = STANDARD_SIZE,
    ) -> None:
        if size not in (STANDARD_SIZE, EXTENDED_SIZE):
            raise ValueError(f"config space of {size} bytes; 256 and 4096 are possible")
        if extended and size == STANDARD_SIZE:
            raise ValueError("extended capabilities need a config space of 4096 bytes")
        self.size = size
        self.identity = identity
        self.bars = {bar.index: bar for bar in bars}
        self.rom_size = rom_size
        self.interrupt_pin = interrupt_pin
        self.capabilities = tuple(capabilities)
        registers = Registers(size)
        define_header(registers, identity, bars, rom_size, interrupt_pin)
        define_bars(registers, bars)
        define_rom(registers, rom_size)
        self._offsets = define_capabilities(registers, capabilities)
        define_extended(registers, extended)
        check_msix(self.capabilities, self.bars)
        self._layout = self._find_layout()
        self._masks = _Masks.of(self._layout)
        self._initial = bytes(registers.values)
        self._values = registers.values
        self._writable = bytes(registers.writable)
        self._clearable = bytes(registers.clearable)
        self._as_written = bytearray(self._initial)

    # Access by the client

    def read(self, offset: int, count: int) -> bytes:
        """Read any part of config space.

        Args:
            offset: first byte.
            count: bytes.

        Returns:
            Exactly `count` bytes.

        Raises:
            CommandError: EINVAL if the range leaves config space.
        """
        end = offset + count
        if not 0 <= offset <= end <= self.size:
            self._refuse("read", offset, count)
        return bytes(self._values[offset:end])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> ConfigEffects:
        """Write any part of config space.

        Args:
            offset: first byte.
            data: what the client writes, in its width.

        Returns:
            What has changed for the device. For `flr` nothing is reset yet: the caller does, with `reset`.

        Raises:
            CommandError: EINVAL if the range leaves config space; nothing is written.
        """
        end = offset + len(data)
        if not 0 <= offset <= end <= self.size:
            self._refuse("write", offset, len(data))
        self._as_written[offset:end] = data
        new = int.from_bytes(data, "little")
        old = int.from_bytes(self._values[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        clearable = int.from_bytes(self._clearable[offset:end], "little")
        result = ((old & ~writable) | (new & writable)) & ~(new & clearable)
        # From here on, bits at their place in the whole of config space: the masks are made once.
        shift = 8 * offset
        masks = self._masks
        changed = (old ^ result) << shift
        if changed & masks.power and (result << shift) & masks.power not in (0, masks.power):
            # D1 or D2, which the function does not have: the state field keeps its value.
            result ^= (changed & masks.power) >> shift
            changed &= ~masks.power
        if changed:
            self._values[offset:end] = result.to_bytes(end - offset, "little")
        flr = (new << shift) & masks.flr
        if not flr and not changed & masks.any_effect:
            return _NO_EFFECTS
        return ConfigEffects._make([*[bool(changed & mask) for mask in masks.effects], bool(flr)])

    # What the device asks

    @property
    def bus_master(self) -> bool:
        """True if the function may do DMA."""
        return bool(self._values[_COMMAND] & _BUS_MASTER)

    @property
    def memory_enabled(self) -> bool:
        """True if the function answers at its memory BARs."""
        return bool(self._values[ConfigOffset.COMMAND] & CommandBits.MEMORY)

    @property
    def intx_disabled(self) -> bool:
        """True if the guest forbids INTx."""
        return bool(self._word(ConfigOffset.COMMAND) & CommandBits.INTX_DISABLE)

    @property
    def msi_enabled(self) -> bool:
        """True if MSI is enabled."""
        return bool(self._msi_control & MsiControl.ENABLE)

    @property
    def msix_enabled(self) -> bool:
        """True if MSI-X is enabled."""
        return bool(self._msix_control & MsixControl.ENABLE)

    @property
    def msix_function_masked(self) -> bool:
        """True if all MSI-X vectors are masked together."""
        return bool(self._msix_control & MsixControl.FUNCTION_MASK)

    @property
    def as_written(self) -> bytes:
        """Every byte as the client last wrote it; power-on values where it wrote nothing."""
        return bytes(self._as_written)

    def bar_address(self, index: int) -> int:
        """Return the address that the guest gave to BAR `index`; 0 if it has none yet.

        Raises:
            LocalProtocolError: the function has no such BAR.
        """
        bar = self.bars.get(index)
        if bar is None:
            raise LocalProtocolError(f"BAR {index} does not exist; there are {sorted(self.bars)}")
        offset = ConfigOffset.BAR0 + 4 * index
        value = int.from_bytes(self._values[offset : offset + (8 if bar.is_64 else 4)], "little")
        return value & ~(0x3 if bar.io else 0xF)

    def capability_offset(self, capability_id: int) -> int | None:
        """Where the first capability with this id starts, or None."""
        return next((offset for cap, offset in self._offsets if cap == capability_id), None)

    # What the device does

    def set_interrupt_status(self, asserted: bool) -> None:
        """Show in the status register whether INTx is asserted."""
        if asserted:
            self._values[ConfigOffset.STATUS] |= STATUS_INTERRUPT
        else:
            self._values[ConfigOffset.STATUS] &= ~STATUS_INTERRUPT

    def clear_bus_master(self) -> None:
        """Forbid DMA, as when the client that allowed it has gone."""
        self._values[ConfigOffset.COMMAND] &= ~CommandBits.BUS_MASTER
        self._as_written[ConfigOffset.COMMAND] &= ~CommandBits.BUS_MASTER

    def reset(self, *, keep_addresses: bool = False) -> None:
        """Go to the power-on values.

        Args:
            keep_addresses: leave BARs, ROM address and interrupt line alone. Right for a function-level reset
                by the guest of a VMM that emulates these registers, such as QEMU: the guest's restore code
                finds them unchanged there and does not write them again.
        """
        ranges = ((ConfigOffset.BAR0, 0x28), (ConfigOffset.ROM, 0x34), (ConfigOffset.INTERRUPT_LINE, 0x3D))
        kept = [(start, self._values[start:end], self._as_written[start:end]) for start, end in ranges]
        self._values[:] = self._initial
        self._as_written[:] = self._initial
        if keep_addresses:
            for start, values, written in kept:
                self._values[start : start + len(values)] = values
                self._as_written[start : start + len(written)] = written

    def snapshot(self) -> ConfigSnapshot:
        """Copy the state."""
        return ConfigSnapshot(bytes(self._values), bytes(self._as_written))

    def check(self, snapshot: ConfigSnapshot) -> None:
        """Refuse a `snapshot` that this config space cannot have.

        Raises:
            ValueError: it is of another size, or in a power state that the function does not have.
        """
        if len(snapshot.values) != self.size or len(snapshot.as_written) != self.size:
            raise ValueError(f"snapshot of {len(snapshot.values)} bytes for a config space of {self.size}")
        power = self._masks.power
        if int.from_bytes(snapshot.values, "little") & power not in (0, power):
            raise ValueError("snapshot of a config space in power state D1 or D2")

    def restore(self, snapshot: ConfigSnapshot) -> None:
        """Take over a `snapshot`; read-only bits stay this function's own.

        Raises:
            ValueError: as `check`; nothing changed.
        """
        self.check(snapshot)
        mutable = int.from_bytes(self._writable, "little") | int.from_bytes(self._clearable, "little")
        own = int.from_bytes(self._values, "little")
        theirs = int.from_bytes(snapshot.values, "little")
        self._values[:] = ((own & ~mutable) | (theirs & mutable)).to_bytes(self.size, "little")
        self._as_written[:] = snapshot.as_written

    # Inside

    def _word(self, offset: int) -> int:
        return self._values[offset] | self._values[offset + 1] << 8

    @property
    def _msi_control(self) -> int:
        at = self._layout.msi
        return 0 if at is None else self._word(at + MsiControl.OFFSET)

    @property
    def _msix_control(self) -> int:
        at = self._layout.msix
        return 0 if at is None else self._word(at + MsixControl.OFFSET)

    def _find_layout(self) -> _Layout:
        msi = next((cap for cap in self.capabilities if isinstance(cap, Msi)), None)
        express = next((cap for cap in self.capabilities if isinstance(cap, PciExpress)), None)
        return _Layout(
            power=self.capability_offset(PowerManagement.capability_id),
            msi=self.capability_offset(Msi.capability_id),
            msi_size=msi.size if msi else 0,
            msix=self.capability_offset(Msix.capability_id),
            flr=self.capability_offset(PciExpress.capability_id) if express and express.flr else None,
        )

    def _refuse(self, what: str, offset: int, count: int) -> None:
        raise CommandError(
            f"config {what} of {offset:#x}+{count:#x}: config space has {self.size:#x} bytes; not done",
            errno.EINVAL,
        )
