"""The event loop in slices of time: work whose length a peer decides makes way for everything else.

Whoever carries out such work has a `FunctionQueue`, one per function, and asks it for a turn before each piece (a
command, a chunk of a long one). Rule 1: as long as the slice lasts, a turn is granted at once and costs next to
nothing. Rule 2: when it is over, whoever asks waits, however many tasks that are, and the loop looks after sockets and
timers before it opens the next slice. Rule 3: functions take turns, and so do the tasks of one function, so a function
that has a thousand tasks
gets no more than one that has a single one.

    slice (2 ms) ─► sockets, timers, replies ─► slice (2 ms) ─► …

A piece should take well under a slice; nobody can interrupt it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from typing import TypeVar

import trio

#: Seconds of such work before everything else has its turn.
SLICE_S = 0.002
#: Tasks that a slice begins with: each does at least one piece, and small ones are not worth a pass of the loop each.
_TOGETHER = 4
T = TypeVar("T")


class FunctionQueue:
    """The place of one function in the queue for the event loop."""

    __slots__ = ("queued", "waiting")

    def __init__(self) -> None:
        #: Tasks that wait for a turn, oldest first.
        self.waiting: dict[trio.lowlevel.Task, None] = {}
        #: Whether the loop knows that any wait.
        self.queued = False

    @property
    def must_wait(self) -> bool:
        """Whether `turn` would wait."""
        return time.monotonic() >= _shared().ends

    async def turn(self) -> None:
        """Wait until the next piece of work may be done; a checkpoint only if the slice is over."""
        loop = _shared()
        if time.monotonic() >= loop.ends:
            await loop.wait(self)

    async def rest(self) -> None:
        """Let everything else have its turn now, and wait for ours if the slice is over."""
        if self.must_wait:
            await self.turn()
        else:
            await trio.lowlevel.checkpoint()

    async def work(self, steps: Generator[None, None, T]) -> T:
        """Carry out work that comes in steps, each of them in a turn; it is closed if this is cancelled.

        Args:
            steps: the work.

        Returns:
            What it returns.
        """
        try:
            while True:
                if self.must_wait:
                    await self.turn()
                next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()


class _Loop:
    """The slices of one event loop."""

    def __init__(self) -> None:
        #: When the slice is over, by `time.monotonic`.
        self.ends = 0.0
        self._opening = False
        self._lanes: deque[FunctionQueue] = deque()
        self._token = trio.lowlevel.current_trio_token()
        self._due = False

    async def wait(self, lane: FunctionQueue) -> None:
        task = trio.lowlevel.current_task()
        lane.waiting[task] = None
        if not lane.queued:
            lane.queued = True
            self._lanes.append(lane)
        if not self._due:
            self._due = True
            self._token.run_sync_soon(self._begin)

        def abort(_: object) -> trio.lowlevel.Abort:
            del lane.waiting[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if self._opening:
            self._opening = False
            self.ends = time.monotonic() + SLICE_S

    def _begin(self) -> None:
        """Wake who has the next slice; called once per pass of the event loop while anybody waits."""
        woken = 0
        while self._lanes and woken < _TOGETHER:
            lane = self._lanes.popleft()
            if lane.waiting:  # else its tasks were cancelled
                task = next(iter(lane.waiting))
                del lane.waiting[task]
                trio.lowlevel.reschedule(task)
                woken += 1
            lane.queued = bool(lane.waiting)
            if lane.queued:
                self._lanes.append(lane)
        self._opening = woken > 0
        self._due = bool(self._lanes)
        if self._due:
            self._token.run_sync_soon(self._begin)


_loops: trio.lowlevel.RunVar[_Loop] = trio.lowlevel.RunVar("vfiouser_oob.turns")


def _shared() -> _Loop:
    try:
        return _loops.get()
    except LookupError:
        loop = _Loop()
        _loops.set(loop)
        return loop
