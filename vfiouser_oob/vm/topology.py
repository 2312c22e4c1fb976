"""Where a function is in its VM's PCI hierarchy, from QEMU's answers, and how its registers are reached there.

Spec: QEMU, qapi/pci.json (query-pci); PCI Local Bus 3.0, 3.2.2.3.2 (configuration mechanism #1); PCI Express Base 4.0,
7.2.2 (ECAM).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
#: What is asked with `qom-get` for the guest's address of a machine's ECAM; only machines with ECAM know it.
ECAM_QUERY: Mapping[str, str] = {"path": "/machine/q35", "property": "MCFG"}
#: What such a machine answers as long as its guest has not turned ECAM on.
_NOWHERE = (1 << 64) - 1
#: The first bus number that is given for a moment to a bridge that has none yet: firmware begins with low ones.
SPARE_BUS = 0x70
#: Bridges above a function; more are a circle.
DEPTH_MAX = 16
_PERIPHERAL = "/machine/peripheral/"
_BUS_NUMBERS = 0x18
_COMMAND = 0x04
_BUS_MASTER = 0x0004
#: The human monitor's names for sizes.
_SIZES: Mapping[int, str] = {1: "b", 2: "h", 4: "w"}
_VALUE = re.compile(r"= (0x[0-9a-fA-F]{1,8})\s*$")


class TopologyError(Exception):
    """QEMU's answer has no such place."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place on some bus.

    Args:
        device: 0 to 31.
        function: 0 to 7.
    """

    device: int
    function: int = 0


@dataclass(frozen=True, slots=True)
class Bdf:
    """A place in the hierarchy.

    Args:
        bus: 0 to 255.
        device: 0 to 31.
        function: 0 to 7.
    """

    bus: int
    device: int
    function: int = 0

    def ecam(self, base: int, offset: int = 0) -> int:
        """The guest's address of a register, where the machine has ECAM.

        Args:
            base: where it begins.
            offset: the register's.
        """
        return base + (self.bus << 20 | self.device << 15 | self.function << 12) + offset

    def port(self, offset: int) -> int:
        """What goes to port 0xcf8 to reach a register's dword.

        Args:
            offset: the register's, below 256.
        """
        return 0x8000_0000 | self.bus << 16 | self.device << 11 | self.function << 8 | offset & 0xFC

    def __str__(self) -> str:
        return f"{self.bus:02x}:{self.device:02x}.{self.function}"


def ecam_base(answer: Any) -> int | None:
    """Where ECAM begins.

    Args:
        answer: to `ECAM_QUERY`, as QEMU gave it.

    Returns:
        The guest's address; None if the guest has not turned it on.
    """
    return answer if isinstance(answer, int) and 0 < answer < _NOWHERE else None


def find_device(answer: Any, name: str) -> Bdf:
    """Find a device by its id in the answer to query-pci; behind a bridge only once that has its bus number.

    Args:
        answer: as QEMU gave it.
        name: the device's id.

    Raises:
        TopologyError: it is not there.
    """
    for device in _devices(answer, DEPTH_MAX):
        if device.get("qdev_id") == name:
            numbers = [device.get(part) for part in ("bus", "slot", "function")]
            if all(isinstance(number, int) and 0 <= number <= 255 for number in numbers):
                bus, slot, function = (int(number or 0) for number in numbers)
                return Bdf(bus, slot & 31, function & 7)
    raise TopologyError(f"QEMU has no PCI device with the id {name}")


def _devices(answer: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    for bus in answer if isinstance(answer, list) else ():
        yield from _below(bus, depth)


def _below(holder: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    devices = holder.get("devices") if isinstance(holder, dict) and depth else None
    for device in devices if isinstance(devices, list) else ():
        if isinstance(device, dict):
            yield device
            yield from _below(device.get("pci_bridge"), depth - 1)


def parse_slot(address: Any) -> Slot:
    """Read a device's property `addr`, which QEMU gives as one number.

    Args:
        address: eight times the device, and the function.

    Raises:
        TopologyError: it is none.
    """
    if not isinstance(address, int) or isinstance(address, bool) or not 0 <= address <= 255:
        raise TopologyError(f"{ascii(address)[:40]} is not the address of a PCI device")
    return Slot(address >> 3, address & 7)


def bridge_of(parent: Any) -> str | None:
    """The id of the bridge whose bus a device is on, from its property `parent_bus`.

    Args:
        parent: such as /machine/peripheral/rp1/rp1.

    Returns:
        The id; None for the root bus.
    """
    if not isinstance(parent, str) or not parent.startswith(_PERIPHERAL):
        return None
    return parent.removeprefix(_PERIPHERAL).split("/", 1)[0] or None


def early_master(path: Sequence[Slot], first: int = SPARE_BUS) -> list[str]:
    """What has a function do DMA before its VM's state has come; only then can the replay be written by it.

    The bridges above it have no bus numbers yet and are given spare ones. The stream overwrites these, as it does the
    configuration address that this leaves behind.

    Args:
        path: the bridges from the root bus downwards, and the function.
        first: the first spare number; of two functions behind different bridges each needs its own.

    Returns:
        Lines for the human monitor.
    """
    lines: list[str] = []
    bus, last = 0, first + len(path) - 2
    for depth, bridge in enumerate(path[:-1]):
        below = first + depth
        here = Bdf(bus, bridge.device, bridge.function)
        lines += port_write(here, _BUS_NUMBERS, (last << 16 | below << 8 | bus).to_bytes(4, "little"))
        bus = below
    function = path[-1]
    here = Bdf(bus, function.device, function.function)
    return lines + port_write(here, _COMMAND, _BUS_MASTER.to_bytes(2, "little"))


def port_write(place: Bdf, offset: int, data: bytes) -> list[str]:
    """Lines for the human monitor that write a register through the ports.

    Args:
        place: the function.
        offset: the register's, below 256.
        data: 1, 2 or 4 bytes within one dword.

    Raises:
        ValueError: the ports cannot do that.
    """
    if offset + len(data) > 256 or len(data) not in _SIZES or offset % 4 + len(data) > 4:
        raise ValueError(f"{len(data)} bytes at {offset:#x} cannot be written through the ports")
    value = int.from_bytes(data, "little")
    return [
        f"o /w {CONFIG_ADDRESS:#x} {place.port(offset):#x}",
        f"o /{_SIZES[len(data)]} {CONFIG_DATA + offset % 4:#x} {value:#x}",
    ]


def port_read(place: Bdf, offset: int, size: int) -> list[str]:
    """Lines for the human monitor that read a register through the ports; the last one's output is the value.

    Args:
        place: the function.
        offset: the register's, below 256.
        size: 1, 2 or 4 bytes within one dword.
    """
    return [
        f"o /w {CONFIG_ADDRESS:#x} {place.port(offset):#x}",
        f"i /{_SIZES[size]} {CONFIG_DATA + offset % 4:#x}",
    ]


def read_value(output: str) -> int:
    """The value that the human monitor has read from a port.

    Args:
        output: such as portw[0x0cfc] = 0x0107.

    Raises:
        TopologyError: there is none.
    """
    found = _VALUE.search(output)
    if found is None:
        raise TopologyError(f"QEMU's monitor did not say what it read: {output[:80]!a}")
    return int(found[1], 16)
