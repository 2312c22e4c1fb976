"""What one socket's process has to leave to its successor at any moment, kill -9 included: a few words and an outbox.

A message stays in its socket until it is answered, so the socket itself is the list of what is not: whole, with its
descriptors, and also what came while nobody was there. Three things the socket cannot tell, and they are here:

* whether its first command was begun, which must not be done twice;
* what was answered and not sent yet: the outbox. The kernel sends it from this file (`sendfile`), and how far it has
  come is the position of the open file, which is the kernel's as well;
* what was asked of the server behind the function for that command, and what it said.

    file  = head page, outbox            state = commands answered (32 bits), stage (8), end of the outbox (24)

Rule 1: *one store decides*. A reply counts, and its command as answered, by the store of `state` behind it.
Rule 2: *a step is stored before it is done.* So a successor may believe that something was begun that was not, and
        never the other way round.
Rule 3: *what was sent once is never overwritten*: the peer may read it in our very pages. Old pages are punched out.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple, Self

from vfiouser_oob.persist.memory import read_memory
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.transport.fds import OwnedFd

MAGIC = b"VFUSTRM\0"
VERSION = 1
_HEAD = Struct("<8sII")
HEAD_SIZE = 4096
OUTBOX_SIZE = 256 << 10
_SIZE = HEAD_SIZE + OUTBOX_SIZE
#: Largest answer of the server behind that is kept, in bytes: every access to a register has less.
MAX_RESULT = 192
_RESULT_AT = 256
#: Where words are, in words.
_STATE, _CONSUMING, _TORN, _CALL, _RESULT, _LIVES = 2, 3, 4, 5, 6, 7
_STAGE_SHIFT, _ANSWERED_SHIFT = 24, 32
_LOW24, _MASK32, _MASK16 = (1 << 24) - 1, (1 << 32) - 1, (1 << 16) - 1
_LONG = _MASK16


class CommandStage(IntEnum):
    """How far the first command is that was not answered."""

    #: Nothing was done.
    IDLE = 0
    #: It may have been executed, wholly or in part.
    BEGUN = 1
    #: It was executed, and its answer, which carries descriptors, may have been sent.
    DIRECT = 2


class Torn(IntFlag):
    """What makes it impossible to go on with a stream, as long as it lasts."""

    #: A message too large for the outbox was sent in part.
    SENDING = 1
    #: A message too large to stay in the socket was taken out of it.
    RECEIVING = 2


class Asked(NamedTuple):
    """The last thing that was asked of the server behind the function, for one command of the client.

    Args:
        tag: which command of the client, modulo 2^16.
        number: how many things were asked for it, with this one.
        id: message id.
        answered: whether the answer came.
        error: error number of the answer.
        payload: of the answer; None if it was too long to be kept.
    """

    tag: int
    number: int
    id: int
    answered: bool
    error: int
    payload: bytes | None


class StreamMemory:
    """The words and the outbox of one socket. `create` and `resume` make one.

    Args:
        fd: the memory; taken.
    """

    def __init__(self, fd: OwnedFd) -> None:
        self._memory = mmap.mmap(fd.fileno(), _SIZE)
        self._view = memoryview(self._memory)
        self._words = self._view.cast("Q")
        self._fd = fd.take()
        state = self._words[_STATE]
        #: Commands of the peer that were answered, modulo 2^32.
        self.answered = state >> _ANSWERED_SHIFT
        #: How far the first one is that was not.
        self.stage = CommandStage(state >> _STAGE_SHIFT & 0xFF)
        #: Processes that have had it before this one.
        self.lives = self._words[_LIVES]
        self._tail = state & _LOW24
        self._sent = self._position()

    @classmethod
    def create(cls, name: str) -> StreamMemory:
        """Begin with a new socket.

        Args:
            name: shown in /proc/PID/fd and /proc/PID/maps.

        Raises:
            OSError: there is no memory.
        """
        with OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
            os.pwrite(fd.fileno(), _HEAD.pack(MAGIC, VERSION, OUTBOX_SIZE), 0)
            os.posix_fallocate(fd.fileno(), 0, _SIZE)  # a store to memory that is not there is SIGBUS
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            os.lseek(fd.fileno(), HEAD_SIZE, os.SEEK_SET)
            return cls(fd)

    @classmethod
    def resume(cls, fd: OwnedFd) -> StreamMemory:
        """Go on with what another process left.

        Args:
            fd: its memory; taken.

        Raises:
            UnusableRecord: it is none, of another version, damaged, or its stream cannot be followed.
            OSError: it cannot be read.
        """
        _check(read_memory(fd, _SIZE))
        memory = cls(fd)
        if memory._sent > memory._tail:  # killed between the two halves of a turn
            memory._rewind()
        memory.lives += 1
        memory._words[_LIVES] = memory.lives
        return memory

    def fileno(self) -> int:
        """Return the descriptor for the successor; it stays this object's."""
        return self._fd.fileno()

    def _position(self) -> int:
        return max(0, os.lseek(self._fd.fileno(), 0, os.SEEK_CUR) - HEAD_SIZE)

    # Commands

    @property
    def tag(self) -> int:
        """Which command of the peer is the first that was not answered, modulo 2^16."""
        return self.answered + 1 & _MASK16

    @property
    def number(self) -> int:
        """The same, modulo 2^32."""
        return self.answered + 1 & _MASK32

    def begin(self) -> None:
        """The first command that was not answered is about to be executed."""
        self.stage = CommandStage.BEGUN
        self._words[_STATE] = self.answered << _ANSWERED_SHIFT | 1 << _STAGE_SHIFT | self._tail

    def direct(self) -> None:
        """It was executed, and its answer is about to be sent without the outbox."""
        self.stage = CommandStage.DIRECT
        self._words[_STATE] = self.answered << _ANSWERED_SHIFT | 2 << _STAGE_SHIFT | self._tail

    def commit(self) -> None:
        """It is answered: what was `put` counts from now on."""
        self.answered = self.answered + 1 & _MASK32
        self.stage = CommandStage.IDLE
        self._words[_STATE] = self.answered << _ANSWERED_SHIFT | self._tail

    def publish(self) -> None:
        """What was `put` counts from now on, and is no answer."""
        self._words[_STATE] = self.answered << _ANSWERED_SHIFT | self.stage << _STAGE_SHIFT | self._tail

    def consuming(self, size: int, unconsumed: int, *, command: bool) -> None:
        """The first message is about to leave its socket.

        Args:
            size: its bytes.
            unconsumed: bytes that were looked at and are still in the socket, with it.
            command: whether that is so once it is committed; otherwise at once.
        """
        tag = self.answered + command & _MASK16
        self._words[_CONSUMING] = tag << 48 | size << 24 | unconsumed

    def consumed(self) -> None:
        """It has left."""
        self._words[_CONSUMING] = 0

    def left_in_socket(self, unconsumed: int) -> int:
        """How many bytes of what was to leave the socket are still there.

        Args:
            unconsumed: bytes that were looked at and are still in the socket, as the kernel knows.
        """
        word = self._words[_CONSUMING]
        size, before = word >> 24 & _LOW24, word & _LOW24
        if not word or word >> 48 != self.answered & _MASK16:
            return 0
        return max(0, size - max(0, before - unconsumed))

    def tear(self, what: Torn) -> None:
        """The stream cannot be followed by another process from now on."""
        self._words[_TORN] |= int(what)

    def mend(self, what: Torn) -> None:
        """What was torn is whole again."""
        self._words[_TORN] &= ~int(what)

    # The outbox

    @property
    def unsent(self) -> int:
        """Bytes that count and were not sent."""
        return self._tail - self._sent

    def has_room(self, size: int) -> bool:
        """Whether so many bytes can be put; room is made if all was sent."""
        if self._tail + size <= OUTBOX_SIZE:
            return True
        if self._sent < self._tail or size > OUTBOX_SIZE:
            return False
        self._tail = 0
        self.publish()
        self._rewind()
        return True

    def _rewind(self) -> None:
        """Begin at the front again, with new pages: the peer may not have read the old ones."""
        fd = self._fd.fileno()
        self._sent = self._tail = 0
        self.publish()
        os.lseek(fd, HEAD_SIZE, os.SEEK_SET)
        self._memory.madvise(mmap.MADV_REMOVE, HEAD_SIZE, OUTBOX_SIZE)
        os.posix_fallocate(fd, HEAD_SIZE, OUTBOX_SIZE)

    def put(self, data: bytes | memoryview) -> None:
        """Write a message behind the others; it counts once that is said."""
        at = HEAD_SIZE + self._tail
        self._memory[at : at + len(data)] = data
        self._tail += len(data)

    def send(self, sock: int) -> int:
        """Send of the outbox what a socket takes now; its flags say that it never waits.

        Args:
            sock: number of the socket.

        Returns:
            Bytes that are still unsent.

        Raises:
            BlockingIOError: the socket takes nothing.
            OSError: it is of no use any more.
        """
        unsent = self._tail - self._sent
        self._sent += os.sendfile(sock, self._fd.fileno(), None, unsent)
        return self._tail - self._sent

    # What was asked of the server behind

    def ask(self, tag: int, number: int, id: int) -> None:
        """Something is about to be asked.

        Args:
            tag: for which command of the client.
            number: how many things were asked for it, with this one.
            id: message id.
        """
        self._words[_CALL] = tag << 48 | number << 32 | id << 16 | 1

    def hear(self, tag: int, number: int, id: int, error: int, payload: bytes) -> None:
        """It was answered.

        Args:
            tag: as for `ask`.
            number: likewise.
            id: likewise.
            error: error number of the answer.
            payload: of the answer.
        """
        size = len(payload)
        if size <= MAX_RESULT:
            self._memory[_RESULT_AT : _RESULT_AT + size] = bytes(payload)
        else:
            size = _LONG
        self._words[_RESULT] = error << 32 | size
        self._words[_CALL] = tag << 48 | number << 32 | id << 16 | 2

    @property
    def asked(self) -> Asked | None:
        """What was asked last; None if nothing ever was."""
        word, result = self._words[_CALL], self._words[_RESULT]
        if not word:
            return None
        answered, size = word & 0xFF == 2, result & _MASK16
        payload = None if size > MAX_RESULT else bytes(self._memory[_RESULT_AT : _RESULT_AT + size])
        return Asked(word >> 48, word >> 32 & _MASK16, word >> 16 & _MASK16, answered, result >> 32, payload)

    def close(self) -> None:
        """Unmap and close; who has another descriptor keeps the truth."""
        self._words.release()
        self._view.release()
        self._memory.close()
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check(image: bytes) -> None:
    """Judge what another process left.

    Raises:
        UnusableRecord: nothing can be made of it.
    """
    if len(image) < _SIZE or not image.startswith(MAGIC):
        raise UnusableRecord("it is not the memory of a stream")
    _, version, size = _HEAD.unpack_from(image)
    if version != VERSION or size != OUTBOX_SIZE:
        age = "a newer" if version > VERSION else "another"
        raise UnusableRecord(f"it is of {age} version, {version}; {VERSION} is understood")
    words = memoryview(image)[:HEAD_SIZE].cast("Q")
    state = words[_STATE]
    if state & _LOW24 > OUTBOX_SIZE or state >> _STAGE_SHIFT & 0xFF not in tuple(CommandStage):
        raise UnusableRecord(f"it is damaged: its state is {state:#x}")
    if words[_TORN]:
        raise UnusableRecord("a large message was under way when its process ended")
