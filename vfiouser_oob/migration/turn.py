"""One event's way through the tables, and what every rule may do on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from vfiouser_agents.api import Outcome, Status
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration import plans
from vfiouser_oob.migration.fence import AS_STATE
from vfiouser_oob.migration.plans import PLANS, Do, FailureOutcome, Step, Then, Undo, steps_of
from vfiouser_oob.migration.record import RUNS, Certainty, Failure, Goal, MigrationRecord, PlanProgress
from vfiouser_protocol.constants import DeviceState

#: What is true once the steps of a plan were taken.
ThenRule: TypeAlias = "Callable[[Turn, PlanProgress], None]"
#: What becomes of a plan of which a step failed.
FallRule: TypeAlias = "Callable[[Turn, PlanProgress, Step, Failure], None]"


@dataclass(frozen=True, slots=True)
class Rules:
    """The interpreter's tables.

    Args:
        then: what is true once all steps of a plan were taken.
        fall: what becomes of a plan of which a step failed.
        given_up: what becomes of one that was given up in the middle of a step.
        learned: what the record learns when a step was taken.
    """

    then: Mapping[Then, ThenRule]
    fall: Mapping[FailureOutcome, FallRule]
    given_up: Mapping[FailureOutcome, ThenRule]
    learned: Mapping[Do, Callable[[Turn, ev.StepTaken], None]]


def goal_of(record: MigrationRecord, undo: Undo) -> Goal:
    """What to work for in the background; a function whose state may live elsewhere is only asked about.

    Args:
        record: what is known.
        undo: what is left to be undone.
    """
    goal = Goal.RESUME if undo is Undo.LEARN else plans.GOALS[undo]
    return Goal.LEARN if goal is Goal.RESUME and record.elsewhere else goal


class Turn:
    """One event's way through the tables: the record as it changes, and what is to be done.

    Args:
        record: before the event.
        now: when it happened, in seconds since 1970.
        rules: the interpreter's tables.
    """

    def __init__(self, record: MigrationRecord, now: float, rules: Rules) -> None:
        self.rules = rules
        self.record = record
        self.effects: list[ev.Effect] = []
        self.now = now

    def set(self, **changes: Any) -> None:
        """Change the record."""
        self.record = self.record.but(changes)

    def do(self, effect: ev.Effect) -> None:
        """Add something to be done."""
        self.effects.append(effect)

    # What the function does

    def arrive(self, state: DeviceState, why: str, *, over_link: bool = False) -> None:
        """The function is in this state: known.

        Args:
            state: which.
            why: for people.
            over_link: it is a pause without the agent.
        """
        old = self.record
        self.set(
            state=state,
            certainty=Certainty.KNOWN,
            over_link=over_link,
            p2p=False,
            awaiting=False,
            reset_due=None,
            unknown_since=None,
            goal=None,
            changes=old.changes + 1,
        )
        if state is DeviceState.RUNNING:
            self.leave(Outcome.SUCCESS if old.committed else Outcome.CANCELLED)
            self.set(
                owner=None,
                fenced=False,
                paused=False,
                asked=True,
                handed=False,
                committed=False,
                load_failure=None,
            )
        if state.name != old.shown:
            self.do(ev.Tell(old.shown, state.name, why))

    def run_again(self, why: str) -> None:
        """It runs, and nothing is moved any more."""
        self.drop()
        self.arrive(DeviceState.RUNNING, why)

    def pause_over_link(self, why: str) -> None:
        """A VM that is paused asks nothing of its function, which goes on with what it was asked before."""
        if self.record.certainty is Certainty.KNOWN:
            self.arrive(DeviceState.STOP, f"paused without its agent: {why}", over_link=True)
        else:
            self.set(state=DeviceState.STOP, over_link=True)

    def unpause(self, why: str) -> None:
        """The VM goes on, and its function was never stopped."""
        if self.record.certainty is Certainty.KNOWN:
            self.arrive(DeviceState.RUNNING, why)
        else:
            self.set(state=DeviceState.RUNNING, over_link=False, owner=None)

    def adopt(self, status: Status) -> None:
        """Make the agent's word the truth; it is not QUIESCED, which is no state to stay in."""
        state = AS_STATE[status.state]
        if state is DeviceState.ERROR:
            self.broken(status.detail or "the agent says that the function is in ERROR")
        elif state is DeviceState.RUNNING:
            self.run_again("the agent says that it runs")
        elif self.record.state in RUNS or self.record.state is DeviceState.RESUMING:
            self.drop()
            self.arrive(state, "the agent says so")
        else:
            self.arrive(self.record.state, "the agent says so")

    def broken(self, why: str) -> None:
        """The agent says that the function is broken: only a reset ends this."""
        self.drop()
        self.cease()
        old = self.record.shown
        self.set(
            certainty=Certainty.FAILED,
            awaiting=False,
            reset_due=None,
            over_link=False,
            unknown_since=None,
            goal=None,
            last_error=why,
            changes=self.record.changes + 1,
        )
        self.do(ev.Tell(old, self.record.shown, why))

    # Finding out

    def settle(self, goal: Goal, why: str, *, sure: bool = False) -> None:
        """Work for the goal in the background until it is reached.

        Args:
            goal: which.
            why: for people.
            sure: what the function does is known all the same, until a call may have changed it.
        """
        self.cease()
        self.set(awaiting=True, goal=goal, last_error=why)
        if not sure:
            self.doubt(why)
        self.do(ev.Settle())

    def doubt(self, why: str) -> None:
        """It is not known any more what the function does."""
        old = self.record
        since = self.now if old.unknown_since is None else old.unknown_since
        self.set(certainty=Certainty.UNKNOWN, unknown_since=since, changes=old.changes + 1)
        self.do(ev.Tell(old.shown, self.record.shown, why))

    def cease(self) -> None:
        """The background stops; who calls this says what becomes of the goal."""
        if self.record.goal is not None:
            self.do(ev.Cease())
        errand = self.record.errand
        if errand is not None and PLANS[errand.plan].fall is FailureOutcome.TRY_AGAIN:
            self.set(errand=None)
        self.set(goal=None)

    # What is moved

    def drop(self) -> None:
        """Stop moving state, and forget what is buffered."""
        if self.record.stream is not None:
            self.set(stream=None, load_failure=None)
        self.do(ev.Drop())

    def leave(self, outcome: Outcome) -> None:
        """End what was begun at the agent."""
        if self.record.begun is not None:
            self.do(ev.Leave(outcome))

    def lose_load(self, why: str) -> None:
        """A load that failed stays RESUMING: nothing else is true, and only the client's reset leads out.

        One of nothing is left by a reset of our own, which may have been done or not: so it is done in any case.
        """
        stream = self.record.stream
        if stream is None or not self.record.loads:
            return
        if not stream.position:
            self.drop()
            self.settle(Goal.RESET, why)
        elif self.record.load_failure is None:
            self.set(load_failure=why, last_error=why)

    def lose_load_begun(self, why: str) -> None:
        """As `lose_load`, but a load of nothing is not lost: it can begin anew."""
        stream = self.record.stream
        if stream is not None and stream.position:
            self.lose_load(why)

    # Errands

    def begin(self, errand: PlanProgress) -> None:
        """Begin to carry out a plan."""
        self.set(errand=errand)
        self.go_on()

    def go_on(self) -> None:
        """Take the next step, or say what is true after the last one."""
        errand = self.record.errand
        assert errand is not None
        steps = steps_of(errand)
        while errand.at < len(steps) and steps[errand.at].unless_owed and errand.missing is not None:
            errand = replace(errand, at=errand.at + 1)
        plan = PLANS[errand.plan]
        if errand.at < len(steps):
            self.set(errand=errand)
            self.do(ev.Take(steps[errand.at], plan.manner, errand.plan == plans.PAUSE and not errand.rest))
        else:
            self.set(errand=None)
            self.rules.then[plan.then](self, errand)

    def answer(self, text: str | None = None, error: int = 0) -> None:
        """Whoever asked gets an answer."""
        if text is not None:
            self.set(last_error=text)
        self.do(ev.Answer(text, error))
