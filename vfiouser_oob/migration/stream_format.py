"""The format of the state stream: layouts, records, and which may follow which.

    header, descriptor, then data and pci records in any order (pci at least once, the last one counts), trailer

Everything is little-endian. The header and each record's head end with an XXH3-128 digest: of the previous digest, of
the head in front of it and of the payload. So order, content and completeness are one chain, each byte is hashed once,
and how far a stream has come is 16 bytes. It guards against faults, not against whoever can write the stream. A header
with a higher epoch may stand wherever a record may: all that came before is void then.

The layouts are declared with construct; what runs is derived from them, and a test holds both equal.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from construct import Bytes, Const, Int32ul, Int64ul
from construct import Struct as Layout
from xxhash import xxh3_128, xxh3_128_digest

from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.packed import packed

Buffer: TypeAlias = "bytes | bytearray | memoryview"

MAGIC = b"VFUOOBST"
#: Version 1 had a CRC-32 in each record and a SHA-256 of the state in its trailer.
VERSION = 2
#: Largest piece of state in one record, bytes: what a reader has to hold before it can check it.
MAX_DATA = 16 << 20

DIGEST_SIZE = 16
#: What stands for the previous digest in front of a header.
NO_DIGEST = bytes(DIGEST_SIZE)
NO_PADDING = bytes(8)
_DIGEST = "digest" / Bytes(DIGEST_SIZE)

HEADER_LAYOUT = Layout(
    "magic" / Const(MAGIC),
    "version" / Int32ul,
    "epoch" / Int32ul,
    "padding" / Const(NO_PADDING),
    _DIGEST,
)
RECORD_LAYOUT = Layout(
    "tag" / Bytes(4),
    "epoch" / Int32ul,
    "sequence" / Int32ul,
    "length" / Int32ul,
    "offset" / Int64ul,
    _DIGEST,
)
TRAILER_LAYOUT = Layout("total" / Int64ul)

#: What runs: everything in front of `digest`, and the trailer's payload.
HEADER = packed(HEADER_LAYOUT, until="digest")
HEAD = packed(RECORD_LAYOUT, until="digest")
TRAILER_BODY = packed(TRAILER_LAYOUT)
DIGEST_AT = HEAD.size
#: Of the header and of every record's head, bytes.
HEAD_SIZE = DIGEST_AT + DIGEST_SIZE


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
        super().__init__(f"{message}; the state is refused, and no part of it is applied", _ERRNO[reason])
        self.reason = reason


class StreamHeader(NamedTuple):
    """The stream begins, or begins anew.

    Args:
        epoch: counts the beginnings.
        restart: True if records of an earlier epoch came before: they are void.
    """

    epoch: int
    restart: bool


class DescriptorRecord(NamedTuple):
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
    """

    total: int


StreamRecord: TypeAlias = StreamHeader | DescriptorRecord | PciConfig | Data | Trailer


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
        TRAILER: RecordRule(TRAILER_BODY.size, TRAILER_BODY.size),
    }
)


class StreamPlace(Enum):
    """How far a stream has come."""

    START = "the start"
    OPENED = "the header"
    DESCRIBED = "the descriptor"
    CONFIGURED = "a pci record"
    COMPLETE = "the trailer"


#: Which record may follow, and where it leads; the header of a new epoch may come anywhere but after the trailer.
ORDER: Mapping[StreamPlace, Mapping[bytes, StreamPlace]] = MappingProxyType(
    {
        StreamPlace.START: {MAGIC: StreamPlace.OPENED},
        StreamPlace.OPENED: {MAGIC: StreamPlace.OPENED, DESCRIPTOR: StreamPlace.DESCRIBED},
        StreamPlace.DESCRIBED: {MAGIC: StreamPlace.OPENED, DATA: StreamPlace.DESCRIBED, PCI: StreamPlace.CONFIGURED},
        StreamPlace.CONFIGURED: {
            MAGIC: StreamPlace.OPENED,
            DATA: StreamPlace.CONFIGURED,
            PCI: StreamPlace.CONFIGURED,
            TRAILER: StreamPlace.COMPLETE,
        },
        StreamPlace.COMPLETE: {},
    }
)


def chain(previous: bytes, head: Buffer, payload: Buffer = b"") -> bytes:
    """Return the digest of a record.

    Args:
        previous: digest of the record in front of it, `NO_DIGEST` for a header.
        head: the record's, without its digest.
        payload: the record's.
    """
    if not payload:
        return xxh3_128_digest(previous + head)
    hasher = xxh3_128(previous + head)
    hasher.update(payload)
    return hasher.digest()


def pack_header(epoch: int) -> bytes:
    """Return the bytes of a header.

    Args:
        epoch: counts the beginnings of a stream.
    """
    body = HEADER.pack(MAGIC, VERSION, epoch, NO_PADDING)
    return body + chain(NO_DIGEST, body)


def pack_record(
    previous: bytes, tag: bytes, epoch: int, sequence: int, offset: int, payload: Buffer, length: int | None = None
) -> bytes:
    """Return the bytes in front of a record's payload.

    Args:
        previous: digest of the record in front of it.
        tag: one of `RECORDS`.
        epoch: of the stream.
        sequence: number of the record in its epoch; that of the descriptor is 0.
        offset: bytes of state in front of this record.
        payload: what follows.
        length: what is said of its length, bytes, if not the truth.
    """
    body = HEAD.pack(tag, epoch, sequence, len(payload) if length is None else length, offset)
    return body + chain(previous, body, payload)


def record_name(tag: bytes) -> str:
    """Return a tag for people.

    Args:
        tag: four bytes, of whatever kind.
    """
    return f"record {tag.decode('ascii', 'backslashreplace').strip()!r}"
