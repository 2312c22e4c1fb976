"""What an agent of the simulator puts into `save` and takes from `load`: a sequence of records.

Each record is a tag (4 bytes), an index (u64) and a length (u32), little-endian, and that many bytes:

    HEAD  version          the first one
    SMEM  block            a block of state memory; may come again, the last one counts
    CMEM  offset           a piece of the controller memory buffer
    CTRL  version          the controller (`nvme.snapshot`)
    TAIL  records so far   the last one; a stream without it is not whole

Pre-copy carries SMEM only. What can be mapped by a VMM changes without the device knowing, so the controller memory
buffer comes after the stop, in one piece with the controller.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio
from xxhash import xxh3_128

from vfiouser_agents.api import Chunk
from vfiouser_agents.errors import CorruptState, InvalidArgument, NoResources
from vfiouser_soc.agent.state_memory import StateMemory
from vfiouser_soc.nvme.snapshot import MAX_SIZE as CONTROLLER_MAX_SIZE

VERSION = 1
_RECORD = struct.Struct("<4sQI")
_HEAD, _STATE_MEMORY, _BUFFER, _CONTROLLER, _TAIL = b"HEAD", b"SMEM", b"CMEM", b"CTRL", b"TAIL"
_BUFFER_PIECE = 256 << 10
#: From this many bytes on, hashing is left to a thread.
_HASH_IN_THREAD = 64 << 10


@dataclass
class SavedParts:
    """What there is to save, besides state memory.

    Args:
        controller: makes the controller's snapshot.
        buffer: the controller memory buffer, if there is one.
    """

    controller: Callable[[], bytes]
    buffer: memoryview | None = None


class StateWriter:
    """The stream of one function, from its first to its last byte.

    Args:
        memory: the function's state memory.
        parts: the rest of its state.
    """

    def __init__(self, memory: StateMemory, parts: SavedParts) -> None:
        self._memory = memory
        self._parts = parts
        self._next = 0  # blocks from here on were never given
        self._again: dict[int, None] = {}  # blocks before it that were rewritten since
        self._records = 0
        self._ready: deque[bytes] = deque()  # made and not given
        self._ready_size = 0
        self._last_offset = 0
        self._last = Chunk(b"", drained=True)
        self._rest: Iterator[None] | None = None  # makes what follows state memory
        self._ended = False
        self._put(_HEAD, VERSION, b"")

    def rewritten(self, index: int) -> None:
        """A block of state memory has changed."""
        if index < self._next:
            self._again[index] = None

    @property
    def initial(self) -> int:
        """Bytes of state memory never given."""
        blocks = self._memory.blocks - self._next
        rest = self._memory.size - self._memory.length(0) * self._next if blocks else 0
        return rest + blocks * _RECORD.size

    @property
    def again(self) -> int:
        """Bytes of state memory given and changed since."""
        return sum(_RECORD.size + self._memory.length(index) for index in self._again)

    @property
    def remaining(self) -> int:
        """Bytes still to come if nothing changed any more."""
        waiting = self._ready_size + self.initial + self.again
        if self._ended:
            return waiting
        buffer = self._parts.buffer
        if buffer is not None:
            waiting += len(buffer) + -(-len(buffer) // _BUFFER_PIECE) * _RECORD.size
        return waiting + len(self._parts.controller()) + 2 * _RECORD.size

    def repeats(self, offset: int) -> bool:
        """Whether an offset is that of the last chunk, which was not acknowledged."""
        return bool(self._last.data) and offset == self._last_offset

    def take(self, offset: int, limit: int, *, final: bool) -> Chunk:
        """The chunk at an offset.

        Args:
            offset: that of the last chunk, or the one after it.
            limit: bytes at most.
            final: the function is stopped; go on to the end of the stream.

        Raises:
            InvalidArgument: another offset.
        """
        if self.repeats(offset):
            return self._repeat(limit, final=final)
        expected = self._last_offset + len(self._last.data)
        if offset != expected:
            raise InvalidArgument(f"save at {offset}; allowed are {self._last_offset} again, {expected} next, and 0")
        self._fill(limit, final=final)
        data = self._cut(limit)
        drained = not final and not self._ready and not self._memory_left
        self._last_offset = offset
        self._last = Chunk(data, eof=self._ended and not self._ready, drained=drained)
        return self._last

    def _repeat(self, limit: int, *, final: bool) -> Chunk:
        data = self._last.data
        if limit < len(data):
            self._ready.appendleft(data[limit:])
            self._ready_size += len(data) - limit
            self._last = Chunk(data[:limit])
        elif final and self._last.drained:
            self._last = Chunk(data)
        return self._last

    @property
    def _memory_left(self) -> bool:
        return self._next < self._memory.blocks or bool(self._again)

    def _fill(self, limit: int, *, final: bool) -> None:
        while self._ready_size < limit and self._memory_left:
            if self._next < self._memory.blocks:
                index, self._next = self._next, self._next + 1
            else:
                index = next(iter(self._again))
                del self._again[index]
            self._put(_STATE_MEMORY, index, self._memory.block(index))
        while final and self._ready_size < limit and not self._ended:
            self._rest = self._rest or self._make_rest()
            next(self._rest, None)

    def _make_rest(self) -> Iterator[None]:
        buffer = self._parts.buffer
        for start in range(0, len(buffer) if buffer is not None else 0, _BUFFER_PIECE):
            assert buffer is not None
            self._put(_BUFFER, start, bytes(buffer[start : start + _BUFFER_PIECE]))
            yield
        self._put(_CONTROLLER, VERSION, self._parts.controller())
        self._put(_TAIL, self._records, b"")
        self._ended = True

    def _put(self, tag: bytes, index: int, data: bytes) -> None:
        self._records += 1
        self._ready.append(_RECORD.pack(tag, index, len(data)))
        if data:
            self._ready.append(data)
        self._ready_size += _RECORD.size + len(data)

    def _cut(self, limit: int) -> bytes:
        pieces, count = [], 0
        while self._ready and count < limit:
            piece = self._ready.popleft()
            if count + len(piece) > limit:
                self._ready.appendleft(piece[limit - count :])
                piece = piece[: limit - count]
            pieces.append(piece)
            count += len(piece)
        self._ready_size -= count
        return b"".join(pieces)


@dataclass
class LoadedParts:
    """A state that has come in whole.

    Args:
        controller: the controller's snapshot.
        buffer: the controller memory buffer; empty if there is none.
        blocks: versions of the state memory's blocks, by index.
    """

    controller: bytes = b""
    buffer: bytearray = field(default_factory=bytearray)
    blocks: dict[int, int] = field(default_factory=dict)


class StateReader:
    """A state as it comes in; nothing of it is applied by this.

    Args:
        memory: the state memory that it is for; only asked.
        buffer_size: bytes of the controller memory buffer; 0 if there is none.
        limit: bytes of the stream at most.
    """

    def __init__(self, memory: StateMemory, buffer_size: int, limit: int) -> None:
        self._memory = memory
        self._limit = limit
        self._hash = xxh3_128()
        self._total = 0
        self._last: tuple[int, bytes] | None = None
        self._rest = bytearray()
        self._records = 0
        self._ended = False
        self._wrong = ""
        self._parts = LoadedParts(buffer=bytearray(buffer_size))
        self._buffer_end = 0
        self._takers: dict[bytes, Callable[[int, bytes], None]] = {
            _STATE_MEMORY: self._take_block,
            _BUFFER: self._take_buffer,
            _CONTROLLER: self._take_controller,
            _TAIL: self._take_tail,
        }

    async def put(self, offset: int, data: bytes) -> None:
        """Take the next piece, or the last one again.

        Raises:
            InvalidArgument: it does not begin where the last one ended.
            NoResources: the state is too large.
        """
        if self._last == (offset, data):
            return
        if offset != self._total:
            raise InvalidArgument(f"load at {offset}; expected {self._total}")
        if self._total + len(data) > self._limit:
            raise NoResources(f"a state of more than {self._limit} bytes", {"max_state": self._limit})
        if len(data) >= _HASH_IN_THREAD:
            await trio.to_thread.run_sync(self._hash.update, data)
        else:
            self._hash.update(data)
        self._last = (offset, data)
        self._total += len(data)
        self._rest += data
        self._parse()

    def _parse(self) -> None:
        at = 0
        while not self._wrong and len(self._rest) - at >= _RECORD.size:
            tag, index, length = _RECORD.unpack_from(self._rest, at)
            self._wrong = self._check(tag, index, length)
            end = at + _RECORD.size + length
            if self._wrong or len(self._rest) < end:
                break
            self._take(tag, index, bytes(memoryview(self._rest)[at + _RECORD.size : end]))
            at = end
        del self._rest[: at if not self._wrong else len(self._rest)]

    def _check(self, tag: bytes, index: int, length: int) -> str:
        if self._ended:
            return "bytes after the last record"
        if (tag == _HEAD) != (self._records == 0):
            return f"record {self._records} is {tag!r}"
        if tag == _HEAD:
            return "" if (index, length) == (VERSION, 0) else f"format version {index}; this is version {VERSION}"
        if tag not in self._takers:
            return f"unknown record {tag!r}"
        largest = CONTROLLER_MAX_SIZE if tag == _CONTROLLER else max(_BUFFER_PIECE, self._memory.length(0))
        return "" if length <= largest else f"record {tag!r} of {length} bytes"

    def _take(self, tag: bytes, index: int, data: bytes) -> None:
        if tag != _HEAD:
            try:
                self._takers[tag](index, data)
            except ValueError as error:
                self._wrong = str(error)
        self._records += 1

    def _take_block(self, index: int, data: bytes) -> None:
        self._parts.blocks[index] = self._memory.recognise(index, data)

    def _take_buffer(self, offset: int, data: bytes) -> None:
        if offset != self._buffer_end or offset + len(data) > len(self._parts.buffer):
            raise ValueError(f"controller memory buffer of {offset + len(data)} bytes or more, or out of order")
        self._parts.buffer[offset : offset + len(data)] = data
        self._buffer_end += len(data)

    def _take_controller(self, version: int, data: bytes) -> None:
        if version != VERSION or self._parts.controller:
            raise ValueError(f"a second controller, or one of version {version}")
        self._parts.controller = data

    def _take_tail(self, records: int, data: bytes) -> None:
        if records != self._records or data:
            raise ValueError(f"the end speaks of {records} records; there were {self._records}")
        self._ended = True

    def finish(self, total: int, digest: bytes) -> LoadedParts:
        """Verify that the state is whole.

        Args:
            total: bytes that were sent.
            digest: their XXH3-128.

        Raises:
            CorruptState: it is not whole, or not what was sent.
        """
        if total != self._total:
            raise CorruptState(f"{self._total} bytes came, {total} were announced; nothing was applied")
        if digest != self._hash.digest():
            raise CorruptState(f"XXH3-128 of the {total} bytes differs; nothing was applied")
        missing = (
            (not self._ended and "its end is missing")
            or (not self._parts.controller and "there is no controller in it")
            or (self._buffer_end != len(self._parts.buffer) and "the controller memory buffer is not whole")
            or (len(self._parts.blocks) != self._memory.blocks and "state memory is not whole")
        )
        if self._wrong or missing:
            raise CorruptState(f"the state makes no sense: {self._wrong or missing}; nothing was applied")
        return self._parts
