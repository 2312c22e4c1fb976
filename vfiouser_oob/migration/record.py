"""Everything that the daemon knows about one function's migration, as one value.

Nothing else keeps any of it: the machine makes a new record of an old one and an event, the runner carries out what
that asks for, and whoever wants to know reads it. It can be written down, so a daemon can go on where another ended.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Self

from vfiouser_agents.api import Role, Status
from vfiouser_protocol.constants import DeviceState

#: Version 1 did not say whether all of a stream was taken.
VERSION = 2
_UNDERSTOOD = frozenset({1, VERSION})


class Owner(Enum):
    """Who moves the state."""

    V1 = "v1"
    V2 = "v2"
    #: A carrier of its VM, for a client that cannot.
    CARRIER = "carrier"


class Certainty(Enum):
    """Whether the state is what the function really does."""

    KNOWN = "known"
    #: A call's effect is not known; the background finds out.
    UNKNOWN = "unknown"
    #: The agent said that the function is broken; only a reset ends this.
    FAILED = "failed"


class Goal(Enum):
    """What the background works for while the function may not do what it should."""

    RESUME = "resume"
    RESET = "reset"
    #: Find out and touch nothing.
    LEARN = "learn"


class ResetDue(Enum):
    """What the agent still owes of a reset that was answered without it."""

    #: The client's: the device is reset once more behind the agent.
    DEVICE = "device"
    #: The guest's, which it did through the device.
    GUEST = "guest"


@dataclass(frozen=True, slots=True)
class Begun:
    """A migration that was begun at the agent; by this a later session takes it over.

    Args:
        role: which side it is.
        id: its name.
    """

    role: Role
    id: str


@dataclass(frozen=True, slots=True)
class Stream:
    """The state under way.

    Args:
        role: which side it is.
        epoch: how often it was begun anew, since the guest reset the function meanwhile.
        position: bytes that the client took, or gave.
        whole: the client took all of it, trailer included.
    """

    role: Role
    epoch: int = 0
    position: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step failed.

    Args:
        text: for people.
        errno: for the client.
        unsent: nothing of it can have reached the agent.
        unclear: it may have had its effect all the same.
        away: nobody answered.
        fatal: the agent says that the function is broken.
    """

    text: str
    errno: int
    unsent: bool = False
    unclear: bool = False
    away: bool = False
    fatal: bool = False

    def __str__(self) -> str:
        return self.text


class Replaceable:
    """A frozen dataclass, without slots, of which another one is made many times in each step of a migration."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def but(self, changes: Mapping[str, Any]) -> Self:
        """Another one, with other values in some fields; `dataclasses.replace` takes ten times as long.

        Args:
            changes: values by the names of fields.
        """
        known = self.__dataclass_fields__.keys()
        if not changes.keys() <= known:
            raise KeyError(f"{type(self).__name__} has no {', '.join(changes.keys() - known)}")
        other = object.__new__(type(self))
        # Past what keeps it from being changed: nobody has this one yet.
        other.__dict__.update(self.__dict__, **changes)
        return other


@dataclass(frozen=True)
class PlanProgress(Replaceable):
    """What is being carried out: a plan, and how far it is.

    Args:
        plan: its name in `plans.PLANS`.
        origin: the state in which the client asked for it.
        at: the step that is under way.
        touched: the function may not do any more what it did before.
        ahead: the name of a step that goes before the plan's own; empty if there is none.
        rest: the plans that follow if all goes well.
        owner: who asked.
        arc: the plan that failed, of which this undoes what was done; empty for what undoes nothing.
        failure: why that failed.
        missing: what could not be done, and is owed.
        status: what the agent said last.
    """

    plan: str
    origin: DeviceState
    at: int = 0
    touched: bool = False
    ahead: str = ""
    rest: tuple[str, ...] = ()
    owner: Owner | None = None
    arc: str = ""
    failure: Failure | None = None
    missing: Failure | None = None
    status: Status | None = None


@dataclass(frozen=True, kw_only=True)
class MigrationRecord(Replaceable):
    """The record of one function.

    Args:
        state: the last state that was known, as the v2 generation names it.
        certainty: whether that is what the function does.
        unknown_since: since when it is not known, in seconds since 1970.
        p2p: the client has it in the P2P state beside that one, which for the function is the same.
        by_client: the client has asked for what it needs to migrate the function itself, as one that cannot never does.
        owner: who moves the state, until RUNNING or a reset.
        begun: the migration that the agent was told of.
        stream: the state under way, as long as there is any.
        handed: the client has the whole state. This is the point of no return: the function must not run again unless
            the client says so.
        committed: a state was loaded and applied, so what runs next is the migrated function.
        load_failure: why the load cannot succeed any more.
        attached: a client has the device.
        asked: the agent was asked, since the daemon began or a client left a migration behind.
        fenced: its copy may run elsewhere; only a reset frees it.
        paused: it was paused with its VM by a daemon before this one.
        over_link: STOP is a pause without the agent: the function was never stopped, and does what it was told before.
        reset_due: what the agent owes of a reset that was answered without it.
        awaiting: the guest's accesses wait, since the function may stand still and is being brought back.
        goal: what the background works for; None if nothing is left to be settled.
        errand: what is being carried out.
        logging: the agent logs dirty pages for the client.
        blocked: why the function cannot be migrated, for a reason that does not pass by itself.
        last_error: what failed last.
        changes: counts what may have changed the state, so that who waited meanwhile knows that something did.
    """

    state: DeviceState = DeviceState.RUNNING
    certainty: Certainty = Certainty.KNOWN
    unknown_since: float | None = None
    p2p: bool = False
    by_client: bool = False
    owner: Owner | None = None
    begun: Begun | None = None
    stream: Stream | None = None
    handed: bool = False
    committed: bool = False
    load_failure: str | None = None
    attached: bool = False
    asked: bool = False
    fenced: bool = False
    paused: bool = False
    over_link: bool = False
    reset_due: ResetDue | None = None
    awaiting: bool = False
    goal: Goal | None = None
    errand: PlanProgress | None = None
    logging: bool = False
    blocked: str | None = None
    last_error: str | None = None
    changes: int = 0

    @property
    def shown(self) -> str:
        """The state as events and errors name it."""
        return _SHOWN.get(self.certainty, self.state.name)

    @property
    def state_shown(self) -> DeviceState:
        """The state for a client that must never see an error that may pass: the old one while it is not known."""
        return DeviceState.ERROR if self.certainty is Certainty.FAILED else self.state

    @property
    def busy(self) -> bool:
        """Whether it may do anything but run."""
        return self.state is not DeviceState.RUNNING or self.certainty is not Certainty.KNOWN

    @property
    def runs(self) -> bool:
        """Whether the function is known to run."""
        return self.certainty is Certainty.KNOWN and (self.state in RUNS or self.over_link)

    @property
    def at_agent(self) -> DeviceState:
        """Where the agent ought to have the function: a pause without it, it knows nothing of."""
        return DeviceState.RUNNING if self.over_link else self.state

    @property
    def saves(self) -> bool:
        """Whether state is being saved."""
        return self.stream is not None and self.stream.role is Role.SOURCE

    @property
    def loads(self) -> bool:
        """Whether state is being loaded."""
        return self.stream is not None and self.stream.role is Role.DESTINATION

    @property
    def moved_by_client(self) -> bool:
        """Whether nobody else has to move it: its client does, or will."""
        return self.by_client or self.owner in (Owner.V1, Owner.V2)

    @property
    def elsewhere(self) -> bool:
        """Whether its state may live elsewhere, or is that of another: it must not be started on our own."""
        return self.handed or self.committed

    def to_json(self) -> str:
        """Write it down."""
        values = {name: _written(getattr(self, name)) for name in _NAMES}
        return json.dumps({"version": VERSION, **{name: value for name, value in values.items() if value is not None}})

    @classmethod
    def from_json(cls, text: str) -> MigrationRecord:
        """Read what `to_json` wrote.

        Args:
            text: the record as written.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        values = json.loads(text)
        version = values.get("version") if isinstance(values, dict) else None
        if version not in _UNDERSTOOD:
            raise ValueError(f"a migration record of version {version}; this daemon reads {VERSION}")
        try:
            return cls(**{name: _read(name, value) for name, value in values.items() if name != "version"})
        except (KeyError, TypeError) as error:
            raise ValueError(f"a damaged migration record: {error}") from error


#: States in which the guest may use the function.
RUNS = frozenset({DeviceState.RUNNING, DeviceState.PRE_COPY})
#: What stands for a state that is not known, or that only a reset ends this of.
_SHOWN: Mapping[Certainty, str] = MappingProxyType({Certainty.UNKNOWN: "UNKNOWN", Certainty.FAILED: "ERROR"})
_NAMES = tuple(field.name for field in fields(MigrationRecord))


def _written(value: Any) -> Any:
    """A field as JSON carries it; an agent's answer is not kept, for it would be old."""
    match value:
        case DeviceState():
            return value.name
        case Enum():
            return value.value
        case Begun() | Stream() | Failure() | PlanProgress():
            return {item.name: _written(getattr(value, item.name)) for item in fields(value)}
        case tuple():
            return list(value)
        case Status():
            return None
    return value


def _read_parts(cls: Callable[..., Any], readers: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        return cls(**{name: readers.get(name, _as_it_is)(item) for name, item in value.items() if item is not None})

    return read


def _as_it_is(value: Any) -> Any:
    return value


_read_failure = _read_parts(Failure, {})
#: How a field is read that JSON does not carry as it is.
_READERS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "state": DeviceState.__getitem__,
        "certainty": Certainty,
        "owner": Owner,
        "goal": Goal,
        "reset_due": ResetDue,
        "begun": _read_parts(Begun, {"role": Role}),
        "stream": _read_parts(Stream, {"role": Role}),
        "errand": _read_parts(
            PlanProgress,
            {
                "origin": DeviceState.__getitem__,
                "rest": tuple,
                "owner": Owner,
                "failure": _read_failure,
                "missing": _read_failure,
            },
        ),
    }
)


def _read(name: str, value: Any) -> Any:
    if name not in _NAMES:
        raise KeyError(f"unknown field {name!r}")
    return _READERS.get(name, _as_it_is)(value)
