"""SHA-256 of a stream in a worker thread, a bounded number of chunks behind."""

from __future__ import annotations

import hashlib
import threading
from queue import Empty, SimpleQueue

import trio

#: Up to here a hash is done sooner than a thread is woken.
_INLINE = 16 << 10
#: Seconds that the thread waits for the next chunk: to begin anew costs more than to stay while state is flowing.
_STAY_S = 0.02
#: Chunks that may wait for the thread. With one, each would have to be waited for; all of them are in memory.
BEHIND = 2


class Hasher:
    """A digest that is computed beside the transfer.

    The thread stays while there is work, and tells nobody of every chunk: being told costs as much as sending one.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        self._chunks: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
        self._behind = 0
        self._working = False
        #: Whoever waits, until how many chunks are not hashed, and where to tell.
        self._waiter: tuple[trio.Event, int, trio.lowlevel.TrioToken] | None = None

    @property
    def behind(self) -> int:
        """Chunks that are not hashed yet."""
        return self._behind

    def add(self, data: bytes | memoryview) -> None:
        """Add bytes, which must not change. Never waits: who adds much asks for `room` first."""
        if not self._behind and len(data) <= _INLINE:
            self._hash.update(data)
            return
        with self._lock:
            self._behind += 1
            begin, self._working = not self._working, True
        self._chunks.put(data)
        if begin:
            trio.lowlevel.start_thread_soon(self._work, lambda _: None, "state hash")

    def _work(self) -> None:
        while True:
            try:
                data = self._chunks.get(timeout=_STAY_S)
            except Empty:
                data = None
            if data is None:
                with self._lock:
                    if self._behind:  # it is just being added
                        continue
                    self._working = False
                    return
            self._hash.update(data)
            # It would be kept from being used again until the next one comes.
            del data
            with self._lock:
                self._behind -= 1
                self._tell(self._behind)

    def _tell(self, behind: int) -> None:
        if self._waiter is None or behind > self._waiter[1]:
            return
        (event, _, token), self._waiter = self._waiter, None
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:  # nobody waits any more
            pass

    async def room(self) -> None:
        """Wait until not too many chunks are waiting."""
        if self.behind > BEHIND:
            await self._until(BEHIND - 1)

    async def digest(self) -> bytes:
        """Return the digest of all bytes so far."""
        await self._until(0)
        if self._working:
            # Most likely that was all; the next one who hashes has the thread at once then.
            self._chunks.put(None)
        return self._hash.digest()

    async def _until(self, behind: int) -> None:
        """Wait until at most so many chunks are not hashed."""
        event = trio.Event()
        with self._lock:
            if self._behind <= behind:
                return
            self._waiter = (event, behind, trio.lowlevel.current_trio_token())
        await event.wait()
