"""A state on its way through a descriptor of QEMU's: written and read by a thread, since it may be any file.

What is written is a head, the state, and a trail. The trail pushes the state through QEMU's buffers to the other side,
and its last byte is held back for a moment: as long as that is missing, the destination's main loop is free, and what
is replayed there can be verified.
"""

from __future__ import annotations

import os
import select
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, NamedTuple, TypeVar

import trio
from construct import Const, Int32ul

from vfiouser_oob.transport.fds import ForeignFd
from vfiouser_oob.transport.worker import Worker
from vfiouser_oob.vm.carriers.interface import State
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import U32, U64, least_size

T = TypeVar("T")
MAGIC = b"oobstate"
VERSION = 1
#: More than QEMU's buffers on both sides hold back of a stream that stops.
TRAIL = 128 << 10
#: Seconds for which the last byte is held back: by size, since the destination has to take the state first, and by how
#: long it took to be saved, since loading takes about as long, on a machine that is as busy.
HOLD_S = 0.01
HOLD_MAX_S = 0.15
_LOADS_PER_SAVE = 3
_BYTES_PER_S = 4 << 30
#: Bytes that the thread moves at a time.
_WRITE = 1 << 20
_READ = 8 << 20
_READ_ONCE = 1 << 20


class PipeError(Exception):
    """A state did not get through; the text says why."""


class StateHead(NamedTuple):
    """What stands in front of the state.

    Args:
        magic: `MAGIC`.
        version: of this form.
        trail: bytes that follow the state.
        size: bytes of the state.
    """

    magic: Annotated[bytes, Const(MAGIC)]
    version: Annotated[int, Const(VERSION, Int32ul)]
    trail: U32
    size: U64


HEAD_SIZE = least_size(StateHead)


def hold_for(size: int, took_s: float = 0.0) -> float:
    """Return for how many seconds the last byte is held back.

    Args:
        size: bytes of the state.
        took_s: seconds that it took to be saved.
    """
    return min(HOLD_MAX_S, max(HOLD_S + size / _BYTES_PER_S, _LOADS_PER_SAVE * took_s))


class PipeEnd:
    """A descriptor of QEMU's that a thread works on; it stays open until the thread is through with it.

    Args:
        fd: the descriptor; owned from now on.
        worker: the thread that may be held up.
    """

    def __init__(self, fd: ForeignFd, worker: Worker) -> None:
        self._fd = fd
        self._worker = worker
        self._busy = False
        self._closing = False

    async def run(self, work: Callable[[int], T]) -> T:
        """Do something with the descriptor's number in the thread, one thing at a time.

        Raises:
            OSError: whatever `work` raises.
        """
        self._busy = True
        return await self._worker.run(lambda: work(self._fd.fileno()), self._landed)

    def _landed(self) -> None:
        self._busy = False
        if self._closing:
            self._fd.close()

    def close(self) -> None:
        """Close the descriptor as soon as the thread does not use it."""
        self._closing = True
        if not self._busy:
            self._fd.close()


async def write_state(
    end: PipeEnd, state: State, before_end: Callable[[], Awaitable[None]], took_s: float = 0.0
) -> None:
    """Write a state, and close the descriptor.

    Args:
        end: where to; it is closed in any case.
        state: the state.
        before_end: called before the last byte leaves.
        took_s: seconds that it took to be saved.

    Raises:
        PipeError: whoever reads has gone.
    """
    try:
        head = encode(StateHead(MAGIC, VERSION, TRAIL, len(state)))
        for piece in (head, state, bytes(TRAIL - 1)):
            await _write(end, memoryview(piece))
        await trio.sleep(hold_for(len(state), took_s))
        await before_end()
        await _write(end, memoryview(b"\0"))
    finally:
        end.close()


async def _write(end: PipeEnd, view: memoryview) -> None:
    while view:
        piece = view[:_WRITE]
        try:
            written = await end.run(partial(_write_some, piece))
        except OSError as error:
            raise PipeError(f"QEMU does not accept the state: {error.strerror}") from error
        view = view[written:]


def _write_some(piece: memoryview, number: int) -> int:
    return os.write(number, piece)


class PipedStateReader:
    """Reads a state.

    Args:
        end: where from; whoever made it closes it.
        most_bytes: bytes of the largest state to take.
    """

    def __init__(self, end: PipeEnd, most_bytes: int) -> None:
        self._pipe = end
        self._most_bytes = most_bytes
        self._head: StateHead | None = None
        self._got = bytearray()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether QEMU has written everything."""
        return self._ended

    async def state(self) -> memoryview:
        """Wait until the state is there, although not its trail.

        Raises:
            PipeError: it is none, or too large, or it broke off.
        """
        await self._read_until(HEAD_SIZE)
        try:
            self._head = decode(StateHead, bytes(self._got[:HEAD_SIZE]))
        except CommandError as error:
            raise PipeError(f"what arrived is not a state that this program saved: {error}") from error
        if self._head.size > self._most_bytes or self._head.trail > TRAIL:
            raise PipeError(f"the state has {self._head.size} bytes, and at most {self._most_bytes} are taken")
        await self._read_until(HEAD_SIZE + self._head.size)
        return memoryview(memoryview(self._got)[HEAD_SIZE : HEAD_SIZE + self._head.size].tobytes())

    async def end(self) -> None:
        """Wait for the end, and check that nothing is missing and nothing follows.

        Raises:
            PipeError: it broke off, or there is more.
        """
        assert self._head is not None
        total = HEAD_SIZE + self._head.size + self._head.trail
        await self._read_until(total)
        while not self._ended and len(self._got) <= total:
            await self._read()
        if len(self._got) != total:
            raise PipeError("more bytes arrived than the state has")

    async def _read_until(self, size: int) -> None:
        while len(self._got) < size:
            if self._ended:
                raise PipeError(f"the state broke off: only {len(self._got)} of {size} bytes arrived")
            await self._read()

    async def _read(self) -> None:
        try:
            data, self._ended = await self._pipe.run(_read_some)
        except OSError as error:
            raise PipeError(f"cannot read QEMU's state: {error.strerror}") from error
        self._got += data


def _read_some(number: int) -> tuple[bytes, bool]:
    """Read what is there, and wait if there is nothing (in the thread); returns whether that was the end, too."""
    waiting = select.poll()
    waiting.register(number, select.POLLIN)
    pieces: list[bytes] = []
    room = _READ
    while room > 0 and (not pieces or waiting.poll(0)):
        piece = os.read(number, min(room, _READ_ONCE))
        if not piece:
            return b"".join(pieces), True
        pieces.append(piece)
        room -= len(piece)
    return b"".join(pieces), False
