"""Everything that the daemon knows about one VM's migration with stock QEMU, as one value.

As in `migration.record`: the machine makes a new record of an old one and an event, and whoever wants to know reads it.
It can be written down, so a daemon can go on where another one ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

VERSION = 1


class VmPhase(Enum):
    """Where the VM is, as its functions have to know it."""

    #: There is no QEMU.
    ABSENT = "absent"
    #: No migration is under way. Whether the vCPUs run is the user's affair.
    RUNNING = "running"
    #: A migration has begun, and the VM runs: what the functions write is recorded.
    ARMED = "armed"
    #: The carrier wants the functions to stand, and waits.
    HOLDING = "holding"
    #: The vCPUs stand, and so do the functions.
    STOPPED = "stopped"
    #: The carrier waits for the state.
    SAVING = "saving"
    #: The carrier has it. The source comes back only by QEMU's word.
    SAVED = "saved"
    #: The migration was completed: the copy runs elsewhere, unless QEMU is told to go on here.
    AWAY = "away"
    #: QEMU waits for the VM.
    INCOMING = "incoming"
    #: The carrier waits until the state is loaded.
    LOADING = "loading"
    #: It is; what QEMU keeps of the functions is being written.
    LOADED = "loaded"
    #: That was read back, and is right.
    READY = "ready"
    #: QEMU has resumed the VM already, and that is not read back yet.
    GOING = "going"
    #: The functions do not have the state that the guest believes in, and must never run.
    BARRED = "barred"


class Migration(Enum):
    """What QEMU says of a migration, in classes."""

    NONE = "none"
    LIVE = "live"
    #: It is being given up.
    ENDING = "ending"
    #: It was given up.
    BACK = "back"
    #: The VM is elsewhere, or about to be, and QEMU does not take it back by itself.
    OVER = "over"


class CarrierKind(Enum):
    """What carries the state in QEMU's stream."""

    DBUS_VMSTATE = "dbus-vmstate"
    VHOST_USER_FS = "vhost-user-fs"


class FunctionPlace(Enum):
    """Where a function is."""

    #: As its client found it: reset, and of no migration.
    FRESH = "fresh"
    RUNS = "runs"
    STANDS = "stands"
    #: It stands, and its state is saved.
    SAVED = "saved"
    #: It stands, with the state of its copy.
    LOADED = "loaded"
    #: It never runs again, and says so to the guest.
    BARRED = "barred"
    #: A step has failed, and nobody knows.
    UNSURE = "unsure"


class Deed(Enum):
    """What is done to a function."""

    STOP = "stop"
    SAVE = "save"
    LOAD = "load"
    RESUME = "resume"
    BAR = "bar"


@dataclass(frozen=True, slots=True)
class VmFunction:
    """One function of the VM.

    Args:
        name: its name, which is its id in QEMU.
        place: where it is.
        doing: what is being done to it; None if nothing is.
        waits: the last attempt has failed, and the next one is not due yet.
    """

    name: str
    place: FunctionPlace = FunctionPlace.FRESH
    doing: Deed | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VmRecord:
    """The record of one VM.

    Args:
        functions: its functions.
        carrier: what carries their state.
        phase: where the VM is.
        migration: what QEMU said last of a migration.
        qemu: what tells this QEMU from any other; empty if there is none.
        connected: its monitor is.
        tells: it sends events about migrations.
        refused: why the migration that is under way must not go through; empty if it may.
        carrier_lost: the carrier's connection was lost, and QEMU does not make it anew by itself.
        last_error: what failed last; empty if nothing did.
    """

    functions: tuple[VmFunction, ...] = ()
    carrier: CarrierKind = CarrierKind.DBUS_VMSTATE
    phase: VmPhase = VmPhase.ABSENT
    migration: Migration = Migration.NONE
    qemu: str = ""
    connected: bool = False
    tells: bool = False
    refused: str = ""
    carrier_lost: bool = False
    last_error: str = ""

    @property
    def hears(self) -> bool:
        """Whether QEMU would have told us of a migration."""
        return self.connected and self.tells

    def function(self, name: str) -> VmFunction | None:
        """The function of that name; None if the VM has none."""
        return next((each for each in self.functions if each.name == name), None)

    def with_function(self, function: VmFunction) -> VmRecord:
        """This record with one function as it is now."""
        return replace(
            self, functions=tuple(function if each.name == function.name else each for each in self.functions)
        )

    def to_json(self) -> str:
        """Write it down."""
        functions = [
            {"name": each.name, "place": each.place.value, "doing": each.doing and each.doing.value}
            for each in self.functions
        ]
        return json.dumps(
            {
                "version": VERSION,
                "functions": functions,
                "carrier": self.carrier.value,
                "phase": self.phase.value,
                "migration": self.migration.value,
                **{name: getattr(self, name) for name in _PLAIN},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> VmRecord:
        """Read what `to_json` wrote.

        Args:
            text: the record as written.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        values = json.loads(text)
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise ValueError(f"a record of a VM of version {version}; this daemon reads {VERSION}")
        try:
            return cls(
                functions=tuple(map(_function, values["functions"])),
                carrier=CarrierKind(values["carrier"]),
                phase=VmPhase(values["phase"]),
                migration=Migration(values["migration"]),
                **{name: _plain(kind, values[name]) for name, kind in _PLAIN.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"a damaged record of a VM: {error}") from error


#: The fields that JSON carries as they are.
_PLAIN: dict[str, type] = {
    "qemu": str,
    "connected": bool,
    "tells": bool,
    "refused": str,
    "carrier_lost": bool,
    "last_error": str,
}


def _plain(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _function(value: Any) -> VmFunction:
    doing = value["doing"]
    return VmFunction(_plain(str, value["name"]), FunctionPlace(value["place"]), None if doing is None else Deed(doing))
