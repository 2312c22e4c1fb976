"""The state stream: what one daemon writes, a VMM carries and another daemon reads; no I/O here.

`stream_format` says what it looks like. Payloads are never copied by the writer, and by the reader only if they did not
come in one piece. The source puts what `StreamWriter` makes into a `RecordQueue`, from which the client takes portions
of its own size; the destination feeds whatever portions come to a `StreamReader`, and calls `finish` at the end.
"""

from __future__ import annotations

from typing import NamedTuple

from vfiouser_oob.migration.record_queue import RecordQueue
from vfiouser_oob.migration.stream_format import (
    DATA,
    DESCRIPTOR,
    DIGEST_AT,
    HEAD,
    HEAD_SIZE,
    HEADER,
    MAGIC,
    MAX_DATA,
    NO_DIGEST,
    NO_PADDING,
    ORDER,
    PCI,
    RECORDS,
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
    chain,
    pack_header,
    pack_record,
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
        #: Of the last record, or of the header.
        self.digest = NO_DIGEST

    def begin(self, epoch: int, header: bytes) -> None:
        self.place = StreamPlace.OPENED
        self.epoch = epoch
        self.sequence = 0
        self.offset = 0
        self.digest = header[DIGEST_AT:]

    def advance(self, tag: bytes, length: int, digest: bytes) -> None:
        self.place = ORDER[self.place][tag]
        self.sequence += 1
        self.digest = digest
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
            raise LocalProtocolError("a state stream cannot start again after its trailer; not written")
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

    def data(self, offset: int, payload: Buffer) -> tuple[Buffer, ...]:
        """Return a record with a piece of state.

        Args:
            offset: where it belongs, bytes; has to be `total`.
            payload: 1 to `MAX_DATA` bytes; part of the record as it is, so it must not change any more.
        """
        if offset != self._progress.offset:
            raise LocalProtocolError(f"state at {offset} follows {self._progress.offset} bytes; not written")
        return self._record(DATA, payload)

    def trailer(self) -> tuple[Buffer, ...]:
        """Return the record that ends the stream."""
        return self._record(TRAILER, TRAILER_BODY.pack(self._progress.offset))

    def _record(self, tag: bytes, payload: Buffer) -> tuple[Buffer, ...]:
        progress = self._progress
        rule = RECORDS[tag]
        length = len(payload)
        if tag not in ORDER[progress.place]:
            raise LocalProtocolError(f"{record_name(tag)} cannot follow {progress.place.value}; not written")
        if not rule.least <= length <= rule.most:
            raise LocalProtocolError(
                f"{record_name(tag)} of {length} bytes, {rule.least} to {rule.most} are allowed; not written"
            )
        head = pack_record(progress.digest, tag, progress.epoch, progress.sequence, progress.offset, payload)
        progress.advance(tag, length, head[DIGEST_AT:])
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

    A record with a wrong digest is not let through. The stream is refused then, unless a header follows, which makes it
    void: so a source goes on that has lost the rest of a record of which its client has a part.

    Once it has refused a stream, it refuses everything. That the state is whole is only proven by `finish`.
    """

    def __init__(self) -> None:
        self._progress = _Progress()
        self._head = bytearray()
        self._payload = _Gathered()
        self._current: _Head | None = None
        self._trailer: Trailer | None = None
        self._refused: StreamRefused | None = None
        #: What is wrong with the last record; only a header may follow.
        self._damage: str | None = None
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

    def finish(self) -> Trailer:
        """End the stream.

        Returns:
            The trailer.

        Raises:
            StreamRefused: the stream was refused before, or is not complete.
        """
        if self._refused is not None:
            raise self._refused
        if self._damage is not None:
            self._refused = StreamRefused(Refusal.CORRUPT, self._damage)
            raise self._refused
        if self._trailer is None:
            where = f"{self._progress.place.value} of epoch {self.epoch}"
            text = f"the stream ends after {self.consumed} bytes, behind {where}"
            self._refused = StreamRefused(Refusal.TRUNCATED, text)
            raise self._refused
        return self._trailer

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
        if self._damage is not None and not packed.startswith(MAGIC):
            raise StreamRefused(Refusal.CORRUPT, self._damage)
        if packed.startswith(MAGIC):
            epoch = _unpack_header(packed)
            if MAGIC not in ORDER[progress.place]:
                raise StreamRefused(Refusal.ORDER, f"a header came after {progress.place.value}")
            if epoch <= progress.epoch:
                raise StreamRefused(Refusal.ORDER, f"a header of epoch {epoch} came after one of {progress.epoch}")
            records.append(StreamHeader(epoch, restart=progress.place is not StreamPlace.START))
            progress.begin(epoch, packed)
            self._damage = None
            return
        self._current = _check_head(_Head(packed, *HEAD.unpack_from(packed)), progress)

    def _close(self, head: _Head, payload: memoryview, records: list[StreamRecord]) -> None:
        """Check a payload and let it through."""
        progress = self._progress
        if chain(progress.digest, head.packed[:DIGEST_AT], payload) != head.packed[DIGEST_AT:]:
            name = record_name(head.tag)
            self._damage = f"record {head.sequence}, {name} at {head.offset}+{head.length}, has a wrong digest"
            self._current = None
            return
        if head.tag == DATA:
            records.append(Data(head.offset, payload))
        elif head.tag == TRAILER:
            self._trailer = _check_trailer(payload, progress)
            records.append(self._trailer)
        else:
            records.append((DescriptorRecord if head.tag == DESCRIPTOR else PciConfig)(bytes(payload)))
        progress.advance(head.tag, head.length, head.packed[DIGEST_AT:])
        self._current = None


class _Head(NamedTuple):
    """A record's head, unpacked."""

    packed: bytes
    tag: bytes
    epoch: int
    sequence: int
    length: int
    offset: int


def _unpack_header(packed: bytes) -> int:
    """The epoch in a header."""
    _magic, version, epoch, padding = HEADER.unpack_from(packed)
    # Before the digest: another version may have another one.
    if version != VERSION:
        age = "newer" if version > VERSION else "older"
        raise StreamRefused(Refusal.VERSION, f"the stream has the {age} version {version}, this daemon reads {VERSION}")
    if packed[DIGEST_AT:] != chain(NO_DIGEST, packed[:DIGEST_AT]) or padding != NO_PADDING:
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
    (total,) = TRAILER_BODY.unpack(payload)
    if total != progress.offset:
        raise StreamRefused(Refusal.CORRUPT, f"the trailer says {total} bytes, there were {progress.offset}")
    return Trailer(total)
