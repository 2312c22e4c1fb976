"""Memory for large payloads that is used again, since fresh memory costs as much as filling it.

Nobody has to give a buffer back: one is free again once nobody looks at it any more, which a `bytearray` knows itself.
"""

from __future__ import annotations

#: Buffers that one pool keeps at most; more are made when they are needed, and forgotten after use.
KEPT = 4
#: Bytes of the largest buffer that is kept.
LARGEST_KEPT = 4 << 20


class BufferPool:
    """Buffers of one owner, which works in one thread; those who look at them may be in others."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []

    def __len__(self) -> int:
        """Buffers that are kept, in use or not."""
        return len(self._buffers)

    def take(self, size: int) -> memoryview:
        """Return memory that nobody else looks at; it holds anything.

        Args:
            size: bytes, at least 1.

        Returns:
            A writable view of that size. The memory is taken again when this view and all that were made of it are
            gone.
        """
        small = None
        for buffer in self._buffers:
            if _unseen(buffer):
                if len(buffer) >= size:
                    return memoryview(buffer)[:size]
                small = buffer
        fresh = bytearray(size)
        if size <= LARGEST_KEPT:
            if small is not None:
                self._buffers.remove(small)
            if len(self._buffers) < KEPT:
                self._buffers.append(fresh)
        return memoryview(fresh)

    def drop(self) -> None:
        """Give all memory back to the system, what is in use as soon as it is not."""
        self._buffers.clear()


def _unseen(buffer: bytearray) -> bool:
    """Whether there is no view of a buffer: its length can be changed then, and only then."""
    try:
        buffer.append(0)
    except BufferError:
        return False
    del buffer[-1]
    return True
