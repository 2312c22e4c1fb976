"""Closing descriptors of other processes, in threads that may be held up for as long as their owner likes.

What can block, and what is done about it. "Foreign" is whatever a client, an upstream server or an agent sent: we may
hold the last reference to it, so the whole of its release happens in our close.

| descriptor | close | fstat | done |
|---|---|---|---|
| memfd, tmpfs, hugetlbfs that we keep open once more | no | no | on the event loop |
| the same, last reference | frees its pages: seconds for a VM's memory | no | closed here |
| TCP socket with SO_LINGER | as long as its peer likes | no | closed here |
| file of FUSE or NFS | FLUSH: as long as its server likes | GETATTR: likewise | closed here; examined by `Worker` |
| eventfd | waits for an epoll instance that its owner put it into | no | closed here |
| UNIX socket of ours | releases what is still unread in it, descriptors too | | closed here |
| anything else | unknown | unknown | closed here |

`fcntl` (F_GETFL, F_GET_SEALS) and readlink of /proc/self/fd/N never leave the kernel's own tables, so they tell on the
event loop what a descriptor is.

Rule 1: *one owner's descriptors hold up nobody else's.* Each has an account of its own, and at most `_PER_ACCOUNT`
        threads close for one account at a time, so the number of threads is bounded by that of the accounts.
Rule 2: *what cannot be closed counts.* It stays on its account until it is closed, also after its client has gone.
Rule 3: the threads do not keep the process alive, and end when nothing is to be closed.
Rule 4: *a burst costs few turns.* A thread closes what waits on an account in one go, as far as the numbers follow each
        other: each close of its own would have the event loop wait for the interpreter once more.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeAlias

#: Threads that close for one account at a time.
_PER_ACCOUNT = 2
#: Seconds that a thread waits for more to close before it ends.
_IDLE_S = 1.0
#: A close that takes longer is being held up.
_HELD_UP_S = 1.0
#: Descriptors of one account that may wait behind closes that are held up.
_MAX_WAITING = 512
#: Descriptors that a thread closes in one go: as many as one message brings.
_BATCH = 253

#: A descriptor to close, or something else to give back.
Work: TypeAlias = "int | Callable[[], object]"


class Account:
    """Descriptors of one owner that this process has open: received, and not closed yet.

    Args:
        name: whose, for logs.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._received = 0
        self._closed = 0
        #: Threads of workers that are there for it; those of clients that have gone count until they return.
        self.threads = 0
        # The reaper's, under its lock: what is to be closed, since when each thread has been at it, and whether one has
        # been told.
        self.waiting: deque[Work] = deque()
        self.closing: dict[int, float] = {}
        self.offered = False

    @property
    def held(self) -> int:
        """How many are open."""
        return self._received - self._closed

    @property
    def held_up(self) -> bool:
        """Whether closing is held up so long that no more descriptors can be taken."""
        if len(self.waiting) <= _MAX_WAITING:
            return False
        now = time.monotonic()
        return any(now - since > _HELD_UP_S for since in tuple(self.closing.values()))

    def add(self, count: int) -> None:
        """Count descriptors that were received; on the event loop only, as `remove`."""
        self._received += count

    def remove(self) -> None:
        """Count one no longer: it was closed at once, or became something else."""
        self._received -= 1

    def closed(self, count: int) -> None:
        """Count so many no longer (the reaper's, under its lock)."""
        self._closed += count


class Reaper:
    """Threads that close descriptors; there is one reaper in a process."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._settled = threading.Condition(lock)
        self._ready: deque[Account] = deque()
        #: Threads that close nothing now, so that they will find what is ready.
        self._free = 0
        self._pending = 0

    def close(self, account: Account, fd: int) -> None:
        """Close a descriptor soon; never waits.

        Args:
            account: where it is counted until it is closed.
            fd: its number; owned from now on.
        """
        self._add(account, fd)

    def dispose(self, account: Account, work: Callable[[], object]) -> None:
        """Give something else back soon, such as a mapping; as `close`."""
        account.add(1)
        self._add(account, work)

    def _add(self, account: Account, work: Work) -> None:
        with self._changed:
            self._pending += 1
            account.waiting.append(work)
            self._offer(account)

    def settle(self, timeout_s: float) -> bool:
        """Wait until everything is closed; for tests, and for processes that end.

        Returns:
            Whether it is.
        """
        with self._settled:
            return self._settled.wait_for(lambda: not self._pending, timeout_s)

    def _offer(self, account: Account) -> None:
        """Tell a thread about an account, unless enough of them are at it."""
        if account.offered or not account.waiting or len(account.closing) >= _PER_ACCOUNT:
            return
        account.offered = True
        self._ready.append(account)
        if self._free >= len(self._ready):
            self._changed.notify()
            return
        try:
            # Nobody waits for these threads, not even the interpreter's end.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # no thread is to be had now; the next close tries again
            self._ready.pop()
            account.offered = False
        else:
            self._free += 1

    def _run(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._find_work():
                account = self._ready.popleft()
                account.offered = False
                batch = _take(account.waiting)
                account.closing[me] = time.monotonic()
                self._free -= 1
                # This close may be held up, so another thread goes on with the rest.
                self._offer(account)
                self._changed.release()
                try:
                    _carry_out(batch)
                except OSError:  # a complaint of its file system; it is closed all the same
                    pass
                finally:
                    self._changed.acquire()
                self._free += 1
                del account.closing[me]
                account.closed(len(batch))
                self._offer(account)
                self._pending -= len(batch)
                if not self._pending:
                    self._settled.notify_all()

    def _find_work(self) -> bool:
        """Wait for an account; returns whether there is one."""
        while not self._ready:
            if not self._changed.wait(_IDLE_S) and not self._ready:
                self._free -= 1
                return False
        return True


def _take(waiting: deque[Work]) -> list[Work]:
    """Take what comes next: descriptors together, anything else by itself."""
    batch = [waiting.popleft()]
    if isinstance(batch[0], int):
        while waiting and isinstance(waiting[0], int) and len(batch) < _BATCH:
            batch.append(waiting.popleft())
    return batch


def _carry_out(batch: Sequence[Work]) -> None:
    """Close descriptors, those with consecutive numbers by one call, or give something else back."""
    for work in batch:
        if not isinstance(work, int):
            work()
    fds = sorted(work for work in batch if isinstance(work, int))
    for _, row in groupby(enumerate(fds), lambda place: place[1] - place[0]):
        numbers = [fd for _, fd in row]
        os.closerange(numbers[0], numbers[-1] + 1)


REAPER = Reaper()
#: Descriptors of peers that have no account of their own: clients that are turned away, servers of the client library.
STRANGERS = Account("strangers")
