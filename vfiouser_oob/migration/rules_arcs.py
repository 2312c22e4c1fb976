"""The rules of state changes: how a client's request travels its arcs, and how a failed one is undone."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from vfiouser_agents.api import AgentState, Outcome
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration import plans
from vfiouser_oob.migration.plans import PLANS, Aftermath, Do, Step, Undo
from vfiouser_oob.migration.record import RUNS, Certainty, Failure, Goal, PlanProgress
from vfiouser_oob.migration.turn import Turn, goal_of
from vfiouser_protocol.constants import DeviceState

# Requests of the client


def taken_over(turn: Turn, event: ev.TakenOver) -> None:
    """What is being brought back in the background is asked for by the client now, so the background leaves it.

    Where a call of it may have been sent, its answer is waited for as everywhere.
    """
    if turn.record.goal is None or turn.record.certainty is not Certainty.KNOWN:
        return
    if event.under_way:
        turn.doubt("a call of the background is under way")
    else:
        turn.cease()


def requested(turn: Turn, event: ev.Requested) -> None:
    """The client asks for another state; what it wants goes before what the background does."""
    turn.do(ev.CeaseProbing())
    turn.do(ev.CeaseLeaving())
    turn.set(p2p=False)
    _begin_arc(turn, event.plans, turn.record.state, event)


def p2p_named(turn: Turn, event: ev.P2pNamed) -> None:
    """A P2P state is the one beside it under another name, which is all that changes."""
    turn.set(p2p=event.p2p)


def _begin_arc(turn: Turn, arcs: tuple[str, ...], origin: DeviceState, asked: ev.Requested | PlanProgress) -> None:
    """Take an arc: without the agent where it is not needed, or away and can be done without."""
    plan, record = PLANS[arcs[0]], turn.record
    errand = PlanProgress(arcs[0], origin, rest=arcs[1:], owner=asked.owner)
    if record.reset_due is not None and arcs[0] in plans.PAUSES and not errand.rest:
        # It holds still in any case, and nothing of the guest reaches it.
        if arcs[0] == plans.PAUSE:
            turn.pause_over_link("its agent is away")
        else:
            turn.unpause("as asked")
        _arrived(turn, errand)
    elif record.over_link and plan.target is DeviceState.RUNNING:
        turn.unpause("as the client asked")
        _arrived(turn, errand)
    elif record.over_link:
        turn.begin(replace(errand, plan=plans.HALT, rest=arcs))
    else:
        ahead = None
        if plan.source is DeviceState.RUNNING and errand.rest:
            ahead = plans.AHEAD.get(PLANS[errand.rest[0]].target)
        turn.begin(errand if ahead is None else replace(errand, ahead=ahead.value))


def _arrived(turn: Turn, errand: PlanProgress) -> None:
    """An arc was taken; go on to the next one."""
    if turn.record.state is not DeviceState.RUNNING:
        turn.set(owner=errand.owner)
    if errand.rest:
        _begin_arc(turn, errand.rest, errand.origin, errand)
    else:
        turn.answer()


def then_arrive(turn: Turn, errand: PlanProgress) -> None:
    """An arc was taken."""
    if turn.record.certainty is Certainty.FAILED:  # it broke while the steps were taken
        turn.answer(f"{errand.plan} failed: {turn.record.last_error}; the state is {turn.record.shown}", errno.EIO)
        return
    turn.arrive(PLANS[errand.plan].target, "as the client asked")
    _arrived(turn, errand)


def then_halted(turn: Turn, errand: PlanProgress) -> None:
    """It holds still in fact now, so that the arc which needed that can be begun."""
    turn.arrive(DeviceState.STOP, "stopped by its agent")
    _begin_arc(turn, errand.rest, errand.origin, errand)


# Arcs that fail


def fall_arc(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """Undo what was done of an arc, or find out what was."""
    plan = PLANS[errand.plan]
    named = replace(failure, text=f"{step.do.value}: {failure}")
    stops = errand.plan == plans.PAUSE and not errand.rest
    if failure.fatal:
        turn.broken(str(named))
        _tell_failed(turn, errand.plan, named)
    elif stops and failure.unsent and failure.away and not errand.touched:
        turn.pause_over_link(str(named))
        _arrived(turn, errand)
    else:
        undoing = replace(errand, arc=errand.plan, failure=named, at=0, ahead="", rest=())
        _AFTER[plans.AFTERMATHS[plan.undo, errand.touched]](turn, undoing)


def _tell_failed(turn: Turn, arc: str, failure: Failure) -> None:
    turn.answer(f"{arc} failed at {failure}; the state is {turn.record.shown}", failure.errno)


def _told(turn: Turn, errand: PlanProgress) -> None:
    """The arc's failure is told, now that it is undone."""
    assert errand.failure is not None
    _tell_failed(turn, errand.arc, errand.failure)


def _bring_back(turn: Turn, errand: PlanProgress) -> None:
    saving = errand.origin is DeviceState.PRE_COPY and turn.record.saves
    turn.begin(replace(errand, plan=plans.BRING_BACK_SAVING if saving else plans.BRING_BACK))


def _run_on(turn: Turn, errand: PlanProgress) -> None:
    """The function was not stopped, so it runs as before."""
    if turn.record.state is DeviceState.PRE_COPY and turn.record.saves:
        turn.do(ev.ReleaseSource())
        turn.arrive(DeviceState.PRE_COPY, f"it was not stopped: {errand.failure}")
    else:
        turn.run_again(f"it was not stopped: {errand.failure}")
    _told(turn, errand)


def _leave(turn: Turn, errand: PlanProgress) -> None:
    turn.drop()
    if errand.origin in RUNS and turn.record.state is DeviceState.STOP:
        turn.begin(replace(errand, plan=plans.BRING_BACK))
        return
    if turn.record.state is DeviceState.RUNNING:
        turn.run_again(str(errand.failure))
    else:
        turn.leave(Outcome.FAILED)
    _told(turn, errand)


def _undo_load(turn: Turn, errand: PlanProgress) -> None:
    turn.drop()
    turn.begin(replace(errand, plan=plans.UNDO_LOAD_RUN if errand.origin in RUNS else plans.UNDO_LOAD_STOP))


def _ask(turn: Turn, errand: PlanProgress) -> None:
    turn.begin(replace(errand, plan=plans.ASK))


def _stand(turn: Turn, errand: PlanProgress) -> None:
    """The function was not started, so it stands still; if it is allowed, it is brought back in the background."""
    if goal_of(turn.record, Undo.LEARN) is Goal.RESUME:
        turn.settle(Goal.RESUME, str(errand.failure), sure=True)
    _told(turn, errand)


def _lose_load(turn: Turn, errand: PlanProgress) -> None:
    turn.lose_load(str(errand.failure))
    _told(turn, errand)


_AFTER: Mapping[Aftermath, Callable[[Turn, PlanProgress], None]] = MappingProxyType(
    {
        Aftermath.BRING_BACK: _bring_back,
        Aftermath.RUN_ON: _run_on,
        Aftermath.LEAVE: _leave,
        Aftermath.RESET: _undo_load,
        Aftermath.ASK: _ask,
        Aftermath.STAND: _stand,
        Aftermath.LOSE_LOAD: _lose_load,
    }
)


def then_run(turn: Turn, errand: PlanProgress) -> None:
    """A failed arc is undone, and the function runs."""
    how = "reset" if errand.plan == plans.UNDO_LOAD_RUN else "brought back"
    turn.run_again(f"{how}: {errand.failure}")
    _told(turn, errand)


def then_pre_copy(turn: Turn, errand: PlanProgress) -> None:
    """A failed arc is undone, and the function runs and is saved anew."""
    turn.arrive(DeviceState.PRE_COPY, f"brought back: {errand.failure}")
    _told(turn, errand)


def then_stand(turn: Turn, errand: PlanProgress) -> None:
    """What was to be done is done, and the state is what it was."""
    missing = errand.missing
    if missing is not None and missing.fatal:
        turn.broken(str(missing))
        turn.answer(str(missing), missing.errno)
        return
    if missing is not None:  # the agent has not left its migration, and is told to later
        turn.leave(Outcome.CANCELLED)
    if errand.failure is not None:
        _told(turn, errand)
    else:
        turn.answer()


def then_adopt(turn: Turn, errand: PlanProgress) -> None:
    """The agent has said where the failed arc left the function."""
    status, failure = errand.status, errand.failure
    assert status is not None
    assert failure is not None
    if status.state is AgentState.QUIESCED or (failure.unclear and status.state is not AgentState.RUNNING):
        # What was asked for may still be under way.
        turn.settle(goal_of(turn.record, PLANS[errand.arc].undo), str(failure))
    else:
        turn.adopt(status)
    _told(turn, errand)


def fall_undo(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """Undoing has failed, too: the background goes on with it."""
    if step.do is Do.RESTART_STREAM:
        turn.do(ev.HaltSource())
    if failure.fatal:
        turn.broken(str(failure))
    else:
        goal = goal_of(turn.record, PLANS[errand.arc].undo)
        turn.settle(goal, f"{errand.failure}; then {failure}", sure=failure.unsent and not errand.touched)
    _told(turn, errand)


def give_up_arc(turn: Turn, errand: PlanProgress) -> None:
    """The client vanished, or its time was up, in the middle of a step."""
    undo = PLANS[errand.arc or errand.plan].undo
    if undo is Undo.LOAD_FAILED:
        turn.lose_load("it was given up while it was applied")
    elif undo is Undo.LEAVE and turn.record.state is DeviceState.RUNNING:
        turn.run_again("the client abandoned it")
    else:
        turn.settle(goal_of(turn.record, undo), "it was given up")


def fall_halt(turn: Turn, errand: PlanProgress, step: Step, failure: Failure) -> None:
    """It could not be made to hold still."""
    named = f"{step.do.value}: {failure}"
    if failure.fatal:
        turn.broken(named)
    elif errand.touched:
        turn.settle(goal_of(turn.record, Undo.RESUME), named)
    turn.answer(f"it could not be stopped at {named}; it is {turn.record.shown}", failure.errno)


def give_up_halt(turn: Turn, errand: PlanProgress) -> None:
    """It may hold still, or not."""
    turn.settle(goal_of(turn.record, Undo.RESUME), "it was given up")
