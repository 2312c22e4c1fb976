"""Which pages of its client's memory a function has written that the client's VMM cannot know of.

A VMM that migrates its guest knows what the guest writes, and what a device writes by DMA_WRITE. What a device writes
into the memory's files goes past it: those pages have to be sent by somebody else, or the guest finds old ones.

| route | where a write goes | who knows of it |
|---|---|---|
| `FILES` | into the file | the journal; and the VMM, if it gave a log |
| `MESSAGES` | DMA_WRITE, and done when it is answered | the VMM |
| `HELD` | into the file at once: the VMM may not answer before we have | the journal |

Rule 1: *the journal is always on*. A migration begins before we hear of it, and pages that were written in between
        count. So the journal remembers the last seconds, and from its time on keeps what it has.
Rule 2: *whatever was not answered was not done*. The VMM may carry it out later, when nobody sends memory any more.
Rule 3: *a message that is still under way may be carried out at any time*. Whoever writes the same bytes by another way
        sends them once more, since messages are carried out in order: else the older ones would win.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple, Protocol

import trio

from vfiouser_protocol.dirty import DirtyLog

PAGE_SIZE = 4096
_PAGE_SHIFT = 12
#: Pages that a generation has as a set, beyond which bits need less memory.
_PAGES_IN_SET = 1 << 15
#: Seconds that one generation of the journal is written to, and how many of them are kept. A migration's beginning is
#: heard of within milliseconds; a machine that stands still for a second is a bad one.
GENERATION_S = 0.5
GENERATIONS = 9


class DmaRoute(Enum):
    """How a function writes its client's memory."""

    FILES = "files"
    MESSAGES = "messages"
    HELD = "held"


class JournalGeneration:
    """What was written from one moment on, until the next generation began.

    A set is several times faster than bits, and most generations are forgotten without ever having been read.

    Args:
        began: the moment.
    """

    __slots__ = ("_log", "_pages", "began")

    def __init__(self, began: float) -> None:
        self.began = began
        self._pages: set[int] = set()
        self._log = DirtyLog(PAGE_SIZE)

    def mark(self, address: int, length: int) -> None:
        """Note a write.

        Args:
            address: where.
            length: bytes.
        """
        page = address >> _PAGE_SHIFT
        if address + length - 1 >> _PAGE_SHIFT != page:
            self._log.mark(address, length)
            return
        self._pages.add(page)
        if len(self._pages) > _PAGES_IN_SET:
            self._fold()

    def _fold(self) -> None:
        for page in self._pages:
            self._log.mark(page << _PAGE_SHIFT, PAGE_SIZE)
        self._pages.clear()

    def clear(self) -> None:
        """Forget it."""
        self._pages.clear()
        self._log.clear()

    @property
    def log(self) -> DirtyLog:
        """What was written."""
        self._fold()
        return self._log


class PageJournal:
    """Pages that were written in the last seconds, or since a moment that somebody named.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        now = clock()
        #: Together they have all that was written since the first one began.
        self._generations: deque[JournalGeneration] = deque([JournalGeneration(now)])
        self._young = self._generations[0]
        self._turn = now + GENERATION_S
        self._kept = False

    @property
    def complete_from(self) -> float:
        """The moment from which on it knows every write, by its clock."""
        return self._generations[0].began

    def wrote(self, address: int, length: int) -> None:
        """Note a write; after it was done, or when it may be done at any time from now on.

        Args:
            address: where.
            length: bytes.
        """
        if not self._kept:
            now = self._clock()
            if now >= self._turn:
                self._begin_generation(now)
        self._young.mark(address, length)

    def _begin_generation(self, now: float) -> None:
        # The one that ends now has writes up to now, however long ago it began: so all are kept that end late enough.
        self._young = JournalGeneration(now)
        self._generations.append(self._young)
        self._turn = now + GENERATION_S
        self._forget_before(now - GENERATION_S * (GENERATIONS - 1))

    def _forget_before(self, moment: float) -> None:
        while len(self._generations) > 1 and self._generations[1].began < moment:
            self._generations.popleft()

    def keep(self, since: float) -> bool:
        """Forget nothing from now on, and what was written before a moment as far as that is possible.

        Args:
            since: the moment, by its clock.

        Returns:
            Whether it knows every write since then.
        """
        known = since >= self.complete_from
        if not self._kept:
            self._forget_before(since)
            self._kept = True
        return known

    def release(self) -> None:
        """Go on as before `keep`; nothing is forgotten at once."""
        if self._kept:
            self._kept = False
            self._begin_generation(self._clock())

    def discard(self) -> None:
        """Forget everything that was noted: somebody else knows it now."""
        for generation in self._generations:
            generation.clear()

    def pages(self) -> DirtyLog:
        """All that it has."""
        found = DirtyLog(PAGE_SIZE)
        for generation in self._generations:
            found.absorb(generation.log)
        return found


class SentWrite(Protocol):
    """A write by message that nobody has to wait for."""

    @property
    def answered(self) -> bool:
        """Whether the client has answered, or cannot any more."""
        ...

    async def wait(self) -> None:
        """Wait for the answer; raises DmaFault if it is none, or a refusal."""
        ...


class SentRead(Protocol):
    """A read by message that was sent."""

    async def wait(self) -> bytes:
        """Wait for the answer; raises DmaFault if it is none, or a refusal."""
        ...


class UnansweredWrite(NamedTuple):
    """A write by message that the client has not answered.

    Args:
        address: where.
        data: what is written.
    """

    address: int
    data: bytes


class WriteRecorder:
    """What is known of the writes of one client's function, and which way they go.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.journal = PageJournal(clock)
        self.route = DmaRoute.FILES
        #: Told of writes through files, if the VMM gave a log for that: address and bytes.
        self.mark: Callable[[int, int], None] | None = None
        self._unanswered: dict[int, UnansweredWrite] = {}
        self._number = 0
        self._waiting: set[trio.CancelScope] = set()
        #: What the client may still carry out, though nothing waits for it any more: number, from, to.
        self._abandoned: list[tuple[int, int, int]] = []
        #: What was sent once more because of that: number, what it is, and its message.
        self._resent: list[tuple[int, UnansweredWrite, SentWrite]] = []

    @property
    def unanswered(self) -> tuple[UnansweredWrite, ...]:
        """Writes by message that were not answered, in the order in which they were sent."""
        return tuple(self._unanswered.values())

    @property
    def to_come(self) -> tuple[UnansweredWrite, ...]:
        """All writes by message that the client may still carry out, in that order; also those that nobody waits for.

        What was written into a file may meanwhile be overwritten by an older message, until the one that was sent
        behind it is carried out. So whoever reads a file for somebody else has to pass these on as well.
        """
        self._settle_resent()
        found = {number: write for number, write, _ in self._resent} | self._unanswered
        return tuple(found[number] for number in sorted(found))

    def wrote(self, address: int, length: int) -> None:
        """Note a write through a file.

        Args:
            address: where.
            length: bytes.
        """
        if self.mark is not None:
            self.mark(address, length)
        else:
            self.journal.wrote(address, length)

    @contextmanager
    def sending(self, address: int, data: bytes, *, has_file: bool) -> Iterator[trio.CancelScope]:
        """Send a write by message, and wait for its answer, inside of this.

        Args:
            address: where.
            data: what is written.
            has_file: whether it can be written into a file instead.

        Returns:
            The scope of the waiting; if it was cancelled, the write has to go into the file.
        """
        self._number = number = self._number + 1
        self._unanswered[number] = UnansweredWrite(address, data)
        scope = trio.CancelScope()
        if has_file:
            self._waiting.add(scope)
        answered = False
        try:
            with scope:
                yield scope
                answered = True
        finally:
            self._waiting.discard(scope)
            del self._unanswered[number]
            if answered:
                self._carried_out(number)
            else:
                self._abandoned.append((number, address, address + len(data)))
                if has_file:  # it goes into the file; what then contests it is sent again, see `to_come`
                    self.wrote(address, len(data))

    def _carried_out(self, number: int) -> None:
        """All up to a message were carried out, for that happens in order."""
        if self._abandoned:
            self._abandoned = [each for each in self._abandoned if each[0] > number]

    def hold(self) -> None:
        """Let all writes go into files, also those that wait for an answer; the guest's processors stand."""
        self.route = DmaRoute.HELD
        for scope in tuple(self._waiting):
            scope.cancel()

    def contested(self, address: int, length: int) -> bool:
        """Whether a message that nobody waits for may still overwrite what was written to a range.

        Args:
            address: its first address.
            length: bytes.
        """
        if not self._abandoned:
            return False
        self._settle_resent()
        return any(start < address + length and address < end for _, start, end in self._abandoned)

    def _settle_resent(self) -> None:
        while self._resent and self._resent[0][2].answered:
            self._carried_out(self._resent.pop(0)[0])

    def sent_again(self, address: int, data: bytes, write: SentWrite) -> None:
        """Note that what was contested was sent behind the message that contests it.

        Args:
            address: where.
            data: what is written.
            write: as it was sent.
        """
        self._number += 1
        self._resent.append((self._number, UnansweredWrite(address, data), write))
