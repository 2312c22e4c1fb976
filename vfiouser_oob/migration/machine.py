"""The migration of one function as a pure function: a record and an event make a new record and what is to be done.

There is no clock in here, no I/O and no waiting. What is done for each request is in the tables of `plans`, what the
agent's word means in those of `fence`; here they are interpreted.

Rule 1: *the state is the truth*. It changes when the agent has done something, not when it was asked to. While the
        truth is not known (a call was lost or timed out), the record says so, and the background finds out.
Rule 2: *never two running copies*. Until the client has the whole state, a source that may stand still is brought
        back; from then on it starts only when the client says RUNNING, or by a reset. A destination runs only what was
        verified and only when the client says so.
Rule 3: *the way back is never lost*. What is not known has a goal, until that is reached or the client resets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from vfiouser_agents.api import Role
from vfiouser_oob.migration import events as ev
from vfiouser_oob.migration import plans
from vfiouser_oob.migration import rules_arcs as arcs
from vfiouser_oob.migration import rules_background as background
from vfiouser_oob.migration import rules_clients as clients
from vfiouser_oob.migration.fence import VERDICTS, FenceVerdict
from vfiouser_oob.migration.plans import PLANS, Do, FailureOutcome, Then, steps_of
from vfiouser_oob.migration.record import Goal, MigrationRecord, Stream
from vfiouser_oob.migration.turn import FallRule, Rules, ThenRule, Turn
from vfiouser_protocol.constants import DeviceState


def advance(
    record: MigrationRecord, event: ev.MigrationEvent, now: float = 0.0
) -> tuple[MigrationRecord, tuple[ev.Effect, ...]]:
    """Take an event.

    Args:
        record: what is known so far.
        event: what has happened.
        now: when, in seconds since 1970.

    Returns:
        What is known now, and what is to be done about it, in order.
    """
    turn = Turn(record, now, _RULES)
    _HANDLERS[type(event)](turn, event)
    return turn.record, tuple(turn.effects)


def _taken(turn: Turn, event: ev.StepTaken) -> None:
    errand = turn.record.errand
    assert errand is not None
    step = steps_of(errand)[errand.at]
    done = errand.but(
        {
            "at": errand.at + 1,
            "touched": errand.touched or (step.changes and event.did),
            "status": errand.status if event.status is None else event.status,
        }
    )
    turn.set(errand=done)
    if step.do in turn.rules.learned:
        turn.rules.learned[step.do](turn, event)
    turn.go_on()


def _stream_opened(turn: Turn, event: ev.StepTaken) -> None:
    turn.set(stream=Stream(Role.SOURCE))


def _stream_restarted(turn: Turn, event: ev.StepTaken) -> None:
    stream = turn.record.stream
    if stream is not None:
        turn.set(stream=replace(stream, epoch=stream.epoch + 1, whole=False))


def _stream_dropped(turn: Turn, event: ev.StepTaken) -> None:
    turn.set(stream=None, load_failure=None)


def _load_begun(turn: Turn, event: ev.StepTaken) -> None:
    turn.set(stream=Stream(Role.DESTINATION), load_failure=None)


def _load_committed(turn: Turn, event: ev.StepTaken) -> None:
    """It is applied, or there was nothing, and the function was reset."""
    stream = turn.record.stream
    turn.set(committed=stream is not None and stream.position > 0, stream=None, load_failure=None)


def _resumed_for_client(turn: Turn, event: ev.StepTaken) -> None:
    turn.set(paused=False)


def _asked(turn: Turn, event: ev.StepTaken) -> None:
    errand = turn.record.errand
    assert errand is not None
    assert event.status is not None
    if errand.plan in plans.GOES_ON:
        background.heard(turn, ev.Heard(event.status))
    elif errand.plan == plans.ATTACH_ASK:
        turn.set(asked=True, blocked=None)
        found = VERDICTS[event.status.state][event.migrated]
        turn.set(fenced=found is FenceVerdict.FENCED, paused=found is FenceVerdict.PAUSED)
        if found is FenceVerdict.FREE:
            turn.do(ev.LetGo())


#: What the record learns when a step was taken.
_LEARNED_BY: Mapping[Do, Callable[[Turn, ev.StepTaken], None]] = MappingProxyType(
    {
        Do.OPEN_STREAM: _stream_opened,
        Do.RESTART_STREAM: _stream_restarted,
        Do.REOPEN_STREAM: _stream_restarted,
        Do.DROP_STREAM: _stream_dropped,
        Do.LOAD_BEGIN: _load_begun,
        Do.LOAD_COMMIT: _load_committed,
        Do.CLOSE: _resumed_for_client,
        Do.ASK: _asked,
    }
)


def _refused(turn: Turn, event: ev.StepRefused) -> None:
    errand = turn.record.errand
    assert errand is not None
    step = steps_of(errand)[errand.at]
    after = replace(errand, at=errand.at + 1)
    if step.owed:
        turn.begin(replace(after, missing=event.failure))
    elif step.tolerated and not event.failure.fatal:
        turn.begin(after)
    else:
        touched = errand.touched or (step.changes and not event.failure.unsent)
        turn.set(errand=None)
        turn.rules.fall[PLANS[errand.plan].fall](turn, replace(errand, touched=touched), step, event.failure)


def _abandoned(turn: Turn, event: ev.Abandoned) -> None:
    errand = turn.record.errand
    if errand is not None:
        turn.set(errand=None)
        turn.rules.given_up[PLANS[errand.plan].fall](turn, errand)


def _started(turn: Turn, event: ev.Started) -> None:
    """What was under way when the other daemon ended is given up; what was buffered is gone with it."""
    stream, goal = turn.record.stream, turn.record.goal
    turn.set(attached=event.client, asked=False)
    if not event.client:
        turn.set(logging=False, p2p=False)
    _abandoned(turn, ev.Abandoned())
    record = turn.record
    if event.client:
        if record.stream is not None and record.saves:
            # What was handed over in vain counts as handed over: who believes otherwise may start a second copy.
            turn.set(stream=replace(record.stream, position=event.position, whole=event.whole))
        clients.client_goes_on(turn, settling=goal is not None and record.goal is goal)
        return
    if stream is not None and stream.role is Role.DESTINATION:
        turn.lose_load("the daemon was started again")
    elif stream is not None and not record.handed and record.goal is None:
        turn.drop()
        if record.state is DeviceState.PRE_COPY:
            turn.arrive(DeviceState.RUNNING, "the daemon was started again")
        else:
            turn.settle(Goal.RESUME, "the daemon was started again")
    elif goal is not None and record.goal is goal:
        turn.do(ev.Settle())


_HANDLERS: Mapping[type[ev.MigrationEvent], Callable[[Turn, Any], None]] = MappingProxyType(
    {
        ev.Started: _started,
        ev.TakenOver: arcs.taken_over,
        ev.Requested: arcs.requested,
        ev.P2pNamed: arcs.p2p_named,
        ev.StepTaken: _taken,
        ev.StepRefused: _refused,
        ev.Abandoned: _abandoned,
        ev.ClientCame: clients.client_came,
        ev.ClientMigrates: clients.client_migrates,
        ev.FitWanted: clients.fit_wanted,
        ev.ClientWent: clients.client_went,
        ev.ResetAsked: clients.reset_asked,
        ev.GuestReset: clients.guest_reset,
        ev.AttemptDue: background.attempt_due,
        ev.Probed: background.probed,
        ev.Blocked: background.blocked,
        ev.Heard: background.heard,
        ev.DeviceBroke: background.device_broke,
        ev.BeganAtAgent: background.began_at_agent,
        ev.Moved: background.moved,
        ev.LoadFailed: background.load_failed,
        ev.Logging: background.logging,
    }
)
_THEN: Mapping[Then, ThenRule] = MappingProxyType(
    {
        Then.ARRIVE: arcs.then_arrive,
        Then.HALTED: arcs.then_halted,
        Then.RUN: arcs.then_run,
        Then.PRE_COPY: arcs.then_pre_copy,
        Then.STAND: arcs.then_stand,
        Then.ADOPT: arcs.then_adopt,
        Then.FIT: clients.then_fit,
        Then.FRESH: clients.then_fresh,
        Then.RESET: clients.then_reset,
        Then.BROUGHT_BACK: background.then_brought_back,
        Then.WAS_RESET: background.then_was_reset,
        Then.LEARNED: background.then_learned,
        Then.GONE_ON: clients.then_gone_on,
    }
)
_FALL: Mapping[FailureOutcome, FallRule] = MappingProxyType(
    {
        FailureOutcome.ARC: arcs.fall_arc,
        FailureOutcome.HALT: arcs.fall_halt,
        FailureOutcome.UNDO: arcs.fall_undo,
        FailureOutcome.ATTACH: clients.fall_attach,
        FailureOutcome.TOLD: clients.fall_told,
        FailureOutcome.RESET: clients.fall_reset,
        FailureOutcome.RESTART: clients.fall_restart,
        FailureOutcome.GO_ON: clients.fall_go_on,
        FailureOutcome.TRY_AGAIN: background.fall_try_again,
    }
)
_GIVEN_UP: Mapping[FailureOutcome, ThenRule] = MappingProxyType(
    {
        FailureOutcome.ARC: arcs.give_up_arc,
        FailureOutcome.HALT: arcs.give_up_halt,
        FailureOutcome.UNDO: arcs.give_up_arc,
        FailureOutcome.ATTACH: clients.give_up_attach,
        FailureOutcome.TOLD: background.keep_trying,
        FailureOutcome.RESET: clients.give_up_reset,
        FailureOutcome.RESTART: clients.give_up_restart,
        FailureOutcome.GO_ON: clients.give_up_restart,
        FailureOutcome.TRY_AGAIN: background.keep_trying,
    }
)
_RULES = Rules(_THEN, _FALL, _GIVEN_UP, _LEARNED_BY)
