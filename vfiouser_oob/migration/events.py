"""What happens to a migration, and what is to be done about it: the machine's events and effects, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vfiouser_agents.api import Outcome, Status
from vfiouser_oob.migration.plans import Step, TimeAllotment
from vfiouser_oob.migration.record import Begun, Failure, Owner

# Events


class MigrationEvent:
    """Something that has happened."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Started(MigrationEvent):
    """A daemon goes on where another one ended.

    Args:
        client: the client is there as before, and has noticed nothing; what is left of its migration goes on.
        position: bytes of a state that is being saved which that client took.
        whole: it took all of it.
    """

    client: bool = False
    position: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class TakenOver(MigrationEvent):
    """The client asks for something now that the background may be working for.

    Args:
        under_way: a call of the background may have been sent already.
    """

    under_way: bool


@dataclass(frozen=True, slots=True)
class Requested(MigrationEvent):
    """The client asks for another state.

    Args:
        plans: the arcs that lead there, by name, at least one.
        owner: the generation that asks.
    """

    plans: tuple[str, ...]
    owner: Owner


@dataclass(frozen=True, slots=True)
class P2pNamed(MigrationEvent):
    """The client calls the state that it has reached by its P2P name, or by its own again.

    Args:
        p2p: by which.
    """

    p2p: bool


@dataclass(frozen=True, slots=True)
class ClientMigrates(MigrationEvent):
    """The client asks for what it needs to migrate the function itself."""


@dataclass(frozen=True, slots=True)
class StepTaken(MigrationEvent):
    """The step that was under way was taken.

    Args:
        did: whether there was anything to do.
        status: what the agent said, if it was asked.
        migrated: whether a migration may have left the function where the agent says that it is.
    """

    did: bool = True
    status: Status | None = None
    migrated: bool = True


@dataclass(frozen=True, slots=True)
class StepRefused(MigrationEvent):
    """The step that was under way was not taken: the agent's refusal, a deadline, a lost contact, the device's error.

    Args:
        failure: what is known of it.
    """

    failure: Failure


@dataclass(frozen=True, slots=True)
class Abandoned(MigrationEvent):
    """The client vanished, or its time was up, in the middle of a step."""


@dataclass(frozen=True, slots=True)
class ClientCame(MigrationEvent):
    """A client has the device."""


@dataclass(frozen=True, slots=True)
class FitWanted(MigrationEvent):
    """The function has to be fit for its client, before the first reply."""


@dataclass(frozen=True, slots=True)
class ClientWent(MigrationEvent):
    """The client has gone.

    Args:
        logged: the agent logs dirty pages that nobody will ask for any more.
    """

    logged: bool


@dataclass(frozen=True, slots=True)
class ResetAsked(MigrationEvent):
    """The client resets the device."""


@dataclass(frozen=True, slots=True)
class GuestReset(MigrationEvent):
    """The guest has reset the function through configuration space.

    Args:
        restarts: a stream that is saved while the function runs begins anew.
    """

    restarts: bool


@dataclass(frozen=True, slots=True)
class AttemptDue(MigrationEvent):
    """The background makes an attempt."""


@dataclass(frozen=True, slots=True)
class Probed(MigrationEvent):
    """The agent was asked where a function is that no migration of ours is about.

    Args:
        status: what it said.
        migrated: whether a migration may have left it there.
    """

    status: Status
    migrated: bool


@dataclass(frozen=True, slots=True)
class Blocked(MigrationEvent):
    """The agent cannot do what is needed, and that does not pass by itself.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Heard(MigrationEvent):
    """The agent says where a function is that nobody is changing.

    Args:
        status: what it said when it was asked.
    """

    status: Status


@dataclass(frozen=True, slots=True)
class DeviceBroke(MigrationEvent):
    """The agent says that the function is broken.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class BeganAtAgent(MigrationEvent):
    """The agent was told of a migration, or was not after all.

    Args:
        begun: the migration; None if there is none.
    """

    begun: Begun | None


@dataclass(frozen=True, slots=True)
class Moved(MigrationEvent):
    """State was moved.

    Args:
        position: bytes of the stream that the client took or gave so far.
        handed: the client has all of it.
    """

    position: int
    handed: bool = False


@dataclass(frozen=True, slots=True)
class LoadFailed(MigrationEvent):
    """What the client gave cannot become this function's state.

    Args:
        reason: for people.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Logging(MigrationEvent):
    """The agent logs dirty pages for the client, or not any more."""

    on: bool


# Effects


class Effect:
    """Something to be done."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Take(Effect):
    """Take a step; `StepTaken` or `StepRefused` follows.

    Args:
        step: which.
        manner: how the time is divided.
        pausing: it belongs to a mere pause of the VM, for which an agent that is away is not waited for.
    """

    step: Step
    manner: TimeAllotment
    pausing: bool = False


@dataclass(frozen=True, slots=True)
class Answer(Effect):
    """Whoever asked gets an answer.

    Args:
        text: why it failed; None if it did not.
        errno: the error number for the client.
    """

    text: str | None = None
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Settle(Effect):
    """Work for the record's goal in the background, from now on."""


@dataclass(frozen=True, slots=True)
class Cease(Effect):
    """Work for it no more."""


@dataclass(frozen=True, slots=True)
class Leave(Effect):
    """End what was begun at the agent, in the background, since the function runs in any case.

    Args:
        outcome: how it ended.
    """

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CeaseLeaving(Effect):
    """Leave that to what comes."""


@dataclass(frozen=True, slots=True)
class Probe(Effect):
    """Ask the agent where the function is, in the background."""


@dataclass(frozen=True, slots=True)
class CeaseProbing(Effect):
    """What the client wants goes first."""


@dataclass(frozen=True, slots=True)
class Drop(Effect):
    """Stop moving state, and forget what is buffered."""


@dataclass(frozen=True, slots=True)
class HaltSource(Effect):
    """What was saved must not be taken for the function's state any more."""


@dataclass(frozen=True, slots=True)
class ReleaseSource(Effect):
    """Fetching goes on as before."""


@dataclass(frozen=True, slots=True)
class LetGo(Effect):
    """No session is needed.

    Args:
        force: also while something still uses it.
    """

    force: bool = False


@dataclass(frozen=True, slots=True)
class StopLogging(Effect):
    """Tell the agent, in the background, that nobody will ask for dirty pages."""


@dataclass(frozen=True, slots=True)
class Tell(Effect):
    """The state has changed.

    Args:
        old: as people read it.
        new: as people read it.
        why: for people.
    """

    old: str
    new: str
    why: str


@dataclass(frozen=True, slots=True)
class Note(Effect):
    """Something went wrong, and was dealt with.

    Args:
        text: for people.
        fields: what belongs to it.
    """

    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
