"""The state stream: what one daemon writes, a VMM carries and another daemon reads; no I/O here.

    header, descriptor, then data and pci records in any order (pci at least once, the last one counts), trailer

Everything is little-endian and every bit is covered: by the CRC-32 of a record's head, by that of its payload, by
sequence and generation numbers in the head against lost, repeated and exchanged records, by `seal` (a CRC-32 over all
heads of the generation) against records of another stream, and by the SHA-256 over the state itself. A header with a
higher generation may stand wherever a record may: all that came before is void then.

The layouts are declared with construct; the packed twins are what runs. Payloads are never copied by the writer, and
by the reader only if they did not come in one piece.
"""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias
from zlib import crc32

from construct import Bytes, Const, Int32ul, Int64ul, Padding
from construct import Struct as Layout

from vfiouser_protocol.errors import CommandError, LocalProtocolError

Buffer: TypeAlias = "bytes | bytearray | memoryview"

MAGIC = b"VFUOOBST"
VERSION = 1
#: Of the header and of every record's head, bytes.
HEAD_SIZE = 32
SHA256_SIZE = 32
#: Largest piece of state in one record, bytes: what a reader has to hold before it can check it.
MAX_DATA = 16 << 20

HEADER_LAYOUT = Layout(
    "magic" / Const(MAGIC),
    "version" / Int32ul,
    "generation" / Int32ul,
    Padding(12),
    "head_crc" / Int32ul,
)
RECORD_LAYOUT = Layout(
    "tag" / Bytes(4),
    "generation" / Int32ul,
    "sequence" / Int32ul,
    "length" / Int32ul,
    "offset" / Int64ul,
    "payload_crc" / Int32ul,
    "head_crc" / Int32ul,
)
TRAILER_LAYOUT = Layout("total" / Int64ul, "sha256" / Bytes(SHA256_SIZE), "seal" / Int32ul, Padding(4))

_header = struct.Struct("<8sII12s")
_head = struct.Struct("<4sIIIQI")
_crc = struct.Struct("<I")
_trailer = struct.Struct("<Q32sI4s")
_NO_PADDING = bytes(12)
_CRC_AT = HEAD_SIZE - _crc.size


class Refusal(Enum):
    """Why a stream is refused."""

    FOREIGN = "foreign"
    VERSION = "version"
    CORRUPT = "corrupt"
    ORDER = "order"
    TRUNCATED = "truncated"


#: What the client is told with the sentence that only logs and status carry.
_ERRNO = {
    Refusal.FOREIGN: errno.EINVAL,
    Refusal.VERSION: errno.EINVAL,
    Refusal.CORRUPT: errno.EILSEQ,
    Refusal.ORDER: errno.EILSEQ,
    Refusal.TRUNCATED: errno.EILSEQ,
}


class StreamRefused(CommandError):
    """A state stream is refused; nothing of it may be applied.

    Args:
        reason: the kind of refusal.
        message: what came, what was allowed.
    """

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(f"{message}; the state is refused and nothing of it applied", _ERRNO[reason])
        self.reason = reason


class Header(NamedTuple):
    """The stream begins, or begins anew.

    Args:
        generation: counts the beginnings.
        restart: True if records of an earlier generation came before: they are void.
    """

    generation: int
    restart: bool


class Descriptor(NamedTuple):
    """What the state is of: opaque here, checked by the engine and the agent.

    Args:
        payload: the encoded descriptor.
    """

    payload: bytes


class PciConfig(NamedTuple):
    """Configuration space as last written.

    Args:
        payload: opaque here.
    """

    payload: bytes


class Data(NamedTuple):
    """A piece of the agent's state.

    Args:
        offset: where it belongs, bytes; pieces follow each other without a gap.
        data: the bytes, read-only.
    """

    offset: int
    data: memoryview


class Trailer(NamedTuple):
    """The end of the stream.

    Args:
        total: bytes of all `Data`.
        sha256: of all `Data`; `StreamReader.finish` compares it.
    """

    total: int
    sha256: bytes


Record: TypeAlias = Header | Descriptor | PciConfig | Data | Trailer


class RecordRule(NamedTuple):
    """What a kind of record may be like.

    Args:
        least: bytes of payload.
        most: bytes of payload.
    """

    least: int
    most: int


DESCRIPTOR = b"desc"
PCI = b"pci "
DATA = b"data"
TRAILER = b"end "

RECORDS: Mapping[bytes, RecordRule] = MappingProxyType(
    {
        DESCRIPTOR: RecordRule(1, 1 << 20),
        PCI: RecordRule(1, 1 << 16),
        DATA: RecordRule(1, MAX_DATA),
        TRAILER: RecordRule(_trailer.size, _trailer.size),
    }
)


class Place(Enum):
    """How far a stream has come."""

    START = "the start"
    OPENED = "the header"
    DESCRIBED = "the descriptor"
    CONFIGURED = "a pci record"
    COMPLETE = "the trailer"


#: Which record may follow, and where it leads; the header of a new generation may come anywhere but after the trailer.
ORDER: Mapping[Place, Mapping[bytes, Place]] = MappingProxyType(
    {
        Place.START: {MAGIC: Place.OPENED},
        Place.OPENED: {MAGIC: Place.OPENED, DESCRIPTOR: Place.DESCRIBED},
        Place.DESCRIBED: {MAGIC: Place.OPENED, DATA: Place.DESCRIBED, PCI: Place.CONFIGURED},
        Place.CONFIGURED: {
            MAGIC: Place.OPENED,
            DATA: Place.CONFIGURED,
            PCI: Place.CONFIGURED,
            TRAILER: Place.COMPLETE,
        },
        Place.COMPLETE: {},
    }
)


def pack_header(generation: int) -> bytes:
    """Return the bytes of a header.

    Args:
        generation: counts the beginnings of a stream.
    """
    body = _header.pack(MAGIC, VERSION, generation, _NO_PADDING)
    return body + _crc.pack(crc32(body))


def pack_head(tag: bytes, generation: int, sequence: int, length: int, offset: int, payload_crc: int) -> bytes:
    """Return the bytes in front of a record's payload.

    Args:
        tag: one of `RECORDS`.
        generation: of the stream.
        sequence: number of the record in its generation; that of the descriptor is 0.
        length: of the payload, bytes.
        offset: bytes of state in front of this record.
        payload_crc: CRC-32 of the payload.
    """
    body = _head.pack(tag, generation, sequence, length, offset, payload_crc)
    return body + _crc.pack(crc32(body))


class _Progress:
    """What writer and reader count alike."""

    def __init__(self) -> None:
        self.place = Place.START
        self.generation = 0
        self.sequence = 0
        self.offset = 0
        self.seal = 0

    def begin(self, generation: int, header: Buffer) -> None:
        self.place = Place.OPENED
        self.generation = generation
        self.sequence = 0
        self.offset = 0
        self.seal = crc32(header)

    def advance(self, tag: bytes, length: int, head: Buffer) -> None:
        self.place = ORDER[self.place][tag]
        self.sequence += 1
        self.seal = crc32(head, self.seal)
        if tag == DATA:
            self.offset += length


class StreamWriter:
    """Makes a stream, record by record; a record is a tuple of buffers that follow each other.

    Args:
        generation: of the first header, at least 1.

    A call out of order raises LocalProtocolError.
    """

    def __init__(self, generation: int = 1) -> None:
        self._progress = _Progress()
        self._next_generation = generation

    @property
    def generation(self) -> int:
        """The generation that is being written, 0 before the first header."""
        return self._progress.generation

    @property
    def total(self) -> int:
        """Bytes of state written in this generation."""
        return self._progress.offset

    @property
    def complete(self) -> bool:
        """True once the trailer was made."""
        return self._progress.place is Place.COMPLETE

    def header(self) -> tuple[Buffer, ...]:
        """Return the header; called again before the trailer, it begins the stream anew in the next generation."""
        if MAGIC not in ORDER[self._progress.place]:
            raise LocalProtocolError("a state stream cannot begin anew after its trailer; not written")
        generation = self._next_generation
        self._next_generation += 1
        packed = pack_header(generation)
        self._progress.begin(generation, packed)
        return (packed,)

    def descriptor(self, payload: bytes) -> tuple[Buffer, ...]:
        """Return the descriptor's record.

        Args:
            payload: the encoded descriptor.
        """
        return self._record(DESCRIPTOR, payload)

    def pci(self, payload: bytes) -> tuple[Buffer, ...]:
        """Return a record of the configuration space; the last one of a stream counts.

        Args:
            payload: the encoded configuration space.
        """
        return self._record(PCI, payload)

    def data(self, offset: int, payload: Buffer, payload_crc: int | None = None) -> tuple[Buffer, ...]:
        """Return a record with a piece of state.

        Args:
            offset: where it belongs, bytes; has to be `total`.
            payload: 1 to `MAX_DATA` bytes; part of the record as it is, so it must not change any more.
            payload_crc: its CRC-32, if the caller has it already.
        """
        if offset != self._progress.offset:
            raise LocalProtocolError(f"state at {offset} follows {self._progress.offset} bytes; not written")
        return self._record(DATA, payload, payload_crc)

    def trailer(self, sha256: bytes) -> tuple[Buffer, ...]:
        """Return the record that ends the stream.

        Args:
            sha256: digest of all state of this generation.
        """
        if len(sha256) != SHA256_SIZE:
            raise LocalProtocolError(f"a SHA-256 of {len(sha256)} bytes; not written")
        progress = self._progress
        return self._record(TRAILER, _trailer.pack(progress.offset, sha256, progress.seal, bytes(4)))

    def _record(self, tag: bytes, payload: Buffer, payload_crc: int | None = None) -> tuple[Buffer, ...]:
        progress = self._progress
        rule = RECORDS[tag]
        length = len(payload)
        if tag not in ORDER[progress.place]:
            raise LocalProtocolError(f"{_name(tag)} cannot follow {progress.place.value}; not written")
        if not rule.least <= length <= rule.most:
            raise LocalProtocolError(
                f"{_name(tag)} of {length} bytes, {rule.least} to {rule.most} are allowed; not written"
            )
        checksum = crc32(payload) if payload_crc is None else payload_crc
        head = pack_head(tag, progress.generation, progress.sequence, length, progress.offset, checksum)
        progress.advance(tag, length, head)
        return head, payload


class StreamReader:
    """Reads a stream from chunks of any size, and lets only what was checked through.

    Once it has refused a stream, it refuses everything. State is only proven by `finish`.
    """

    def __init__(self) -> None:
        self._progress = _Progress()
        self._head = bytearray()
        self._payload = bytearray()
        self._current: _Head | None = None
        self._trailer: Trailer | None = None
        self._refused: StreamRefused | None = None
        #: Bytes that were fed.
        self.consumed = 0

    @property
    def complete(self) -> bool:
        """True once a trailer came."""
        return self._progress.place is Place.COMPLETE

    @property
    def generation(self) -> int:
        """The generation that is being read, 0 before the first header."""
        return self._progress.generation

    def feed(self, chunk: Buffer) -> list[Record]:
        """Take the next bytes of the stream.

        Args:
            chunk: any number of bytes. They must never change: a `Data` that lies wholly in it shares its memory.

        Returns:
            The records that are complete now, checked and in order.

        Raises:
            StreamRefused: foreign, of another version, corrupt, or out of order.
        """
        if self._refused is not None:
            raise self._refused
        view = memoryview(chunk)
        self.consumed += len(view)
        records: list[Record] = []
        try:
            position = 0
            while position < len(view):
                position = self._take(view, position, records)
        except StreamRefused as refused:
            self._refused = refused
            self._head.clear()
            # A fresh one: views of the old one may be in the hands of the caller.
            self._payload = bytearray()
            raise
        return records

    def finish(self, sha256: bytes) -> Trailer:
        """End the stream.

        Args:
            sha256: digest of the data of every `Data` since the last `Header`, as the caller computed it.

        Returns:
            The trailer.

        Raises:
            StreamRefused: the stream was refused before, is not complete, or holds other data.
        """
        if self._refused is not None:
            raise self._refused
        trailer = self._trailer
        if trailer is None:
            where = f"{self._progress.place.value} of generation {self.generation}"
            raise self._refuse(Refusal.TRUNCATED, f"the stream ends after {self.consumed} bytes, behind {where}")
        if trailer.sha256 != sha256:
            text = f"the trailer says SHA-256 {trailer.sha256.hex()}, the state has {sha256.hex()}"
            raise self._refuse(Refusal.CORRUPT, text)
        return trailer

    def _refuse(self, reason: Refusal, text: str) -> StreamRefused:
        self._refused = StreamRefused(reason, text)
        return self._refused

    def _take(self, view: memoryview, position: int, records: list[Record]) -> int:
        """Go on with the head or the payload that comes next; returns where the rest begins."""
        current = self._current
        if self.complete:
            raise StreamRefused(Refusal.ORDER, f"{len(view) - position} more bytes came after the trailer")
        if current is None:
            end = min(len(view), position + HEAD_SIZE - len(self._head))
            self._head += view[position:end]
            if not MAGIC.startswith(self._head[:8]) and self._progress.place is Place.START:
                raise StreamRefused(Refusal.FOREIGN, f"the stream begins with {bytes(self._head[:8])!r}, not {MAGIC!r}")
            if len(self._head) == HEAD_SIZE:
                head, self._head = bytes(self._head), bytearray()
                self._open(head, records)
            return end
        have = len(self._payload)
        end = min(len(view), position + current.length - have)
        if not have and end - position == current.length:
            self._close(current, view[position:end].toreadonly(), records)
            return end
        self._payload += view[position:end]
        if len(self._payload) == current.length:
            payload, self._payload = self._payload, bytearray()
            self._close(current, memoryview(payload).toreadonly(), records)
        return end

    def _open(self, packed: bytes, records: list[Record]) -> None:
        """Check what stands in front of a payload; a header is a record by itself."""
        progress = self._progress
        if packed.startswith(MAGIC):
            generation = _unpack_header(packed)
            if MAGIC not in ORDER[progress.place]:
                raise StreamRefused(Refusal.ORDER, f"a header came after {progress.place.value}")
            if generation <= progress.generation:
                raise StreamRefused(
                    Refusal.ORDER, f"a header of generation {generation} came after one of {progress.generation}"
                )
            records.append(Header(generation, restart=progress.place is not Place.START))
            progress.begin(generation, packed)
            return
        if _crc.unpack_from(packed, _CRC_AT)[0] != crc32(packed[:_CRC_AT]):
            raise StreamRefused(Refusal.CORRUPT, f"the head of record {progress.sequence} has a wrong CRC-32")
        self._current = _check_head(_Head(packed, *_head.unpack_from(packed)), progress)

    def _close(self, head: _Head, payload: memoryview, records: list[Record]) -> None:
        """Check a payload and let it through."""
        progress = self._progress
        if crc32(payload) != head.payload_crc:
            text = f"record {head.sequence}, {_name(head.tag)} at {head.offset}+{head.length}, has a wrong CRC-32"
            raise StreamRefused(Refusal.CORRUPT, text)
        if head.tag == DATA:
            records.append(Data(head.offset, payload))
        elif head.tag == TRAILER:
            self._trailer = _check_trailer(payload, progress)
            records.append(self._trailer)
        else:
            records.append((Descriptor if head.tag == DESCRIPTOR else PciConfig)(bytes(payload)))
        progress.advance(head.tag, head.length, head.packed)
        self._current = None


class _Head(NamedTuple):
    """A record's head, unpacked."""

    packed: bytes
    tag: bytes
    generation: int
    sequence: int
    length: int
    offset: int
    payload_crc: int


def _unpack_header(packed: bytes) -> int:
    """The generation in a header."""
    _magic, version, generation, padding = _header.unpack_from(packed)
    # Before the checksum: another version may have another one.
    if version != VERSION:
        age = "newer" if version > VERSION else "older"
        raise StreamRefused(Refusal.VERSION, f"the stream has the {age} version {version}, this daemon reads {VERSION}")
    if _crc.unpack_from(packed, _CRC_AT)[0] != crc32(packed[:_CRC_AT]) or padding != _NO_PADDING:
        raise StreamRefused(Refusal.CORRUPT, "the stream's header is damaged")
    return int(generation)


def _check_head(head: _Head, progress: _Progress) -> _Head:
    """Return the head of a record that may come now; refuse any other."""
    expected = (progress.generation, progress.sequence, progress.offset)
    came = (head.generation, head.sequence, head.offset)
    if came != expected:
        names = "generation {}, record {}, offset {}".format
        raise StreamRefused(Refusal.ORDER, f"{_name(head.tag)} of {names(*came)} where {names(*expected)} was due")
    if head.tag not in ORDER[progress.place]:
        raise StreamRefused(Refusal.ORDER, f"{_name(head.tag)} came after {progress.place.value}")
    rule = RECORDS[head.tag]
    if not rule.least <= head.length <= rule.most:
        text = f"{_name(head.tag)} of {head.length} bytes, {rule.least} to {rule.most} are allowed"
        raise StreamRefused(Refusal.CORRUPT, text)
    return head


def _check_trailer(payload: memoryview, progress: _Progress) -> Trailer:
    total, sha256, seal, padding = _trailer.unpack(payload)
    if (total, seal, padding) != (progress.offset, progress.seal, bytes(4)):
        text = f"the trailer says {total} bytes and seal {seal:#x}, there were {progress.offset} and {progress.seal:#x}"
        raise StreamRefused(Refusal.CORRUPT, text)
    return Trailer(total, sha256)


def _name(tag: bytes) -> str:
    return f"record {tag.decode('ascii', 'backslashreplace').strip()!r}"


class RecordQueue:
    """Records on their way to a client that takes them in portions of its own size."""

    def __init__(self) -> None:
        self._records: deque[deque[memoryview]] = deque()
        self._begun = False
        self._size = 0

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
            piece = pieces.popleft()
            if len(piece) > limit:
                pieces.appendleft(piece[limit:])
                piece = piece[:limit]
            taken.append(piece)
            limit -= len(piece)
            self._size -= len(piece)
            self._begun = bool(pieces)
            if not pieces:
                records.popleft()
        return taken

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
