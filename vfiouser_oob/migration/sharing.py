"""Memory for state on its way, shared by all functions of a daemon: one may have much, many have to have less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: Bytes of state that all pipelines together may hold, as long as each has its least.
TOTAL = 32 << 20
#: Chunks that a pipeline holds.
_CHUNKS = 2
#: Bytes of a chunk that a pipeline may have however many there are: with less, each byte costs too much.
LEAST = 1 << 20


class BufferShare:
    """Who shares."""

    def __init__(self) -> None:
        self._sharers = 0

    @property
    def busy(self) -> bool:
        """Whether state is on its way."""
        return self._sharers > 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Have a part for the length of the block."""
        self._sharers += 1
        try:
            yield
        finally:
            self._sharers -= 1

    def part(self, most: int) -> int:
        """Return the bytes of a chunk that one of those who share may ask for now.

        Args:
            most: bytes that it would ask for if it were alone.
        """
        return min(most, max(LEAST, TOTAL // (_CHUNKS * max(1, self._sharers))))
