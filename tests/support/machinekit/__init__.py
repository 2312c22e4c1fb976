"""A function's agent as a toy, and an interpreter of the machine's effects: the machine without sockets and clocks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from vfiouser_agents.api import AgentState, Role, Status
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration.machine import advance
from vfiouser_oob.migration.plans import PLANS, Do, FailureOutcome, arc_name
from vfiouser_oob.migration.record import Begun, Failure, MigrationRecord, Owner
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.migration_v2 import require_path


class Fate(Enum):
    """What becomes of a step."""

    DONE = "done"
    REFUSED = "refused"
    #: The agent was not reached.
    AWAY = "away"
    #: It was sent, and nobody knows more: it had its effect, or had not.
    LOST_DONE = "lost, done"
    LOST = "lost"
    #: Whoever asked has gone in the middle of it.
    GIVEN_UP = "given up"
    GIVEN_UP_DONE = "given up, done"
    #: The function is broken.
    BROKEN = "broken"


FAILURES = {
    Fate.REFUSED: Failure("refused", errno.EBUSY),
    Fate.AWAY: Failure("nobody is there", errno.ENOTCONN, unsent=True, away=True),
    Fate.LOST: Failure("lost", errno.EIO, unclear=True),
    Fate.LOST_DONE: Failure("lost", errno.EIO, unclear=True),
    Fate.BROKEN: Failure("broken", errno.EIO, fatal=True),
}
#: Fates in which a step has its effect.
EFFECTIVE = frozenset({Fate.DONE, Fate.LOST_DONE, Fate.GIVEN_UP_DONE})
GONE = frozenset({Fate.GIVEN_UP, Fate.GIVEN_UP_DONE})
#: Steps that an agent takes.
AT_AGENT = frozenset(
    {
        *(Do.QUIESCE, Do.STOP, Do.RESUME, Do.BEGIN_SOURCE, Do.BEGIN_DESTINATION, Do.OPEN_STREAM, Do.FINISH_STREAM),
        *(Do.RESTART_STREAM, Do.REOPEN_STREAM, Do.ABORT, Do.END, Do.END_CANCELLED, Do.LOAD_BEGIN, Do.LOAD_COMMIT),
        *(Do.ASK, Do.RESET_AGENT),
    }
)
Script = Callable[[Do], Fate]


def all_well(do: Do) -> Fate:
    """Every step is taken."""
    return Fate.DONE


@dataclass
class Side:
    """One function: its record, and what it really does.

    Args:
        record: what the daemon knows.
        agent: what the function does.
        live: it has the guest's state.
        whole: what was written to it is a whole stream.
    """

    record: MigrationRecord = field(default_factory=MigrationRecord)
    agent: AgentState = AgentState.RUNNING
    live: bool = True
    whole: bool = False
    taken: list[Do] = field(default_factory=list)
    effects: list[ev.Effect] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self.agent is AgentState.RUNNING

    def feed(self, event: ev.MigrationEvent) -> ev.Take | ev.Answer | None:
        """Take an event; returns what an errand needs next."""
        self.record, effects = advance(self.record, event, 1000.0)
        self.effects += effects
        due = None
        for effect in effects:
            if isinstance(effect, ev.Take | ev.Answer):
                due = effect
            elif isinstance(effect, ev.Leave):
                self.feed(ev.BeganAtAgent(None))
        return due

    def play(self, event: ev.MigrationEvent, script: Script = all_well) -> ev.Answer | None:
        """Take an event and the steps that follow; returns the answer, None if whoever asked has gone."""
        due = self.feed(event)
        while isinstance(due, ev.Take):
            due = self._step(due.step.do, script(due.step.do))
        return due

    def go_on(self, script: Script = all_well) -> ev.Answer | None:
        """Another daemon goes on under the client, with nothing but the record."""
        self.record = MigrationRecord.from_json(self.record.to_json())
        stream = self.record.stream
        return self.play(ev.Started(True, self.position, stream is not None and stream.whole), script)

    def die(self, event: ev.MigrationEvent, steps: int, *, done: bool) -> bool:
        """Take an event and so many steps, and be killed in the next one.

        Args:
            event: what is asked for.
            steps: how many are taken.
            done: the next one has its effect all the same.

        Returns:
            Whether there was a next one; if not, all was done, and nobody was killed.
        """
        due = self.feed(event)
        for _ in range(steps):
            if isinstance(due, ev.Take):
                due = self._step(due.step.do, Fate.DONE)
        if not isinstance(due, ev.Take):
            return False
        do = due.step.do
        if do in (Do.BEGIN_SOURCE, Do.BEGIN_DESTINATION):
            self.feed(ev.BeganAtAgent(Begun(Role.SOURCE if do is Do.BEGIN_SOURCE else Role.DESTINATION, "m")))
        spoiled = self.record.load_failure is not None or (self.position and not self.whole)
        if done and not (do is Do.LOAD_COMMIT and spoiled):
            self._do(do)
        return True

    def _step(self, do: Do, fate: Fate) -> ev.Take | ev.Answer | None:
        self.taken.append(do)
        if do not in AT_AGENT and fate not in GONE and fate is not Fate.DONE:
            fate = Fate.REFUSED
        background = self.record.errand is not None and PLANS[self.record.errand.plan].fall is FailureOutcome.TRY_AGAIN
        if do in (Do.BEGIN_SOURCE, Do.BEGIN_DESTINATION) and fate is not Fate.AWAY:
            self.feed(ev.BeganAtAgent(Begun(Role.SOURCE if do is Do.BEGIN_SOURCE else Role.DESTINATION, "m")))
        spoiled = self.record.load_failure is not None or (self.position and not self.whole)
        if do is Do.LOAD_COMMIT and spoiled:  # nothing is asked of the agent then
            fate = Fate.GIVEN_UP if fate in GONE else Fate.REFUSED
        if fate in EFFECTIVE:
            self._do(do)
        if fate is Fate.BROKEN:
            self.agent = AgentState.ERROR
        if fate in GONE:
            # The background's goal stands, and nobody can give it up.
            return self.feed(ev.StepRefused(FAILURES[Fate.LOST])) if background else self.feed(ev.Abandoned())
        if fate is Fate.DONE:
            return self.feed(ev.StepTaken(status=Status(self.agent) if do is Do.ASK else None))
        return self.feed(ev.StepRefused(FAILURES[fate]))

    @property
    def position(self) -> int:
        """Bytes of the stream."""
        return 0 if self.record.stream is None else self.record.stream.position

    def _do(self, do: Do) -> None:
        match do:
            case Do.QUIESCE:
                self.agent = AgentState.QUIESCED
            case Do.STOP:
                self.agent = AgentState.STOPPED
            case Do.RESUME:
                self.agent = AgentState.RUNNING
            case Do.LOAD_BEGIN:
                self.agent, self.live, self.whole = AgentState.LOADING, False, False
            case Do.LOAD_COMMIT:
                self.live = self.whole
                self.agent = AgentState.LOADED if self.whole else AgentState.STOPPED
            case Do.RESET_AGENT:
                self.agent, self.live = AgentState.RUNNING, False
                self.feed(ev.BeganAtAgent(None))
            case Do.END | Do.END_CANCELLED:
                self.feed(ev.BeganAtAgent(None))

    # Clients

    def come(self, script: Script = all_well) -> ev.Answer | None:
        """A client comes."""
        self.feed(ev.ClientCame())
        return self.play(ev.FitWanted(), script)

    def request(self, target: DeviceState, script: Script = all_well, owner: Owner = Owner.V2) -> ev.Answer | None:
        """The client asks for a state, on a legal path."""
        self.feed(ev.TakenOver(under_way=False))
        arcs = require_path(self.record.state_shown, target)
        if not arcs:
            return ev.Answer()
        return self.play(ev.Requested(tuple(arc_name(arc.source, arc.target) for arc in arcs), owner), script)

    def settle(self, attempts: int = 5) -> None:
        """The background works with an agent that answers."""
        for _ in range(attempts):
            if self.record.goal is not None:
                self.play(ev.AttemptDue())
