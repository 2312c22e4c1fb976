"""The controller registers as a table: where they are, what a host can change in them.

Spec: NVMe 1.4, 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vfiouser_soc.nvme.spec import PAGE, VERSION_1_4, ControllerRegister

_FULL_32 = 0xFFFF_FFFF
_FULL_64 = 0xFFFF_FFFF_FFFF_FFFF
_PAGE_BASE = _FULL_64 & ~0xFFF


class RegisterSpec(NamedTuple):
    """One register: bytes, what a host may write, and whether a controller reset leaves it alone.

    A `command` register keeps nothing: the written value is only handed to its hook.
    """

    size: int
    writable: int
    survives_reset: bool = False
    command: bool = False


REGISTERS: dict[ControllerRegister, RegisterSpec] = {
    ControllerRegister.CAP: RegisterSpec(8, 0, survives_reset=True),
    ControllerRegister.VS: RegisterSpec(4, 0, survives_reset=True),
    ControllerRegister.INTMS: RegisterSpec(4, _FULL_32, command=True),
    ControllerRegister.INTMC: RegisterSpec(4, _FULL_32, command=True),
    ControllerRegister.CC: RegisterSpec(4, 0x00FF_FFF1, survives_reset=True),
    ControllerRegister.CSTS: RegisterSpec(4, 0),
    ControllerRegister.AQA: RegisterSpec(4, 0x0FFF_0FFF, survives_reset=True),
    ControllerRegister.ASQ: RegisterSpec(8, _PAGE_BASE, survives_reset=True),
    ControllerRegister.ACQ: RegisterSpec(8, _PAGE_BASE, survives_reset=True),
    ControllerRegister.CMBLOC: RegisterSpec(4, 0, survives_reset=True),
    ControllerRegister.CMBSZ: RegisterSpec(4, 0, survives_reset=True),
    ControllerRegister.CMBMSC: RegisterSpec(8, _PAGE_BASE | 3, survives_reset=True),
    ControllerRegister.CMBSTS: RegisterSpec(4, 0, survives_reset=True),
}

Hook = Callable[[int, int], None]


class CapabilitiesRegister(NamedTuple):
    """What CAP announces.

    Args:
        max_entries: entries of the largest queue.
        timeout_s: longest time for CSTS.RDY to follow CC.EN, in seconds.
        page_shift_max: log2 of the largest memory page that the host may choose.
        cmb: whether there is a controller memory buffer.
    """

    max_entries: int
    timeout_s: float
    page_shift_max: int
    cmb: bool

    def value(self) -> int:
        """Make the register: NVM command set, doorbell stride 4 bytes, pages from 4 KiB."""
        return (
            (self.max_entries - 1)
            | 1 << 16
            | round(self.timeout_s * 2) << 24
            | 1 << 37
            | (self.page_shift_max - 12) << 52
            | int(self.cmb) << 57
        )


class RegisterFile:
    """The bytes of the register page.

    Args:
        capabilities: value of CAP.
        hooks: called with (old value, new value) after the host wrote a register; for command registers
            with (0, value written).
    """

    def __init__(self, capabilities: int, hooks: dict[ControllerRegister, Hook]) -> None:
        self._hooks = hooks
        self._capabilities = capabilities
        self.image = bytearray(PAGE)
        self.power_on()

    def power_on(self) -> None:
        """Give every register its value after a reset of the whole function."""
        self.image[:] = bytes(PAGE)
        self[ControllerRegister.CAP] = self._capabilities
        self[ControllerRegister.VS] = VERSION_1_4

    def controller_reset(self) -> None:
        """Give every register its value after CC.EN was cleared."""
        for register, spec in REGISTERS.items():
            if not spec.survives_reset:
                self[register] = 0

    def imagined(self, image: bytes) -> RegisterFile:
        """Make the registers that a page shows, as those of a controller of the same kind.

        Args:
            image: the page.

        Raises:
            ValueError: it has bits that no host can set, or another kind of controller shows them.
        """
        other = RegisterFile(self._capabilities, {})
        for register, spec in REGISTERS.items():
            value = int.from_bytes(image[register : register + spec.size], "little")
            if spec.writable and value & ~spec.writable:
                raise ValueError(f"register {register.name} is {value:#x}")
            other[register] = value
        if (other[ControllerRegister.CAP], other[ControllerRegister.VS]) != (self._capabilities, VERSION_1_4):
            raise ValueError("the controller has other capabilities, or is of another version")
        if bytes(other.image) != image:
            raise ValueError("there is something between the registers")
        return other

    @property
    def image_bytes(self) -> bytes:
        """A copy of the page."""
        return bytes(self.image)

    def load(self, image: bytes) -> None:
        """Take over the page of another controller of the same kind."""
        self.image[:] = image
        self[ControllerRegister.CAP] = self._capabilities
        self[ControllerRegister.VS] = VERSION_1_4

    def __getitem__(self, register: ControllerRegister) -> int:
        return int.from_bytes(self.image[register : register + REGISTERS[register].size], "little")

    def __setitem__(self, register: ControllerRegister, value: int) -> None:
        size = REGISTERS[register].size
        self.image[register : register + size] = value.to_bytes(size, "little")

    def read(self, offset: int, count: int) -> bytes:
        """Read bytes of the page."""
        return bytes(self.image[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes of the page; what is not writable is left alone.

        Accesses of any width work: the halves of a 64-bit register as well as several registers at once.
        """
        end = offset + len(data)
        for register, spec in REGISTERS.items():
            low, high = max(offset, register), min(end, register + spec.size)
            if low < high and spec.writable:
                self._write_register(register, spec, low - register, data[low - offset : high - offset])

    def _write_register(self, register: ControllerRegister, spec: RegisterSpec, at: int, data: bytes) -> None:
        old = 0 if spec.command else self[register]
        written = int.from_bytes(data, "little") << 8 * at
        covered = ((1 << 8 * len(data)) - 1) << 8 * at & spec.writable
        new = old & ~covered | written & covered
        if not spec.command:
            self[register] = new
        hook = self._hooks.get(register)
        if hook is not None:
            hook(old, new)
