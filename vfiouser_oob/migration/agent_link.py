"""One function's way to its agent: a session that is opened when needed, and calls that end at a deadline.

Rule 1: every call has a deadline. One that did not answer in time has an unknown effect, which is what
        `DeadlineExceeded` says; so has one whose connection was lost. One that was certainly not sent says so
        (`AgentError.unsent`), and has none.
Rule 2: a lost session is opened again by the next call, and a migration that was begun is taken over by its id. Nobody
        else does that: an adapter's session ends with its connection.
Rule 3: while nothing is to be done no session is open, so an idle function costs the agent nothing.
Rule 4: while a session is open its events are listened to, if it has any; they are hints, on which nothing depends.
Rule 5: an agent that is away is told of once, and once more when it is back, however often it was called meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import trio

from vfiouser_agents.api import Agent, Capabilities, EventKind, Outcome, Session, Status
from vfiouser_agents.causes import words_of
from vfiouser_agents.delivery import Delivery, followed
from vfiouser_agents.errors import (
    AgentError,
    ConnectError,
    DeadlineExceeded,
    InvalidState,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)
from vfiouser_agents.operations import Op, Operation, invoke
from vfiouser_oob.migration.backoff import Pace
from vfiouser_oob.migration.events import BeganAtAgent
from vfiouser_oob.migration.host import BackgroundJob, MigrationHost
from vfiouser_oob.migration.record import Begun
from vfiouser_oob.migration.trace import Tracer
from vfiouser_oob.persist.capabilities import Facts, Source

P = ParamSpec("P")
T = TypeVar("T")


class Unanswered(DeadlineExceeded):
    """Our own time for a call is over."""

    away = True


#: After these the session is of no use; the next call opens another.
_SESSION_LOST = (TransportLost, ProtocolError, NotFound)
#: Operations that are made with every chunk, so that only their failures are traced.
_OFTEN = frozenset({Operation.SAVE, Operation.LOAD, Operation.DIRTY_REPORT})
#: Events that are taken in a row, and seconds until the next ones are; a watcher that is slow loses the oldest.
_EVENTS = 16
_EVENTS_S = 0.1
#: Seconds to tell the agent that a session is of no use any more.
_LET_GO_S = 5.0


@dataclass(slots=True)
class _OpenSession:
    """A session with the agent.

    Args:
        session: the session.
        member: whether the migration belongs to it, if one was begun.
        told: the migration that its agent has taken a `begin` for, and need not be told of again.
    """

    session: Session
    member: bool
    told: Begun | None = None


class AgentLink:
    """Calls to the agent of one function.

    Args:
        agent: the agent; shared with other functions.
        function_id: the agent's name for the function.
        tracer: where steps are traced.
        host: knows which migration was begun, and is told of what the agent says of itself.
    """

    def __init__(self, agent: Agent, function_id: str, tracer: Tracer, host: MigrationHost) -> None:
        self.function_id = function_id
        #: What is known of the agent's capabilities; None if nothing is.
        self.facts: Facts | None = None
        #: Since when nobody answers, as trio's clock has it and in seconds since 1970; None: somebody did at last.
        self.away_since: float | None = None
        self.away_time: float | None = None
        #: How far the last call came that changes what the function does.
        self.changing = Delivery()
        self._agent = agent
        self._tracer = tracer
        self._host = host
        self._open: _OpenSession | None = None
        self._watching = BackgroundJob(host.background)
        self._opening = trio.Lock()
        self._in_use = 0

    @property
    def is_open(self) -> bool:
        """Whether a session is open."""
        return self._open is not None

    @property
    def caps(self) -> Capabilities | None:
        """What the agent said last that it can do, to whomever; None if that is not known."""
        return None if self.facts is None else self.facts.caps

    @property
    def asked(self) -> bool:
        """Whether `caps` are the agent's word to this daemon."""
        return self.facts is not None and self.facts.source is Source.AGENT

    async def call(self, op: Op[P, T], deadline: float, *args: P.args, **kwargs: P.kwargs) -> T:
        """Make one call.

        Args:
            op: the operation.
            deadline: when to give up, as trio's clock has it.
            args: the operation's arguments.
            kwargs: the operation's arguments.

        Raises:
            AgentError: of whatever kind; `DeadlineExceeded` for our own deadline.
        """
        return await self.make(op, deadline, lambda session: invoke(session, op, *args, **kwargs))

    async def make(self, op: Op[..., Any], deadline: float, work: Callable[[Session], Awaitable[T]]) -> T:
        """Make one call whose arguments depend on the session.

        Args:
            op: the operation.
            deadline: when to give up, as trio's clock has it.
            work: makes the call on a session.

        Raises:
            AgentError: as for `call`.
        """
        with self._tracer.step(op.name, quiet=op in _OFTEN), followed() as delivery:
            if op.changes:
                self.changing = delivery
            self._in_use += 1
            try:
                with trio.move_on_at(deadline):
                    return await self._made(op, delivery, work)
                raise self._told(op, _late(op.name, delivery), None, delivery)
            finally:
                self._in_use -= 1

    async def _made(self, op: Op[..., Any], delivery: Delivery, work: Callable[[Session], Awaitable[T]]) -> T:
        """Make a call on the open session; on another one if its connection turns out to have gone before we came."""
        while True:
            known, used = self._open, None
            try:
                used = await self._ready(op, delivery)
                result = await work(used)
            except AgentError as error:
                delivery.judge(error)
                if isinstance(error, TransportLost) and error.unsent and known is not None and used is known.session:
                    self._forget(used)
                    continue
                self._failed(op, error, used, delivery)
                raise
            except OSError as error:
                raise self._told(op, _lost(error, delivery), used, delivery) from error
            self._answered(op)
            return result

    async def _ready(self, op: Op[..., Any], delivery: Delivery) -> Session:
        """A session on which the call can be made; what is sent until then changes nothing."""
        delivery.note(sent=False)
        try:
            session = await self._opened(op)
        except BaseException:
            delivery.note(sent=False)
            raise
        delivery.note(sent=None)
        return session

    def _failed(self, op: Op[..., Any], error: AgentError, used: Session | None, delivery: Delivery) -> None:
        """Note at an error what is known of its call, and what it says of the agent."""
        delivery.judge(error)
        if isinstance(error, _SESSION_LOST):
            self._forget(used)
        if error.away:
            self._missed(error)
        elif not error.unsent and not isinstance(error, Unsupported):  # which adapters say themselves
            self._answered(op)

    def _told(self, op: Op[..., Any], error: AgentError, used: Session | None, delivery: Delivery) -> AgentError:
        """An error of our own, noted; a frame that raises an error and keeps it would keep all that is in its calls."""
        self._failed(op, error, used, delivery)
        return error

    def _missed(self, error: AgentError) -> None:
        if self.away_since is None:
            self.away_since, self.away_time = trio.current_time(), time.time()
            self._tracer.note("no contact with the agent", error=str(error))
            self._tracer.agent_away = True

    def _answered(self, op: Op[..., Any]) -> None:
        if self.away_since is not None and op.contact:
            self._tracer.tell("the agent answers again", away_s=round(trio.current_time() - self.away_since, 3))
            self.away_since = self.away_time = None
            self._tracer.agent_away = False

    def _forget(self, used: Session | None) -> None:
        if used is None or self._open is None or self._open.session is not used:
            return
        self._open = None
        self._watching.cancel()
        # Not left as it is: it may still be open at the agent.
        self._host.background.begin(_let_go, used)
        self._host.contact_lost()

    async def _opened(self, op: Op[..., Any]) -> Session:
        if self._open is not None and (self._open.member or op.anybody):
            return self._open.session
        async with self._opening:
            if self._open is None:
                await self._agent.connect()
                session = await self._agent.open(self.function_id)
                require_usable(session.caps)
                self._open = _OpenSession(session, member=self._host.record.begun is None)
                self._learn(session)
                self._watching.cancel()
                self._watching.begin(partial(self._watch, session))
            now = self._open
            if not op.anybody and not now.member:
                begun = self._host.record.begun
                if begun is None:
                    now.member = True
                elif await _taken_over(now.session, begun):
                    now.member, now.told = True, begun
                elif op.role is not None:
                    raise InvalidState(
                        f"the agent no longer knows migration {begun.id} of function {self.function_id}; "
                        f"{op.name} was not sent"
                    )
            return now.session

    def _learn(self, session: Session) -> None:
        self.facts = Facts(session.caps, time.time())
        self._host.learned(self.facts)

    # The agent's events

    async def _watch(self, session: Session) -> None:
        """Hand on what the agent tells of itself; that it tells nothing changes nothing."""
        reason = "it has ended"
        try:
            async with session.watch() as events:
                pace = Pace(_EVENTS, _EVENTS_S)
                async for event in events:
                    if self.facts is None or session.caps != self.facts.caps:
                        require_usable(session.caps)
                        self._learn(session)  # the agent was started anew, and is another one now
                        if self._open is not None and self._open.session is session:
                            self._open.told = None
                    self._host.heard(event)
                    if event.kind is EventKind.CONNECTION_LOST:
                        self._forget(session)  # which ends this watch, and has another session opened while it matters
                    await pace.taken()
        except* (AgentError, OSError) as errors:
            reason = words_of(errors)
        self._tracer.unwatched(reason)

    # Calls

    async def status(self, deadline: float) -> Status:
        """Ask where the function is."""
        return await self.call(Operation.STATUS, deadline)

    async def begin(self, begun: Begun, deadline: float) -> None:
        """Begin a migration; one that an earlier life of ours has left behind is ended first.

        Args:
            begun: which.
            deadline: when to give up.
        """
        before = self._host.record.begun
        if self._open is not None and self._open.told == before == begun:
            await trio.lowlevel.checkpoint()
            return
        self._host.feed(BeganAtAgent(begun))
        try:
            await self.call(Operation.BEGIN, deadline, begun.role, begun.id)
        except InvalidState:
            await self.call(Operation.END, deadline, Outcome.FAILED)
            await self.call(Operation.BEGIN, deadline, begun.role, begun.id)
        except AgentError as error:
            if error.unsent:
                self._host.feed(BeganAtAgent(before))
            raise
        if self._open is not None:
            self._open.member, self._open.told = True, begun

    async def leave(self, outcome: Outcome, deadline: float, *, abort: bool) -> None:
        """End the migration, if one was begun; when that fails, it still counts as begun.

        Args:
            outcome: how it ended.
            deadline: when to give up.
            abort: drop what was being saved or loaded first.

        Raises:
            AgentError: it could not be ended.
        """
        if self._host.record.begun is not None:
            if abort:
                await self.call(Operation.ABORT, deadline)
            if self._open is not None:
                self._open.told = None
            await self.call(Operation.END, deadline, outcome)
            self._host.feed(BeganAtAgent(None))

    def close(self, *, force: bool = False) -> None:
        """Let go of the session; nothing changes for the function, and nobody waits for it.

        Args:
            force: also while something still uses it.
        """
        if (self._in_use or self._host.record.logging) and not force:
            return
        left, self._open = self._open, None
        self._watching.cancel()
        if left is not None:
            self._host.background.begin(_let_go, left.session)


async def _taken_over(session: Session, begun: Begun) -> bool:
    """Take over a migration that was begun in an earlier session.

    Returns:
        Whether the agent has it still: one that it has forgotten is not begun anew, for that would be another one.
    """
    if session.caps.takeover:
        status = await session.status()
        if (status.role, status.migration_id) != (begun.role, begun.id):
            return False
    await session.begin(begun.role, begun.id)
    return True


async def _let_go(session: Session) -> None:
    with trio.move_on_after(_LET_GO_S):
        try:
            await session.aclose()
        except (AgentError, OSError):  # gone already
            pass


def _late(name: str, delivery: Delivery) -> AgentError:
    """The error of a call whose time is up."""
    if delivery.unsent:
        return ConnectError(f"could not reach the agent in time for {name}")
    return Unanswered(f"the agent did not answer {name} in time; its effect is unknown")


def _lost(error: OSError, delivery: Delivery) -> AgentError:
    """The error of a call that the system ended."""
    reason = words_of(error)
    if delivery.unsent:
        return ConnectError(f"cannot reach the agent: {reason}")
    return TransportLost(f"the connection to the agent broke: {reason}")


def require_usable(caps: Capabilities) -> None:
    """Refuse what an agent says of itself that nothing could be done with.

    Args:
        caps: of a session that was opened.

    Raises:
        ProtocolError: a size is impossible.
    """
    if caps.max_chunk < 1 or caps.max_state < 0:
        raise ProtocolError(
            f"the agent takes pieces of {caps.max_chunk} bytes and states of {caps.max_state}; the least is 1 and 0"
        )
