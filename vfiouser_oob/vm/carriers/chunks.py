"""A state in pieces, for a carrier that takes no more than so much at a time.

Each piece begins with a head that says which one it is, so they may arrive in any order, and a piece of something else
is known. What is inside is checked by the stream's own checksum, not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from construct import Const, Int32ul

from vfiouser_oob.vm.carriers.interface import State
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import U32, U64, least_size

MAGIC = b"oobchunk"
VERSION = 1


class ChunkError(Exception):
    """A piece does not belong to the state that is being put together, or is none."""


class ChunkHead(NamedTuple):
    """What stands in front of each piece.

    Args:
        magic: `MAGIC`.
        version: of this form.
        index: which piece, from 0.
        pieces: how many there are.
        reserved: 0.
        size: bytes of the whole state.
    """

    magic: Annotated[bytes, Const(MAGIC)]
    version: Annotated[int, Const(VERSION, Int32ul)]
    index: U32  # type: ignore[assignment]
    pieces: U32
    reserved: U32
    size: U64


HEAD_SIZE = least_size(ChunkHead)


def pieces_for(size: int, room: int) -> int:
    """Return in how many pieces a state travels; an empty one travels too.

    Args:
        size: bytes of the state.
        room: bytes of state in a piece.
    """
    return max(1, -(-size // room))


def cut(state: State, largest: int) -> list[tuple[bytes, memoryview]]:
    """Return a state's pieces: the head of each, and where its bytes lie.

    Args:
        state: the state.
        largest: bytes of the largest piece, its head included.
    """
    room = largest - HEAD_SIZE
    view = memoryview(state)
    count = pieces_for(len(view), room)
    heads = (encode(ChunkHead(MAGIC, VERSION, index, count, 0, len(view))) for index in range(count))
    return [(head, view[index * room : (index + 1) * room]) for index, head in enumerate(heads)]


class Joiner:
    """Puts a state together.

    Args:
        most_bytes: bytes of the largest state to take.
        largest: bytes of the largest piece, its head included.
    """

    def __init__(self, most_bytes: int, largest: int) -> None:
        self._most_bytes = most_bytes
        self._room = largest - HEAD_SIZE
        self._size: int | None = None
        self._pieces: dict[int, bytes | memoryview] = {}

    def add(self, index: int, piece: bytes) -> bytes | None:
        """Take a piece.

        Args:
            index: the place at which it arrived.
            piece: head and bytes.

        Returns:
            The state, if it is whole now.

        Raises:
            ChunkError: it is not a piece of this state.
        """
        try:
            head = decode(ChunkHead, piece)
        except CommandError as error:
            raise ChunkError(f"what arrived is not a piece of a state that this program saved: {error}") from error
        self._check(index, head, len(piece) - HEAD_SIZE)
        self._size = head.size
        self._pieces[index] = memoryview(piece)[HEAD_SIZE:]
        if len(self._pieces) < head.pieces:
            return None
        return b"".join(self._in_order())

    def _in_order(self) -> Iterator[bytes | memoryview]:
        return (self._pieces[index] for index in range(len(self._pieces)))

    def _check(self, index: int, head: ChunkHead, length: int) -> None:
        if head.size > self._most_bytes:
            raise ChunkError(f"the state has {head.size} bytes, and at most {self._most_bytes} are taken")
        if self._size not in (None, head.size):
            raise ChunkError(f"pieces of two states arrived, one of {self._size} bytes and one of {head.size}")
        if head.index != index or index in self._pieces:
            raise ChunkError(f"piece {head.index} of the state arrived where piece {index} was expected, or twice")
        if head.pieces != pieces_for(head.size, self._room):
            raise ChunkError(f"a state of {head.size} bytes does not come in {head.pieces} pieces")
        if length != max(0, min(self._room, head.size - index * self._room)) or index >= head.pieces:
            raise ChunkError(f"piece {index} of {head.pieces} of a state of {head.size} bytes has {length} bytes")
