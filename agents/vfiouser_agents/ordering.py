"""The order in which the calls of one function are executed: that of their arrival, one at a time.

A call goes on when its caller loses interest, as it would in an agent far away; the next one waits for it. Only a call
that `overtakes`, which is for `reset`, ends what is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar

import trio

from .errors import InvalidState, NoResources

T = TypeVar("T")
#: Calls of one function that may wait.
QUEUE_LIMIT = 256


class _Call:
    """One call; as a context manager it takes what its work raises, which `answer` gives to whoever waits."""

    def __init__(self, name: str, work: Callable[[], Awaitable[Any]], *, overtakes: bool) -> None:
        self.name = name
        self.overtakes = overtakes
        self._work = work
        self._scope = trio.CancelScope()
        self._ended_by = ""
        self._done = trio.Event()
        self._result: Any = None
        self._error: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self._error = error
        return isinstance(error, Exception)

    async def execute(self) -> None:
        try:
            with self._scope, self:
                self._result = await self._work()
            if self._scope.cancelled_caught:
                self._error = InvalidState(f"{self._ended_by} ended {self.name}; ask status")
        finally:
            self._done.set()

    def end(self, by: str) -> None:
        self._ended_by = by
        self._scope.cancel()

    def drop(self, by: str) -> None:
        self._error = InvalidState(f"{by} dropped {self.name} before it started")
        self._done.set()

    async def answer(self) -> Any:
        await self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class CallQueue:
    """Executes the calls of one function.

    Args:
        nursery: where they run; idle, there is no task.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._waiting: deque[_Call] = deque()
        self._running: _Call | None = None

    @property
    def pending(self) -> str:
        """The name of the call that is being executed, or empty."""
        return self._running.name if self._running else ""

    @property
    def idle(self) -> bool:
        """Nothing runs or waits."""
        return self._running is None and not self._waiting

    async def call(self, name: str, work: Callable[[], Awaitable[T]], *, overtakes: bool = False) -> T:
        """Have a call executed after all that came before it. Its place is taken before this waits for anything.

        Args:
            name: for `pending` and for errors.
            work: does it.
            overtakes: end what runs and drop what waits, except calls of this sort.

        Returns:
            What the work returned.

        Raises:
            NoResources: too many calls wait.
            InvalidState: a call that overtakes ended this one.
            Exception: whatever the work raised.
        """
        return await self.enter(name, work, overtakes=overtakes)()

    def enter(
        self, name: str, work: Callable[[], Awaitable[T]], *, overtakes: bool = False
    ) -> Callable[[], Awaitable[T]]:
        """As `call`, but only take the place; what is returned waits for the result."""
        if len(self._waiting) >= QUEUE_LIMIT and not overtakes:
            raise NoResources(f"{len(self._waiting)} calls wait for this function; {name} was not accepted")
        call = _Call(name, work, overtakes=overtakes)
        if overtakes:
            self._clear(name)
        self._waiting.append(call)
        if self._running is None:
            self._running = call
            self._nursery.start_soon(self._execute_all)
        return call.answer

    def abandon(self, by: str) -> None:
        """End what runs and drop what waits, even calls that overtake: nobody executes them any more.

        Args:
            by: what ends them, for errors.
        """
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.drop(by)
        if self._running is not None:
            self._running.end(by)

    def _clear(self, by: str) -> None:
        kept = deque(call for call in self._waiting if call.overtakes)
        for call in self._waiting:
            if not call.overtakes:
                call.drop(by)
        self._waiting = kept
        if self._running and not self._running.overtakes:
            self._running.end(by)

    async def _execute_all(self) -> None:
        try:
            while self._waiting:
                self._running = self._waiting.popleft()
                await self._running.execute()
        finally:
            # With anything left, this was cancelled, and nobody else would tell those who wait.
            while self._waiting:
                self._waiting.popleft().drop("the end of the agent")
            self._running = None
