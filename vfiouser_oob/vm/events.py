"""What happens to a VM, and what is to be done about it: the machine's events and effects, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from vfiouser_oob.vm.record import CarrierKind, Deed

# Events


class VmEvent:
    """Something that has happened."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class DaemonStarted(VmEvent):
    """A daemon goes on where another one ended."""


@dataclass(frozen=True, slots=True)
class QemuCame(VmEvent):
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
class MonitorLost(VmEvent):
    """The monitor's connection has ended; QEMU may live."""


@dataclass(frozen=True, slots=True)
class QemuGone(VmEvent):
    """QEMU has ended: its monitor and its devices' connections have."""


@dataclass(frozen=True, slots=True)
class Stopped(VmEvent):
    """QEMU's event STOP."""


@dataclass(frozen=True, slots=True)
class Resumed(VmEvent):
    """QEMU's event RESUME."""


@dataclass(frozen=True, slots=True)
class MigrationIs(VmEvent):
    """QEMU's event MIGRATION.

    Args:
        status: as QEMU names it.
    """

    status: str


@dataclass(frozen=True, slots=True)
class RunstateIs(VmEvent):
    """The answer to `AskRunstate`.

    Args:
        runstate: as QEMU names it.
    """

    runstate: str


@dataclass(frozen=True, slots=True)
class Judged(VmEvent):
    """The answer to `Judge`.

    Args:
        reasons: why this migration cannot go well; none if it can.
    """

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CarrierCame(VmEvent):
    """QEMU has connected its end of a carrier, or asks through it: that is the one which carries the state.

    Args:
        kind: which.
    """

    kind: CarrierKind


@dataclass(frozen=True, slots=True)
class CarrierHolds(VmEvent):
    """The carrier says that QEMU wants devices to stand, and waits for the answer."""


@dataclass(frozen=True, slots=True)
class CarrierSaves(VmEvent):
    """The carrier waits for the state. All of the monitor's events that came before must have been fed."""


@dataclass(frozen=True, slots=True)
class CarrierLoads(VmEvent):
    """The carrier has brought the state, and waits. All of the monitor's events that came before must have been fed."""


@dataclass(frozen=True, slots=True)
class CarrierGoes(VmEvent):
    """The carrier says that QEMU starts the VM now, if it can say so itself."""


@dataclass(frozen=True, slots=True)
class CarrierReset(VmEvent):
    """The carrier's connection was lost: what it waited for is of no use any more."""


@dataclass(frozen=True, slots=True)
class Did(VmEvent):
    """A function is where `DoDeed` wanted it.

    Args:
        function: its name.
        deed: what was done.
    """

    function: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Failed(VmEvent):
    """What `DoDeed` wanted has failed, and may have been half done.

    Args:
        function: its name.
        deed: what was attempted.
        reason: for people.
    """

    function: str
    deed: Deed
    reason: str


@dataclass(frozen=True, slots=True)
class Due(VmEvent):
    """The next attempt of what has failed is due.

    Args:
        function: its name.
    """

    function: str


@dataclass(frozen=True, slots=True)
class Replayed(VmEvent):
    """The replay was read back.

    Args:
        failure: what is not as it should be; empty if nothing is.
    """

    failure: str = ""


# Effects


class VmEffect:
    """Something to be done."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Arm(VmEffect):
    """Record what the functions write, or have them write by messages, so that QEMU knows."""


@dataclass(frozen=True, slots=True)
class Disarm(VmEffect):
    """End that."""


@dataclass(frozen=True, slots=True)
class Judge(VmEffect):
    """Find out whether this migration can go well; `Judged` is the answer."""


@dataclass(frozen=True, slots=True)
class Cancel(VmEffect):
    """Have QEMU give the migration up.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class AskRunstate(VmEffect):
    """Ask QEMU whether the VM runs; `RunstateIs` is the answer."""


@dataclass(frozen=True, slots=True)
class DoDeed(VmEffect):
    """Do something to a function; `Did` or `Failed` is the answer.

    Args:
        function: its name.
        deed: what.
    """

    function: str
    deed: Deed


@dataclass(frozen=True, slots=True)
class Later(VmEffect):
    """Feed `Due` after a pause.

    Args:
        function: the function's name.
    """

    function: str


@dataclass(frozen=True, slots=True)
class AnswerHold(VmEffect):
    """The functions stand."""


@dataclass(frozen=True, slots=True)
class RefuseHold(VmEffect):
    """They do not.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class AnswerSave(VmEffect):
    """Give the carrier the state. From then on the source comes back only by QEMU's word."""


@dataclass(frozen=True, slots=True)
class RefuseSave(VmEffect):
    """Give the carrier no state, in the way that has QEMU give the migration up.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Prepare(VmEffect):
    """Let the functions of a VM that is yet to come do DMA, so that the replay can be written by them."""


@dataclass(frozen=True, slots=True)
class Replay(VmEffect):
    """Write what QEMU keeps of the functions, and read it back; `Replayed` is the answer."""


@dataclass(frozen=True, slots=True)
class AnswerLoad(VmEffect):
    """The carrier's state is loaded."""


@dataclass(frozen=True, slots=True)
class RefuseLoad(VmEffect):
    """It is not.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class RepairCarrier(VmEffect):
    """Have QEMU make its end of the carrier anew."""


@dataclass(frozen=True, slots=True)
class LeaveFunctions(VmEffect):
    """QEMU has gone: give up what is being done to the functions; their own rules decide what happens to them."""


@dataclass(frozen=True, slots=True)
class TellPeople(VmEffect):
    """Tell people.

    Args:
        error: something is wrong, rather than worth knowing.
        text: what.
    """

    error: bool
    text: str
