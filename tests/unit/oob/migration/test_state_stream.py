"""The state stream: what is written is read, and everything else is refused with a reason."""

from __future__ import annotations

import errno
import struct

import pytest

from streamkit import portions, read_stream, whole_records
from vfiouser_oob.migration.stream import (
    MAX_DATA,
    VERSION,
    Data,
    DescriptorRecord,
    PciConfig,
    RecordQueue,
    Refusal,
    StreamHeader,
    StreamReader,
    StreamRefused,
    StreamWriter,
    Trailer,
)
from vfiouser_oob.migration.stream_format import DIGEST_AT, HEAD_SIZE, MAGIC, NO_DIGEST, RECORDS, chain, pack_record
from vfiouser_protocol.errors import LocalProtocolError

PIECES = (b"first piece", b"x" * 5000, b"\0")
STATE = b"".join(PIECES)
RECORDS_OF_STREAM = whole_records(PIECES)
STREAM = b"".join(RECORDS_OF_STREAM)


def refusal(chunks: list[bytes]) -> StreamRefused:
    """Proves that a stream is refused; returns how."""
    with pytest.raises(StreamRefused) as info:
        read_stream(chunks)
    return info.value


def test_a_stream_comes_back() -> None:
    """Every record in order, with its contents."""
    records, state = read_stream([STREAM])
    assert STATE == state
    offsets = [0, len(PIECES[0]), len(PIECES[0]) + len(PIECES[1])]
    expected = [
        StreamHeader(1, restart=False),
        DescriptorRecord(b"nvme"),
        *[Data(offset, memoryview(piece)) for offset, piece in zip(offsets, PIECES, strict=True)],
        PciConfig(b"config"),
        Trailer(len(STATE)),
    ]
    assert expected == records


def test_a_state_of_nothing_is_a_stream_too() -> None:
    """A device may have no state but its configuration space."""
    records, state = read_stream([b"".join(whole_records([]))])
    assert b"" == state
    assert Trailer(0) == records[-1]


@pytest.mark.parametrize("size", [1, 7, 39, 40, 41, 4096, 1 << 20])
def test_chunks_of_any_size(size: int) -> None:
    """The sizes in which a stream comes mean nothing."""
    assert read_stream([STREAM])[1] == read_stream(portions(STREAM, size))[1]


def test_data_is_not_copied_when_it_comes_in_one_piece() -> None:
    """A piece that lies wholly in what was fed shares its memory, and is read-only."""
    reader = StreamReader()
    (*_, data) = reader.feed(b"".join(RECORDS_OF_STREAM[:3]))
    assert isinstance(data, Data)
    assert data.data.readonly
    assert isinstance(data.data.obj, bytes)


def test_writer_does_not_copy() -> None:
    """A record holds the very buffer that was given."""
    writer = StreamWriter()
    writer.header()
    writer.descriptor(b"d")
    piece = bytearray(10)
    assert writer.data(0, piece)[1] is piece


def test_the_first_version_is_refused_in_words() -> None:
    """What an older daemon sends, its 32-byte header and first record with their CRC-32, is refused by its version."""
    header = bytes.fromhex("5646554f4f425354010000000100000000000000000000000000000000000000")
    refused = refusal([header, b"desc" + bytes(40)])
    assert Refusal.VERSION is refused.reason
    assert "older version 1, this daemon reads 2" in str(refused)


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (VERSION + 1, "newer"), (1 << 31, "newer")])
def test_other_versions(version: int, word: str) -> None:
    """Refused with both versions named, even if the rest of the header is laid out otherwise."""
    body = struct.pack("<8sII8s", MAGIC, version, 1, b"nonsense")
    refused = refusal([body + b"other things all"])
    assert (Refusal.VERSION, errno.EINVAL) == (refused.reason, refused.errno)
    assert f"{word} version {version}" in str(refused)
    assert f"reads {VERSION}" in str(refused)


def test_reserved_bytes_are_zero() -> None:
    """A header whose checksum is right but which says more than this version knows is refused."""
    body = struct.pack("<8sII8s", MAGIC, VERSION, 1, b"feature!")
    assert Refusal.CORRUPT is refusal([body + chain(NO_DIGEST, body)]).reason


@pytest.mark.parametrize(("epoch", "sequence", "offset"), [(2, 2, 11), (4, 2, 11), (3, 1, 11), (3, 3, 11), (3, 2, 0)])
def test_a_record_out_of_place_is_refused_by_its_head(epoch: int, sequence: int, offset: int) -> None:
    """Of another epoch, number or offset: its payload is not even waited for."""
    records = whole_records(PIECES, epoch=3)[:3]
    reader = StreamReader()
    reader.feed(b"".join(records))
    with pytest.raises(StreamRefused, match="was due") as info:
        reader.feed(pack_record(NO_DIGEST, b"data", epoch, sequence, offset, b"", 10))
    assert Refusal.ORDER is info.value.reason


@pytest.mark.parametrize("stream", [b"QEVM\0\0\0\3", b"\0", b"VFUOOBSX", bytes(100)])
def test_foreign_streams(stream: bytes) -> None:
    """Refused with the first byte that differs, however little came."""
    refused = refusal([stream])
    assert Refusal.FOREIGN is refused.reason
    assert repr(MAGIC) in str(refused)


@pytest.mark.parametrize("length", [*range(200), len(STREAM) - 1])
def test_truncation(length: int) -> None:
    """A stream that ends early never finishes, also where a record ends."""
    refused = refusal([STREAM[:length]])
    assert (Refusal.TRUNCATED, errno.EILSEQ) == (refused.reason, refused.errno)
    assert f"after {length} bytes" in str(refused)


@pytest.mark.parametrize("surplus", [b"\0", MAGIC, RECORDS_OF_STREAM[0], RECORDS_OF_STREAM[-1]])
def test_nothing_follows_the_trailer(surplus: bytes) -> None:
    """Not even one byte, or a new epoch."""
    assert Refusal.ORDER is refusal([STREAM, surplus]).reason
    assert Refusal.ORDER is refusal([STREAM + surplus]).reason


def test_every_record_is_bound_to_the_one_before() -> None:
    """A record with a digest of its own contents alone is refused, whatever it holds."""
    for number, record in enumerate(RECORDS_OF_STREAM[1:], 1):
        head, payload = record[:DIGEST_AT], record[HEAD_SIZE:]
        loose = head + chain(NO_DIGEST, head, payload) + payload
        refused = refusal([*RECORDS_OF_STREAM[:number], loose])
        assert (Refusal.CORRUPT, True) == (refused.reason, "wrong digest" in str(refused))


@pytest.mark.parametrize("total", [0, len(STATE) - 1, 1 << 63])
def test_a_trailer_with_another_total(total: int) -> None:
    """The end has to say how much there was, even if its digest is right."""
    *records, trailer = RECORDS_OF_STREAM
    head, payload = trailer[:DIGEST_AT], struct.pack("<Q", total)
    refused = refusal([*records, head + chain(records[-1][DIGEST_AT:HEAD_SIZE], head, payload) + payload])
    assert (Refusal.CORRUPT, True) == (refused.reason, f"there were {len(STATE)}" in str(refused))


def test_a_refused_stream_stays_refused() -> None:
    """Nothing that comes later changes it."""
    reader = StreamReader()
    with pytest.raises(StreamRefused) as first:
        reader.feed(b"garbage!")
    for attempt in (lambda: reader.feed(STREAM), reader.finish):
        with pytest.raises(StreamRefused) as later:
            attempt()
        assert first.value is later.value


@pytest.mark.parametrize("tag", [*RECORDS, b"????"])
@pytest.mark.parametrize("length", [0, (1 << 32) - 1])
def test_sizes_are_refused_before_anything_is_kept(tag: bytes, length: int) -> None:
    """A head that promises nothing or four gigabytes is refused at once."""
    head = pack_record(NO_DIGEST, tag, 1, 1, 0, b"", length)
    assert refusal([*RECORDS_OF_STREAM[:2], head]).reason in {Refusal.CORRUPT, Refusal.ORDER}


@pytest.mark.parametrize("skipped", [1, 5])
def test_descriptor_and_config_have_to_be_there(skipped: int) -> None:
    """A stream without either is refused, even if its writer numbered it so."""
    writer = StreamWriter()
    writer.header()
    with pytest.raises(LocalProtocolError):
        writer.data(0, b"x")
    with pytest.raises(LocalProtocolError):
        writer.trailer()
    tag = {1: b"data", 5: b"end "}[skipped]
    length = {1: 1, 5: 8}[skipped]
    records = RECORDS_OF_STREAM[:skipped]
    offset = sum(map(len, PIECES)) if skipped == 5 else 0
    refused = refusal([*records, pack_record(NO_DIGEST, tag, 1, skipped - 1, offset, b"", length)])
    assert Refusal.ORDER is refused.reason
    assert "came after" in str(refused)


def test_restart() -> None:
    """A new header at a record's boundary voids what came; the second epoch is complete by itself."""
    writer = StreamWriter(5)
    records = [writer.header(), writer.descriptor(b"old"), writer.data(0, b"old state"), writer.pci(b"old")]
    records += [writer.header(), writer.descriptor(b"new"), writer.data(0, b"new state"), writer.pci(b"new")]
    records += [writer.trailer()]
    read, state = read_stream([b"".join(record) for record in records])
    assert [StreamHeader(5, restart=False), StreamHeader(6, restart=True)] == [
        item for item in read if isinstance(item, StreamHeader)
    ]
    assert (6, b"new state") == (writer.epoch, state)
    assert writer.complete


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_restart_wherever_a_record_may_come(at: int) -> None:
    """Generation 2 may begin anywhere before the trailer of epoch 1."""
    records = RECORDS_OF_STREAM[:at] + whole_records([b"again"], epoch=2)
    assert b"again" == read_stream(records)[1]


@pytest.mark.parametrize("epoch", [0, 1])
def test_restart_has_to_count_up(epoch: int) -> None:
    """The header of the same or an earlier epoch is no restart."""
    refused = refusal(RECORDS_OF_STREAM[:3] + whole_records([], epoch=epoch))
    assert Refusal.ORDER is refused.reason


def test_restart_inside_a_record_is_refused() -> None:
    """The rest of a record has to be delivered first."""
    broken = [*RECORDS_OF_STREAM[:2], RECORDS_OF_STREAM[3][:100], *whole_records([b"again"], epoch=2)]
    assert refusal(broken).reason in {Refusal.CORRUPT, Refusal.ORDER}


@pytest.mark.parametrize("number", range(1, len(RECORDS_OF_STREAM)))
def test_records_of_another_stream(number: int) -> None:
    """A record of the same place and size in another good stream is found out, whatever is in it."""
    other = whole_records([b"F" + PIECES[0][1:], b"y" * 5000, b"\1"], b"nvmf", b"Config")
    mixed = [*RECORDS_OF_STREAM]
    mixed[number] = other[number]
    refusal(mixed)


def test_writer_misuse() -> None:
    """Gaps, sizes and calls after the end are errors of ours; the stream can go on behind them."""
    writer = StreamWriter()
    writer.header()
    with pytest.raises(LocalProtocolError):
        writer.descriptor(b"")
    writer.descriptor(b"d")
    for offset, piece in ((1, b"x"), (0, b""), (0, bytes(MAX_DATA + 1))):
        with pytest.raises(LocalProtocolError):
            writer.data(offset, piece)
    with pytest.raises(LocalProtocolError):
        writer.descriptor(b"again")
    writer.pci(b"p")
    writer.trailer()
    for call in (writer.header, lambda: writer.data(0, b"x"), writer.trailer):
        with pytest.raises(LocalProtocolError):
            call()


def test_queue_gives_any_portion() -> None:
    """Records come out in the client's sizes, and nothing is lost."""
    queue = RecordQueue()
    for record in RECORDS_OF_STREAM:
        queue.put((record[:HEAD_SIZE], record[HEAD_SIZE:]))
    assert len(STREAM) == len(queue)
    taken = b""
    for limit in (0, 1, 50, 3, 4096, 1 << 20):
        portion = b"".join(queue.take(limit))
        assert min(limit, len(STREAM) - len(taken)) == len(portion)
        taken += portion
    assert STREAM == taken
    assert 0 == len(queue)
    assert [] == queue.take(10)


@pytest.mark.parametrize(("taken", "kept"), [(0, 0), (40, 0), (41, 43), (84, 0), (86, 49)])
def test_queue_forgets_what_was_not_begun(taken: int, kept: int) -> None:
    """Before a new epoch, a record that is half delivered is finished and all others are dropped."""
    queue = RecordQueue()
    for record in RECORDS_OF_STREAM[:4]:
        queue.put((record[:HEAD_SIZE], record[HEAD_SIZE:]))
    assert [40, 44, 51] == [len(record) for record in RECORDS_OF_STREAM[:3]]
    total = len(queue)
    head = b"".join(queue.take(taken))
    assert total - taken - kept == queue.drop_untouched()
    assert kept == len(queue)
    rest = b"".join(queue.take(1 << 20))
    again = whole_records([b"again"], epoch=2)
    if taken:
        assert b"again" == read_stream([head, rest, *again])[1]
