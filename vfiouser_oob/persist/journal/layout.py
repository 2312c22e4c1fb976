"""How a journal lies in its memory, and how it is read. Everything here is pure: bytes in, history out.

    file     = head page, segments
    head     = magic, version, active segment            the last is one word, changed by one store
    segment  = generation, end of its base, check · frames, then zeros
    frame    = check, size of the value, operation, kind, size of the key · key, value

Rule 1: *a history is read as far as it is whole.* A frame's check is a CRC-32 of the frame that goes on where the one
        of the frame before ended. So a torn frame, a changed byte and a frame of a former use of the memory end the
        history there, and what comes before them is what was true once.
Rule 2: *a base is read whole or not at all.* A segment begins with everything that was known when it was begun, in no
        order that ever was; only its end makes it true. Half of a base was never true.
Rule 3: *zeros end the history.* What follows the last frame is all zero, so an end is told from a tear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct
from struct import error as StructError
from types import MappingProxyType
from typing import TypeAlias
from zlib import crc32

from vfiouser_oob.persist.record import UnusableRecord

MAGIC = b"VFUJRNL\0"
#: Of the layout; what is in the records has a version of its own.
VERSION = 1
#: Unit in which segments are placed, and size of the head.
PAGE = 4096
#: Where the word is that says which segment counts: its first page in the upper half, its pages in the lower one.
ACTIVE = 16
#: A journal has a few pages; what is larger than this is not ours.
MAX_SIZE = 1 << 30
MAX_KEY = (1 << 16) - 1
MAX_KIND = 255

Key: TypeAlias = bytes
Records: TypeAlias = dict[int, dict[Key, bytes]]

FILE_HEAD = Struct("<8sI4xQ")
SEGMENT_HEAD = Struct("<QQI4x")
FRAME_CHECK = Struct("<I")
FRAME_HEAD = Struct("<IBBH")
FRAME_SIZE = FRAME_CHECK.size + FRAME_HEAD.size
_SEED = Struct("<QII")
_NOTHING = bytes(FRAME_SIZE)


class FrameOperation(IntEnum):
    """What a frame says; 0 is none, for that is what memory is filled with."""

    #: The record of this kind and key is this.
    PUT = 1
    #: There is none any more.
    DROP = 2
    #: There is no record of this kind any more.
    FORGET = 3


def _put(records: Records, kind: int, key: Key, value: bytes) -> None:
    records.setdefault(kind, {})[key] = value


def _drop(records: Records, kind: int, key: Key, value: bytes) -> None:
    records.get(kind, {}).pop(key, None)


def _forget(records: Records, kind: int, key: Key, value: bytes) -> None:
    records.pop(kind, None)


_CARRY_OUT: Mapping[int, Callable[[Records, int, Key, bytes], None]] = MappingProxyType(
    {FrameOperation.PUT: _put, FrameOperation.DROP: _drop, FrameOperation.FORGET: _forget}
)


@dataclass(frozen=True, slots=True)
class SegmentPlace:
    """Where a segment is.

    Args:
        start: offset of its first byte in the file; whole pages.
        size: bytes; whole pages.
    """

    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset behind its last byte."""
        return self.start + self.size

    @property
    def word(self) -> int:
        """The place in one word."""
        return (self.start // PAGE) << 32 | self.size // PAGE

    @classmethod
    def of(cls, word: int) -> SegmentPlace:
        """The place that a word says."""
        return cls((word >> 32) * PAGE, (word & 0xFFFFFFFF) * PAGE)

    def seed(self, generation: int) -> int:
        """Where the checks of a segment's frames begin.

        Args:
            generation: counts the segments that there were.
        """
        return crc32(_SEED.pack(generation, self.start // PAGE, self.size // PAGE))

    def head(self, generation: int, base_end: int) -> bytes:
        """What stands at its begin.

        Args:
            generation: counts the segments that there were.
            base_end: offset in the file behind the last frame of its base.
        """
        check = crc32(base_end.to_bytes(8, "little"), self.seed(generation))
        return SEGMENT_HEAD.pack(generation, base_end, check)


@dataclass(frozen=True, slots=True)
class History:
    """What a journal says.

    Args:
        records: what is true at its end, by kind and key.
        place: the segment that it is in.
        generation: of that segment.
        changes: frames behind the base.
        torn: something follows that is not whole; what it said is lost.
    """

    records: Records = field(repr=False)
    place: SegmentPlace
    generation: int
    changes: int
    torn: bool


def file_head(active: SegmentPlace) -> bytes:
    """The head of a file.

    Args:
        active: the segment that counts.
    """
    return FILE_HEAD.pack(MAGIC, VERSION, active.word)


def body(operation: int, kind: int, key: Key, value: bytes) -> bytes:
    """A frame without its check.

    Args:
        operation: what it says.
        kind: of record.
        key: which record.
        value: what it is.

    Raises:
        ValueError: it is larger than a frame may be.
    """
    try:
        return FRAME_HEAD.pack(len(value), operation, kind, len(key)) + key + value
    except StructError:
        raise ValueError(
            f"a record of kind {kind} with a key of {len(key)} and a value of {len(value)} bytes; a kind is at most "
            f"{MAX_KIND}, a key has at most {MAX_KEY} bytes"
        ) from None


def read_history(image: bytes) -> History:
    """Read a journal.

    Args:
        image: the whole file, as it was found.

    Returns:
        Its history, as far as it is whole.

    Raises:
        UnusableRecord: it is not a journal, one of a newer version, or what it begins with is damaged.
    """
    if len(image) < PAGE:
        raise UnusableRecord(f"it has {len(image)} bytes; a journal has {PAGE} at least")
    magic, version, word = FILE_HEAD.unpack_from(image)
    if magic != MAGIC:
        raise UnusableRecord("it is not a journal")
    if version != VERSION:
        age = "a newer" if version > VERSION else "an unknown"
        raise UnusableRecord(f"it is of {age} version, {version}; {VERSION} is understood")
    place = SegmentPlace.of(word)
    if place.start < PAGE or place.size < PAGE or place.end > len(image):
        raise UnusableRecord("it is damaged: its head names a segment that it does not have")
    generation, base_end, _ = SEGMENT_HEAD.unpack_from(image, place.start)
    begin = place.start + SEGMENT_HEAD.size
    if image[place.start : begin] != place.head(generation, base_end):
        raise UnusableRecord("it is damaged: the head of its segment is")
    reading = _Reading(image, begin, place.end, place.seed(generation))
    reading.read(base_end)
    if reading.at != base_end:
        raise UnusableRecord("it is damaged: its first record is incomplete")
    changes = reading.read(place.end)
    torn = image[reading.at : min(reading.at + FRAME_SIZE, place.end)] not in _NOTHING
    return History(reading.records, place, generation, changes, torn)


class _Reading:
    """Frames that are carried out one by one.

    Args:
        image: the file.
        at: offset of the first frame.
        end: offset where the segment ends.
        check: of the frame before the first.
    """

    def __init__(self, image: bytes, at: int, end: int, check: int) -> None:
        self.records: Records = {}
        self.at = at
        self._image = memoryview(image)
        self._end = end
        self._check = check

    def read(self, until: int) -> int:
        """Carry out frames up to an offset, or to the first that is not whole; returns how many."""
        count = 0
        while self.at < until and self._step():
            count += 1
        return count

    def _step(self) -> bool:
        image, body = self._image, self.at + FRAME_CHECK.size
        key = body + FRAME_HEAD.size
        if key > self._end:
            return False
        (check,) = FRAME_CHECK.unpack_from(image, self.at)
        value_size, operation, kind, key_size = FRAME_HEAD.unpack_from(image, body)
        value, end = key + key_size, key + key_size + value_size
        carry_out = _CARRY_OUT.get(operation)
        if carry_out is None or end > self._end or crc32(image[body:end], self._check) != check:
            return False
        carry_out(self.records, kind, bytes(image[key:value]), bytes(image[value:end]))
        self.at, self._check = end, check
        return True
