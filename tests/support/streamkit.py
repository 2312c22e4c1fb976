"""State streams for tests: made whole, cut into records, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vfiouser_oob.migration.stream import Data, StreamHeader, StreamReader, StreamRecord, StreamWriter


def whole_records(
    pieces: Sequence[bytes], descriptor: bytes = b"nvme", config: bytes = b"config", epoch: int = 1
) -> list[bytes]:
    """The records of a complete stream, header first."""
    writer = StreamWriter(epoch)
    records = [writer.header(), writer.descriptor(descriptor)]
    records += [writer.data(writer.total, piece) for piece in pieces]
    records += [writer.pci(config), writer.trailer()]
    return [b"".join(record) for record in records]


def read_stream(chunks: Iterable[bytes], reader: StreamReader | None = None) -> tuple[list[StreamRecord], bytes]:
    """Read a whole stream as a destination does; returns its records and state, or raises StreamRefused."""
    reader = StreamReader() if reader is None else reader
    records: list[StreamRecord] = []
    for chunk in chunks:
        records += reader.feed(chunk)
    state = bytearray()
    for record in records:
        if isinstance(record, StreamHeader):
            state.clear()
        elif isinstance(record, Data):
            state += record.data
    reader.finish()
    return records, bytes(state)


def portions(data: bytes, size: int) -> list[bytes]:
    """Bytes in pieces of a size; the last may be shorter."""
    return [data[start : start + size] for start in range(0, len(data), size)]
