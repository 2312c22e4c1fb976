"""SHA-256 of a stream in a worker thread, at most one chunk behind."""

from __future__ import annotations

import hashlib

import trio

#: Up to here a hash is done sooner than a thread is woken.
_INLINE = 16 << 10


class Hasher:
    """A digest that is computed beside the transfer.

    Args:
        nursery: where the thread is waited for.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._hash = hashlib.sha256()
        self._idle = trio.Event()
        self._idle.set()

    async def update(self, data: bytes | memoryview) -> None:
        """Add bytes; waits only for those before them. They must not change."""
        await self._idle.wait()
        if len(data) <= _INLINE:
            self._hash.update(data)
        else:
            self._idle = trio.Event()
            self._nursery.start_soon(self._work, data)

    async def _work(self, data: bytes | memoryview) -> None:
        try:
            await trio.to_thread.run_sync(self._hash.update, data)
        finally:
            self._idle.set()

    async def digest(self) -> bytes:
        """Return the digest of all bytes so far."""
        await self._idle.wait()
        return self._hash.digest()
