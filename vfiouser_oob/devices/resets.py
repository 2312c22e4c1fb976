"""The three resets, as one table.

A guest, a VMM and a lost connection each reset a function, and each means something else. Everything that resets a
function reads this table; the documentation prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vfiouser_oob.devices.base import ResetKind


@dataclass(frozen=True, slots=True)
class ResetEffect:
    """What one reset does.

    Args:
        config_space: config space goes to its power-on values (bus mastering and interrupts off with it).
        registers: the device's own registers and queues go to their power-on values.
        bus_master_off: bus mastering is switched off.
        intx_deasserted: the INTx line is released.
        eventfds_dropped: the client's eventfds are closed.
        maps_dropped: the client's memory is unmapped and its files closed.
    """

    config_space: bool
    registers: bool
    bus_master_off: bool
    intx_deasserted: bool
    eventfds_dropped: bool
    maps_dropped: bool


RESETS: Mapping[ResetKind, ResetEffect] = MappingProxyType(
    {
        # Power-on state; the connection, its mappings and its eventfds stay (QEMU re-sends INTx only).
        ResetKind.DEVICE: ResetEffect(
            config_space=True,
            registers=True,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=False,
            maps_dropped=False,
        ),
        # The same, asked for by the guest; the VMM may not even notice.
        ResetKind.FUNCTION_LEVEL: ResetEffect(
            config_space=True,
            registers=True,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=False,
            maps_dropped=False,
        ),
        # Everything of the client goes, everything of the device stays; with bus mastering off, addresses that the old
        # guest left in the registers are never used with the next client's memory.
        ResetKind.CONNECTION_LOST: ResetEffect(
            config_space=False,
            registers=False,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=True,
            maps_dropped=True,
        ),
    }
)
