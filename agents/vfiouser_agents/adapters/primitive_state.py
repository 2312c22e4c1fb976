"""A state on its way through an adapter whose device has no offsets: what was saved, and what is being loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from xxhash import xxh3_128

from vfiouser_agents.answers import check_chunk
from vfiouser_agents.api import Chunk, Phase
from vfiouser_agents.errors import CorruptState, InvalidArgument, NoResources, ProtocolError


class SavedStream:
    """What was saved so far: all of it if it came from a stopped function, or the last piece in pre-copy.

    Args:
        limit: bytes that a state may have.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._base = 0
        self._data = bytearray()
        self._last = 0  # offset of the last piece
        self._eof = False
        self._drained = False
        #: Nothing of it was saved in pre-copy.
        self.final_only = True

    @classmethod
    def of(cls, state: bytes) -> SavedStream:
        """The state that a function was just given: until it runs, it is what would be saved."""
        stream = cls(len(state))
        stream._data += state
        stream._eof = True
        return stream

    @property
    def end(self) -> int:
        """Bytes that were given so far."""
        return self._base + len(self._data)

    @property
    def complete(self) -> bool:
        """The whole state was given."""
        return self._eof

    def restarts(self, offset: int) -> bool:
        """The offset begins a new stream rather than ask for the last piece again."""
        return offset == 0 and not self.final_only and self._last != 0

    def wants(self, offset: int) -> bool:
        """The device has to be asked for the piece at an offset.

        Raises:
            InvalidArgument: that piece cannot be had.
        """
        if not self._base <= offset <= self.end:
            raise InvalidArgument(f"save at {offset}; allowed are {self._last} again, {self.end} next, and 0")
        return offset == self.end and not self._eof

    def add(self, chunk: Chunk, limit: int, phase: Phase) -> None:
        """Take what the device gave.

        Args:
            chunk: the piece at `end`.
            limit: bytes that were asked for.
            phase: the phase that it was asked in.

        Raises:
            ProtocolError: it is more than was asked for, or nothing for no reason.
        """
        # A vendor's device knows one stream, and may say its end in the words of the other phase.
        ends, drained = chunk.eof and phase is Phase.FINAL, chunk.drained and phase is Phase.PRECOPY
        check_chunk(replace(chunk, eof=ends, drained=drained), limit, phase)
        if self.end + len(chunk.data) > self._limit:
            have = self.end + len(chunk.data)
            raise ProtocolError(f"the device gave a state of {have} bytes; at most {self._limit} are allowed")
        if phase is Phase.PRECOPY:
            self.final_only = False
            self._base = self.end
            self._data.clear()
        self._last = self.end
        self._data += chunk.data
        self._eof, self._drained = ends, drained

    def piece(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """The piece at an offset, from what is here."""
        begin = offset - self._base
        data = bytes(self._data[begin : begin + limit])
        at_end = offset + len(data) == self.end
        drained = at_end and self._drained and phase is Phase.PRECOPY
        return Chunk(data, eof=at_end and self._eof, drained=drained)


class IncomingState:
    """A state that comes in; the device gets it when it is whole.

    Args:
        limit: bytes that it may have.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._hash = xxh3_128()
        self._last: tuple[int, bytes] | None = None

    @property
    def data(self) -> bytearray:
        """What came so far."""
        return self._data

    def put(self, offset: int, data: bytes) -> None:
        """Take the next piece, or the last one again.

        Raises:
            InvalidArgument: it does not follow.
            NoResources: the state is too long.
        """
        if self._last == (offset, data):
            return
        if offset != len(self._data):
            raise InvalidArgument(f"load at {offset}; expected {len(self._data)}")
        if offset + len(data) > self._limit:
            raise NoResources(f"a state of more than {self._limit} bytes", {"max_state": self._limit})
        self._last = (offset, bytes(data))
        self._data += data
        self._hash.update(data)

    def finish(self, total: int, digest: bytes) -> bytes:
        """The whole state.

        Raises:
            CorruptState: it is not what was announced.
        """
        if total != len(self._data):
            raise CorruptState(f"{len(self._data)} bytes came, {total} were announced; nothing was applied")
        if digest != self._hash.digest():
            raise CorruptState(f"XXH3-128 of the {total} bytes differs; nothing was applied")
        if not self._data:
            raise CorruptState("a state of 0 bytes; nothing was applied")
        return bytes(self._data)


class StateTaker(Protocol):
    """What takes a state piece by piece."""

    async def load_open(self) -> None:
        """Get ready for a state from its beginning."""

    async def load_piece(self, offset: int, data: bytes) -> None:
        """Take the next piece."""


class StateFeed:
    """Hands a state to a device as it comes in; where a piece was lost on the way, it begins anew.

    Args:
        taker: the device.
        loading: what comes in.
        size: bytes of one piece at most.
    """

    def __init__(self, taker: StateTaker, loading: IncomingState, size: int) -> None:
        self._taker = taker
        self._loading = loading
        self._size = size
        self._given = 0
        #: What the device has is what was given; never so while a piece is on its way.
        self._intact = False

    async def catch_up(self) -> None:
        """Give what came and was not given yet."""
        if not self._intact:
            await self._taker.load_open()
            self._given, self._intact = 0, True
        while self._given < len(self._loading.data):
            piece = bytes(self._loading.data[self._given : self._given + self._size])
            self._intact = False
            await self._taker.load_piece(self._given, piece)
            self._given += len(piece)
            self._intact = True
