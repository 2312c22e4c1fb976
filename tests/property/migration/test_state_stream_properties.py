"""The state stream under every cut, flip and exchange that hypothesis thinks of."""

from __future__ import annotations

import pytest
from construct import Container
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from streamkit import portions, read_stream, whole_records
from vfiouser_oob.migration.stream import RecordQueue, StreamReader, StreamRefused, StreamWriter
from vfiouser_oob.migration.stream_format import (
    DIGEST_AT,
    DIGEST_SIZE,
    HEAD_SIZE,
    HEADER_LAYOUT,
    MAGIC,
    RECORD_LAYOUT,
    RECORDS,
    TRAILER_LAYOUT,
    VERSION,
    pack_header,
    pack_record,
)

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
digests = st.binary(min_size=DIGEST_SIZE, max_size=DIGEST_SIZE)
pieces = st.lists(st.binary(min_size=1, max_size=200), max_size=5)
SMALL = b"".join(whole_records([b"some state", b"more"]))


@given(u32)
def test_header_twin(epoch: int) -> None:
    """Proves that the packed header is the declared one."""
    packed = pack_header(epoch)
    parsed = HEADER_LAYOUT.parse(packed)
    assert (MAGIC, VERSION, epoch) == (parsed.magic, parsed.version, parsed.epoch)
    values = Container(version=VERSION, epoch=epoch, digest=parsed.digest)
    assert packed == HEADER_LAYOUT.build(values)


@given(st.sampled_from(sorted(RECORDS)), u32, u32, u64, digests, st.binary(max_size=300))
def test_head_twin(tag: bytes, epoch: int, sequence: int, offset: int, previous: bytes, payload: bytes) -> None:
    """Proves that a packed head is the declared one, and its digest the documented one."""
    packed = pack_record(previous, tag, epoch, sequence, offset, payload)
    values = {"tag": tag, "epoch": epoch, "sequence": sequence, "length": len(payload), "offset": offset}
    digest = xxh3_128_digest(previous + packed[:DIGEST_AT] + payload)
    assert packed == RECORD_LAYOUT.build({**values, "digest": digest})


@given(pieces)
def test_trailer_twin(parts: list[bytes]) -> None:
    """Proves that the trailer's payload is the declared one."""
    payload = whole_records(parts)[-1][HEAD_SIZE:]
    assert payload == TRAILER_LAYOUT.build({"total": len(b"".join(parts))})


@given(pieces, st.data())
def test_any_chunking(parts: list[bytes], data: st.DataObject) -> None:
    """Proves that where a stream is cut means nothing: not where it is taken, not where it is fed."""
    queue = RecordQueue()
    for record in whole_records(parts):
        queue.put((record[:HEAD_SIZE], record[HEAD_SIZE:]))
    sizes = st.integers(1, 90)
    taken = []
    while len(queue):
        taken.append(b"".join(queue.take(data.draw(sizes))))
    assert b"".join(whole_records(parts)) == b"".join(taken)
    assert b"".join(parts) == read_stream(taken)[1]


@pytest.mark.parametrize("size", [1, 33, len(SMALL)])
def test_every_single_bit_flip(size: int) -> None:
    """Proves that there is no bit in a stream that may be another one."""
    for bit in range(8 * len(SMALL)):
        flipped = bytearray(SMALL)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StreamRefused):
            read_stream(portions(bytes(flipped), size))


@given(pieces, st.data())
def test_any_flip_of_any_stream(parts: list[bytes], data: st.DataObject) -> None:
    """Proves the same for random streams, and that a prefix that was let through was the true one."""
    stream = bytearray(b"".join(whole_records(parts)))
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    stream[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StreamRefused):
        read_stream(portions(bytes(stream), data.draw(st.integers(1, 300))))


@given(pieces, st.data())
def test_any_truncation(parts: list[bytes], data: st.DataObject) -> None:
    """Proves that a stream cut anywhere never finishes."""
    stream = b"".join(whole_records(parts))
    cut = data.draw(st.integers(0, len(stream) - 1))
    with pytest.raises(StreamRefused):
        read_stream(portions(stream[:cut], data.draw(st.integers(1, 300))))


@given(pieces, st.data())
def test_any_loss_repetition_or_exchange(parts: list[bytes], data: st.DataObject) -> None:
    """Proves that records come in the order in which they were written, each once."""
    records = whole_records(parts)
    places = st.integers(0, len(records) - 1)
    first, second = data.draw(places), data.draw(places)
    changed = list(records)
    match data.draw(st.sampled_from(["lose", "repeat", "move", "exchange"])):
        case "lose":
            del changed[first]
        case "repeat":
            changed.insert(second, records[first])
        case "move":
            changed.insert(second, changed.pop(first))
        case "exchange":
            changed[first], changed[second] = changed[second], changed[first]
    if changed == records:
        assert b"".join(parts) == read_stream(changed)[1]
        return
    with pytest.raises(StreamRefused):
        read_stream(changed)


@given(pieces, pieces, st.data())
def test_restart_after_any_delivery(old: list[bytes], new: list[bytes], data: st.DataObject) -> None:
    """Proves that whatever part of a epoch was taken, the next one is read whole."""
    writer = StreamWriter()
    queue = RecordQueue()
    queue.put(writer.header())
    queue.put(writer.descriptor(b"old"))
    for piece in old:
        queue.put(writer.data(writer.total, piece))
    taken = [b"".join(queue.take(data.draw(st.integers(0, len(queue)))))]
    queue.drop_untouched()
    queue.put(writer.header())
    queue.put(writer.descriptor(b"new"))
    for piece in new:
        queue.put(writer.data(writer.total, piece))
    queue.put(writer.pci(b"config"))
    queue.put(writer.trailer())
    while len(queue):
        taken.append(b"".join(queue.take(data.draw(st.integers(1, 200)))))
    assert b"".join(new) == read_stream(taken)[1]


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=80), max_size=6), st.integers(0, len(SMALL)))
def test_garbage_raises_nothing_else(chunks: list[bytes], good: int) -> None:
    """Proves that a reader refuses, waits or reads, whatever comes behind a good beginning."""
    reader = StreamReader()
    try:
        for chunk in (SMALL[:good], *chunks):
            reader.feed(chunk)
    except StreamRefused:
        return
    assert reader.consumed == good + sum(map(len, chunks))
