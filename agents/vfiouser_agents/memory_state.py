"""The state of a function in memory, and the stream that carries it.

The stream is a sequence of records: kind (u8), index of a block (u64), length (u32), little-endian, and the bytes. A
block may come several times, the last one counts. The last record has the kind END and the counter in place of an
index.
"""

from __future__ import annotations

import hashlib
import struct

from xxhash import xxh3_128

from .api import Chunk
from .errors import CorruptState, InvalidArgument, NoResources

_RECORD = struct.Struct("<BQI")
_BLOCK, _END = 1, 2
_WORD = struct.Struct("<Q")
_MASK = (1 << 64) - 1


class Content:
    """Bytes that take up memory only where they were written.

    Args:
        size: how many.
        seed: what they are at first: each block repeats one word made of the seed and its index.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.block_size = 4096 if size <= 16 << 20 else 65536
        self._written: dict[int, bytes] = {}

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.size // self.block_size)

    def length(self, index: int) -> int:
        """Bytes of a block; the last one may be short."""
        return min(self.block_size, self.size - index * self.block_size)

    def block(self, index: int) -> bytes:
        """The bytes of a block."""
        length = self.length(index)
        word = self._written.get(index)
        if word is None:
            word = _WORD.pack((self.seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK)
        return word if len(word) == length else (word * (length // 8 + 1))[:length]

    def put(self, index: int, data: bytes) -> None:
        """Replace a block. One that repeats a word is kept as that word."""
        word = data[:8]
        repeats = len(data) >= 8 and data == (word * (len(data) // 8 + 1))[: len(data)]
        self._written[index] = word if repeats else bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes anywhere."""
        while data:
            index, within = divmod(offset, self.block_size)
            block = bytearray(self.block(index))
            piece = min(len(data), len(block) - within)
            block[within : within + piece] = data[:piece]
            self.put(index, bytes(block))
            offset, data = offset + piece, data[piece:]

    def digest(self) -> bytes:
        """SHA-256 of all bytes."""
        hasher = hashlib.sha256()
        for index in range(self.blocks):
            hasher.update(self.block(index))
        return hasher.digest()


class Outgoing:
    """What of a state is still to be given.

    Args:
        content: the state.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._next = 0  # blocks from here on were never given
        self._again: set[int] = set()  # blocks before it that changed since
        self._ready = bytearray()  # records that are made but not given
        self._last_offset = 0
        self._last = Chunk(b"", drained=True)
        self._ended = False

    def changed(self, offset: int, length: int) -> None:
        """Bytes of the state changed."""
        size = self._content.block_size
        self._again.update(
            index for index in range(offset // size, (offset + length - 1) // size + 1) if index < self._next
        )

    def repeats(self, offset: int) -> bool:
        """The offset is that of the last chunk, which has not been acknowledged."""
        return bool(self._last.data) and offset == self._last_offset

    def estimate(self) -> tuple[int, int]:
        """Bytes never given, and bytes given that changed."""
        first = self._cost(range(self._next, self._content.blocks))
        return first, self._cost(self._again)

    def remaining(self) -> int:
        """Bytes still to come if nothing changed any more."""
        return len(self._ready) + sum(self.estimate()) + (0 if self._ended else _RECORD.size)

    def _cost(self, blocks: range | set[int]) -> int:
        # All blocks but the last one of the state are equally long.
        full = len(blocks) * (_RECORD.size + self._content.block_size)
        last = self._content.blocks - 1
        return full - (self._content.block_size - self._content.length(last) if last in blocks else 0)

    def take(self, offset: int, limit: int, counter: int | None) -> Chunk:
        """The chunk at an offset.

        Args:
            offset: that of the last chunk, or the one after it.
            limit: bytes at most.
            counter: what the end record carries; None in pre-copy, which has no end.
        """
        if self.repeats(offset):
            return self._repeat(limit, final=counter is not None)
        if offset != self._last_offset + len(self._last.data):
            expected = self._last_offset + len(self._last.data)
            raise InvalidArgument(f"save at {offset}; allowed are {self._last_offset} again, {expected} next, and 0")
        self._fill(limit, counter)
        data = bytes(self._ready[:limit])
        del self._ready[:limit]
        drained = counter is None and not self._ready and not self._left()
        self._last_offset = offset
        self._last = Chunk(data, eof=self._ended and not self._ready, drained=drained)
        return self._last

    def _repeat(self, limit: int, *, final: bool) -> Chunk:
        data = self._last.data
        if limit < len(data):
            self._ready[:0] = data[limit:]
            self._last = Chunk(data[:limit])
        elif final and self._last.drained:
            self._last = Chunk(data)
        return self._last

    def _left(self) -> bool:
        return self._next < self._content.blocks or bool(self._again)

    def _fill(self, limit: int, counter: int | None) -> None:
        while len(self._ready) < limit and self._left():
            if self._next < self._content.blocks:
                index, self._next = self._next, self._next + 1
            else:
                index = self._again.pop()
            data = self._content.block(index)
            self._ready += _RECORD.pack(_BLOCK, index, len(data))
            self._ready += data
        if counter is not None and not self._left() and not self._ended and len(self._ready) < limit:
            self._ready += _RECORD.pack(_END, counter, 0)
            self._ended = True


class Incoming:
    """A state as it comes in; nothing of it is applied before `finish`.

    Args:
        size: bytes of the state itself.
        limit: bytes of the stream at most.
    """

    def __init__(self, size: int, limit: int) -> None:
        self._content = Content(size, 0)
        self._limit = limit
        self._hash = xxh3_128()
        self._total = 0
        self._last: tuple[int, bytes] | None = None
        self._rest = bytearray()
        self._seen: set[int] = set()
        self._counter: int | None = None
        self._wrong = ""

    def put(self, offset: int, data: bytes) -> None:
        """Take the next piece, or the last one again."""
        if self._last == (offset, data):
            return
        if offset != self._total:
            raise InvalidArgument(f"load at {offset}; expected {self._total}")
        if self._total + len(data) > self._limit:
            raise NoResources(f"a state of more than {self._limit} bytes", {"max_state": self._limit})
        self._last = (offset, bytes(data))
        self._total += len(data)
        self._hash.update(data)
        self._rest += data
        self._parse()

    def _parse(self) -> None:
        while len(self._rest) >= _RECORD.size and not self._wrong:
            kind, index, length = _RECORD.unpack_from(self._rest)
            if self._counter is not None:
                self._wrong = "bytes after the end record"
            elif kind == _END and length == 0:
                self._counter = index
            elif kind != _BLOCK or index >= self._content.blocks or length != self._content.length(index):
                self._wrong = f"record of kind {kind}, index {index}, {length} bytes"
            elif len(self._rest) < _RECORD.size + length:
                return
            else:
                self._content.put(index, bytes(self._rest[_RECORD.size : _RECORD.size + length]))
                self._seen.add(index)
            del self._rest[: _RECORD.size + length]
        if self._wrong:
            self._rest.clear()

    def finish(self, total: int, digest: bytes, seed: int) -> tuple[Content, int]:
        """Verify.

        Returns:
            The state and the counter.

        Raises:
            CorruptState: it is not whole, or not what was sent.
        """
        if total != self._total:
            raise CorruptState(f"{self._total} bytes came, {total} were announced; nothing was applied")
        if digest != self._hash.digest():
            raise CorruptState(f"XXH3-128 of the {total} bytes differs; nothing was applied")
        if self._wrong or self._rest or self._counter is None or len(self._seen) != self._content.blocks:
            reason = self._wrong or f"{len(self._seen)} of {self._content.blocks} blocks, end record missing or cut"
            raise CorruptState(f"the state makes no sense: {reason}; nothing was applied")
        self._content.seed = seed
        return self._content, self._counter
