"""The state stream: what one daemon writes, a VMM carries and another daemon reads; no I/O here.

`stream_format` says what it looks like. Payloads are never copied by the writer, and by the reader only if they did not
come in one piece. The source puts what `StreamWriter` makes into a `RecordQueue`, from which the client takes portions
of its own size; the destination feeds whatever portions come to a `StreamReader`, and calls `finish` at the end.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

from vfiouser_oob.migration.record_queue import RecordQueue
from vfiouser_oob.migration.stream_format import (
    CRC,
    CRC_AT,
    DATA,
    DESCRIPTOR,
    HEAD,
    HEAD_SIZE,
    HEADER,
    MAGIC,
    MAX_DATA,
    NO_PADDING,
    ORDER,
    PCI,
    RECORDS,
    SHA256_SIZE,
    TRAILER,
    TRAILER_BODY,
    VERSION,
    Buffer,
    Data,
    DescriptorRecord,
    PciConfig,
    Refusal,
    StreamHeader,
    StreamPlace,
    StreamRecord,
    StreamRefused,
    Trailer,
    pack_head,
    pack_header,
    record_name,
)
from vfiouser_protocol.errors import LocalProtocolError

__all__ = [
    "MAX_DATA",
    "VERSION",
    "Buffer",
    "Data",
    "DescriptorRecord",
    "PciConfig",
    "RecordQueue",
    "Refusal",
    "StreamHeader",
    "StreamReader",
    "StreamRecord",
    "StreamRefused",
    "StreamWriter",
    "Trailer",
]

#: Bytes from which a piece of a payload is kept where it is until the payload is whole.
_KEPT = 16 << 10


class _Progress:
    """What writer and reader count alike."""

    def __init__(self) -> None:
        self.place = StreamPlace.START
        self.epoch = 0
        self.sequence = 0
        self.offset = 0
        self.seal = 0

    def begin(self, epoch: int, header: Buffer) -> None:
        self.place = StreamPlace.OPENED
        self.epoch = epoch
        self.sequence = 0
        self.offset = 0
        self.seal = crc32(header[:CRC_AT])

    def advance(self, tag: bytes, length: int, head: Buffer) -> None:
        self.place = ORDER[self.place][tag]
        self.sequence += 1
        # Without its own checksum: a CRC over something and its CRC is the same for everything.
        self.seal = crc32(head[:CRC_AT], self.seal)
        if tag == DATA:
            self.offset += length


class StreamWriter:
    """Makes a stream, record by record; a record is a tuple of buffers that follow each other.

    Args:
        epoch: of the first header, at least 1.

    A call out of order raises LocalProtocolError.
    """

    def __init__(self, epoch: int = 1) -> None:
        self._progress = _Progress()
        self._next_epoch = epoch

    @property
    def epoch(self) -> int:
        """The epoch that is being written, 0 before the first header."""
        return self._progress.epoch

    @property
    def total(self) -> int:
        """Bytes of state written in this epoch."""
        return self._progress.offset

    @property
    def complete(self) -> bool:
        """True once the trailer was made."""
        return self._progress.place is StreamPlace.COMPLETE

    def header(self) -> tuple[Buffer, ...]:
        """Return the header; called again before the trailer, it begins the stream anew in the next epoch."""
        if MAGIC not in ORDER[self._progress.place]:
            raise LocalProtocolError("a state stream cannot begin anew after its trailer; not written")
        epoch = self._next_epoch
        self._next_epoch += 1
        packed = pack_header(epoch)
        self._progress.begin(epoch, packed)
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
            sha256: digest of all state of this epoch.
        """
        if len(sha256) != SHA256_SIZE:
            raise LocalProtocolError(f"a SHA-256 of {len(sha256)} bytes; not written")
        progress = self._progress
        return self._record(TRAILER, TRAILER_BODY.pack(progress.offset, sha256, progress.seal, bytes(4)))

    def _record(self, tag: bytes, payload: Buffer, payload_crc: int | None = None) -> tuple[Buffer, ...]:
        progress = self._progress
        rule = RECORDS[tag]
        length = len(payload)
        if tag not in ORDER[progress.place]:
            raise LocalProtocolError(f"{record_name(tag)} cannot follow {progress.place.value}; not written")
        if not rule.least <= length <= rule.most:
            raise LocalProtocolError(
                f"{record_name(tag)} of {length} bytes, {rule.least} to {rule.most} are allowed; not written"
            )
        checksum = crc32(payload) if payload_crc is None else payload_crc
        head = pack_head(tag, progress.epoch, progress.sequence, length, progress.offset, checksum)
        progress.advance(tag, length, head)
        return head, payload


class _Gathered:
    """A payload that comes in pieces. Large ones are kept where they are until all can be joined in one go."""

    def __init__(self) -> None:
        self._pieces: list[memoryview | bytearray] = []
        self.size = 0

    def add(self, piece: memoryview) -> None:
        """Add a piece; it must not change any more."""
        self.size += len(piece)
        if len(piece) >= _KEPT:
            self._pieces.append(piece)
            return
        # Many small ones would take up more memory than what they hold.
        last = self._pieces[-1] if self._pieces else None
        if not isinstance(last, bytearray):
            last = bytearray()
            self._pieces.append(last)
        last += piece

    def join(self) -> bytes:
        """All pieces together."""
        return b"".join(self._pieces)


class StreamReader:
    """Reads a stream from chunks of any size, and lets only what was checked through.

    Once it has refused a stream, it refuses everything. State is only proven by `finish`.
    """

    def __init__(self) -> None:
        self._progress = _Progress()
        self._head = bytearray()
        self._payload = _Gathered()
        self._current: _Head | None = None
        self._trailer: Trailer | None = None
        self._refused: StreamRefused | None = None
        #: Bytes that were fed.
        self.consumed = 0

    @property
    def complete(self) -> bool:
        """True once a trailer came."""
        return self._progress.place is StreamPlace.COMPLETE

    @property
    def epoch(self) -> int:
        """The epoch that is being read, 0 before the first header."""
        return self._progress.epoch

    def feed(self, chunk: Buffer) -> list[StreamRecord]:
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
        records: list[StreamRecord] = []
        try:
            position = 0
            while position < len(view):
                position = self._take(view, position, records)
        except StreamRefused as refused:
            self._refused = refused
            self._head.clear()
            self._payload = _Gathered()
            raise
        return records

    def finish(self, sha256: bytes) -> Trailer:
        """End the stream.

        Args:
            sha256: digest of the data of every `Data` since the last `StreamHeader`, as the caller computed it.

        Returns:
            The trailer.

        Raises:
            StreamRefused: the stream was refused before, is not complete, or holds other data.
        """
        if self._refused is not None:
            raise self._refused
        trailer = self._trailer
        if trailer is None:
            where = f"{self._progress.place.value} of epoch {self.epoch}"
            raise self._refuse(Refusal.TRUNCATED, f"the stream ends after {self.consumed} bytes, behind {where}")
        if trailer.sha256 != sha256:
            text = f"the trailer says SHA-256 {trailer.sha256.hex()}, the state has {sha256.hex()}"
            raise self._refuse(Refusal.CORRUPT, text)
        return trailer

    def _refuse(self, reason: Refusal, text: str) -> StreamRefused:
        self._refused = StreamRefused(reason, text)
        return self._refused

    def _take(self, view: memoryview, position: int, records: list[StreamRecord]) -> int:
        """Go on with the head or the payload that comes next; returns where the rest begins."""
        current = self._current
        if self.complete:
            raise StreamRefused(Refusal.ORDER, f"{len(view) - position} more bytes came after the trailer")
        if current is None:
            end = min(len(view), position + HEAD_SIZE - len(self._head))
            self._head += view[position:end]
            if not MAGIC.startswith(self._head[:8]) and self._progress.place is StreamPlace.START:
                raise StreamRefused(Refusal.FOREIGN, f"the stream begins with {bytes(self._head[:8])!r}, not {MAGIC!r}")
            if len(self._head) == HEAD_SIZE:
                head, self._head = bytes(self._head), bytearray()
                self._open(head, records)
            return end
        have = self._payload.size
        end = min(len(view), position + current.length - have)
        if not have and end - position == current.length:
            self._close(current, view[position:end].toreadonly(), records)
            return end
        self._payload.add(view[position:end])
        if self._payload.size == current.length:
            payload, self._payload = self._payload, _Gathered()
            self._close(current, memoryview(payload.join()), records)
        return end

    def _open(self, packed: bytes, records: list[StreamRecord]) -> None:
        """Check what stands in front of a payload; a header is a record by itself."""
        progress = self._progress
        if packed.startswith(MAGIC):
            epoch = _unpack_header(packed)
            if MAGIC not in ORDER[progress.place]:
                raise StreamRefused(Refusal.ORDER, f"a header came after {progress.place.value}")
            if epoch <= progress.epoch:
                raise StreamRefused(Refusal.ORDER, f"a header of epoch {epoch} came after one of {progress.epoch}")
            records.append(StreamHeader(epoch, restart=progress.place is not StreamPlace.START))
            progress.begin(epoch, packed)
            return
        if CRC.unpack_from(packed, CRC_AT)[0] != crc32(packed[:CRC_AT]):
            raise StreamRefused(Refusal.CORRUPT, f"the head of record {progress.sequence} has a wrong CRC-32")
        self._current = _check_head(_Head(packed, *HEAD.unpack_from(packed)), progress)

    def _close(self, head: _Head, payload: memoryview, records: list[StreamRecord]) -> None:
        """Check a payload and let it through."""
        progress = self._progress
        if crc32(payload) != head.payload_crc:
            text = f"record {head.sequence}, {record_name(head.tag)} at {head.offset}+{head.length}, has a wrong CRC-32"
            raise StreamRefused(Refusal.CORRUPT, text)
        if head.tag == DATA:
            records.append(Data(head.offset, payload))
        elif head.tag == TRAILER:
            self._trailer = _check_trailer(payload, progress)
            records.append(self._trailer)
        else:
            records.append((DescriptorRecord if head.tag == DESCRIPTOR else PciConfig)(bytes(payload)))
        progress.advance(head.tag, head.length, head.packed)
        self._current = None


class _Head(NamedTuple):
    """A record's head, unpacked."""

    packed: bytes
    tag: bytes
    epoch: int
    sequence: int
    length: int
    offset: int
    payload_crc: int


def _unpack_header(packed: bytes) -> int:
    """The epoch in a header."""
    _magic, version, epoch, padding = HEADER.unpack_from(packed)
    # Before the checksum: another version may have another one.
    if version != VERSION:
        age = "newer" if version > VERSION else "older"
        raise StreamRefused(Refusal.VERSION, f"the stream has the {age} version {version}, this daemon reads {VERSION}")
    if CRC.unpack_from(packed, CRC_AT)[0] != crc32(packed[:CRC_AT]) or padding != NO_PADDING:
        raise StreamRefused(Refusal.CORRUPT, "the stream's header is damaged")
    return int(epoch)


def _check_head(head: _Head, progress: _Progress) -> _Head:
    """Return the head of a record that may come now; refuse any other."""
    expected = (progress.epoch, progress.sequence, progress.offset)
    came = (head.epoch, head.sequence, head.offset)
    if came != expected:
        names = "epoch {}, record {}, offset {}".format
        raise StreamRefused(
            Refusal.ORDER, f"{record_name(head.tag)} of {names(*came)} where {names(*expected)} was due"
        )
    if head.tag not in ORDER[progress.place]:
        raise StreamRefused(Refusal.ORDER, f"{record_name(head.tag)} came after {progress.place.value}")
    rule = RECORDS[head.tag]
    if not rule.least <= head.length <= rule.most:
        text = f"{record_name(head.tag)} of {head.length} bytes, {rule.least} to {rule.most} are allowed"
        raise StreamRefused(Refusal.CORRUPT, text)
    return head


def _check_trailer(payload: memoryview, progress: _Progress) -> Trailer:
    total, sha256, seal, padding = TRAILER_BODY.unpack(payload)
    if (total, seal, padding) != (progress.offset, progress.seal, bytes(4)):
        text = f"the trailer says {total} bytes and seal {seal:#x}, there were {progress.offset} and {progress.seal:#x}"
        raise StreamRefused(Refusal.CORRUPT, text)
    return Trailer(total, sha256)
