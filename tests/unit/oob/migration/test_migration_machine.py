"""The machine's tables, row by row: what each request leads to, and what becomes of it when a step fails."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from machinekit import Fate, Side, all_well
from vfiouser_agents.api import AgentState, Outcome, Role, Status
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration import plans
from vfiouser_oob.migration.fence import AS_STATE, REACTIONS, Reaction
from vfiouser_oob.migration.plans import PLANS, Do, FailureOutcome, Undo, arc_name, steps_of
from vfiouser_oob.migration.record import (
    RUNS,
    Begun,
    Certainty,
    Goal,
    MigrationRecord,
    Owner,
    PlanProgress,
    ResetDue,
    Stream,
)
from vfiouser_oob.migration.turn import goal_of
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.migration_v2 import ARCS

S = DeviceState
SOURCE, DESTINATION = Begun(Role.SOURCE, "m"), Begun(Role.DESTINATION, "m")
#: What a function is like that is in a state, and what it does there.
IN_STATE = {
    S.RUNNING: (MigrationRecord(asked=True, attached=True), AgentState.RUNNING),
    S.STOP: (MigrationRecord(asked=True, attached=True, state=S.STOP, owner=Owner.V2), AgentState.STOPPED),
    S.PRE_COPY: (
        MigrationRecord(
            asked=True, attached=True, state=S.PRE_COPY, owner=Owner.V2, begun=SOURCE, stream=Stream(Role.SOURCE)
        ),
        AgentState.RUNNING,
    ),
    S.STOP_COPY: (
        MigrationRecord(
            asked=True, attached=True, state=S.STOP_COPY, owner=Owner.V2, begun=SOURCE, stream=Stream(Role.SOURCE)
        ),
        AgentState.STOPPED,
    ),
    S.RESUMING: (
        MigrationRecord(
            asked=True,
            attached=True,
            state=S.RESUMING,
            owner=Owner.V2,
            begun=DESTINATION,
            stream=Stream(Role.DESTINATION, position=10),
        ),
        AgentState.LOADING,
    ),
}
ARC_NAMES = [arc_name(arc.source, arc.target) for arc in ARCS]


def side_in(state: DeviceState) -> Side:
    """A function in a state."""
    record, agent = IN_STATE[state]
    return Side(record, agent, live=True, whole=True)


def ask(side: Side, *arcs: str, fate: Fate = Fate.DONE, at: Do | None = None) -> ev.Answer | None:
    """Request arcs; the first such step has another fate."""
    left = [at]

    def script(do: Do) -> Fate:
        if do in left:
            left.clear()
            return fate
        return Fate.DONE

    return side.play(ev.Requested(arcs, Owner.V2), script)


# Plans


def test_every_arc_has_a_plan() -> None:
    """The nine arcs of the protocol and no other."""
    assert sorted(ARC_NAMES) == sorted(name for name, plan in PLANS.items() if plan.fall is FailureOutcome.ARC)


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_has_its_rules(name: str) -> None:
    """What follows a plan, its fall and its being given up are in the tables, and every step is a known one."""
    from vfiouser_oob.migration.machine import _RULES

    plan = PLANS[name]
    assert plan.then in _RULES.then
    assert plan.fall in _RULES.fall
    assert plan.fall in _RULES.given_up
    assert plan.steps == steps_of(PlanProgress(name, S.RUNNING))
    for touched in (False, True):
        assert (plan.undo, touched) in plans.AFTERMATHS


def test_every_goal_can_be_worked_for() -> None:
    """Whatever the goal and whatever is owed, there is a plan of the background."""
    for goal in Goal:
        for due in (None, *ResetDue):
            assert PLANS[plans.SETTLING[goal, due]].fall is FailureOutcome.TRY_AGAIN


@pytest.mark.parametrize("name", ARC_NAMES)
def test_an_arc_that_goes_well(name: str) -> None:
    """Its steps are taken in order, the function does what the state says, and the mover owns the migration."""
    plan = PLANS[name]
    side = side_in(plan.source)
    assert ev.Answer() == ask(side, name)
    assert [step.do for step in plan.steps] == side.taken
    assert (plan.target, Certainty.KNOWN, None) == (side.record.state, side.record.certainty, side.record.errand)
    assert (plan.target in RUNS) == side.runs == side.record.runs
    assert (None if plan.target is S.RUNNING else Owner.V2) == side.record.owner


#: Arc, the step that fails, how; then the state that is read, its certainty, the goal, and the steps that undo.
FAILURES = [
    # Nobody was reached, and nothing was touched: it runs as before.
    ("PRE_COPY → STOP_COPY", Do.HOLD_STREAM, Fate.REFUSED, S.PRE_COPY, "known", None, []),
    ("PRE_COPY → STOP_COPY", Do.FLUSH, Fate.REFUSED, S.PRE_COPY, "known", None, []),
    ("PRE_COPY → STOP_COPY", Do.QUIESCE, Fate.AWAY, S.PRE_COPY, "known", None, []),
    ("RUNNING → STOP", Do.FLUSH, Fate.REFUSED, S.RUNNING, "known", None, []),
    # Something was: it is brought back.
    ("RUNNING → STOP", Do.QUIESCE, Fate.LOST, S.RUNNING, "known", None, [Do.RESUME]),
    ("RUNNING → STOP", Do.STOP, Fate.REFUSED, S.RUNNING, "known", None, [Do.RESUME]),
    ("RUNNING → STOP", Do.STOP, Fate.LOST_DONE, S.RUNNING, "known", None, [Do.RESUME]),
    ("PRE_COPY → STOP_COPY", Do.STOP, Fate.LOST, S.PRE_COPY, "known", None, [Do.RESUME, Do.RESTART_STREAM]),
    ("PRE_COPY → STOP_COPY", Do.FINISH_STREAM, Fate.LOST, S.PRE_COPY, "known", None, [Do.RESUME, Do.RESTART_STREAM]),
    ("RUNNING → STOP", Do.STOP, Fate.GIVEN_UP, S.RUNNING, "unknown", Goal.RESUME, []),
    # A migration that does not begin is left.
    ("RUNNING → PRE_COPY", Do.BEGIN_SOURCE, Fate.REFUSED, S.RUNNING, "known", None, []),
    ("RUNNING → PRE_COPY", Do.OPEN_STREAM, Fate.LOST, S.RUNNING, "known", None, []),
    ("RUNNING → PRE_COPY", Do.START_STREAM, Fate.GIVEN_UP, S.RUNNING, "known", None, []),
    ("STOP → STOP_COPY", Do.BEGIN_SOURCE, Fate.REFUSED, S.STOP, "known", None, []),
    ("STOP → STOP_COPY", Do.OPEN_STREAM, Fate.GIVEN_UP, S.STOP, "unknown", Goal.RESUME, []),
    # What fails on the way out is not worth a failure.
    ("PRE_COPY → RUNNING", Do.ABORT, Fate.LOST, S.RUNNING, "known", None, []),
    ("PRE_COPY → RUNNING", Do.END_CANCELLED, Fate.AWAY, S.RUNNING, "known", None, []),
    ("STOP_COPY → STOP", Do.ABORT, Fate.LOST, S.STOP, "known", None, []),
    ("STOP → RUNNING", Do.END, Fate.LOST, S.RUNNING, "known", None, []),
    # A start that fails: the agent says what is true.
    ("STOP → RUNNING", Do.RESUME, Fate.AWAY, S.STOP, "known", Goal.RESUME, []),
    ("STOP → RUNNING", Do.RESUME, Fate.REFUSED, S.STOP, "known", None, [Do.ASK]),
    ("STOP → RUNNING", Do.RESUME, Fate.LOST, S.STOP, "unknown", Goal.RESUME, [Do.ASK]),
    ("STOP → RUNNING", Do.RESUME, Fate.LOST_DONE, S.RUNNING, "known", None, [Do.ASK]),
    # A load that does not begin leaves a function that was reset.
    ("STOP → RESUMING", Do.BEGIN_DESTINATION, Fate.REFUSED, S.STOP, "known", None, []),
    ("STOP → RESUMING", Do.LOAD_BEGIN, Fate.LOST, S.STOP, "known", None, [Do.RESET_AGENT, Do.REARM_LOG, Do.STOP]),
    ("STOP → RESUMING", Do.LOAD_BEGIN, Fate.GIVEN_UP, S.STOP, "unknown", Goal.RESET, []),
    # One that does not end is lost.
    ("RESUMING → STOP", Do.LOAD_COMMIT, Fate.REFUSED, S.RESUMING, "known", None, []),
    ("RESUMING → STOP", Do.LOAD_COMMIT, Fate.LOST_DONE, S.RESUMING, "known", None, []),
    ("RESUMING → STOP", Do.LOAD_COMMIT, Fate.GIVEN_UP, S.RESUMING, "known", None, []),
    # A broken function is broken wherever that is found out.
    ("RUNNING → STOP", Do.STOP, Fate.BROKEN, S.RUNNING, "failed", None, []),
    ("STOP → RUNNING", Do.RESUME, Fate.BROKEN, S.STOP, "failed", None, []),
    ("RESUMING → STOP", Do.LOAD_COMMIT, Fate.BROKEN, S.RESUMING, "failed", None, []),
    ("STOP → RUNNING", Do.END, Fate.BROKEN, S.STOP, "failed", None, []),
]


@pytest.mark.parametrize(("name", "at", "fate", "state", "certainty", "goal", "undone"), FAILURES)
def test_an_arc_that_fails(
    name: str,
    at: Do,
    fate: Fate,
    state: DeviceState,
    certainty: str,
    goal: Goal | None,
    undone: list[Do],
) -> None:
    """What is read, what the background works for, and what was done to undo it."""
    side = side_in(PLANS[name].source)
    answer = ask(side, name, fate=fate, at=at)
    assert (state, Certainty(certainty), goal) == (side.record.state, side.record.certainty, side.record.goal)
    steps = [step.do for step in PLANS[name].steps]
    tolerated = next(step.tolerated for step in PLANS[name].steps if step.do is at) and fate is not Fate.BROKEN
    assert undone == side.taken[len(steps) if tolerated else steps.index(at) + 1 :]
    if fate in (Fate.GIVEN_UP, Fate.GIVEN_UP_DONE):
        assert answer is None
    else:
        assert answer is not None
        assert tolerated == (answer.text is None)
        assert side.record.awaiting == (side.record.goal is not None)
    if side.record.certainty is Certainty.KNOWN and state is not S.RESUMING:
        assert side.record.runs == side.runs
    assert ("RESUMING → STOP" == name and certainty == "known") == (side.record.load_failure is not None)


def test_a_pause_does_without_an_agent_that_is_away() -> None:
    """The function goes on with what it was asked to do, and the VM's going on needs nobody either."""
    side = side_in(S.RUNNING)
    script = {Do.QUIESCE: Fate.AWAY}.get
    assert ev.Answer() == side.play(ev.Requested((plans.PAUSE,), Owner.V1), lambda do: script(do) or Fate.DONE)
    assert (S.STOP, True, True, Owner.V1) == (
        side.record.state,
        side.record.over_link,
        side.record.runs,
        side.record.owner,
    )
    side.taken.clear()
    assert ev.Answer() == ask(side, plans.CONTINUE)
    assert ([], S.RUNNING, None) == (side.taken, side.record.state, side.record.owner)


def test_what_needs_a_paused_function_to_hold_still_stops_it_first() -> None:
    """A pause without the agent becomes a stop before its state is saved."""
    side = Side(MigrationRecord(asked=True, attached=True, state=S.STOP, over_link=True))
    assert ev.Answer() == ask(side, arc_name(S.STOP, S.STOP_COPY))
    assert [Do.FLUSH, Do.QUIESCE, Do.STOP, Do.BEGIN_SOURCE, Do.OPEN_STREAM, Do.FINISH_STREAM] == side.taken
    assert (S.STOP_COPY, False) == (side.record.state, side.record.over_link)


@pytest.mark.parametrize(
    ("fate", "certainty", "goal"),
    [
        (Fate.AWAY, Certainty.KNOWN, None),
        (Fate.LOST, Certainty.UNKNOWN, Goal.RESUME),
        (Fate.GIVEN_UP, Certainty.UNKNOWN, Goal.RESUME),
        (Fate.BROKEN, Certainty.FAILED, None),
    ],
)
def test_a_paused_function_that_cannot_be_stopped(fate: Fate, certainty: Certainty, goal: Goal | None) -> None:
    """It is brought back if it was touched."""
    side = Side(MigrationRecord(asked=True, attached=True, state=S.STOP, over_link=True))
    answer = ask(side, arc_name(S.STOP, S.STOP_COPY), fate=fate, at=Do.QUIESCE)
    assert (certainty, goal) == (side.record.certainty, side.record.goal)
    assert answer is None or "could not be stopped at quiesce" in (answer.text or "")


@pytest.mark.parametrize(
    ("next_arc", "ahead"),
    [(arc_name(S.STOP, S.STOP_COPY), Do.BEGIN_SOURCE), (arc_name(S.STOP, S.RESUMING), Do.BEGIN_DESTINATION)],
)
def test_the_agent_is_told_what_it_is_stopped_for(next_arc: str, ahead: Do) -> None:
    """On the way through STOP the migration is begun while the function still runs."""
    side = side_in(S.RUNNING)
    ask(side, plans.PAUSE, next_arc)
    assert [ahead, Do.FLUSH] == side.taken[:2]


def test_a_function_that_was_stopped_on_the_way_is_started_again() -> None:
    """The client asked for it in RUNNING, and one of the later arcs failed."""
    side = side_in(S.RUNNING)
    answer = ask(side, plans.PAUSE, arc_name(S.STOP, S.STOP_COPY), fate=Fate.REFUSED, at=Do.OPEN_STREAM)
    assert answer is not None
    assert "STOP → STOP_COPY failed at open stream: refused; the state is RUNNING" == answer.text
    assert (S.RUNNING, True, [Do.RESUME]) == (side.record.state, side.runs, side.taken[-1:])


def test_a_load_that_failed_on_the_way_from_running() -> None:
    """The function is reset and runs."""
    side = side_in(S.RUNNING)
    ask(side, plans.PAUSE, arc_name(S.STOP, S.RESUMING), fate=Fate.LOST, at=Do.LOAD_BEGIN)
    assert [Do.RESET_AGENT, Do.REARM_LOG] == side.taken[-2:]
    assert (S.RUNNING, True) == (side.record.state, side.runs)


def test_undoing_that_fails_is_left_to_the_background() -> None:
    """The state is not known, and the background brings the function back."""
    side = side_in(S.RUNNING)
    fates = {Do.STOP: Fate.LOST_DONE, Do.RESUME: Fate.AWAY}
    answer = side.play(ev.Requested((plans.PAUSE,), Owner.V2), lambda do: fates.get(do, Fate.DONE))
    assert answer is not None
    assert "the state is UNKNOWN" in (answer.text or "")
    assert (Certainty.UNKNOWN, Goal.RESUME, 1000.0) == (
        side.record.certainty,
        side.record.goal,
        side.record.unknown_since,
    )
    side.settle()
    assert (S.RUNNING, Certainty.KNOWN, True, None) == (
        side.record.state,
        side.record.certainty,
        side.runs,
        side.record.unknown_since,
    )


def test_an_agent_that_breaks_while_it_is_undone() -> None:
    """That is what is true then."""
    side = side_in(S.RUNNING)
    fates = {Do.STOP: Fate.LOST_DONE, Do.RESUME: Fate.BROKEN}
    side.play(ev.Requested((plans.PAUSE,), Owner.V2), lambda do: fates.get(do, Fate.DONE))
    assert Certainty.FAILED is side.record.certainty
    assert S.ERROR is side.record.state_shown


def test_a_stream_that_cannot_begin_anew_is_halted() -> None:
    """The function runs again, and what was saved of it before is of no use."""
    side = side_in(S.PRE_COPY)
    fates = {Do.STOP: Fate.LOST_DONE, Do.RESTART_STREAM: Fate.REFUSED}
    side.play(ev.Requested((arc_name(S.PRE_COPY, S.STOP_COPY),), Owner.V2), lambda do: fates.get(do, Fate.DONE))
    assert ev.HaltSource() in side.effects
    assert Goal.RESUME is side.record.goal


# The point of no return


@pytest.mark.parametrize(("handed", "goal"), [(False, Goal.RESUME), (True, Goal.LEARN)])
def test_the_point_of_no_return(handed: bool, goal: Goal) -> None:
    """Until the client has everything the source is brought back; from then on it is only asked about."""
    side = side_in(S.STOP_COPY)
    side.feed(ev.Moved(10, handed=handed))
    assert goal is goal_of(side.record, Undo.LEARN)
    ask(side, arc_name(S.STOP_COPY, S.STOP))
    ask(side, plans.CONTINUE, fate=Fate.LOST, at=Do.RESUME)
    assert goal is side.record.goal
    side.settle()
    assert (not handed, Certainty.KNOWN) == (side.runs, side.record.certainty)


@pytest.mark.parametrize(("handed", "goal"), [(False, Goal.RESUME), (True, Goal.LEARN)])
def test_what_was_handed_over_is_not_brought_back_when_it_is_saved_once_more(handed: bool, goal: Goal) -> None:
    """A client that has the whole state asks for it again, and gives that up: the first copy may run elsewhere."""
    side = Side(MigrationRecord(asked=True, attached=True, state=S.STOP, owner=Owner.V2, handed=handed))
    side.agent = AgentState.STOPPED
    side.request(S.STOP_COPY, lambda do: Fate.GIVEN_UP_DONE)
    assert goal is side.record.goal
    side.settle()
    assert side.runs is not handed


@pytest.mark.parametrize(
    ("record", "agent", "runs", "fenced"),
    [
        (MigrationRecord(asked=True), AgentState.RUNNING, True, False),
        (MigrationRecord(asked=True, begun=SOURCE), AgentState.RUNNING, True, False),
        (replace(IN_STATE[S.PRE_COPY][0]), AgentState.RUNNING, True, False),
        (IN_STATE[S.STOP][0], AgentState.STOPPED, True, False),
        (IN_STATE[S.STOP_COPY][0], AgentState.STOPPED, True, False),
        (replace(IN_STATE[S.STOP_COPY][0], handed=True), AgentState.STOPPED, False, True),
        (replace(IN_STATE[S.STOP][0], committed=True), AgentState.LOADED, False, True),
        (IN_STATE[S.RESUMING][0], AgentState.LOADING, False, True),
        (replace(IN_STATE[S.STOP][0], over_link=True), AgentState.RUNNING, True, False),
        (MigrationRecord(asked=True, certainty=Certainty.FAILED), AgentState.ERROR, False, True),
    ],
)
def test_a_client_that_goes(record: MigrationRecord, agent: AgentState, runs: bool, fenced: bool) -> None:
    """A source that it did not take is brought back; what may live elsewhere is fenced, and reset for the next one."""
    side = Side(replace(record, attached=True), agent)
    side.feed(ev.ClientWent(logged=True))
    assert ev.StopLogging() in side.effects
    side.settle()
    assert (runs, fenced, None) == (side.runs, side.record.fenced, side.record.owner)
    assert ev.Answer() == side.come()
    assert (S.RUNNING, True, False) == (side.record.state, side.runs, side.record.fenced)
    assert fenced == (Do.RESET_DEVICE in side.taken)


# Clients that come


@pytest.mark.parametrize(
    ("agent", "steps"),
    [
        (AgentState.RUNNING, [Do.ASK]),
        (AgentState.QUIESCED, [Do.ASK, Do.RESUME, Do.CLOSE]),
        (AgentState.STOPPED, [Do.ASK, Do.RESET_AGENT, Do.RESET_DEVICE]),
        (AgentState.LOADED, [Do.ASK, Do.RESET_AGENT, Do.RESET_DEVICE]),
        (AgentState.ERROR, [Do.ASK, Do.RESET_AGENT, Do.RESET_DEVICE]),
    ],
)
def test_a_client_that_comes_first(agent: AgentState, steps: list[Do]) -> None:
    """The agent is asked, and the function is made fit."""
    side = Side(MigrationRecord(), agent)
    assert ev.Answer() == side.come()
    assert (steps, True, True, False) == (side.taken, side.runs, side.record.asked, side.record.paused)
    # A function that was changed is asked about again; one that runs was asked about just now.
    assert (ev.Probe() in side.effects) is (len(steps) > 1)


def test_a_client_that_comes_later() -> None:
    """The agent was asked before this client came: it is asked again, while the client goes on."""
    side = Side(MigrationRecord(asked=True), AgentState.RUNNING)
    assert ev.Answer() == side.come()
    assert [] == side.taken
    assert ev.Probe() in side.effects


def test_a_client_that_comes_while_the_agent_is_away() -> None:
    """It is let in; what its function does is found out later, and what has to be done about it then."""
    side = Side(MigrationRecord(), AgentState.STOPPED)
    assert ev.Answer() == side.come(lambda do: Fate.AWAY)
    assert (False, Certainty.KNOWN) == (side.record.asked, side.record.certainty)
    assert ev.Probe() in side.effects
    side.feed(ev.Probed(Status(AgentState.STOPPED), migrated=True))
    assert (Goal.RESET, True) == (side.record.goal, side.record.awaiting)
    side.settle()
    assert side.runs


@pytest.mark.parametrize("fate", [Fate.AWAY, Fate.LOST, Fate.GIVEN_UP, Fate.BROKEN])
def test_a_client_that_is_turned_away(fate: Fate) -> None:
    """A function that cannot be reset stays fenced, and nobody is attached."""
    side = Side(replace(IN_STATE[S.STOP_COPY][0], handed=True, attached=False), AgentState.STOPPED)
    answer = side.come(lambda do: fate)
    assert answer is None or answer.text
    assert (False, True) == (side.record.attached, side.record.fenced)
    assert ev.Answer() == side.come()
    assert side.runs


# Resets


@pytest.mark.parametrize("state", IN_STATE)
def test_a_reset_leads_out_of_every_state(state: DeviceState) -> None:
    """The function runs, nothing is moved, and the agent has left what was begun."""
    side = side_in(state)
    assert ev.Answer() == side.play(ev.ResetAsked())
    assert (S.RUNNING, Certainty.KNOWN, None, None) == (
        side.record.state,
        side.record.certainty,
        side.record.begun,
        side.record.stream,
    )
    assert side.runs
    assert Do.RESET_DEVICE in side.taken


def test_a_reset_of_a_function_that_runs_asks_no_agent() -> None:
    """Only one that has not left its migration."""
    side = side_in(S.RUNNING)
    side.play(ev.ResetAsked())
    assert [Do.RESET_DEVICE] == side.taken
    side = Side(MigrationRecord(asked=True, attached=True, begun=SOURCE))
    side.play(ev.ResetAsked())
    assert [Do.RESET_AGENT, Do.REARM_LOG, Do.RESET_DEVICE] == side.taken
    side = Side(MigrationRecord(asked=True, attached=True, begun=SOURCE))
    side.play(ev.ResetAsked(), lambda do: Fate.AWAY if do is Do.RESET_AGENT else Fate.DONE)
    assert [Do.RESET_AGENT, Do.RESET_DEVICE] == side.taken
    assert ev.Leave(Outcome.CANCELLED) in side.effects


@pytest.mark.parametrize("event", [ev.ResetAsked(), ev.GuestReset(restarts=True)])
def test_a_reset_without_the_agent(event: ev.MigrationEvent) -> None:
    """The client is answered, the guest's accesses wait, and the agent does its part later, behind it the device."""
    side = side_in(S.STOP_COPY)
    assert ev.Answer() == side.play(event, lambda do: Fate.AWAY if do is Do.RESET_AGENT else Fate.DONE)
    due = ResetDue.DEVICE if isinstance(event, ev.ResetAsked) else ResetDue.GUEST
    assert (S.RUNNING, due, True, Goal.RESET) == (
        side.record.state,
        side.record.reset_due,
        side.record.awaiting,
        side.record.goal,
    )
    # The VM may be paused and go on meanwhile; then it is found paused.
    assert ev.Answer() == ask(side, plans.PAUSE)
    assert ev.Answer() == ask(side, plans.CONTINUE)
    assert ev.Answer() == ask(side, plans.PAUSE)
    side.taken.clear()
    side.settle()
    again = Do.RESET_DEVICE_AGAIN if due is ResetDue.DEVICE else Do.WRITE_CONFIG
    assert [Do.RESET_AGENT, again, Do.REARM_LOG] == side.taken
    assert (S.STOP, True, True, None) == (
        side.record.state,
        side.record.over_link,
        side.runs,
        side.record.reset_due,
    )


def test_a_reset_of_a_function_that_was_never_stopped_needs_no_agent() -> None:
    """The device is reset, and the agent's migration is left when it is back."""
    side = side_in(S.PRE_COPY)
    assert ev.Answer() == side.play(ev.ResetAsked(), lambda do: Fate.AWAY if do is Do.RESET_AGENT else Fate.DONE)
    assert (S.RUNNING, Certainty.KNOWN, None) == (side.record.state, side.record.certainty, side.record.goal)
    assert ev.Leave(Outcome.CANCELLED) in side.effects


@pytest.mark.parametrize(
    ("at", "fate", "text"),
    [
        (Do.RESET_AGENT, Fate.BROKEN, "the function could not be reset: broken"),
        (Do.RESET_DEVICE, Fate.REFUSED, "refused"),
        (Do.RESET_AGENT, Fate.GIVEN_UP, None),
    ],
)
def test_a_reset_that_fails(at: Do, fate: Fate, text: str | None) -> None:
    """The background goes on with it."""
    side = side_in(S.STOP_COPY)
    answer = side.play(ev.ResetAsked(), lambda do: fate if do is at else Fate.DONE)
    assert text == (None if answer is None else answer.text)
    assert Goal.RESET is side.record.goal
    side.settle()
    assert (S.RUNNING, Certainty.KNOWN, True) == (side.record.state, side.record.certainty, side.runs)


def test_the_guests_reset_begins_the_stream_anew() -> None:
    """In PRE_COPY the state is saved anew, in the next epoch; a function that just runs is not touched."""
    side = side_in(S.PRE_COPY)
    assert ev.Answer() == side.play(ev.GuestReset(restarts=True))
    assert (S.PRE_COPY, Stream(Role.SOURCE, epoch=1)) == (side.record.state, side.record.stream)
    side = side_in(S.RUNNING)
    assert ev.Answer() == side.play(ev.GuestReset(restarts=True))
    assert [] == side.taken


@pytest.mark.parametrize(
    ("fate", "certainty", "text"),
    [
        (Fate.AWAY, Certainty.KNOWN, None),
        (Fate.REFUSED, Certainty.KNOWN, "the stream could not start again: refused"),
        (Fate.BROKEN, Certainty.FAILED, "the stream could not start again: broken"),
        (Fate.GIVEN_UP, Certainty.KNOWN, None),
    ],
)
def test_a_stream_that_does_not_begin_anew(fate: Fate, certainty: Certainty, text: str | None) -> None:
    """It ends; the guest's reset is done all the same, unless the agent says that it was not."""
    side = side_in(S.PRE_COPY)
    answer = side.play(ev.GuestReset(restarts=True), lambda do: fate if do is Do.RESTART_STREAM else Fate.DONE)
    assert text == (None if answer is None else answer.text)
    assert certainty is side.record.certainty
    assert ev.HaltSource() in side.effects
    assert (fate is Fate.AWAY) == (Do.REARM_LOG in side.taken)


# The background


def test_an_attempt_that_fails_keeps_its_goal() -> None:
    """What was sure is not, once a call may have had its effect; a device that cannot be reset is told of."""
    side = side_in(S.STOP)
    ask(side, plans.CONTINUE, fate=Fate.AWAY, at=Do.RESUME)
    assert Certainty.KNOWN is side.record.certainty
    side.play(ev.AttemptDue(), lambda do: Fate.AWAY)
    assert (Certainty.KNOWN, Goal.RESUME) == (side.record.certainty, side.record.goal)
    side.play(ev.AttemptDue(), lambda do: Fate.LOST)
    assert (Certainty.UNKNOWN, Goal.RESUME) == (side.record.certainty, side.record.goal)
    side.play(ev.AttemptDue(), lambda do: Fate.BROKEN)
    assert (Certainty.FAILED, None) == (side.record.certainty, side.record.goal)
    side = side_in(S.STOP_COPY)
    side.play(ev.ResetAsked(), lambda do: Fate.REFUSED if do is Do.RESET_DEVICE else Fate.DONE)
    side.play(ev.AttemptDue(), lambda do: Fate.REFUSED if do is Do.RESET_DEVICE else Fate.DONE)
    assert Goal.RESET is side.record.goal
    assert ev.Note("the device did not reset", {"error": "refused"}) in side.effects


def test_nothing_is_attempted_without_a_goal() -> None:
    """Nor is anything asked of the agent."""
    side = side_in(S.RUNNING)
    assert side.play(ev.AttemptDue()) is None
    assert [] == side.taken


@pytest.mark.parametrize("stays", [False, True])
def test_a_function_that_is_found_half_way_is_stopped(stays: bool) -> None:
    """One whose state may live elsewhere is not started, but stopping it does no harm."""
    side = Side(replace(IN_STATE[S.STOP][0], handed=True), AgentState.STOPPED)
    ask(side, plans.CONTINUE, fate=Fate.LOST, at=Do.RESUME)
    assert Goal.LEARN is side.record.goal
    side.agent = AgentState.QUIESCED

    def script(do: Do) -> Fate:
        if stays and do is Do.STOP:
            side.agent = AgentState.STOPPED
        return Fate.DONE

    side.play(ev.AttemptDue(), script)
    assert (S.STOP, Certainty.KNOWN, AgentState.STOPPED) == (side.record.state, side.record.certainty, side.agent)
    assert [Do.ASK, Do.STOP, Do.ASK] == side.taken[-3:]


def test_an_agent_that_has_not_made_up_its_mind() -> None:
    """It is asked again."""
    side = Side(replace(IN_STATE[S.STOP][0], handed=True), AgentState.STOPPED)
    ask(side, plans.CONTINUE, fate=Fate.LOST, at=Do.RESUME)
    assert isinstance(side.feed(ev.AttemptDue()), ev.Take)
    assert side.feed(ev.StepTaken(status=Status(AgentState.STOPPED, pending="stop"))) is None
    assert Goal.LEARN is side.record.goal


@pytest.mark.parametrize(("under_way", "certainty"), [(True, Certainty.UNKNOWN), (False, Certainty.KNOWN)])
def test_the_client_takes_over_what_the_background_does(under_way: bool, certainty: Certainty) -> None:
    """Unless a call of it may have been sent, whose answer is waited for."""
    side = side_in(S.STOP)
    ask(side, plans.CONTINUE, fate=Fate.AWAY, at=Do.RESUME)
    side.feed(ev.AttemptDue())
    side.feed(ev.TakenOver(under_way=under_way))
    assert (certainty, under_way) == (side.record.certainty, side.record.goal is not None)
    assert under_way == (side.record.errand is not None)
    side.feed(ev.TakenOver(under_way=False))
    assert under_way == (side.record.goal is not None)


# What the agent says


@pytest.mark.parametrize("state", REACTIONS)
@pytest.mark.parametrize("told", AgentState)
def test_what_the_agent_says_by_itself(state: DeviceState, told: AgentState) -> None:
    """Every row of the table: it is expected, or told to people, or the truth."""
    side = side_in(state)
    before = side.record
    side.feed(ev.Heard(Status(told, detail="smoke")))
    match REACTIONS[state][told]:
        case Reaction.NOTHING:
            assert before == side.record
            assert [] == side.effects
        case Reaction.NOTE:
            assert before == side.record
            assert isinstance(side.effects[0], ev.Note)
        case Reaction.ADOPT if told is AgentState.ERROR:
            assert (Certainty.FAILED, "smoke") == (side.record.certainty, side.record.last_error)
        case Reaction.ADOPT:
            expected = AS_STATE[told] if state in (*RUNS, S.RESUMING) or told is AgentState.RUNNING else state
            assert (expected, Certainty.KNOWN) == (side.record.state, side.record.certainty)


def test_what_is_heard_while_nothing_is_known_changes_nothing() -> None:
    """The background asks anyway."""
    side = Side(replace(IN_STATE[S.STOP][0], certainty=Certainty.UNKNOWN, goal=Goal.RESUME, unknown_since=1.0))
    before = side.record
    side.feed(ev.Heard(Status(AgentState.RUNNING)))
    assert before == side.record


@pytest.mark.parametrize(
    ("agent", "migrated", "goal"),
    [
        (AgentState.RUNNING, True, None),
        (AgentState.STOPPED, False, Goal.RESUME),
        (AgentState.STOPPED, True, Goal.RESET),
        (AgentState.ERROR, False, Goal.RESET),
    ],
)
def test_what_a_probe_finds(agent: AgentState, migrated: bool, goal: Goal | None) -> None:
    """A client that came before it was known has its function made fit; what is busy is not judged."""
    side = Side(MigrationRecord(attached=True), agent)
    side.feed(ev.Blocked("too old"))
    side.feed(ev.Blocked("too old"))
    assert 1 == sum(isinstance(effect, ev.Note) for effect in side.effects)
    side.feed(ev.Probed(Status(agent), migrated))
    assert (goal, True, None) == (side.record.goal, side.record.asked, side.record.blocked)
    side = side_in(S.STOP_COPY)
    side.feed(ev.Probed(Status(AgentState.STOPPED), migrated=True))
    assert IN_STATE[S.STOP_COPY][0] == side.record


def test_a_device_that_breaks_while_an_arc_is_under_way() -> None:
    """The arc does not make it whole."""
    side = side_in(S.PRE_COPY)
    due = side.feed(ev.Requested((arc_name(S.PRE_COPY, S.STOP_COPY),), Owner.V2))
    side.feed(ev.DeviceBroke("smoke"))
    while isinstance(due, ev.Take):
        due = side.feed(ev.StepTaken())
    assert due is not None
    assert ("PRE_COPY → STOP_COPY failed: smoke; the state is ERROR", errno.EIO) == (due.text, due.errno)
    assert (S.ERROR, Certainty.FAILED) == (side.record.state_shown, side.record.certainty)


# What is moved


def test_a_load_of_nothing_is_undone() -> None:
    """A client that gave nothing has cancelled its load: the function stands still, reset."""
    side = Side(replace(IN_STATE[S.RESUMING][0], stream=Stream(Role.DESTINATION)), AgentState.LOADING, live=False)
    assert ev.Answer() == ask(side, arc_name(S.RESUMING, S.STOP))
    assert (False, S.STOP) == (side.record.committed, side.record.state)
    side = Side(replace(IN_STATE[S.RESUMING][0], stream=Stream(Role.DESTINATION)), AgentState.LOADING, live=False)
    ask(side, arc_name(S.RESUMING, S.STOP), fate=Fate.GIVEN_UP, at=Do.LOAD_COMMIT)
    assert Goal.RESET is side.record.goal


def test_the_first_reason_of_a_lost_load_is_kept() -> None:
    """What fails because of it says nothing new."""
    side = side_in(S.RESUMING)
    side.feed(ev.Moved(20))
    side.feed(ev.LoadFailed("first"))
    side.feed(ev.LoadFailed("second"))
    assert ("first", 20) == (side.record.load_failure, side.record.stream and side.record.stream.position)
    side = side_in(S.RUNNING)
    side.feed(ev.LoadFailed("nobody loads"))
    side.feed(ev.Moved(1))
    assert IN_STATE[S.RUNNING][0] == side.record
    side.feed(ev.Logging(on=True))
    assert side.record.logging


# Another daemon goes on


@pytest.mark.parametrize(
    ("record", "state", "goal"),
    [
        (IN_STATE[S.RUNNING][0], S.RUNNING, None),
        (IN_STATE[S.STOP][0], S.STOP, None),
        (IN_STATE[S.PRE_COPY][0], S.RUNNING, None),
        (IN_STATE[S.STOP_COPY][0], S.STOP_COPY, Goal.RESUME),
        (replace(IN_STATE[S.STOP_COPY][0], handed=True), S.STOP_COPY, None),
        (IN_STATE[S.RESUMING][0], S.RESUMING, None),
        (replace(IN_STATE[S.STOP][0], goal=Goal.RESUME, awaiting=True), S.STOP, Goal.RESUME),
        (replace(IN_STATE[S.RUNNING][0], errand=PlanProgress(plans.PAUSE, S.RUNNING, at=2)), S.RUNNING, Goal.RESUME),
    ],
)
def test_a_daemon_goes_on_where_another_ended(record: MigrationRecord, state: DeviceState, goal: Goal | None) -> None:
    """What was under way is given up, what was buffered is gone; the goal is worked for, and nothing is trusted."""
    side = Side(MigrationRecord.from_json(record.to_json()))
    side.feed(ev.Started())
    assert (state, goal, False) == (side.record.state, side.record.goal, side.record.attached)
    assert (goal is not None) == (ev.Settle() in side.effects)
    assert (state is S.RESUMING) == (side.record.load_failure is not None)


#: What a daemon may have been doing when it ended: any step of any plan, or nothing.
UNDER_WAY = [
    None,
    *(
        PlanProgress(name, S.RUNNING, at=at, touched=touched, arc=arc)
        for name, plan in PLANS.items()
        if plan.fall is not FailureOutcome.ATTACH
        for at in range(len(plan.steps))
        for touched in (False, True)
        for arc in ([plans.PAUSE] if plan.fall is FailureOutcome.UNDO else [""])
    ),
]
LEFT = {
    **{state.name: record for state, (record, _) in IN_STATE.items()},
    "STOP_COPY, handed": replace(
        IN_STATE[S.STOP_COPY][0], handed=True, stream=Stream(Role.SOURCE, position=10, whole=True)
    ),
    "STOP, handed": replace(IN_STATE[S.STOP][0], handed=True, begun=SOURCE),
    "STOP, committed": replace(IN_STATE[S.STOP][0], committed=True, begun=DESTINATION),
    "RESUMING, empty": replace(IN_STATE[S.RESUMING][0], stream=Stream(Role.DESTINATION)),
    "STOP, over link": replace(IN_STATE[S.STOP][0], over_link=True),
    "RUNNING, begun": replace(IN_STATE[S.RUNNING][0], begun=SOURCE),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_client_goes_on_with_another_daemon(name: str) -> None:
    """Whatever was under way, in whatever state: it stays attached, and no second copy is started by that."""
    left = LEFT[name]
    agent = AgentState.RUNNING if left.over_link else IN_STATE[left.state][1]
    for errand in UNDER_WAY:
        record = replace(left, errand=errand)
        side = Side(MigrationRecord.from_json(record.to_json()), agent, live=not left.elsewhere)
        answer = side.play(ev.Started(True, 10, "handed" in name))
        assert (ev.Answer(), True, None) == (answer, side.record.attached, side.record.errand)
        assert Do.RESUME not in side.taken
        assert not side.taken or Do.ASK is side.taken[0]
        goal = side.record.goal
        assert (goal is not None) == (ev.Settle() in side.effects)
        assert not (left.elsewhere and goal is Goal.RESUME)
        if left.loads and left.stream is not None and left.stream.position and goal is None:
            assert side.record.load_failure is not None
        if errand is None and goal is None:
            assert (left.state, Certainty.KNOWN) == (side.record.state, side.record.certainty)


@pytest.mark.parametrize("name", LEFT)
def test_a_client_goes_on_where_the_agent_is_elsewhere(name: str) -> None:
    """The agent was started anew as well, and says that the function runs: that is the truth."""
    side = Side(MigrationRecord.from_json(LEFT[name].to_json()), AgentState.RUNNING)
    side.play(ev.Started(True, 10, "handed" in name))
    assert LEFT[name].at_agent is S.PRE_COPY or side.record.at_agent is S.RUNNING


def test_a_stream_that_cannot_begin_anew() -> None:
    """The function is as it was; what was fetched is not taken for its state."""
    for fate in (Fate.REFUSED, Fate.AWAY, Fate.LOST):
        side = side_in(S.STOP_COPY)
        left = [Do.REOPEN_STREAM]
        answer = side.play(ev.Started(True, 10), lambda do, left=left, fate=fate: fate if do in left else Fate.DONE)  # type: ignore[misc]
        assert (ev.Answer(), S.STOP_COPY, None) == (answer, side.record.state, side.record.goal)
        assert ev.HaltSource() in side.effects
    side = side_in(S.STOP_COPY)
    side.play(ev.Started(True, 10), lambda do: Fate.BROKEN if do is Do.REOPEN_STREAM else Fate.DONE)
    assert Certainty.FAILED is side.record.certainty


def test_steps_go_well_by_default() -> None:
    """The kit's script says so."""
    assert {Fate.DONE} == {all_well(do) for do in Do}
