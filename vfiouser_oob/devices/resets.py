"""The resets, as one table.

A guest, a VMM, a lost connection and a new client each reset a function, and each means something else. The backend of
models does what a row says of the device, and the migration what it says of the migration. A real function and the
device of another server are reset by their kernel and their server; a row says what they are to make of it.
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


class MemoryEffect(Enum):
    """What a reset does to device memory that clients map."""

    #: It stays as it is.
    KEPT = "kept"
    #: It reads as zeros; whoever has it mapped still reaches it.
    CLEARED = "cleared"
    #: It is other memory, all zeros; what the last client has mapped reaches nothing any more.
    RENEWED = "renewed"


@dataclass(frozen=True, slots=True)
class ResetEffect:
    """What one reset does.

    Args:
        config_space: config space goes to its power-on values (bus mastering and interrupts off with it).
        registers: the device's own registers and queues go to their power-on values.
        memory: what becomes of device memory that clients map.
        bus_master_off: bus mastering is switched off.
        intx_deasserted: the INTx line is released.
        eventfds_dropped: the client's eventfds are closed.
        maps_dropped: the client's memory is unmapped and its files closed.
        migration: what becomes of the migration.
        dirty_log: what becomes of the client's log of dirty pages.
    """

    config_space: bool
    registers: bool
    memory: MemoryEffect
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
            memory=MemoryEffect.CLEARED,
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
            memory=MemoryEffect.CLEARED,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=False,
            maps_dropped=False,
            migration=MigrationEffect.RESTARTS,
            dirty_log=DirtyLogEffect.KEPT,
        ),
        # Everything of the client goes, everything of the device stays: an agent may still save it. With bus mastering
        # off, addresses that the guest left in the registers are used no more.
        ResetKind.CONNECTION_LOST: ResetEffect(
            config_space=False,
            registers=False,
            memory=MemoryEffect.KEPT,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=True,
            maps_dropped=True,
            migration=MigrationEffect.FENCED,
            dirty_log=DirtyLogEffect.FORGOTTEN,
        ),
        # Before the first reply to the next client, unless `retain_state` is set: nothing is left of the one before.
        ResetKind.NEW_CLIENT: ResetEffect(
            config_space=True,
            registers=True,
            memory=MemoryEffect.RENEWED,
            bus_master_off=True,
            intx_deasserted=True,
            eventfds_dropped=True,
            maps_dropped=True,
            migration=MigrationEffect.ENDS,
            dirty_log=DirtyLogEffect.FORGOTTEN,
        ),
    }
)
