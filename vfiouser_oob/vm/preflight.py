"""Why a VM could not migrate, as one table over what QEMU and the functions say of themselves.

It is asked at two moments: at rest, by people and scripts who want to know whether it would go well, and when a
migration has begun, to have it given up while that costs nothing. What a manager sets for each migration by itself
(libvirt does) is no more than advice at rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any

from vfiouser_oob.vm.record import CarrierKind, VmPhase
from vfiouser_oob.vm.topology import ECAM_QUERY

#: The oldest QEMU whose client's DMA messages carry the replay.
OLDEST = (11, 1, 0)
CLIENT = "vfio-user-pci"
#: What is asked: a name for the answer, the command, and its arguments.
QUERIES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "capabilities": ("query-migrate-capabilities", {}),
        "migration": ("query-migrate", {}),
        "runstate": ("query-status", {}),
        "objects": ("qom-list", {"path": "/objects"}),
        "devices": ("qom-list", {"path": "/machine/peripheral"}),
        "ecam": ("qom-get", ECAM_QUERY),
    }
)


class Moment(Enum):
    """When it is asked."""

    REST = "rest"
    SETUP = "setup"


class Weight(Enum):
    """What a reason means."""

    #: The migration would fail, or lose something.
    REFUSED = "refused"
    #: It would if nothing changes until then.
    ADVICE = "advice"


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """What is known of one function.

    Args:
        name: its name, which is its id in QEMU.
        attached: QEMU uses it.
        unfit: why it cannot be migrated at all, such as its agent's word or its configuration; empty if it can.
        away: nobody answers at its agent's address.
        by_client: its client migrates it itself, so that nothing is written for it.
        unrecorded: bytes that it may have written and of which QEMU does not know.
        unrecorded_max: how many of them may travel in the state.
        mismatch: why the other side's function cannot take its state; empty if it can, or was not asked.
    """

    name: str
    attached: bool = True
    unfit: str = ""
    away: bool = False
    by_client: bool = False
    unrecorded: int = 0
    unrecorded_max: int = 1 << 62
    mismatch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    """What is known of one VM.

    Args:
        phase: where its machine has it.
        connected: QEMU's monitor is.
        tells: QEMU sends events about migrations.
        version: QEMU's; None if it is not known.
        carrier: what is to carry the state.
        paused: somebody has paused the VM, as whoever saves one into a file does; the switchover's pause is another.
        capabilities: what is on and off for migrations.
        blockers: why QEMU itself would refuse.
        objects: the classes of QEMU's objects, by id.
        devices: the classes of QEMU's devices, by id.
        ecam: whether its machine has ECAM.
        functions: the VM's functions.
    """

    phase: VmPhase = VmPhase.RUNNING
    connected: bool = True
    tells: bool = True
    version: tuple[int, int, int] | None = None
    carrier: CarrierKind = CarrierKind.DBUS_VMSTATE
    paused: bool = False
    capabilities: Mapping[str, bool] = field(default_factory=dict)
    blockers: tuple[str, ...] = ()
    objects: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    ecam: bool = True
    functions: tuple[FunctionFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing in the way.

    Args:
        code: the same in every version, for scripts.
        text: one sentence for people.
        weight: what it means.
    """

    code: str
    text: str
    weight: Weight


#: The subjects of a rule: what its text is filled with, once for each thing that is in the way.
Finder = Callable[[VmFacts], Iterator[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Rule:
    """What may be in the way.

    Args:
        code: of its reasons.
        text: one sentence, with the names that `find` gives.
        find: finds what is.
        rest: what it means at rest; None if nothing.
        setup: what it means when a migration has begun.
        asks: it is about an answer of QEMU's, so it is left out without a monitor.
    """

    code: str
    text: str
    find: Finder
    rest: Weight | None = Weight.REFUSED
    setup: Weight | None = Weight.REFUSED
    asks: bool = False


def _when(holds: Callable[[VmFacts], bool]) -> Finder:
    def find(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
        if holds(facts):
            yield {}

    return find


def _each_function(holds: Callable[[FunctionFacts], Any]) -> Finder:
    def find(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
        for function in facts.functions:
            if holds(function):
                yield {name: getattr(function, name) for name in FunctionFacts.__slots__}

    return find


def _on(capability: str) -> Finder:
    return _when(lambda facts: facts.capabilities.get(capability, False))


def _without_ecam(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
    if not facts.ecam and not all(function.by_client for function in facts.functions):
        yield {}


def _too_old(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
    if facts.version is not None and facts.version < OLDEST:
        yield {"version": ".".join(map(str, facts.version)), "oldest": ".".join(map(str, OLDEST[:2]))}


def _blocked(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
    for blocker in facts.blockers:
        yield {"reason": blocker}


def _not_in_qemu(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
    for function in facts.functions:
        if facts.devices.get(function.name) != CLIENT:
            yield {"name": function.name}


def _strangers(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
    ours = {function.name for function in facts.functions}
    for name, kind in facts.devices.items():
        if kind == CLIENT and name not in ours:
            yield {"name": name}


#: What a carrier is in QEMU: where to look, and for which class.
_CARRIERS: Mapping[CarrierKind, tuple[Callable[[VmFacts], Mapping[str, str]], str]] = MappingProxyType(
    {
        CarrierKind.DBUS_VMSTATE: (lambda facts: facts.objects, "dbus-vmstate"),
        CarrierKind.VHOST_USER_FS: (lambda facts: facts.devices, "vhost-user-fs-pci"),
    }
)


def _no_carrier(facts: VmFacts) -> Iterator[Mapping[str, Any]]:
    look, kind = _CARRIERS[facts.carrier]
    if kind not in look(facts).values():
        yield {"kind": kind}


_ADVICE = Weight.ADVICE
RULES: tuple[Rule, ...] = (
    Rule("no-functions", "No function is configured for this VM.", _when(lambda facts: not facts.functions)),
    Rule(
        "no-monitor",
        "QEMU has not connected its monitor, so the daemon would not learn of a migration: is QEMU running, and was "
        "it started with the monitor's options?",
        _when(lambda facts: not facts.connected),
    ),
    Rule(
        "no-events",
        "QEMU sends no events about migrations, and refused to send them.",
        _when(lambda facts: not facts.tells),
        asks=True,
    ),
    Rule(
        "qemu-too-old",
        "QEMU {version} is too old: the client of QEMU {oldest} is the first whose DMA messages carry what is needed.",
        _too_old,
        asks=True,
    ),
    Rule(
        "barred",
        "The VM came to this host without its functions' state, so there is none that could move on.",
        _when(lambda facts: facts.phase is VmPhase.BARRED),
    ),
    Rule(
        "incoming",
        "The VM has not arrived on this host yet.",
        _when(lambda facts: facts.phase in {VmPhase.INCOMING, VmPhase.LOADING, VmPhase.LOADED}),
    ),
    Rule(
        "no-return-path",
        "The capability return-path is off: should the destination refuse the state, the source would not learn of it, "
        "and the VM would be lost.",
        # A file has no way back. What is paused stands here until somebody starts it, whatever the other side says.
        _when(lambda facts: not facts.paused and not facts.capabilities.get("return-path", False)),
        rest=_ADVICE,
        asks=True,
    ),
    Rule(
        "postcopy",
        "The capability postcopy-ram is on: functions would use guest memory that has not arrived yet, unnoticed.",
        _on("postcopy-ram"),
        rest=_ADVICE,
        asks=True,
    ),
    Rule(
        "background-snapshot",
        "The capability background-snapshot is on: the VM runs on while it is saved, and its functions cannot.",
        _on("background-snapshot"),
        rest=_ADVICE,
        asks=True,
    ),
    Rule(
        "colo",
        "The capability x-colo is on: a VM that runs twice would need its functions twice.",
        _on("x-colo"),
        rest=_ADVICE,
        asks=True,
    ),
    Rule("blocked", "QEMU itself would refuse: {reason}", _blocked, asks=True),
    # When a migration has begun, each function says it of itself.
    Rule(
        "no-ecam",
        "The machine has no ECAM, through which the destination writes what QEMU keeps of the functions: use q35.",
        _without_ecam,
        setup=None,
        asks=True,
    ),
    Rule("no-carrier", "QEMU has no {kind}, which is to carry the functions' state.", _no_carrier, asks=True),
    Rule(
        "function-missing",
        "QEMU has no device vfio-user-pci with the id {name}.",
        _not_in_qemu,
        asks=True,
    ),
    Rule(
        "stranger",
        "QEMU's device {name} is a vfio-user-pci too, but no function of this VM: its state would be lost.",
        _strangers,
        asks=True,
    ),
    Rule(
        "function-detached",
        "Function {name} has no QEMU as its client.",
        _each_function(lambda function: not function.attached),
    ),
    Rule(
        "function-unfit",
        "Function {name} cannot be migrated: {unfit}.",
        _each_function(lambda function: function.unfit),
    ),
    Rule(
        "agent-away",
        "The agent of function {name} does not answer.",
        _each_function(lambda function: function.away),
    ),
    Rule(
        "unrecorded-memory",
        "Function {name} may have written {unrecorded} bytes of guest memory unseen, and only {unrecorded_max} may "
        "travel with its state.",
        _each_function(lambda function: function.unrecorded > function.unrecorded_max),
    ),
    Rule(
        "mismatch",
        "The destination's function {name} cannot take the state: {mismatch}.",
        _each_function(lambda function: function.mismatch),
    ),
)


def judge(facts: VmFacts, moment: Moment) -> tuple[Reason, ...]:
    """Find what is in the way.

    Args:
        facts: what is known.
        moment: when it is asked.

    Returns:
        All reasons, in the order of the table; the VM would migrate if none of them is `REFUSED`.
    """
    found: list[Reason] = []
    for rule in RULES:
        weight = rule.rest if moment is Moment.REST else rule.setup
        if weight is None or (rule.asks and not facts.connected):
            continue
        found += [Reason(rule.code, rule.text.format(**subject), weight) for subject in rule.find(facts)]
    return tuple(found)


def refusals(reasons: tuple[Reason, ...]) -> tuple[str, ...]:
    """The sentences of those reasons that forbid it."""
    return tuple(reason.text for reason in reasons if reason.weight is Weight.REFUSED)


def read_answers(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Read QEMU's answers to `QUERIES`; what does not look as it should is left out.

    Args:
        answers: by the names of the queries.

    Returns:
        Fields of `VmFacts`.
    """
    migration, runstate = answers.get("migration"), answers.get("runstate")
    blockers = migration.get("blocked-reasons", []) if isinstance(migration, dict) else []
    return {
        "capabilities": {
            item["capability"]: item["state"] is True
            for item in _items(answers.get("capabilities"))
            if isinstance(item.get("capability"), str) and "state" in item
        },
        "blockers": tuple(each for each in blockers if isinstance(each, str)) if isinstance(blockers, list) else (),
        "paused": isinstance(runstate, dict) and runstate.get("status") == "paused",
        "objects": _children(answers.get("objects")),
        "devices": _children(answers.get("devices")),
        "ecam": "ecam" in answers,  # only machines that have it know that property; others refuse
    }


def _items(answer: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(answer, list):
        yield from (item for item in answer if isinstance(item, dict))


def _children(answer: Any) -> dict[str, str]:
    """The classes of an object's children: QEMU shows them as properties of the type `child<class>`."""
    found = {}
    for item in _items(answer):
        name, kind = item.get("name"), item.get("type")
        if isinstance(name, str) and isinstance(kind, str) and kind.startswith("child<") and kind.endswith(">"):
            found[name] = kind[len("child<") : -1]
    return found
