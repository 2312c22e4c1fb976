"""What a client has of its function while it is attached, as the migration needs it."""

from __future__ import annotations

from dataclasses import dataclass

from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.held_writes import HeldWrites
from vfiouser_oob.migration.inherited import TransferNotes


@dataclass(slots=True)
class AttachedDevice:
    """The device as the attached client has it.

    Args:
        session: the backend's session.
        shadow: configuration space as the client wrote it.
        dirty: its log of dirty pages.
        held: writes of the guest that have not reached it yet.
        notes: where is taken down what its client takes; None: nowhere.
    """

    session: BackendSession
    shadow: ConfigShadow
    dirty: DirtyTracker
    held: HeldWrites
    notes: TransferNotes | None = None
