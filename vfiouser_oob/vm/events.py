"""What happens to a VM, and what is to be done about it: the machine's events and effects, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from vfiouser_oob.vm.record import Deed

# Events


class Event:
    """Something that has happened."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Started(Event):
    """A daemon goes on where another one ended."""


@dataclass(frozen=True, slots=True)
class QemuCame(Event):
    """A QEMU has connected its monitor, for the first time or again.

    Args:
        qemu: what tells it from any other.
        runstate: as QEMU names it.
        migration: the migration's status as QEMU names it; empty if there is none.
        tells: it sends events about migrations.
    """

    qemu: str
    runstate: str
    migration: str = ""
    tells: bool = True


@dataclass(frozen=True, slots=True)
class MonitorLost(Event):
    """The monitor's connection has ended; QEMU may live."""


@dataclass(frozen=True, slots=True)
class QemuGone(Event):
    """QEMU has ended: its monitor and its devices' connections have."""


@dataclass(frozen=True, slots=True)
class Stopped(Event):
    """QEMU's event STOP."""


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """QEMU's event RESUME."""


@dataclass(frozen=True, slots=True)
class MigrationIs(Event):
    """QEMU's event MIGRATION.

    Args:
        status: as QEMU names it.
    """

    status: str


@dataclass(frozen=True, slots=True)
class RunstateIs(Event):
    """The answer to `AskRunstate`.

    Args:
        runstate: as QEMU names it.
    """

    runstate: str


@dataclass(frozen=True, slots=True)
class Judged(Event):
    """The answer to `Judge`.

    Args:
        reasons: why this migration cannot go well; none if it can.
    """

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HoldAsked(Event):
    """The carrier says that QEMU wants devices to stand, and waits for the answer."""


@dataclass(frozen=True, slots=True)
class SaveAsked(Event):
    """The carrier waits for the state. All of the monitor's events that came before must have been fed."""


@dataclass(frozen=True, slots=True)
class LoadAsked(Event):
    """The carrier has brought the state, and waits. All of the monitor's events that came before must have been fed."""


@dataclass(frozen=True, slots=True)
class Go(Event):
    """The carrier says that QEMU starts the VM now, if it can say so itself."""


@dataclass(frozen=True, slots=True)
class CarrierReset(Event):
    """The carrier's connection was lost: what it waited for is of no use any more."""


@dataclass(frozen=True, slots=True)
class Did(Event):
    """A function is where `Do` wanted it.

    Args:
        function: its name.
        deed: what was done.
    """

    function: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """What `Do` wanted has failed, and may have been half done.

    Args:
        function: its name.
        deed: what was attempted.
        reason: for people.
    """

    function: str
    deed: Deed
    reason: str


@dataclass(frozen=True, slots=True)
class Due(Event):
    """The next attempt of what has failed is due.

    Args:
        function: its name.
    """

    function: str


@dataclass(frozen=True, slots=True)
class Replayed(Event):
    """The replay was read back.

    Args:
        failure: what is not as it should be; empty if nothing is.
    """

    failure: str = ""


# Effects


class Effect:
    """Something to be done."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Arm(Effect):
    """Record what the functions write, or have them write by messages, so that QEMU knows."""


@dataclass(frozen=True, slots=True)
class Disarm(Effect):
    """End that."""


@dataclass(frozen=True, slots=True)
class Judge(Effect):
    """Find out whether this migration can go well; `Judged` is the answer."""


@dataclass(frozen=True, slots=True)
class Cancel(Effect):
    """Have QEMU give the migration up.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class AskRunstate(Effect):
    """Ask QEMU whether the VM runs; `RunstateIs` is the answer."""


@dataclass(frozen=True, slots=True)
class Do(Effect):
    """Do something to a function; `Did` or `Failed` is the answer.

    Args:
        function: its name.
        deed: what.
    """

    function: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Later(Effect):
    """Feed `Due` after a pause.

    Args:
        function: the function's name.
    """

    function: str


@dataclass(frozen=True, slots=True)
class AnswerHold(Effect):
    """The functions stand."""


@dataclass(frozen=True, slots=True)
class RefuseHold(Effect):
    """They do not.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class AnswerSave(Effect):
    """Give the carrier the state. From then on the source comes back only by QEMU's word."""


@dataclass(frozen=True, slots=True)
class RefuseSave(Effect):
    """Give the carrier no state, in the way that has QEMU give the migration up.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Prepare(Effect):
    """Let the functions of a VM that is yet to come do DMA, so that the replay can be written by them."""


@dataclass(frozen=True, slots=True)
class Replay(Effect):
    """Write what QEMU keeps of the functions, and read it back; `Replayed` is the answer."""


@dataclass(frozen=True, slots=True)
class AnswerLoad(Effect):
    """The carrier's state is loaded."""


@dataclass(frozen=True, slots=True)
class RefuseLoad(Effect):
    """It is not.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class RepairCarrier(Effect):
    """Have QEMU make its end of the carrier anew."""


@dataclass(frozen=True, slots=True)
class Leave(Effect):
    """QEMU has gone: give up what is being done to the functions; what becomes of them is their own rules' affair."""


@dataclass(frozen=True, slots=True)
class Tell(Effect):
    """Tell people.

    Args:
        error: something is wrong, rather than worth knowing.
        text: what.
    """

    error: bool
    text: str
