"""The thread work of one function, one job after the other.

Opening, mapping, unmapping and resetting a device may take the kernel seconds, during which other functions must go on;
and two of them at once on one device would only wait for each other. A caller may stop waiting (its deadline has come,
its client has gone); the job then ends all the same, and what it achieved is undone before the next one begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

import trio

from vfiouser_agents.errors import AgentError
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_protocol.errors import CommandError, VfioUserError

T = TypeVar("T")
#: What the kernel takes longer for is worth a line in the log: a client may not wait so long.
SLOW_S = 1.0
#: What helps a client that does not wait for as long as the kernel takes.
BUDGET_ADVICE = "raise reply_budget_s and QEMU's x-msg-timeout as `vfiouser-oob snippet qemu` prints them"
_FAILURES = (OSError, VfioUserError, AgentError, BackendUnavailable)


class Job(Generic[T]):
    """One piece of work; awaiting it gives its result. It goes on when nobody awaits it.

    Args:
        work: runs in a thread.
        undo: takes back what `work` returned, in a thread, if its caller stopped waiting.
        always: do it even if the caller stopped waiting before it began.
        succeeded: runs in the event loop when the work is done.
        failed: runs in the event loop, once, when it failed or its caller stopped waiting.
        finish: runs in the event loop when the job is over, however it ended.
    """

    def __init__(
        self,
        work: Callable[[Job[T]], T],
        undo: Callable[[T], object] | None = None,
        *,
        always: bool = False,
        succeeded: Callable[[], object] | None = None,
        failed: Callable[[], object] | None = None,
        finish: Callable[[], object] | None = None,
    ) -> None:
        #: The caller does not wait any more; long work looks at it.
        self.abandoned = False
        #: Until when the caller waits, by `time.monotonic`; long work compares it with what is still to do.
        self.until = math.inf
        self._done = trio.Event()
        self._work = work
        self._undo = undo
        self._always = always
        self._succeeded = succeeded
        self._failed = failed
        self._finish = finish
        self._result: list[T] = []
        self._error: Exception | None = None

    async def execute(self) -> None:
        """Do the work, and take it back if nobody wants it."""
        try:
            if not self.abandoned or self._always:
                self._result.append(await trio.to_thread.run_sync(self._work, self, abandon_on_cancel=True))
                if self._succeeded is not None:
                    self._succeeded()
        except _FAILURES as error:
            self._error = error
            self._fail()
        finally:
            if self._finish is not None:
                self._finish()
        if self.abandoned and self._result and self._undo is not None:
            try:
                await trio.to_thread.run_sync(self._undo, self._result.pop(), abandon_on_cancel=True)
            except _FAILURES as error:
                self._error = error
        self._done.set()

    def _fail(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        # A job that is over is not asked for once more: that could be cancelled, with nobody left to undo it.
        if not self._done.is_set():
            self.until = time.monotonic() + trio.current_effective_deadline() - trio.current_time()
            try:
                await self._done.wait()
            except trio.Cancelled:
                self.abandoned = True
                self._fail()
                raise
        if self._error is not None:
            raise self._error
        return self._result[0]


class OrderedWorker:
    """Runs jobs in order; `run` has to run while it is used."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Job[Any]](math.inf)
        self._pending = 0

    @property
    def busy(self) -> bool:
        """Whether a job is under way or waits; the kernel then may hold whoever else touches the device."""
        return self._pending > 0

    async def run(self) -> None:
        """Do the jobs as they come."""
        async for job in self._receive:
            try:
                await job.execute()
            finally:
                self._pending -= 1

    def submit(self, job: Job[T]) -> Job[T]:
        """Do a job in its turn.

        Returns:
            The job, to be awaited.
        """
        self._pending += 1
        self._send.send_nowait(job)
        return job


def explained(what: str, work: Callable[[], T]) -> Callable[[Job[T]], T]:
    """Make a job's work whose system errors say what was being done.

    Args:
        what: as in "resetting the function".
        work: what to do; its OSError becomes a CommandError with the same errno.
    """

    def run(job: Job[T]) -> T:
        return explain(what, work)

    return run


def explain(what: str, work: Callable[[], T]) -> T:
    """Do it at once; arguments as for `explained`."""
    try:
        return work()
    except OSError as error:
        raise CommandError(f"{what} failed: {error.strerror}", error.errno) from error
