"""An agent around another one, which fails as it is told to: for tests of whatever uses agents.

It behaves as an agent far away would: a call that was sent goes on when its caller has given up, the next call of the
same function waits for it, `status` is answered in between, and only `reset` ends it.

    async with FaultyAgent(MemoryAgent()) as agent:
        agent.inject("save", Delay(0.5), after=2)       # the third save is late
        agent.inject("stop", NeverAnswers(executed=True), count=None)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

import trio

from .api import (
    Agent,
    AgentInfo,
    Capabilities,
    Event,
    EventKind,
    FunctionInfo,
    Session,
    Status,
)
from .errors import ERRORS, AgentError, Incompatible, TransportLost
from .events import EventFeed
from .operations import BY_NAME, BY_WIRE, Op
from .ordering import CallQueue
from .relay import RelaySession

T = TypeVar("T")
P = ParamSpec("P")
#: Every method of a session that can be made to fail.
SESSION_OPS = tuple(op.name for op in BY_WIRE.values())
#: Every method of an agent that can be made to fail.
AGENT_OPS = ("connect", "functions", "open")

Work = Callable[..., Awaitable[Any]]


class Fault(ABC):
    """Something that goes wrong with one call."""

    @abstractmethod
    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Take the place of the call.

        Args:
            work: the real thing.
            args: its arguments.
            connection: what can be lost.
        """


class PretendedConnection:
    """The connection that a `FaultyAgent` pretends to have."""

    def __init__(self) -> None:
        self._lost = trio.Event()
        self.feed = EventFeed()

    def drop(self) -> None:
        """Lose it: every call that is not answered fails. The next call finds it restored."""
        self._lost.set()
        self._lost = trio.Event()
        self.feed.put(Event(EventKind.CONNECTION_LOST, "connection dropped on purpose"))

    async def answer(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Wait for an answer, or for the loss of the connection.

        Args:
            wait: waits for the answer.

        Raises:
            TransportLost: the connection was lost first.
        """
        lost = self._lost
        try:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await lost.wait()
                    raise TransportLost("the connection ended before the answer came")

                nursery.start_soon(watch)
                result = await wait()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # What the agent answered, or the loss of the connection: after that, no answer arrives.
            raise next(
                (item for item in group.exceptions if isinstance(item, TransportLost)), group.exceptions[0]
            ) from None
        return result


@dataclass(frozen=True)
class Delay(Fault):
    """Late by some seconds, before or after the call has its effect.

    Args:
        seconds: how late.
        after: the call has its effect first.
    """

    seconds: float
    after: bool = False

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Wait and make the call, or the other way round."""
        if not self.after:
            await trio.sleep(self.seconds)
        result = await work(*args)
        if self.after:
            await trio.sleep(self.seconds)
        return result


@dataclass(frozen=True)
class NeverAnswers(Fault):
    """No answer ever, with or without effect.

    Args:
        executed: the call has its effect.
    """

    executed: bool = False

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Make the call or not, and go silent."""
        if self.executed:
            await work(*args)
        await trio.sleep_forever()


@dataclass(frozen=True)
class Fails(Fault):
    """Answered with an error, with or without effect.

    Args:
        error: the answer.
        executed: the call has its effect.
    """

    error: AgentError
    executed: bool = False

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Make the call or not, and raise the error.

        Raises:
            AgentError: always; it is `error`.
        """
        if self.executed:
            await work(*args)
        await trio.lowlevel.checkpoint()
        raise self.error


@dataclass(frozen=True)
class Drops(Fault):
    """The connection ends before or after the call has its effect; every other call under way is lost, too.

    Args:
        executed: the call has its effect.
    """

    executed: bool = False

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Make the call or not, and lose the connection.

        Raises:
            TransportLost: always.
        """
        if self.executed:
            await work(*args)
        await trio.lowlevel.checkpoint()
        connection.drop()
        raise TransportLost("the connection ended before the answer came")


@dataclass(frozen=True)
class ChangesArguments(Fault):
    """What arrives at the agent is not what was sent.

    Args:
        change: takes the call's arguments and returns others.
    """

    change: Callable[..., tuple[Any, ...]]

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Make the call with other arguments."""
        return await work(*self.change(*args))


@dataclass(frozen=True)
class ChangesResult(Fault):
    """What is answered is not the truth.

    Args:
        change: takes the agent's answer and returns another one.
    """

    change: Callable[[Any], Any]

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Make the call and lie about its result."""
        return self.change(await work(*args))


@dataclass(frozen=True)
class Twice(Fault):
    """The call arrives twice; the second answer counts."""

    async def strike(self, work: Work, args: tuple[Any, ...], connection: PretendedConnection) -> Any:
        """Make the call twice."""
        await work(*args)
        return await work(*args)


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else b"\1"


def short_save() -> Fault:
    """A chunk lacks its last byte."""
    return ChangesResult(lambda chunk: replace(chunk, data=chunk.data[:-1]))


def corrupt_save() -> Fault:
    """A chunk has one wrong bit."""
    return ChangesResult(lambda chunk: replace(chunk, data=_flipped(bytes(chunk.data))))


def duplicated_save() -> Fault:
    """A chunk carries its bytes twice."""
    return ChangesResult(lambda chunk: replace(chunk, data=bytes(chunk.data) * 2))


def short_load() -> Fault:
    """The agent gets one byte less than was sent."""
    return ChangesArguments(lambda offset, data: (offset, data[:-1]))


def corrupt_load() -> Fault:
    """The agent gets one wrong bit."""
    return ChangesArguments(lambda offset, data: (offset, _flipped(data)))


def duplicated_load() -> Fault:
    """The agent gets the bytes twice in one piece."""
    return ChangesArguments(lambda offset, data: (offset, data * 2))


def wrong_descriptor(**fields: Any) -> Fault:
    """The function says that it is another one.

    Args:
        fields: fields of `Descriptor` and what they shall be; another firmware if left out.
    """
    return ChangesResult(lambda descriptor: replace(descriptor, **(fields or {"firmware": "other"})))


def short_report() -> Fault:
    """A dirty bitmap lacks its last byte."""
    return ChangesResult(lambda report: replace(report, bitmap=(report.bitmap or b"")[:-1]))


def error_of(kind: type[AgentError], message: str = "injected") -> AgentError:
    """Return an error of a class, whatever its constructor needs.

    Args:
        kind: the class.
        message: its text.
    """
    return Incompatible([message]) if issubclass(kind, Incompatible) else kind(message)


def every_error(*, executed: bool = False) -> Sequence[Fails]:
    """Return one fault for each class of error.

    Args:
        executed: the call has its effect before it fails.
    """
    return [Fails(error_of(kind), executed=executed) for kind in ERRORS.values()]


@dataclass
class Injection:
    """A fault and when it strikes.

    Args:
        op: the method.
        fault: what goes wrong.
        count: how many calls it spoils; None = all.
        after: calls that go well before.
        function_id: only of this function; None = of all.
    """

    op: str
    fault: Fault
    count: int | None = 1
    after: int = 0
    function_id: str | None = None
    #: How often it struck.
    struck: int = field(default=0, init=False)

    def applies(self, op: str, function_id: str | None) -> bool:
        """Decide about one call, and count it.

        Args:
            op: the call's method.
            function_id: the call's function; None for a call of the agent's own.

        Returns:
            Whether the fault strikes this call.
        """
        if op != self.op or (self.function_id is not None and function_id != self.function_id):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.count is not None and self.struck >= self.count:
            return False
        self.struck += 1
        return True


class FaultyAgent(Agent):
    """An agent around another one.

    Args:
        inner: the agent that works; entered and left with this one.
    """

    def __init__(self, inner: Agent) -> None:
        self.inner = inner
        self.connection = PretendedConnection()
        #: Calls that arrived, by name.
        self.seen: Counter[str] = Counter()
        self._injections: list[Injection] = []
        self._queues: dict[str, CallQueue] = {}
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.inner)
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        await self._stack.__aexit__(None, None, None)

    def inject(
        self, op: str, fault: Fault, *, count: int | None = 1, after: int = 0, function_id: str | None = None
    ) -> Injection:
        """Make calls fail.

        Args:
            op: one of `SESSION_OPS` or `AGENT_OPS`.
            fault: what goes wrong.
            count: how many calls it spoils; None = all.
            after: calls that go well before.
            function_id: only of this function; None = of all.

        Returns:
            The injection; its `struck` counts the calls that it spoiled.

        Raises:
            ValueError: there is no such method.
        """
        if op not in (*SESSION_OPS, *AGENT_OPS):
            raise ValueError(f"there is no call {op!r} (allowed: {', '.join((*SESSION_OPS, *AGENT_OPS))})")
        injection = Injection(op, fault, count, after, function_id)
        self._injections.append(injection)
        return injection

    def heal(self) -> None:
        """Forget all faults; what hangs already goes on hanging."""
        self._injections.clear()

    def restart(self) -> None:
        """Act like a process that was killed and started again: hanging calls end, the functions stay as they are."""
        self.connection.drop()
        for queue in self._queues.values():
            queue.abandon("the end of the agent")

    async def perform(self, op: str, work: Work, *args: Any, function_id: str | None = None) -> Any:
        """Make one call, with the fault that is meant for it, and without its caller.

        Args:
            op: its name.
            work: the real thing.
            args: its arguments.
            function_id: whose call it is; None = the agent's own.

        Raises:
            RuntimeError: the agent was not entered.
        """
        if self._nursery is None:
            raise RuntimeError("a FaultyAgent is used inside `async with`")
        self.seen[op] += 1
        fault = next((item.fault for item in self._injections if item.applies(op, function_id)), None)

        async def call() -> Any:
            return await (work(*args) if fault is None else fault.strike(work, args, self.connection))

        # The agent's own calls and `status` wait for nobody, so each has a queue of its own.
        queue = CallQueue(self._nursery)
        row = BY_NAME.get(op)
        if function_id is not None and row is not None and not row.at_once:
            queue = self._queues.setdefault(function_id, queue)
        return await self.connection.answer(queue.enter(op, call, overtakes=row is not None and row.overtakes))

    def pending(self, function_id: str) -> str:
        """Return the call of a function that is being executed; empty if there is none."""
        return self._queues[function_id].pending if function_id in self._queues else ""

    async def connect(self) -> AgentInfo:
        """Reach the agent behind the faults."""
        return await self.perform("connect", self.inner.connect)  # type: ignore[no-any-return]

    async def functions(self) -> Sequence[FunctionInfo]:
        """Ask the agent behind the faults for its functions."""
        return await self.perform("functions", self.inner.functions)  # type: ignore[no-any-return]

    async def open(self, function_id: str) -> Session:
        """Open a session that goes through the faults."""
        return FaultySession(self, await self.perform("open", self.inner.open, function_id))

    async def aclose(self) -> None:
        """Let go of what is behind the faults."""
        await self.inner.aclose()


class FaultySession(RelaySession):
    """A session of a `FaultyAgent`.

    Args:
        agent: whose faults strike it.
        inner: the session that works.
    """

    def __init__(self, agent: FaultyAgent, inner: Session) -> None:
        self._agent = agent
        self.inner = inner

    @property
    def function_id(self) -> str:
        """The function's name."""
        return self.inner.function_id

    @property
    def caps(self) -> Capabilities:
        """What the agent behind the faults can do with it."""
        return self.inner.caps

    async def operate(self, op: Op[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have the agent perform it, with the fault that is meant for it."""
        work = partial(getattr(self.inner, op.name), **kwargs)
        return cast("T", await self._agent.perform(op.name, work, *args, function_id=self.function_id))

    async def status(self) -> Status:
        """Return where the function is; never wait for another call, so `pending` names the one under way."""
        status = await super().status()
        return replace(status, pending=status.pending or self._agent.pending(self.function_id))

    async def was_reset(self) -> None:
        """Tell the agent behind the faults; nothing goes wrong with that."""
        await self.inner.was_reset()

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Watch what the function tells; `PretendedConnection.feed` has the losses of the connection."""
        return self.inner.watch()

    async def aclose(self) -> None:
        """Let go of what is behind the faults."""
        await self.inner.aclose()
