"""How much data of a guest's commands a controller holds at one time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

#: Bytes that commands of one controller hold together; a guest may begin thousands of commands of half a megabyte.
MOST_DATA = 16 << 20


class DataRoom:
    """Lets commands have their data in memory, as many at a time as fit; the others wait, the oldest first.

    Args:
        most: bytes; a single command is always let in.
    """

    def __init__(self, most: int = MOST_DATA) -> None:
        self._most = most
        self._used = 0
        self._waiting: dict[trio.Event, int] = {}

    @property
    def used(self) -> int:
        """Bytes that are held now."""
        return self._used

    @asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        """Hold data in the block, once there is room for it.

        Args:
            size: bytes.
        """
        if self._waiting or not self._fits(size):
            await self._wait(size)
        else:
            self._used += size
        try:
            yield
        finally:
            self._used -= size
            self._let_in()

    def _fits(self, size: int) -> bool:
        return not self._used or self._used + size <= self._most

    async def _wait(self, size: int) -> None:
        turn = trio.Event()
        self._waiting[turn] = size
        try:
            await turn.wait()
        except trio.Cancelled:
            if self._waiting.pop(turn, None) is None:  # it was let in at the same moment
                self._used -= size
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._waiting:
            turn, size = next(iter(self._waiting.items()))
            if not self._fits(size):
                return
            del self._waiting[turn]
            self._used += size
            turn.set()
