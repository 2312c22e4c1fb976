"""The targets: each takes bytes as a peer would send them, and raises if they did anything but what is documented."""

from __future__ import annotations

import atexit
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from typing import Any

import msgpack
import trio

from fuzzkit.edits import edit
from nvmebed import machine, make_function
from vfiouser_agents.adapters.legacy_tcp import LegacyFunction
from vfiouser_agents.adapters.vfio_v1 import v1_caps
from vfiouser_agents.errors import AgentError, Incompatible, ProtocolError
from vfiouser_agents.rpc.json_codec import JsonCodec
from vfiouser_agents.rpc.legacy_messages import HEADERS
from vfiouser_agents.rpc.messages import Codec, Request, Response
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.values import Descriptor
from vfiouser_oob.migration.descriptor import decode_descriptor
from vfiouser_oob.migration.stream import Data, StreamHeader, StreamReader, StreamRefused
from vfiouser_oob.migration.stream_format import DATA, DIGEST_AT, RECORDS, pack_header, pack_record
from vfiouser_protocol.capabilities import (
    VersionCapabilities,
    accept_reply,
    encode_version,
    negotiate,
    parse_version_reply,
    parse_version_request,
)
from vfiouser_protocol.codec import decode, describe, encode
from vfiouser_protocol.commands import COMMANDS
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError, StreamError, VfioUserError
from vfiouser_protocol.framing import Framer, Message
from vfiouser_protocol.messages import FeatureLoggingStart
from vfiouser_protocol.migration_v2 import FeatureAction, interpret_feature
from vfiouser_protocol.regions import parse_region_info
from vfiouser_protocol.session import CommandReceived, ConnectionEnd, ConnectionPhase, ProtocolSession
from vfiouser_soc.nvme import snapshot as nvme
from vfiouser_soc.nvme.function import NvmeFunction
from vfiouser_soc.nvme.snapshot_reader import BadSnapshot, parse
from vfiouser_soc.nvme.stores import MemoryStore

TARGETS: dict[str, Callable[[bytes], None]] = {}
MAX_MESSAGE = 1 << 20
#: The same limits as in a test of megabytes, reached by inputs of kilobytes.
SMALL_MESSAGE = 4096


def target(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """Make a function a target, by its name."""
    TARGETS[run.__name__] = run
    return run


def _pieces(data: bytes) -> Iterator[bytes]:
    """The input as a stream delivers it: whole, byte by byte, or in pieces, as its first byte says."""
    if not data:
        return
    size = {0: len(data), 1: 1}.get(data[0] & 7, 1 + (data[0] >> 3))
    for start in range(1, len(data), max(1, size)):
        yield data[start : start + size]


def _messages(data: bytes, framer: Framer) -> Iterator[Message]:
    """Feed a framer as the transport does, a descriptor with the first byte of every third piece."""
    number = 0
    for piece in _pieces(data):
        while piece:
            wanted = framer.bytes_wanted
            number += 1
            fds = [number] if number % 3 == 0 and not framer.in_body else []
            message = framer.feed(piece[:wanted], fds)
            piece = piece[wanted:]
            if message is not None:
                yield message


@target
def framing(data: bytes) -> None:
    """A stream becomes messages, in whatever pieces it comes; each descriptor is handed out once."""
    framer = Framer(MAX_MESSAGE)
    taken: list[int] = []
    total = 0
    try:
        for message in _messages(data, framer):
            total += message.header[2]
            taken += message.fds
            assert message.header[2] == 16 + len(message.payload)
            assert describe(message.header, bytes(message.payload), len(message.fds), "<")
    except StreamError as error:
        assert framer.bytes_wanted == 0
        assert error.reply is None or len(error.reply) == 16
    assert total <= len(data)
    assert len({*taken, *framer.pending_fds}) == len(taken) + len(framer.pending_fds)


@target
def session(data: bytes) -> None:
    """No message raises; every descriptor comes back, and every command is answered at most once."""
    role = ConnectionEnd.SERVER if not data or data[0] & 1 else ConnectionEnd.CLIENT
    ours = ProtocolSession(role)
    if role is ConnectionEnd.CLIENT:
        ours.propose(VersionCapabilities())
    try:
        for message in _messages(data[1:], ours.new_framer()):
            event = ours.receive(message)
            surplus = getattr(event, "surplus_fds", ())
            assert sorted(message.fds) == sorted([*event.fds, *surplus])
            if isinstance(event, CommandReceived):
                _answer(ours, event)
            elif role is ConnectionEnd.CLIENT and ours.phase is ConnectionPhase.READY and len(ours.outstanding) < 4:
                ours.command(9, struct.pack("<QII", 0, 7, 4), "token")
    except StreamError:
        pass


def _answer(ours: ProtocolSession, event: CommandReceived) -> None:
    if event.header.command == 1:
        reply = ours.accept(event.header, VersionCapabilities())
        assert reply
        return
    try:
        request = decode(event.spec.request, bytes(event.payload))
    except CommandError as error:
        assert 0 < error.errno < 4096
        reply = ours.error_reply(event.header, error.errno)
    else:
        assert isinstance(request, event.spec.request)
        reply = ours.reply(event.header, b"")
    assert bool(reply) != event.header.no_reply


@target
def capabilities(data: bytes) -> None:
    """The JSON of VERSION, either way: what is accepted can be negotiated, and the result goes round."""
    ours = VersionCapabilities(write_multiple=True)
    try:
        request = parse_version_request(data)
    except StreamError:
        pass
    else:
        agreed = negotiate(request, ours, request_payload_size=len(data))
        assert parse_version_reply(agreed.reply_payload)
    try:
        parse_version_reply(data)
        accept_reply(_PROPOSAL, data, 0)
    except StreamError:
        pass


_PROPOSAL = parse_version_request(encode_version(VersionCapabilities(write_multiple=True)))


@target
def chains(data: bytes) -> None:
    """Capability chains of regions: what an upstream says is bounded, and what was believed can be passed on."""
    try:
        found = parse_region_info(data)
    except VfioUserError:
        return
    assert found.size <= 1 << 64
    assert all(area.offset + area.size <= found.size for area in found.mappable_areas)
    assert len(found.mappable_areas) <= len(data)


@target
def features(data: bytes) -> None:
    """DEVICE_FEATURE: calls that are accepted are carried out on a log, within its bounds."""
    try:
        call = interpret_feature(data)
    except VfioUserError as error:
        assert 0 < error.errno < 4096
        return
    assert len(call.echo()) <= len(data) + 64
    if call.action is FeatureAction.START_LOGGING:
        log = DmaLogging()
        start = call.data
        assert isinstance(start, FeatureLoggingStart)
        try:
            log.start(start.page_size, start.ranges)
        except VfioUserError:
            return
        for each in log.ranges[:4]:
            log.mark(each.iova, min(each.length, 1 << 30))
            log.report(each.iova, min(each.length, 1 << 20) & ~(log.page_size - 1) or log.page_size, log.page_size)


#: Payloads of requests and replies, in an order that a corpus can rely on.
CLASSES = sorted(
    {cls for spec in COMMANDS.values() for cls in (spec.request, spec.reply)}, key=lambda cls: cls.__name__
)


@target
def payloads(data: bytes) -> None:
    """Every payload of the protocol: what decodes encodes to something that decodes to the same."""
    if not data:
        return
    cls = CLASSES[data[0] % len(CLASSES)]
    try:
        message = decode(cls, data[1:])
    except CommandError:
        return
    assert decode(cls, encode(message)) == message


@target
def stream(data: bytes) -> None:
    """A state stream as bytes: everything but a whole one is refused, and nothing else happens."""
    _read(_pieces(data))


@target
def stream_records(data: bytes) -> None:
    """A state stream whose digests are right: what is out of order, out of place or too large is refused."""
    _read(_records(data))


def _records(data: bytes) -> Iterator[bytes]:
    """Records as the input says, three bytes for each head, with its digest."""
    sequence = offset = 0
    epoch = 1
    tags = [*RECORDS, b"XXXX"]
    head = pack_header(epoch)
    yield head
    position = 0
    while position + 3 <= len(data):
        kind, length, twist = data[position : position + 3]
        payload = data[position + 3 : position + 3 + length]
        position += 3 + length
        if kind == 0xFF:
            epoch += twist & 3
            sequence = offset = 0
            head = pack_header(epoch)
            yield head
            continue
        at = offset + (twist >> 6)
        claimed = len(payload) if not twist & 32 else len(payload) * 1_000_003
        tag, number = tags[kind % len(tags)], sequence + (twist & 1)
        head = pack_record(head[DIGEST_AT:], tag, epoch, number, at, payload, claimed)
        yield head
        yield payload
        sequence += 1
        if tag == DATA:
            offset += len(payload)


def _read(chunks: Iterator[bytes]) -> None:
    reader = StreamReader()
    state = bytearray()
    fed = 0
    try:
        for chunk in chunks:
            fed += len(chunk)
            for record in reader.feed(chunk):
                if isinstance(record, StreamHeader):
                    state.clear()
                elif isinstance(record, Data):
                    assert record.offset == len(state)
                    state += record.data
        reader.finish()
        assert reader.complete
    except StreamRefused as refused:
        assert str(refused)
    assert len(state) <= fed


@target
def descriptor(data: bytes) -> None:
    """The descriptor of a stream: refused, or within its bounds."""
    try:
        found = decode_descriptor(data)
    except (StreamRefused, Incompatible):
        return
    assert isinstance(found, Descriptor)


@cache
def _reader() -> NvmeFunction:
    """The function that snapshots are read for; it lives as long as the process."""
    store = MemoryStore(1 << 20)
    atexit.register(store.close)
    return make_function(store)


@target
def snapshot(data: bytes) -> None:
    """An NVMe snapshot as bytes: refused, or taken, carried on and taken again, and its function lives."""
    try:
        found = parse(data, _reader())
    except BadSnapshot:
        return
    trio.run(_go_on, found)


@target
def snapshot_values(data: bytes) -> None:
    """The same with a snapshot of a function at work, in which the input replaces single values."""
    raw = msgpack.unpackb(_base())
    edit(raw, data)
    snapshot(msgpack.packb(raw))


@cache
def _base() -> bytes:
    return trio.run(_at_work)


async def _at_work() -> bytes:
    """A snapshot of a function with queues, events that are waited for, and commands on their way."""
    with closing(MemoryStore(1 << 20)) as store:
        return await _captured(store)


async def _captured(store: MemoryStore) -> bytes:
    async with machine(make_function(store)) as bed:
        await bed.driver.write_blocks(0, b"x" * 512)
        bed.driver.submit(bed.driver.queues[0], 0x0C)
        bed.driver.ring(bed.driver.queues[0])
        prp1, prp2, _ = bed.driver.prps(512)
        bed.driver.submit(bed.io, 0x02, nsid=1, prp1=prp1, prp2=prp2)
        bed.driver.ring(bed.io)
        await bed.function.controller.suspender.suspend(0.0)
        return nvme.pack(nvme.capture(bed.function))


async def _go_on(found: nvme.Snapshot) -> None:
    """Let a function go on from a snapshot, and its guest touch every register that may matter."""
    with closing(MemoryStore(1 << 20)) as store:
        await _live_on(found, make_function(store))


async def _live_on(found: nvme.Snapshot, function: NvmeFunction) -> None:
    async with machine(function, io_queue=False):
        suspender = function.controller.suspender
        await suspender.suspend(0.0)
        nvme.apply(found, function)
        parse(nvme.pack(nvme.capture(function)), function)
        suspender.unsuspend()
        for offset in (*range(0x1000, 0x1024, 4), 0x14):
            function.region_write(0, offset, (3).to_bytes(4, "little"))
            await trio.lowlevel.checkpoint()
        for _ in range(20):
            await trio.lowlevel.checkpoint()


def _codec(codec: Codec, data: bytes) -> None:
    total = 0
    try:
        for piece in _pieces(data):
            for message in codec.feed(piece):
                total += 1
                if isinstance(message, Request):
                    assert message.id >= 0
                elif isinstance(message, Response):
                    assert message.error is None or isinstance(message.error, AgentError)
    except ProtocolError as error:
        assert str(error)
    assert total <= len(data)


@target
def msgpack_rpc(data: bytes) -> None:
    """The reference protocol: messages, or the end of the connection."""
    _codec(MsgpackCodec(SMALL_MESSAGE), data)


@target
def jsonrpc(data: bytes) -> None:
    """JSON-RPC: messages, or the end of the connection."""
    _codec(JsonCodec(SMALL_MESSAGE), data)


class _Script(trio.abc.Stream):
    """A server that says the input, whatever it is asked."""

    def __init__(self, data: bytes) -> None:
        self._chunks = _pieces(data)

    async def send_all(self, data: Any) -> None:
        """Take anything."""

    async def wait_send_all_might_not_block(self) -> None:
        """At once."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next piece."""
        return next(self._chunks, b"")

    async def aclose(self) -> None:
        """Nothing to do."""


class _Address:
    """What the adapter's function asks of its agent."""

    byte_order = "little"
    call_timeout_s = 5.0
    address = "tcp://127.0.0.1:1"

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def stream(self) -> trio.abc.Stream:
        """A server."""
        return _Script(self.data)


_CAPS = v1_caps(1 << 20, 1 << 16, "legacy-tcp")
_LEGACY = Descriptor("legacy-tcp", 1, "v", "m", "k", "f", 64)


@target
def legacy_tcp(data: bytes) -> None:
    """The 2022 protocol: answers of their exact size, or an error."""
    assert HEADERS

    async def talk() -> None:
        function = LegacyFunction(_Address(data), _CAPS, _LEGACY)  # type: ignore[arg-type]
        for ask in (function.get_state, function.pending, lambda: function.save_bytes(64)):
            try:
                answer = await ask()
            except AgentError:
                continue
            assert not isinstance(answer, bytes) or len(answer) == 64

    trio.run(talk)
