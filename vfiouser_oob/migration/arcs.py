"""From arcs of the state machine to what is done for them: one table, read by one interpreter.

Both generations travel these nine arcs; only the interpreter's caller knows which one asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import trio

from vfiouser_agents.errors import AgentError, Fate
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import VfioUserError


class Do(Enum):
    """One step; the engine has a method for each."""

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
    DROP_STREAM = "drop stream"
    ABORT = "abort"
    END_CANCELLED = "end cancelled"
    #: End the migration, with the outcome that it had.
    END = "end"
    LOAD_BEGIN = "load begin"
    #: Verify and apply what was loaded; with nothing written, undo the beginning.
    LOAD_COMMIT = "load commit"


class Bound(Enum):
    """Which configured limit a step has inside the message's deadline."""

    CALL = "call"
    STOP = "stop"
    DATA = "data"


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


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an arc.

    Args:
        do: what.
        bound: its own limit.
        tolerated: the arc goes on when it fails, because the device is where the arc leads already.
    """

    do: Do
    bound: Bound = Bound.CALL
    tolerated: bool = False


@dataclass(frozen=True, slots=True)
class Arc:
    """What one change of state takes.

    Args:
        steps: in order.
        undo: what happens when one of them fails.
    """

    steps: tuple[Step, ...]
    undo: Undo


_S = DeviceState
_HALT = (Step(Do.FLUSH), Step(Do.QUIESCE, Bound.STOP), Step(Do.STOP, Bound.STOP))

ARCS: Mapping[tuple[DeviceState, DeviceState], Arc] = MappingProxyType(
    {
        (_S.RUNNING, _S.STOP): Arc(_HALT, Undo.RESUME),
        (_S.STOP, _S.RUNNING): Arc((Step(Do.RESUME, Bound.STOP), Step(Do.END, tolerated=True)), Undo.LEARN),
        (_S.RUNNING, _S.PRE_COPY): Arc(
            (Step(Do.BEGIN_SOURCE), Step(Do.OPEN_STREAM), Step(Do.START_STREAM)), Undo.LEAVE
        ),
        (_S.PRE_COPY, _S.RUNNING): Arc(
            (Step(Do.DROP_STREAM), Step(Do.ABORT, tolerated=True), Step(Do.END_CANCELLED, tolerated=True)), Undo.LEAVE
        ),
        (_S.PRE_COPY, _S.STOP_COPY): Arc(
            (Step(Do.HOLD_STREAM, Bound.DATA), *_HALT, Step(Do.FINISH_STREAM)), Undo.RESUME
        ),
        (_S.STOP, _S.STOP_COPY): Arc((Step(Do.BEGIN_SOURCE), Step(Do.OPEN_STREAM), Step(Do.FINISH_STREAM)), Undo.LEAVE),
        (_S.STOP_COPY, _S.STOP): Arc((Step(Do.DROP_STREAM), Step(Do.ABORT, tolerated=True)), Undo.LEARN),
        (_S.STOP, _S.RESUMING): Arc((Step(Do.BEGIN_DESTINATION), Step(Do.LOAD_BEGIN, Bound.DATA)), Undo.RESET),
        (_S.RESUMING, _S.STOP): Arc((Step(Do.LOAD_COMMIT, Bound.DATA),), Undo.LOAD_FAILED),
    }
)
#: What is done before a running function is stopped, if the way leads on to there: its device is to know what for.
AHEAD: Mapping[DeviceState, Do] = MappingProxyType({_S.STOP_COPY: Do.BEGIN_SOURCE, _S.RESUMING: Do.BEGIN_DESTINATION})


class StepFailed(Exception):
    """A step of an arc failed.

    Args:
        step: which.
        error: what the agent, the device or the stream said.
    """

    def __init__(self, step: Step, error: AgentError | VfioUserError) -> None:
        super().__init__(f"{step.do.value}: {error}")
        self.step = step
        self.error = error

    @property
    def errno(self) -> int:
        """The error number for the client."""
        return self.error.errno

    @property
    def unclear(self) -> bool:
        """Whether the step may still have its effect."""
        return isinstance(self.error, AgentError) and self.error.fate is Fate.UNKNOWN

    @property
    def device_failed(self) -> bool:
        """Whether the agent said that the function is broken."""
        return isinstance(self.error, AgentError) and self.error.fate is Fate.FAILED


async def travel(
    arc: Arc,
    actions: Mapping[Do, Callable[[float], Awaitable[None]]],
    bounds: Mapping[Bound, float],
    deadline: float,
) -> None:
    """Take the steps of an arc.

    Args:
        arc: the arc.
        actions: does each step, given its deadline.
        bounds: seconds of each limit.
        deadline: when all of it has to be done, as trio's clock has it.

    Raises:
        StepFailed: a step that is not tolerated failed; the steps before it were taken.
    """
    for step in arc.steps:
        try:
            await actions[step.do](min(deadline, trio.current_time() + bounds[step.bound]))
        except (AgentError, VfioUserError) as error:
            failure = StepFailed(step, error)
            if not step.tolerated or failure.device_failed:
                raise failure from error
