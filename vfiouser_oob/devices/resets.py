"""The three resets, as one table.

A guest, a VMM and a lost connection each reset a function, and each means something else. Everything that resets a
function reads this table; the documentation prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from vfiouser_oob.devices.base import ResetKind


class MigrationEffect(Enum):
    """What a reset does to a migration; in RUNNING without one, the agent is not even asked."""

    #: The agent resets the function, later if it is away; data under way is dropped, the state is RUNNING.
    ENDS = "ends"
    #: In PRE_COPY the stream begins anew in its next generation; in every other state as ENDS.
    RESTARTS = "restarts"
    #: The next client reads RUNNING. A source whose state the client has, and a destination, stay stopped until then;
    #: any other source is brought back.
    FENCED = "fenced"


class DirtyLogEffect(Enum):
    """What a reset does to dirty logging."""

    #: It goes on; where the agent's log has ended with the reset, everything is dirty once.
    KEPT = "kept"
    FORGOTTEN = "forgotten"


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
        migration: what becomes of the migration.
        dirty_log: what becomes of the client's log of dirty pages.
    """

    config_space: bool
    registers: bool
    bus_master_off: bool
    intx_deasserted: bool
    eventfds_dropped: bool
    maps_dropped: bool
    migration: MigrationEffect
    dirty_log: DirtyLogEffect


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
            migration=MigrationEffect.ENDS,
            dirty_log=DirtyLogEffect.KEPT,
        ),
        # The same, asked for by the guest; the VMM may not even notice.
        ResetKind.FUNCTION_LEVEL: ResetEffect(
            config_space=True,
            registers=True,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=False,
            maps_dropped=False,
            migration=MigrationEffect.RESTARTS,
            dirty_log=DirtyLogEffect.KEPT,
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
            migration=MigrationEffect.FENCED,
            dirty_log=DirtyLogEffect.FORGOTTEN,
        ),
    }
)
