"""Messages in words, for reports of failures: what was sent and received, field by field."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from vfiouser_conformance import wire
from vfiouser_conformance.link import TranscriptEntry
from vfiouser_protocol.constants import Command

_SHOWN = 64


class _PayloadHead(NamedTuple):
    """How a payload begins.

    Args:
        format: of `struct`.
        names: of its fields.
        rest: what follows them.
    """

    format: str
    names: str
    rest: str = "surplus"


_FOUR = "<IIII"
_REQUESTS: Mapping[int, _PayloadHead] = {
    Command.VERSION: _PayloadHead("<HH", "major minor", "version data"),
    Command.DMA_MAP: _PayloadHead("<IIQQQ", "argsz flags offset address size"),
    Command.DMA_UNMAP: _PayloadHead("<IIQQ", "argsz flags address size", "bitmap"),
    Command.DEVICE_GET_INFO: _PayloadHead(_FOUR, "argsz flags num_regions num_irqs"),
    Command.DEVICE_GET_REGION_INFO: _PayloadHead("<IIIIQQ", "argsz flags index cap_offset size offset", "capabilities"),
    Command.DEVICE_GET_REGION_IO_FDS: _PayloadHead(_FOUR, "argsz flags index count", "entries"),
    Command.DEVICE_GET_IRQ_INFO: _PayloadHead(_FOUR, "argsz flags index count"),
    Command.DEVICE_SET_IRQS: _PayloadHead("<IIIII", "argsz flags index start count", "data"),
    Command.REGION_READ: _PayloadHead("<QII", "offset region count", "data"),
    Command.REGION_WRITE: _PayloadHead("<QII", "offset region count", "data"),
    Command.DMA_READ: _PayloadHead("<QQ", "address count", "data"),
    Command.DMA_WRITE: _PayloadHead("<QQ", "address count", "data"),
    Command.DIRTY_PAGES: _PayloadHead("<II", "argsz flags", "range and bitmap"),
    Command.REGION_WRITE_MULTI: _PayloadHead("<Q", "wr_cnt", "entries"),
    Command.DEVICE_FEATURE: _PayloadHead("<II", "argsz flags", "data"),
    Command.MIG_DATA_READ: _PayloadHead("<II", "argsz size", "data"),
    Command.MIG_DATA_WRITE: _PayloadHead("<II", "argsz size", "data"),
}
_HEXADECIMAL = {"flags", "offset", "address", "size"}


def transcript(records: Sequence[TranscriptEntry], last: int = 12) -> Iterator[str]:
    """The last messages of a case, sent ones marked `>`, received ones `<`: what they say, then their bytes."""
    if len(records) > last:
        yield f"({len(records) - last} earlier messages)"
    for record in records[-last:]:
        first, *words = parts(record.data, record.fds)
        yield f"{record.direction} {record.at:7.3f} s  connection {record.channel}: {first}"
        for hexadecimal, text in itertools.zip_longest(_dump(record.data, record.size), words, fillvalue=""):
            yield f"    {hexadecimal:53}  {text}".rstrip()


def message(data: bytes, fds: int = 0) -> str:
    """One message in words."""
    return ", ".join(parts(data, fds))


def parts(data: bytes, fds: int = 0) -> Sequence[str]:
    """One message in words: what it is, then field by field."""
    if len(data) < wire.HEADER_SIZE:
        return [f"{len(data)} bytes of a message"]
    msg_id, command, size, flags, error = wire.HEADER.unpack_from(data)
    kind = {0: "command", 1: "reply"}.get(flags & wire.TYPE_MASK, f"type {flags & wire.TYPE_MASK}")
    found = [f"{kind} {wire.command_name(command)}", f"id {msg_id:#x}, msg_size {size}, flags {flags:#x}"]
    if flags & wire.NO_REPLY:
        found.append("NO_REPLY")
    if flags & wire.ERROR:
        found.append(f"ERROR {error}")
    if fds:
        found.append(f"{fds} descriptors")
    return [*found, *_fields(command, data[wire.HEADER_SIZE : size])]


def _fields(command: int, payload: bytes) -> Iterator[str]:
    layout = _REQUESTS.get(command)
    if not payload:
        return
    if layout is None or len(payload) < struct.calcsize(layout.format):
        yield f"{len(payload)} bytes of payload"
        return
    fields = zip(layout.names.split(), struct.unpack_from(layout.format, payload), strict=True)
    yield ", ".join(f"{name} {value:#x}" if name in _HEXADECIMAL else f"{name} {value}" for name, value in fields)
    rest = payload[struct.calcsize(layout.format) :]
    if rest:
        yield f"{layout.rest} of {len(rest)} bytes" if command != Command.VERSION else repr(rest)


def _dump(data: bytes, size: int) -> Iterator[str]:
    for at in range(0, min(len(data), _SHOWN), 16):
        yield f"{at:04x}  {data[at : at + 16].hex(' ')}"
    if size > _SHOWN:
        yield f"… {size} bytes"
