"""Which commands of a client were taken and not answered, in shared memory: the truth also after a crash.

The journal is for what changes now and then. A register access happens ten thousand times a second, so what has to be
known of it is a few stores to mapped memory: no system call, no check, nothing to compact.

    page = head (magic, slots, progress), slots        slot = tag (sequence, id, size, flags, command), payload
    progress = sequence of the last command answered, how far the next one is

Rule 1: *each step is one store of one word*, so there is no moment at which the page says half of something. A payload
        is stored before the tag that makes it count.
Rule 2: *a step is stored before what it is about is done*: a command is begun before the device sees it, and its answer
        is under way before the socket has it. A successor so errs on one side only: it never does a thing twice because
        the page did not know of the first time.
Rule 3: *commands are answered in the order in which they came*, so one number says which are.

What the page cannot know is whether a reply that was under way reached the socket: a process that is killed in send(2)
dies after the reply has gone, before it can say so. The client knows: it asks on, or answers a command of ours.

Measured (CPython 3.11 on a small virtual machine on which an empty call takes 56 ns; `journalkit.measure`): `take` with
16 bytes 1500 ns, `begin`, `answering` and `answered` 300 ns each; a register access pays 2200 ns.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Self

from vfiouser_oob.persist.memory import read_memory
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.transport.fds import OwnedFd

MAGIC = b"VFUCMDS\0"
VERSION = 1
#: Commands that may be taken and not answered; who has taken so many stops reading.
SLOTS = 256
#: Largest payload that is kept, in bytes: every access to a register has less, and so has DMA_MAP.
MAX_PAYLOAD = 56
_HEAD = Struct("<8sIIQ")
_HEAD_SIZE = 64
_SLOT_SIZE = 64
_TAG = Struct("<Q")
_MAX_SLOTS = 1 << 16
_MASK = (1 << 32) - 1
#: Where words are, in words.
_PROGRESS = 2
_FIRST_SLOT = _HEAD_SIZE // 8
_WORDS_PER_SLOT = _SLOT_SIZE // 8
#: The lowest part of a tag: seven bits of command, three that say more of it, six of the size of its payload.
_COMMAND = 0x7F
BEGUN, NO_REPLY, WITH_FDS = 1 << 7, 1 << 8, 1 << 9
_SIZE_SHIFT = 10
_LARGE = 0x3F


class Stage(IntEnum):
    """How far a command is."""

    #: It was taken, and nothing was done.
    TAKEN = 0
    #: It may have been executed, wholly or in part.
    BEGUN = 1
    #: It was executed, and its answer may have been sent.
    ANSWERING = 2
    #: It failed, and that may have been said.
    REFUSING = 3


@dataclass(frozen=True, slots=True)
class Taken:
    """A command that was taken and is not known to be answered.

    Args:
        sequence: counts the client's commands, modulo 2^32.
        id: message id.
        command: number of the command; 127 for all that are larger.
        stage: how far it is.
        no_reply: the client waits for no answer.
        with_fds: descriptors came with it, which are gone.
        payload: what it says; None if that is too large to be kept.
    """

    sequence: int
    id: int
    command: int
    stage: Stage
    no_reply: bool
    with_fds: bool
    payload: bytes | None


class CommandPage:
    """The writer of a page; one per client. `create` and `resume` make one.

    Args:
        fd: its memory; taken.
        slots: how many it has.
        answered: sequence of the last command that was answered.
    """

    def __init__(self, fd: OwnedFd, slots: int, answered: int) -> None:
        self._memory = mmap.mmap(fd.fileno(), _size(slots))
        self._view = memoryview(self._memory)
        self._words = self._view.cast("Q")
        self._fd = fd.take()
        self._slots = slots
        self._taken = self._answered = answered
        self._words[_PROGRESS] = (answered & _MASK) << 8

    @classmethod
    def create(cls, name: str, slots: int = SLOTS) -> CommandPage:
        """Begin a page.

        Args:
            name: shown in /proc/PID/fd and /proc/PID/maps.
            slots: commands that may be taken and not answered; a power of two.

        Raises:
            OSError: there is no memory.
        """
        if not 0 < slots <= _MAX_SLOTS or slots & (slots - 1):
            raise ValueError(f"{slots} slots; it has to be a power of two up to {_MAX_SLOTS}")
        with OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
            os.pwrite(fd.fileno(), _HEAD.pack(MAGIC, VERSION, slots, 0), 0)
            os.posix_fallocate(fd.fileno(), 0, _size(slots))  # a store to memory that is not there is SIGBUS
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, slots, 0)

    @classmethod
    def resume(cls, fd: OwnedFd) -> CommandPage:
        """Go on with the page of another process, all of whose commands have been dealt with.

        Args:
            fd: its memory; taken.

        Raises:
            UnusableRecord: it is no page of ours.
            OSError: there is no memory.
        """
        image = read_memory(fd, _size(_MAX_SLOTS))
        taken = read_page(image)
        _, _, slots, progress = _HEAD.unpack_from(image)
        return cls(fd, slots, (progress >> 8) + len(taken))

    def fileno(self) -> int:
        """Return the descriptor for the successor; it stays this object's."""
        return self._fd.fileno()

    @property
    def full(self) -> bool:
        """Whether no more commands can be taken before one is answered."""
        return self._taken - self._answered >= self._slots

    def take(self, id: int, command: int, payload: bytes, flags: int = 0) -> None:
        """A command has come.

        Args:
            id: message id.
            command: its number.
            payload: what it says.
            flags: BEGUN, if it is begun at once; NO_REPLY; WITH_FDS.
        """
        taken = self._taken + 1
        assert taken - self._answered <= self._slots, "a command was taken although the page is full"
        slot = taken & (self._slots - 1)
        size = len(payload)
        if size <= MAX_PAYLOAD:
            at = _HEAD_SIZE + 8 + slot * _SLOT_SIZE
            self._memory[at : at + size] = payload
        else:
            size = _LARGE
        if command > _COMMAND:
            command = _COMMAND
        low = id << 16 | (size << _SIZE_SHIFT | flags | command)  # small numbers first: large ones cost more
        self._words[_FIRST_SLOT + slot * _WORDS_PER_SLOT] = (taken & _MASK) << 32 | low
        self._taken = taken

    def begin(self) -> None:
        """The oldest command that is not answered is about to be executed."""
        self._words[_PROGRESS] = (self._answered & _MASK) << 8 | 1

    def answering(self) -> None:
        """It was executed, and its answer is about to be sent."""
        self._words[_PROGRESS] = (self._answered & _MASK) << 8 | 2

    def refusing(self) -> None:
        """It failed, and that is about to be said."""
        self._words[_PROGRESS] = (self._answered & _MASK) << 8 | 3

    def answered(self) -> None:
        """Its answer was sent, or nobody waits for one."""
        self._answered = answered = self._answered + 1
        self._words[_PROGRESS] = (answered & _MASK) << 8

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


def read_page(image: bytes) -> tuple[Taken, ...]:
    """Read a page.

    Args:
        image: all of it, as it was found.

    Returns:
        The commands that are not known to be answered, oldest first.

    Raises:
        UnusableRecord: it is no page, or one of a newer version.
    """
    if len(image) < _HEAD_SIZE or not image.startswith(MAGIC):
        raise UnusableRecord("it is no page of commands")
    _, version, slots, progress = _HEAD.unpack_from(image)
    if version != VERSION:
        age = "a newer" if version > VERSION else "an unknown"
        raise UnusableRecord(f"it is of {age} version, {version}; {VERSION} is understood")
    stage, answered = progress & 0xFF, progress >> 8
    if not 0 < slots <= _MAX_SLOTS or slots & (slots - 1) or len(image) < _size(slots):
        raise UnusableRecord(f"it is damaged: {slots} slots in {len(image)} bytes")
    if stage not in tuple(Stage) or answered > _MASK:
        raise UnusableRecord(f"it is damaged: its progress is {progress:#x}")
    found: list[Taken] = []
    while len(found) < slots:
        taken = _slot(image, (answered + 1 + len(found)) & _MASK, slots, Stage(0 if found else stage))
        if taken is None:
            break
        found.append(taken)
    return tuple(found)


def _slot(image: bytes, sequence: int, slots: int, stage: Stage) -> Taken | None:
    at = _HEAD_SIZE + (sequence & (slots - 1)) * _SLOT_SIZE
    (tag,) = _TAG.unpack_from(image, at)
    if tag >> 32 != sequence:
        return None
    at += _TAG.size
    size = tag >> _SIZE_SHIFT & _LARGE
    return Taken(
        sequence=sequence,
        id=tag >> 16 & 0xFFFF,
        command=tag & _COMMAND,
        stage=max(stage, Stage.BEGUN if tag & BEGUN else Stage.TAKEN),
        no_reply=bool(tag & NO_REPLY),
        with_fds=bool(tag & WITH_FDS),
        payload=image[at : at + size] if size <= MAX_PAYLOAD else None,
    )


def _size(slots: int) -> int:
    return -(-(_HEAD_SIZE + slots * _SLOT_SIZE) // mmap.PAGESIZE) * mmap.PAGESIZE
