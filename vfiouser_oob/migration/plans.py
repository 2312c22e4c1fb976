"""What is done for each thing that is asked for: plans of steps, as tables that `machine` reads.

Both generations travel the same nine arcs. What goes wrong in the middle of one is undone by plans, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from vfiouser_oob.migration.record import Goal, PlanProgress, ResetDue
from vfiouser_protocol.constants import DeviceState


class Do(Enum):
    """One step; `steps` has a method for each."""

    #: A replied access over the device link: what the guest wrote before is at the device when it returns.
    FLUSH = "flush"
    QUIESCE = "quiesce"
    STOP = "stop"
    RESUME = "resume"
    BEGIN_SOURCE = "begin source"
    BEGIN_DESTINATION = "begin destination"
    #: Describe the function and make a stream for its state.
    OPEN_STREAM = "open stream"
    #: Fetch what can be had while the function runs.
    START_STREAM = "start stream"
    #: Wait for the chunk that is under way, so that it survives the stop.
    HOLD_STREAM = "hold stream"
    #: Fetch the rest, from the stopped function.
    FINISH_STREAM = "finish stream"
    #: The function is not what was saved so far any more: begin the stream anew.
    RESTART_STREAM = "restart stream"
    #: What another daemon had fetched is gone: go on behind what the client has, with a stream begun anew.
    REOPEN_STREAM = "reopen stream"
    #: Nothing had come yet: go on with an empty load.
    REOPEN_LOAD = "reopen load"
    DROP_STREAM = "drop stream"
    ABORT = "abort"
    END_CANCELLED = "end cancelled"
    #: End the migration, with the outcome that it had.
    END = "end"
    LOAD_BEGIN = "load begin"
    #: Verify and apply what was loaded; with nothing written, undo the beginning.
    LOAD_COMMIT = "load commit"
    #: Ask the agent where the function is.
    ASK = "ask"
    #: Reset the function through its agent, whatever it was doing.
    RESET_AGENT = "reset agent"
    RESET_DEVICE = "reset device"
    #: Reset the device once more behind its agent, and write configuration space as the client has left it since.
    RESET_DEVICE_AGAIN = "reset device again"
    #: The same without the reset, which the guest has done.
    WRITE_CONFIG = "write config"
    #: The agent's log of dirty pages has ended with its reset: begin it anew.
    REARM_LOG = "rearm log"
    CLOSE = "close"


class Bound(Enum):
    """Which configured limit a step has inside the message's deadline."""

    CALL = "call"
    STOP = "stop"
    DATA = "data"


class Again(Enum):
    """What is attempted again while there is time."""

    NOTHING = "nothing"
    #: What did not find the agent.
    AWAY = "away"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a plan.

    Args:
        do: what.
        bound: its own limit, where the plan's manner has limits per step.
        tolerated: the plan goes on when it fails, because the function is where the plan leads already.
        owed: the plan goes on when it fails, and what could not be done is remembered.
        unless_owed: it is left out when something is owed.
        changes: it changes what the function does.
        again: what is attempted again.
    """

    do: Do
    bound: Bound = Bound.CALL
    tolerated: bool = False
    owed: bool = False
    unless_owed: bool = False
    changes: bool = False
    again: Again = Again.AWAY


class TimeAllotment(Enum):
    """How the time of a message is divided among the steps of a plan."""

    #: Each step has its limit within the part of the time that leaves enough to undo it.
    FORWARD = "forward"
    #: All steps together have what is left; an agent that has been away for long is not waited for.
    UNDOING = "undoing"
    #: All of the time; without the agent the client is turned away.
    ATTACHING = "attaching"
    #: The agent has its part of the time, the device the rest.
    RESETTING = "resetting"
    #: An attempt of the background.
    BACKGROUND = "background"


class Then(Enum):
    """What is true once all steps of a plan were taken."""

    #: The state that the arc leads to; the arcs that follow are begun.
    ARRIVE = "arrive"
    #: It stands still now, as its VM wanted before; the arcs that follow are begun.
    HALTED = "halted"
    #: It runs again as before, and what failed is told.
    RUN = "run"
    #: It runs and is saved again.
    PRE_COPY = "pre-copy"
    #: Nothing but what the steps themselves have changed.
    STAND = "stand"
    #: What the agent says is true, unless it may still change its mind.
    ADOPT = "adopt"
    #: The next need of a client that has come.
    FIT = "fit"
    #: It was reset for a client that has come.
    FRESH = "fresh"
    #: It was reset, or as much of that as could be done.
    RESET = "reset"
    #: The background has brought it back.
    BROUGHT_BACK = "brought back"
    #: The background has reset it.
    WAS_RESET = "was reset"
    #: The background has asked.
    LEARNED = "learned"
    #: A daemon goes on where another one ended, as far as that is possible.
    GONE_ON = "gone on"


class FailureOutcome(Enum):
    """What becomes of a plan of which a step failed, or that was given up."""

    ARC = "arc"
    HALT = "halt"
    UNDO = "undo"
    ATTACH = "attach"
    #: What failed is told, and nothing else is changed by it.
    TOLD = "told"
    RESET = "reset"
    RESTART = "restart"
    #: The state cannot be saved any more, which its reader is told; all else goes on.
    GO_ON = "go on"
    #: The background tries again.
    TRY_AGAIN = "try again"


class Undo(Enum):
    """What a failed arc leaves to be done."""

    #: The function runs, or stands still by an earlier request: leave the migration that was begun, if any.
    LEAVE = "leave"
    #: The function may stand still: bring it back.
    RESUME = "resume"
    #: A load may have begun: only a reset gives a function that can be trusted.
    RESET = "reset"
    #: Nothing may be undone on our own; find out where the function is.
    LEARN = "learn"
    #: The load is lost; only the client's reset leads out.
    LOAD_FAILED = "load failed"


class Aftermath(Enum):
    """How it is done."""

    BRING_BACK = "bring back"
    RUN_ON = "run on"
    LEAVE = "leave"
    RESET = "reset"
    ASK = "ask"
    STAND = "stand"
    LOSE_LOAD = "lose load"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done for one thing.

    Args:
        steps: in order.
        then: what is true afterwards.
        fall: what becomes of it when a step fails.
        manner: how time is divided.
        undo: of an arc.
        source: the state that an arc begins in.
        target: the state that an arc leads to.
    """

    steps: tuple[Step, ...]
    then: Then
    fall: FailureOutcome
    manner: TimeAllotment = TimeAllotment.FORWARD
    undo: Undo = Undo.LEARN
    source: DeviceState = DeviceState.RUNNING
    target: DeviceState = DeviceState.RUNNING


_S = DeviceState
_HALT = (
    Step(Do.FLUSH),
    Step(Do.QUIESCE, Bound.STOP, changes=True),
    Step(Do.STOP, Bound.STOP, changes=True),
)


def _tolerated(do: Do) -> Step:
    return Step(do, tolerated=True, again=Again.NOTHING)


#: What each arc takes, and what is left to be done when it fails.
_ARCS: Mapping[tuple[DeviceState, DeviceState], tuple[tuple[Step, ...], Undo]] = {
    (_S.RUNNING, _S.STOP): (_HALT, Undo.RESUME),
    (_S.STOP, _S.RUNNING): ((Step(Do.RESUME, Bound.STOP, changes=True), _tolerated(Do.END)), Undo.LEARN),
    (_S.RUNNING, _S.PRE_COPY): ((Step(Do.BEGIN_SOURCE), Step(Do.OPEN_STREAM), Step(Do.START_STREAM)), Undo.LEAVE),
    (_S.PRE_COPY, _S.RUNNING): (
        (Step(Do.DROP_STREAM), _tolerated(Do.ABORT), _tolerated(Do.END_CANCELLED)),
        Undo.LEAVE,
    ),
    (_S.PRE_COPY, _S.STOP_COPY): (
        (Step(Do.HOLD_STREAM, Bound.DATA), *_HALT, Step(Do.FINISH_STREAM)),
        Undo.RESUME,
    ),
    (_S.STOP, _S.STOP_COPY): ((Step(Do.BEGIN_SOURCE), Step(Do.OPEN_STREAM), Step(Do.FINISH_STREAM)), Undo.LEAVE),
    (_S.STOP_COPY, _S.STOP): ((Step(Do.DROP_STREAM), _tolerated(Do.ABORT)), Undo.LEARN),
    (_S.STOP, _S.RESUMING): (
        (Step(Do.BEGIN_DESTINATION), Step(Do.LOAD_BEGIN, Bound.DATA, changes=True)),
        Undo.RESET,
    ),
    (_S.RESUMING, _S.STOP): (
        # It is attempted again where it certainly did not arrive, by the pipeline that knows.
        (Step(Do.LOAD_COMMIT, Bound.DATA, changes=True, again=Again.NOTHING),),
        Undo.LOAD_FAILED,
    ),
}


def arc_name(source: DeviceState, target: DeviceState) -> str:
    """The name of an arc's plan, which is what people read, too."""
    return f"{source.name} → {target.name}"


#: What is done before a running function is stopped, if the way leads on to there: its device is to know what for.
AHEAD: Mapping[DeviceState, Do] = MappingProxyType({_S.STOP_COPY: Do.BEGIN_SOURCE, _S.RESUMING: Do.BEGIN_DESTINATION})
#: The arcs by which a VM is paused and goes on.
PAUSE, CONTINUE = arc_name(_S.RUNNING, _S.STOP), arc_name(_S.STOP, _S.RUNNING)
PAUSES = frozenset({PAUSE, CONTINUE})
HALT = "halt"
BRING_BACK = "bring back"
BRING_BACK_SAVING = "bring back to PRE_COPY"
UNDO_LOAD_RUN = "undo the load and run"
UNDO_LOAD_STOP = "undo the load and stop"
ASK = "ask"
RESET_IDLE = "reset while it runs"
RESET_CLEARING = "reset while it runs and the agent has not left its migration"
RESET = "reset"
GUEST_RESET = "guest's reset"
RESTART = "restart of the stream"
SETTLE_STOP = "settle: stop"

_RESET_AGENT = Step(Do.RESET_AGENT, owed=True)
_REARM = Step(Do.REARM_LOG, unless_owed=True, again=Again.NOTHING)
_RESET_DEVICE = Step(Do.RESET_DEVICE, again=Again.NOTHING)


def _background(then: Then, *steps: Do) -> Plan:
    taken = tuple(Step(do, again=Again.NOTHING) for do in steps)
    return Plan(taken, then, FailureOutcome.TRY_AGAIN, TimeAllotment.BACKGROUND)


def _attaching(then: Then, *steps: Step) -> Plan:
    return Plan(steps, then, FailureOutcome.ATTACH, TimeAllotment.ATTACHING)


def _going_on(*steps: Step) -> Plan:
    return Plan((_tolerated(Do.ASK), *steps), Then.GONE_ON, FailureOutcome.GO_ON, TimeAllotment.ATTACHING)


def _undoing(then: Then, *steps: Do, again: Again = Again.NOTHING) -> Plan:
    return Plan(tuple(Step(do, again=again) for do in steps), then, FailureOutcome.UNDO, TimeAllotment.UNDOING)


def _resetting(then: Then, fall: FailureOutcome, *steps: Step) -> Plan:
    return Plan(steps, then, fall, TimeAllotment.RESETTING)


#: How a daemon goes on with a client's migration that another one has left, by what is under way.
GO_ON, GO_ON_SAVING, GO_ON_LOADING = "go on", "go on with the save", "go on with the load"
GOES_ON = frozenset({GO_ON, GO_ON_SAVING, GO_ON_LOADING})
#: The needs of a client that has come, in the order in which they are looked at.
ATTACH_ASK, ATTACH_RESUME, ATTACH_RESET = "attach: ask", "attach: resume", "attach: reset"
PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        **{
            arc_name(*ends): Plan(steps, Then.ARRIVE, FailureOutcome.ARC, undo=undo, source=ends[0], target=ends[1])
            for ends, (steps, undo) in _ARCS.items()
        },
        # For a function that its VM has paused without it: what makes it hold still, before anything that needs that.
        HALT: Plan(_HALT, Then.HALTED, FailureOutcome.HALT),
        BRING_BACK: _undoing(Then.RUN, Do.RESUME, again=Again.AWAY),
        # It ran again in between, so what was saved so far need not fit what comes: begin anew.
        BRING_BACK_SAVING: _undoing(Then.PRE_COPY, Do.RESUME, Do.RESTART_STREAM, again=Again.AWAY),
        UNDO_LOAD_RUN: _undoing(Then.RUN, Do.RESET_AGENT, Do.REARM_LOG),
        UNDO_LOAD_STOP: _undoing(Then.STAND, Do.RESET_AGENT, Do.REARM_LOG, Do.STOP),
        ASK: _undoing(Then.ADOPT, Do.ASK),
        ATTACH_ASK: _attaching(Then.FIT, _tolerated(Do.ASK)),
        ATTACH_RESUME: _attaching(Then.FIT, Step(Do.RESUME), Step(Do.CLOSE)),
        ATTACH_RESET: _attaching(Then.FRESH, Step(Do.RESET_AGENT), _RESET_DEVICE),
        GO_ON: _going_on(),
        GO_ON_SAVING: _going_on(Step(Do.REOPEN_STREAM)),
        GO_ON_LOADING: _going_on(Step(Do.REOPEN_LOAD)),
        RESET_IDLE: _resetting(Then.STAND, FailureOutcome.TOLD, _RESET_DEVICE),
        RESET_CLEARING: _resetting(
            Then.STAND, FailureOutcome.TOLD, Step(Do.RESET_AGENT, owed=True, again=Again.NOTHING), _REARM, _RESET_DEVICE
        ),
        RESET: _resetting(Then.RESET, FailureOutcome.RESET, _RESET_AGENT, _RESET_DEVICE, _REARM),
        GUEST_RESET: _resetting(Then.RESET, FailureOutcome.RESET, _RESET_AGENT, _REARM),
        RESTART: _resetting(Then.STAND, FailureOutcome.RESTART, Step(Do.RESTART_STREAM), _REARM),
        "settle: resume": _background(Then.BROUGHT_BACK, Do.RESUME),
        "settle: reset": _background(Then.WAS_RESET, Do.RESET_AGENT, Do.RESET_DEVICE, Do.REARM_LOG),
        "settle: reset due": _background(Then.WAS_RESET, Do.RESET_AGENT, Do.RESET_DEVICE_AGAIN, Do.REARM_LOG),
        "settle: guest's reset due": _background(Then.WAS_RESET, Do.RESET_AGENT, Do.WRITE_CONFIG, Do.REARM_LOG),
        "settle: learn": _background(Then.LEARNED, Do.ASK),
        # Half-way: it may not be started by us, so it is stopped, which does no harm to any copy.
        SETTLE_STOP: _background(Then.LEARNED, Do.STOP, Do.ASK),
    }
)
#: How the background works for a goal, by what is owed.
SETTLING: Mapping[tuple[Goal, ResetDue | None], str] = MappingProxyType(
    {
        **{(Goal.RESUME, due): "settle: resume" for due in (None, *ResetDue)},
        **{(Goal.LEARN, due): "settle: learn" for due in (None, *ResetDue)},
        (Goal.RESET, None): "settle: reset",
        (Goal.RESET, ResetDue.DEVICE): "settle: reset due",
        (Goal.RESET, ResetDue.GUEST): "settle: guest's reset due",
    }
)
#: What to work for in the background when undoing fails; `machine.goal_of` knows the exception.
GOALS: Mapping[Undo, Goal] = MappingProxyType(
    {
        Undo.RESUME: Goal.RESUME,
        Undo.RESET: Goal.RESET,
        Undo.LEARN: Goal.LEARN,
        Undo.LEAVE: Goal.RESUME,
        Undo.LOAD_FAILED: Goal.RESET,
    }
)
#: How a failed arc is undone, by whether it has touched the function.
AFTERMATHS: Mapping[tuple[Undo, bool], Aftermath] = MappingProxyType(
    {
        (Undo.RESUME, True): Aftermath.BRING_BACK,
        (Undo.RESUME, False): Aftermath.RUN_ON,
        (Undo.LEAVE, True): Aftermath.LEAVE,
        (Undo.LEAVE, False): Aftermath.LEAVE,
        (Undo.RESET, True): Aftermath.RESET,
        (Undo.RESET, False): Aftermath.LEAVE,
        (Undo.LEARN, True): Aftermath.ASK,
        (Undo.LEARN, False): Aftermath.STAND,
        (Undo.LOAD_FAILED, True): Aftermath.LOSE_LOAD,
        (Undo.LOAD_FAILED, False): Aftermath.LOSE_LOAD,
    }
)


def steps_of(errand: PlanProgress) -> tuple[Step, ...]:
    """The steps of an errand: the one ahead, if there is one, and its plan's, without those that are left out."""
    ahead = (Step(Do(errand.ahead)),) if errand.ahead else ()
    return (*ahead, *PLANS[errand.plan].steps)
