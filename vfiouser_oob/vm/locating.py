"""Asks a QEMU where its functions are: on the guest's PCI bus, and in the machine."""

from __future__ import annotations

from collections.abc import Iterable

from vfiouser_oob.vm.bundle import Whereabouts
from vfiouser_oob.vm.monitor import RefusedError
from vfiouser_oob.vm.movable import VmMonitor
from vfiouser_oob.vm.topology import (
    DEPTH_MAX,
    Slot,
    TopologyError,
    bridge_of,
    early_master,
    find_device,
    parse_slot,
)

_PERIPHERAL = "/machine/peripheral"
#: Where a machine with ECAM says at which address the guest has it.
_ECAM = {"path": "/machine/q35", "property": "MCFG"}
_ADDRESS_MAX = (1 << 64) - 1


async def locate(monitor: VmMonitor, names: Iterable[str]) -> dict[str, Whereabouts]:
    """Find out where functions are in a guest; those that are not there are left out.

    Args:
        monitor: its QEMU's.
        names: the functions'.

    Raises:
        MonitorError: QEMU did not answer.
    """
    answer = await monitor.execute("query-pci")
    ecam = await _ecam(monitor)
    found: dict[str, Whereabouts] = {}
    for name in names:
        try:
            found[name] = Whereabouts(find_device(answer, name), ecam)
        except TopologyError:
            continue
    return found


async def _ecam(monitor: VmMonitor) -> int | None:
    """Where ECAM begins; None if the machine has none, or the guest has not turned it on."""
    try:
        base = await monitor.execute("qom-get", _ECAM)
    except RefusedError:
        return None
    return base if isinstance(base, int) and 0 < base < _ADDRESS_MAX else None


async def let_master(monitor: VmMonitor, name: str) -> None:
    """Let a function do DMA before its VM has come.

    Args:
        monitor: its QEMU's, which waits for the VM.
        name: the function's.

    Raises:
        MonitorError: QEMU did not answer, or has no such function.
        TopologyError: QEMU does not say where it is.
    """
    path: list[Slot] = []
    bridge: str | None = name
    while bridge is not None:
        if len(path) > DEPTH_MAX:
            raise TopologyError(f"more than {DEPTH_MAX} bridges above {name}")
        place = {"path": f"{_PERIPHERAL}/{bridge}"}
        path.insert(0, parse_slot(await monitor.execute("qom-get", {**place, "property": "addr"})))
        bridge = bridge_of(await monitor.execute("qom-get", {**place, "property": "parent_bus"}))
    for line in early_master(path):
        await monitor.hmp(line)
