"""Streams that must not be loaded: each is refused, says why, and leaves the function as it was."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from migrationkit import RESUMING, RUNNING, V1_ERROR, V1_RESUMING, V1_RUNNING, Side, bed, stream_of
from rawclient import RESET
from vfiouser_agents.faults import wrong_descriptor
from vfiouser_oob.migration.stream import Data, DescriptorRecord, PciConfig, StreamReader, StreamWriter, Trailer
from vfiouser_oob.migration.stream_format import (
    HEAD_SIZE,
    HEADER,
    MAGIC,
    NO_DIGEST,
    NO_PADDING,
    RECORD_LAYOUT,
    VERSION,
    chain,
)

SMALL = 8 << 10


def records_of(stream: bytes) -> list[bytes]:
    """A whole stream, cut into its header and its records."""
    records, at = [stream[:HEAD_SIZE]], HEAD_SIZE
    while at < len(stream):
        end = at + HEAD_SIZE + RECORD_LAYOUT.parse(stream[at : at + HEAD_SIZE]).length
        records.append(stream[at:end])
        at = end
    assert at == len(stream)
    return records


def rewritten(stream: bytes, config: bytes) -> bytes:
    """The same state with another `pci` record, as a daemon of another make would have written it."""
    writer = StreamWriter()
    parts: list[Sequence[bytes | bytearray | memoryview]] = [writer.header()]
    for record in StreamReader().feed(stream):
        if isinstance(record, DescriptorRecord):
            parts.append(writer.descriptor(record.payload))
        elif isinstance(record, Data):
            parts.append(writer.data(record.offset, record.data))
        elif isinstance(record, PciConfig):
            parts.append(writer.pci(config))
        elif isinstance(record, Trailer):
            parts.append(writer.trailer())
    return b"".join(piece for part in parts for piece in part)


async def refuse(side: Side, stream: bytes, chunk: int = 30_000) -> tuple[int, str]:
    """Load something bad: it fails at some write or at the end, nothing is applied, and only a reset ends this.

    Returns:
        The first error number, and what is said about it.
    """
    before = side.device.digest()
    side.device.calls.clear()
    async with side.vmm() as dst:
        await dst.set_state(RESUMING)
        error = 0
        for start in range(0, len(stream), chunk):
            error = error or await dst.data_write_errno(stream[start : start + chunk])
        late = await dst.set_state_errno(RUNNING)
        assert late
        why = side.runner.tracer.last_failure or ""
        assert RESUMING == await dst.state()
        stands_still = not side.runs
        assert stands_still
        assert before == side.device.digest()
        assert "load_commit" not in side.device.calls
        await dst.succeed(RESET)
        assert side.runs
    return error or late, why


async def test_truncated_streams(tmp_path: Path) -> None:
    """A stream without its end is refused wherever it ends: at every record, in its head and in its payload."""
    async with bed(tmp_path, state_size=SMALL) as both:
        stream = await stream_of(both.source)
        ends = [0]
        for record in records_of(stream):
            ends.append(ends[-1] + len(record))
        assert len(stream) == ends.pop()
        lengths = {end + more for end in ends for more in (0, 1, HEAD_SIZE - 1, HEAD_SIZE, HEAD_SIZE + 1)}
        for length in sorted(lengths | {len(stream) // 2, len(stream) - 1}):
            if 0 < length < len(stream):
                error, why = await refuse(both.destination, stream[:length])
                assert (errno.EILSEQ, True) == (error, f"after {length} bytes" in why), (length, why)


async def test_flipped_bits(tmp_path: Path) -> None:
    """A stream with a bit wrong in any of its bytes is refused; the stream's own tests take every single bit."""
    rng = random.Random(1)
    async with bed(tmp_path, state_size=SMALL) as both:
        stream = await stream_of(both.source)
        heads: list[int] = []
        at = 0
        for record in records_of(stream):
            heads += range(at, at + HEAD_SIZE, 4)
            at += len(record)
        for place in sorted({*heads, len(stream) - 1, *(rng.randrange(len(stream)) for _ in range(40))}):
            bad = bytearray(stream)
            bad[place] ^= 1 << rng.randrange(8)
            assert (await refuse(both.destination, bytes(bad)))[0] in (errno.EINVAL, errno.EILSEQ)


async def test_reordered_streams(tmp_path: Path) -> None:
    """A record that is missing, repeated, or in another's place is found by its number, before its data is used."""
    async with bed(tmp_path, state_size=200 << 10) as both:
        records = records_of(await stream_of(both.source))
        assert len(records) > 6
        for index in range(1, len(records)):
            swapped = [*records]
            swapped[index - 1], swapped[index] = swapped[index], swapped[index - 1]
            for wrong in (records[:index] + records[index + 1 :], records[:index] + records[index - 1 :], swapped):
                error, _ = await refuse(both.destination, b"".join(wrong))
                assert error in (errno.EILSEQ, errno.EINVAL), index


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (VERSION + 1, "newer")])
async def test_other_versions(tmp_path: Path, version: int, word: str) -> None:
    """A stream of an older or newer version is refused by its header, with both versions named."""
    async with bed(tmp_path, state_size=SMALL) as both:
        stream = await stream_of(both.source)
        body = HEADER.pack(MAGIC, version, 1, NO_PADDING)
        error, why = await refuse(both.destination, body + chain(NO_DIGEST, body) + stream[HEAD_SIZE:])
        assert errno.EINVAL == error
        assert f"{word} version {version}" in why
        assert f"reads {VERSION}" in why
        assert "load" not in both.destination.device.calls


async def test_nobodys_streams(tmp_path: Path) -> None:
    """What is no stream is refused, and so is a stream with something behind its end."""
    async with bed(tmp_path, state_size=SMALL) as both:
        error, why = await refuse(both.destination, b"QEVM" + bytes(1000))
        assert (errno.EINVAL, True) == (error, repr(MAGIC) in why)
        stream = await stream_of(both.source)
        error, why = await refuse(both.destination, stream + b"x")
        assert (errno.EILSEQ, True) == (error, "trailer" in why)


@pytest.mark.parametrize(
    ("field", "theirs", "ours"),
    [
        ("kind", "virtio-net", "test"),
        ("vendor", "acme", "vfiouser-oob"),
        ("format_id", "acme-state", "memory-agent"),
        ("format_version", 7, 1),
        ("model", "acme 9000", "memory"),
        ("firmware", "9.9", "1.0"),
        ("fingerprint", {"queues": "63"}, "8"),
    ],
)
async def test_foreign_functions(tmp_path: Path, field: str, theirs: object, ours: object) -> None:
    """Another function's state is refused before any of it is loaded, by a reason that names both sides."""
    async with bed(tmp_path, state_size=SMALL) as both:
        both.agent.inject("describe", wrong_descriptor(**{field: theirs}), function_id="src")
        foreign = await stream_of(both.source)
        error, why = await refuse(both.destination, foreign)
        assert errno.EINVAL == error
        assert "load" not in both.destination.device.calls
        told = theirs["queues"] if isinstance(theirs, dict) else theirs
        assert str(told) in why
        assert str(ours) in why.replace(str(told), "")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b"\1", "1 bytes"),
        (b"\7\0\0\0", "version 7"),
        (b"\1\0\1\0", "cut off"),
        (b"\1\0\1\0" + struct.pack("<HH", 4094, 4) + b"abcd", "leaves it"),
        (b"\1\0\1\0" + struct.pack("<HH", 16, 4) + b"ab", "leaves it"),
    ],
)
async def test_config_space_that_makes_no_sense(tmp_path: Path, config: bytes, says: str) -> None:
    """A `pci` record that cannot be read is found before the agent applies anything."""
    async with bed(tmp_path, state_size=SMALL) as both:
        stream = await stream_of(both.source)
        assert both.source.device.digest() != both.destination.device.digest()
        error, why = await refuse(both.destination, rewritten(stream, config))
        assert (errno.EILSEQ, True) == (error, says in why), why


async def test_refused_in_v1(tmp_path: Path) -> None:
    """The region refuses by the write of data_size; device_state stays resuming, never the error value."""
    async with bed(tmp_path, state_size=SMALL) as both:
        stream = bytearray(await stream_of(both.source))
        stream[len(stream) // 2] ^= 1
        before = both.destination.device.digest()
        async with both.destination.vmm() as dst:
            await dst.v1_set(V1_RESUMING)
            assert errno.EILSEQ == await dst.v1_write(bytes(stream))
            assert await dst.v1_set_errno(V1_RUNNING)
            assert V1_ERROR != await dst.v1_state() == V1_RESUMING
            assert not both.destination.runs
            assert before == both.destination.device.digest()
            await dst.succeed(RESET)
            assert V1_RUNNING == await dst.v1_state()
            assert both.destination.runs


async def test_the_downtime_has_each_call_once(tmp_path: Path) -> None:
    """Between the stop of the source and the start of the destination, agents are asked nothing twice, or too late."""
    async with bed(tmp_path, state_size=SMALL) as both:
        async with both.destination.vmm() as dst:
            await dst.set_state(RESUMING)
            for side in (both.source, both.destination):
                side.device.calls.clear()
            stream = await stream_of(both.source)
            saving = both.source.device.calls
            assert [1] * 5 == [saving.count(name) for name in ("begin", "quiesce", "stop", "describe", "estimate")]
            for start in range(0, len(stream), 30_000):
                await dst.data_write(stream[start : start + 30_000])
            await dst.set_state(RUNNING)
        loading = [name for name in both.destination.device.calls if name != "load"]
        assert ["check", "load_commit", "resume", "end"] == loading
