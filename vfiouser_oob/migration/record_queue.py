"""Records on their way to a client that takes them in portions of its own size."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vfiouser_oob.migration.stream_format import Buffer


class RecordQueue:
    """What is waiting to be taken: whole records, but for the one that is being taken."""

    def __init__(self) -> None:
        self._records: deque[deque[memoryview]] = deque()
        self._begun = False
        self._size = 0
        #: The head of the record that is being taken, and how many bytes of that record were.
        self._head: Buffer = b""
        self._done = 0

    def __len__(self) -> int:
        """Bytes that are waiting."""
        return self._size

    def put(self, record: Sequence[Buffer]) -> None:
        """Add a record behind the others.

        Args:
            record: its buffers, as a `StreamWriter` made them; they are kept, not copied.
        """
        views = deque(memoryview(piece) for piece in record if len(piece))
        if views:
            self._records.append(views)
            self._size += sum(map(len, views))

    def take(self, limit: int) -> list[memoryview]:
        """Remove up to `limit` bytes from the front.

        Args:
            limit: bytes.

        Returns:
            The buffers that they lie in.
        """
        taken: list[memoryview] = []
        records = self._records
        while limit and records:
            pieces = records[0]
            if not self._begun:
                self._head, self._done = pieces[0], 0
            piece = pieces.popleft()
            if len(piece) > limit:
                pieces.appendleft(piece[limit:])
                piece = piece[:limit]
            taken.append(piece)
            limit -= len(piece)
            self._size -= len(piece)
            self._done += len(piece)
            self._begun = bool(pieces)
            if not pieces:
                records.popleft()
        return taken

    @property
    def begun(self) -> tuple[bytes, int]:
        """The head of the record of which a part was taken, and how many bytes of it were; nothing at its end."""
        return (bytes(self._head), self._done) if self._begun else (b"", 0)

    def resume(self, head: bytes, done: int, rest: bytes) -> None:
        """Begin with a record of which a part was taken from another queue.

        Args:
            head: its head.
            done: bytes that were taken.
            rest: those that were not.
        """
        if rest:
            self.put((rest,))
            self._head, self._done, self._begun = head, done, True

    def drop_untouched(self) -> int:
        """Forget every record of which nothing was taken, as before a new generation begins.

        Returns:
            Bytes forgotten.
        """
        before = self._size
        kept = deque([self._records[0]]) if self._begun else deque()
        self._records = kept
        self._size = sum(len(piece) for pieces in kept for piece in pieces)
        return before - self._size
