"""Calls into what another process may hold up: in one thread per client, so that only that client waits for them.

The kernel has calls that wait for somebody: `pwrite` for whoever holds the inode's lock, `fstat` for a FUSE server.
Work is done in order. Most of it is done within microseconds, so a caller looks on for a moment before it lets other
tasks run; after having looked in vain once, nobody does so for a while.
"""

from __future__ import annotations

import _thread
import errno
import queue
import time
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import outcome
import trio

from vfiouser_oob.transport.reaper import Account

T = TypeVar("T")
#: How long to look on while the thread is at it, and how long not to after that was in vain, in seconds. What a client
#: can take from the others so is the ratio of the two.
_PATIENCE_S = 0.001
_IMPATIENT_S = 0.2
#: Seconds that a thread waits for more work before it ends.
_IDLE_S = 1.0
#: Work that may wait for its turn.
_MAX_WAITING = 1024
#: Threads of one account that may be held up: those of clients that have gone go on until their call returns.
_MAX_THREADS = 4


#: Guards what threads and event loop both change; held for a few instructions only.
_lock = _thread.allocate_lock()


def _nothing() -> None:
    return


def _given_up() -> NoReturn:
    raise OSError(errno.ECANCELED, "nothing waits for it any more")


class _Job(Generic[T]):
    """One call, and who is to be told.

    Args:
        work: runs in the thread.
        landed: runs once the thread is through with it.
    """

    __slots__ = ("_outcome", "_work", "abandoned", "finished", "landed", "tell")

    def __init__(self, work: Callable[[], T], landed: Callable[[], object]) -> None:
        self._work = work
        self._outcome: outcome.Outcome[T] | None = None
        self.landed = landed
        self.abandoned = False
        self.finished = _thread.allocate_lock()
        self.finished.acquire()
        #: Tells the event loop that it is done; None while somebody looks on.
        self.tell: Callable[[], object] | None = None

    def execute(self) -> None:
        """Do it (in the thread)."""
        done: outcome.Outcome[T] = outcome.capture(self._work if not self.abandoned else _given_up)
        with _lock:
            self._outcome = done
            tell = self.tell
        self.finished.release()
        if tell is not None:
            tell()

    def tell_when_done(self, tell: Callable[[], object]) -> bool:
        """Let `tell` be called when it is done; returns whether it will be, or it was done before."""
        with _lock:
            if self._outcome is None:
                self.tell = tell
            return self.tell is not None

    def result(self) -> T:
        """Return or raise what came of it."""
        assert self._outcome is not None
        return self._outcome.unwrap()


class Worker:
    """A thread that is there while there is work.

    Args:
        account: whose threads count together.
    """

    def __init__(self, account: Account) -> None:
        self._account = account
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._running = False
        self._impatient_until = 0.0

    async def run(self, work: Callable[[], T], landed: Callable[[], object] = _nothing) -> T:
        """Do something that may be held up.

        A caller that is cancelled does not wait for it: it is not begun any more, or goes on alone.

        Args:
            work: runs in the thread.
            landed: runs once the thread is through with it, on the event loop as long as that runs.

        Raises:
            OSError: EBUSY when too much waits already; whatever `work` raises.
        """
        job = _Job(work, landed)
        try:
            self._put(job)
        except OSError:
            landed()
            raise
        if time.monotonic() >= self._impatient_until:
            if job.finished.acquire(timeout=_PATIENCE_S):
                landed()
                return job.result()
            self._impatient_until = time.monotonic() + _IMPATIENT_S
        over = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def land() -> None:
            landed()
            over.set()

        def tell() -> None:
            try:
                token.run_sync_soon(land)
            except trio.RunFinishedError:
                landed()

        if not job.tell_when_done(tell):
            landed()
            return job.result()
        try:
            await over.wait()
        except trio.Cancelled:
            job.abandoned = True
            raise
        return job.result()

    def _put(self, job: _Job[Any]) -> None:
        if self._jobs.qsize() >= _MAX_WAITING:
            raise OSError(errno.EBUSY, "too many calls for this client are waiting already")
        with _lock:
            if not self._running:
                if self._account.threads >= _MAX_THREADS:
                    raise OSError(errno.EBUSY, f"{_MAX_THREADS} earlier calls into its files have not returned")
                self._account.threads += 1
                self._running = True
                _thread.start_new_thread(self._loop, ())
            self._jobs.put(job)

    def close(self) -> None:
        """Let the thread end as soon as it has nothing to do, and not only after a while."""
        with _lock:
            if self._running:
                self._jobs.put(None)

    def _loop(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                job = None
            if job is not None:
                job.execute()
                del job  # and with it what it holds on to, however long there is nothing else to do
                continue
            with _lock:
                if self._jobs.empty():
                    self._running = False
                    self._account.threads -= 1
                    return
