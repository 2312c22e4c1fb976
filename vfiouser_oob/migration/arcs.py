"""From arcs of the state machine to what is done for them: one table, read by one interpreter.

Both generations travel these nine arcs; only the interpreter's caller knows which one asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

import trio

from vfiouser_agents.errors import AgentError, Fate
from vfiouser_oob.migration.backoff import WAITING_PAUSE_MAX_S, Backoff, agent_is_away, persist
from vfiouser_protocol.constants import DeviceState
from vfiouser_protocol.errors import VfioUserError

#: Parts of a message's time, see `MessageTime`.
_FORWARD = 0.6
_AGAIN = 0.9


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
        changes: it changes what the function does.
    """

    do: Do
    bound: Bound = Bound.CALL
    tolerated: bool = False
    changes: bool = False


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
_HALT = (
    Step(Do.FLUSH),
    Step(Do.QUIESCE, Bound.STOP, changes=True),
    Step(Do.STOP, Bound.STOP, changes=True),
)

ARCS: Mapping[tuple[DeviceState, DeviceState], Arc] = MappingProxyType(
    {
        (_S.RUNNING, _S.STOP): Arc(_HALT, Undo.RESUME),
        (_S.STOP, _S.RUNNING): Arc(
            (Step(Do.RESUME, Bound.STOP, changes=True), Step(Do.END, tolerated=True)), Undo.LEARN
        ),
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
        (_S.STOP, _S.RESUMING): Arc(
            (Step(Do.BEGIN_DESTINATION), Step(Do.LOAD_BEGIN, Bound.DATA, changes=True)), Undo.RESET
        ),
        (_S.RESUMING, _S.STOP): Arc((Step(Do.LOAD_COMMIT, Bound.DATA, changes=True),), Undo.LOAD_FAILED),
    }
)
#: What is done before a running function is stopped, if the way leads on to there: its device is to know what for.
AHEAD: Mapping[DeviceState, Do] = MappingProxyType({_S.STOP_COPY: Do.BEGIN_SOURCE, _S.RESUMING: Do.BEGIN_DESTINATION})
#: For a function that its VM has paused without it: what makes it hold still, before anything that needs that.
HALT = Arc(_HALT, Undo.LEARN)


@dataclass(frozen=True, slots=True)
class MessageTime:
    """The time that a client's message has, in points of trio's clock.

    Args:
        forward: until when what is done may be under way, so that there is time to undo it.
        again: until when what did not reach the agent is attempted again: there is nothing to undo then.
        end: when the message has to be answered.
    """

    forward: float
    again: float
    end: float

    @classmethod
    def until(cls, end: float) -> MessageTime:
        """Divide the time from now on."""
        now = trio.current_time()
        left = max(0.0, end - now)
        return cls(now + left * _FORWARD, now + left * _AGAIN, end)

    def once(self) -> MessageTime:
        """The same time, but nothing is attempted again."""
        return MessageTime(self.forward, float("-inf"), self.end)

    @property
    def attempt(self) -> float:
        """When an attempt that begins now has to be over."""
        return self.forward if trio.current_time() < self.forward else self.end


class StepFailed(Exception):
    """A step of an arc failed.

    Args:
        step: which.
        error: what the agent, the device or the stream said.
        touched: the function may not do any more what it did before the arc.
    """

    def __init__(self, step: Step, error: AgentError | VfioUserError, *, touched: bool) -> None:
        super().__init__(f"{step.do.value}: {error}")
        self.step = step
        self.error = error
        self.touched = touched

    @property
    def errno(self) -> int:
        """The error number for the client."""
        return self.error.errno

    @property
    def unclear(self) -> bool:
        """Whether the step may still have its effect."""
        return isinstance(self.error, AgentError) and self.error.unclear

    @property
    def not_reached(self) -> bool:
        """Whether it failed because there was no agent to be reached."""
        return isinstance(self.error, AgentError) and self.error.unsent and self.error.away

    @property
    def device_failed(self) -> bool:
        """Whether the agent said that the function is broken."""
        return isinstance(self.error, AgentError) and self.error.fate is Fate.FAILED


#: Takes a step by a deadline; False if there was nothing to do.
Action: TypeAlias = Callable[[float], Awaitable[bool | None]]


async def travel(
    arc: Arc, actions: Mapping[Do, Action], bounds: Mapping[Bound, float], time: MessageTime, retry_s: float
) -> None:
    """Take the steps of an arc; what finds no agent is attempted again, as long as there is time.

    Args:
        arc: the arc.
        actions: does each step, given its deadline.
        bounds: seconds of each limit.
        time: of the message.
        retry_s: seconds before the first repetition.

    Raises:
        StepFailed: a step that is not tolerated failed; the steps before it were taken.
    """
    touched = False
    for step in arc.steps:

        async def attempt(step: Step = step) -> bool | None:
            return await actions[step.do](min(time.attempt, trio.current_time() + bounds[step.bound]))

        until = float("-inf") if step.tolerated or step.do is Do.LOAD_COMMIT else time.again
        try:
            done = await persist(attempt, Backoff(retry_s, WAITING_PAUSE_MAX_S, until), agent_is_away)
        except (AgentError, VfioUserError) as error:
            unsent = isinstance(error, AgentError) and error.unsent
            if not step.tolerated or (isinstance(error, AgentError) and error.fatal):
                raise StepFailed(step, error, touched=touched or (step.changes and not unsent)) from error
        else:
            touched = touched or (step.changes and done is not False)
