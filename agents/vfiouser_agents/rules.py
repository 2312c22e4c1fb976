"""The rules of a session that are the same for every function: whose migration it is, and what is allowed when.

Whoever implements `Session` asks them before doing anything. What they raise is what the contract (see `contract`) asks
for, with who, what and why in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from .api import AgentState, Capabilities, Descriptor, Phase, Range, Role, Session
from .dirtylog import PageLog
from .errors import Busy, DeviceFailed, Incompatible, InvalidArgument, InvalidState, NoResources, NotFound, Unsupported
from .operations import Op

#: In these a function changes nothing by itself, neither its state nor guest memory.
STILL = frozenset({AgentState.STOPPED, AgentState.LOADING, AgentState.LOADED})
#: Where a function has to be for its state to be saved.
SAVES_IN: Mapping[Phase, Sequence[AgentState]] = {
    Phase.PRECOPY: (AgentState.RUNNING, AgentState.QUIESCED),
    Phase.FINAL: (AgentState.STOPPED, AgentState.LOADED),
}
_COMPARED = ("format_id", "format_version", "vendor", "model", "kind", "firmware")


class Participant(Protocol):
    """A function as far as migrations are concerned; it outlives the sessions."""

    @property
    def state(self) -> AgentState:
        """What it does."""
        ...

    @property
    def role(self) -> Role | None:
        """Its side in the migration that was begun."""
        ...

    @property
    def migration_id(self) -> str:
        """That migration's name."""
        ...

    @property
    def owner(self) -> object | None:
        """The session that began it, unless that was closed."""
        ...

    @property
    def spoiled(self) -> bool:
        """A load was begun and not committed: what it holds is not to be run."""
        ...

    def forget_migration(self) -> None:
        """Leave the migration; what the function does stays."""
        ...


class SessionRules:
    """The rules for the calls of one session.

    Args:
        session: the session; what its function can do is asked each time.
        function: its function.
    """

    def __init__(self, session: Session, function: Participant) -> None:
        self._session = session
        self._function = function

    @property
    def _name(self) -> str:
        return self._session.function_id

    @property
    def _caps(self) -> Capabilities:
        return self._session.caps

    def admit(self, op: Op[..., Any], *, is_open: bool) -> None:
        """What all calls have in common: the migration of another session is in their way.

        Args:
            op: what is called.
            is_open: the session was not closed.

        Raises:
            NotFound: the session is closed.
            Busy: another session migrates the function.
            InvalidState: the session did not begin as the side that the call needs.
        """
        function = self._function
        if not is_open:
            raise NotFound(f"this session of function {self._name} is closed")
        if not op.anybody and function.owner not in (None, self._session):
            raise Busy(f"function {self._name} is in migration {function.migration_id!r} of another session")
        role = op.role
        if role is not None and (function.role is not role or function.owner is not self._session):
            had = function.role.value if function.role and function.owner is self._session else "in no migration"
            raise InvalidState(f"{op} needs a session that began as {role.value}; this one is {had}")

    def migratable(self, migration_id: str) -> None:
        """Before `begin`: it can be migrated at all, and the migration has a name.

        Raises:
            Unsupported: it cannot be migrated.
            InvalidArgument: the name is empty.
        """
        if not self._caps.stop_copy:
            raise Unsupported(f"function {self._name} cannot be migrated: its agent gives no state")
        if not migration_id:
            raise InvalidArgument("a migration needs a name")

    def make_way(self, role: Role, migration_id: str) -> bool:
        """`begin`: leave a migration that is over; one that is not is in the way.

        Returns:
            Whether the function is in this very migration already, so that it is only taken over.

        Raises:
            Busy: another session is in another migration.
            InvalidState: this session is, or one that is gone left the function in the midst of it.
        """
        function = self._function
        if (role, migration_id) == (function.role, function.migration_id):
            return True
        if function.role is None:
            return False
        which = f"function {self._name} is {function.role.value} of {function.migration_id!r}"
        if function.owner is self._session:
            raise InvalidState(f"{which}; end that first")
        if function.owner is not None:
            raise Busy(f"{which}, in another session")
        if function.state is not AgentState.RUNNING:
            raise InvalidState(f"{which}, whose session is gone, and {function.state.value}; end or reset it first")
        function.forget_migration()
        return False

    def working(self) -> None:
        """The function has not failed.

        Raises:
            DeviceFailed: it has.
        """
        if self._function.state is AgentState.ERROR:
            raise DeviceFailed(f"function {self._name} has failed; it must be reset")

    def committed(self) -> None:
        """What the function holds may be run and saved.

        Raises:
            InvalidState: it is half of something.
        """
        if self._function.spoiled:
            way_out = "reset it, or load another one" if self._caps.reset else "reset its device, or load another one"
            raise InvalidState(f"function {self._name} holds a state that was not committed; {way_out}")

    def saveable_piece(self, offset: int, limit: int, phase: Phase) -> None:
        """The arguments of `save` make sense for this function.

        Raises:
            Unsupported: it has no pre-copy.
            InvalidArgument: no such piece can be had of anything.
        """
        if phase is Phase.PRECOPY and not self._caps.precopy:
            raise Unsupported(f"function {self._name} has no pre-copy")
        if limit <= 0 or offset < 0:
            raise InvalidArgument(f"save of {limit} bytes at {offset}: both must be positive")

    def saveable_now(self, phase: Phase) -> None:
        """The function is where its state can be saved.

        Raises:
            DeviceFailed: it has failed.
            InvalidState: it does something else, or holds half of something.
        """
        self.working()
        state = self._function.state
        if state not in SAVES_IN[phase]:
            names = " or ".join(allowed.value for allowed in SAVES_IN[phase])
            raise InvalidState(f"save({phase.value}) needs a function that is {names}, not {state.value}")
        self.committed()

    def loadable(self, total: int | None) -> None:
        """`load_begin`: the function is still, and the state is one that fits.

        Raises:
            DeviceFailed: it has failed.
            InvalidState: it is not still.
            NoResources: the state is too large.
        """
        self.working()
        if self._function.state not in STILL:
            raise InvalidState(f"load_begin needs a function that is stopped, not {self._function.state.value}")
        if total is not None and not 0 <= total <= self._caps.max_state:
            raise NoResources(f"a state of {total} bytes", {"max_state": self._caps.max_state})

    def loadable_piece(self, data: bytes) -> None:
        """`load`: no more than was agreed.

        Raises:
            InvalidArgument: it is more.
        """
        if len(data) > self._caps.max_chunk:
            raise InvalidArgument(f"load of {len(data)} bytes; at most {self._caps.max_chunk} at once")

    def nothing_is_loaded(self) -> InvalidState:
        """The error of a piece or an end of a load that was not begun."""
        return InvalidState(f"nothing is being loaded; function {self._name} is {self._function.state.value}")

    def can_log(self) -> None:
        """It has a log of dirty pages.

        Raises:
            Unsupported: it has none.
        """
        if not self._caps.dirty:
            raise Unsupported(f"function {self._name} has no dirty log")

    def loggable(self, log: PageLog | None, ranges: Sequence[Range]) -> None:
        """`dirty_start`: nothing is logged yet, and it is not too much.

        Raises:
            InvalidState: pages are logged already.
            NoResources: there are too many ranges.
        """
        if log is not None:
            raise InvalidState("dirty pages are logged already; stop that first")
        if len(ranges) > self._caps.max_ranges:
            raise NoResources(f"{len(ranges)} ranges", {"max_ranges": self._caps.max_ranges})

    def resettable(self) -> None:
        """Its agent can reset it.

        Raises:
            Unsupported: it cannot.
        """
        if not self._caps.reset:
            raise Unsupported(f"function {self._name} cannot be reset by its agent")


def logged(log: PageLog | None) -> PageLog:
    """The log, for `dirty_report`.

    Raises:
        InvalidState: there is none.
    """
    if log is None:
        raise InvalidState("dirty pages are not being logged")
    return log


def require_same(source: Descriptor, here: Descriptor, room: int | None = None) -> None:
    """`check`: a state fits where everything is equal; sizes need not be, but must fit.

    Args:
        source: what it is there.
        here: what it is here.
        room: bytes that a state may have here; None: it fits.

    Raises:
        Incompatible: everything in which they differ, one line each, naming both sides.
    """
    reasons = list(_differences(source, here))
    if room is not None and source.state_max > room:
        reasons.append(f"state of {source.state_max} bytes there, room for {room} here")
    if reasons:
        raise Incompatible(reasons)


def _differences(source: Descriptor, here: Descriptor) -> Iterator[str]:
    pairs = [(name.replace("_", " "), getattr(source, name), getattr(here, name)) for name in _COMPARED]
    names = sorted({*source.fingerprint, *here.fingerprint})
    pairs += [(name, source.fingerprint.get(name), here.fingerprint.get(name)) for name in names]
    return (f"{name} is {theirs!r} there and {ours!r} here" for name, theirs, ours in pairs if theirs != ours)
