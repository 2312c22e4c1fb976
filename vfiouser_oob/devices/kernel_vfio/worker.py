"""The thread work of one function, one job after the other.

Opening, mapping, unmapping and resetting a device may take the kernel seconds, during which other functions must go on;
and two of them at once on one device would only wait for each other. A caller may stop waiting (its deadline has come,
its client has gone); the job then ends all the same, and what it achieved is undone before the next one begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import trio

from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_protocol.errors import VfioUserError

T = TypeVar("T")
_FAILURES = (OSError, VfioUserError, BackendUnavailable)


class Job(Generic[T]):
    """One piece of work.

    Args:
        work: runs in a thread.
        undo: takes back what `work` returned, in a thread, if nobody waits for it any more.
        always: do it even if nobody waited any more before it began.
        finish: runs in the event loop when the job is over, or will never begin.
    """

    def __init__(
        self,
        work: Callable[[Job[T]], T],
        undo: Callable[[T], object] | None,
        *,
        always: bool,
        finish: Callable[[], object] | None,
    ) -> None:
        #: Nobody waits any more; long work looks at it.
        self.abandoned = False
        self.done = trio.Event()
        self._work = work
        self._undo = undo
        self._always = always
        self._finish = finish
        self._result: list[T] = []
        self._error: Exception | None = None

    async def execute(self) -> None:
        """Do the work, and take it back if nobody wants it."""
        try:
            if not self.abandoned or self._always:
                self._result.append(await trio.to_thread.run_sync(self._work, self, abandon_on_cancel=True))
        except _FAILURES as error:
            self._error = error
        finally:
            if self._finish is not None:
                self._finish()
        if self.abandoned and self._result and self._undo is not None:
            try:
                await trio.to_thread.run_sync(self._undo, self._result.pop(), abandon_on_cancel=True)
            except _FAILURES as error:
                self._error = error
        self.done.set()

    def outcome(self) -> T:
        """Return what came out, or raise it."""
        if self._error is not None:
            raise self._error
        return self._result[0]


class Worker:
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

    async def call(
        self,
        work: Callable[[Job[T]], T],
        undo: Callable[[T], object] | None = None,
        *,
        always: bool = False,
        finish: Callable[[], object] | None = None,
    ) -> T:
        """Do one job in its turn and return its result; arguments as for `Job`."""
        job = Job(work, undo, always=always, finish=finish)
        self._pending += 1
        self._send.send_nowait(job)
        try:
            await job.done.wait()
        except trio.Cancelled:
            job.abandoned = True
            raise
        return job.outcome()
