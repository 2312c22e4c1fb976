"""Migration by DEVICE_FEATURE: the stream."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.cases.migrate import AREA as AREA
from vfiouser_conformance.link import RawLink
from vfiouser_conformance.migration import (
    PRE_COPY,
    RESUMING,
    RUNNING,
    STOP,
    STOP_COPY,
    back,
    begin,
    go,
    pre_copy,
    read_chunk,
    read_stream,
    save,
    try_state,
    write_chunk,
    write_stream,
)
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

MUST, SHOULD, COMPAT = Level.MUST, Level.SHOULD, Level.COMPAT
READ, WRITE = int(Command.MIG_DATA_READ), int(Command.MIG_DATA_WRITE)
_MORE = 1 << 16


@AREA.case(30, MUST, "R268")
def read_needs_saving(t: Trial) -> None:
    """The stream is read in saving states only.

    Sends: MIG_DATA_READ in RUNNING, STOP and RESUMING.
    Expects: errors.
    """
    link = begin(t)
    for state in (RUNNING, STOP, RESUMING):
        go(link, state)
        link.refused(READ, wire.mig_data(64))


@AREA.case(31, MUST, "R269 R271")
def read_goes_on(t: Trial) -> None:
    """Each read goes on where the last one ended, whatever the sizes.

    Sends: the stream read in pieces of 1, 4, 7 and 64 bytes, then in large ones; and in large ones only.
    Expects: as many bytes both times, no short read before the end.
    """
    link = begin(t)
    go(link, STOP_COPY)
    pieces = read_stream(link, t.facts.transfer, [1, 4, 7, 64])
    same(b"", read_chunk(link, _MORE), "bytes behind the end of the stream")
    go(link, STOP, STOP_COPY)
    whole = read_stream(link, t.facts.transfer)
    same(len(whole), len(pieces), "bytes of the stream in large pieces, and in small ones")


@AREA.case(32, MUST, "R270")
def end_of_stream(t: Trial) -> None:
    """The stream ends with a short read, and stays at its end.

    Sends: the stream to its end, and three reads more, of 1, 64 and 65536 bytes.
    Expects: no more bytes.
    """
    link = begin(t)
    go(link, STOP_COPY)
    if not read_stream(link, t.facts.transfer):
        raise NotApplicable("the device has an empty stream")
    for size in (1, 64, _MORE):
        same(0, len(read_chunk(link, size)), "bytes behind the end of the stream")


@AREA.case(33, SHOULD, "R272")
def client_limit(t: Trial) -> None:
    """A read is not larger than the client's max_data_xfer_size.

    Sends: VERSION with max_data_xfer_size 4096; MIG_DATA_READ of 4097 bytes in STOP_COPY, and of 4096.
    Expects: an error or at most 4096 bytes; then success.
    """
    t.facts.migratable()
    link = begin(t, t.attach_with({"max_msg_fds": 8, "max_data_xfer_size": 4096, "migration": {"pgsize": 4096}}))
    go(link, STOP_COPY)
    reply = link.call(READ, wire.mig_data(4097))
    check(reply.failed or len(reply.payload) <= 8 + 4096, f"{len(reply.payload) - 8} bytes came, the client takes 4096")
    t.saw("MIG_DATA_READ above the client's limit", "refused" if reply.failed else "cut", recommended=reply.failed)
    link.ok(READ, wire.mig_data(4096))


@AREA.case(34, SHOULD, "R274")
def short_read(t: Trial) -> None:
    """A short read has a short reply.

    Sends: MIG_DATA_READ at the end of the stream.
    Expects: as many bytes as size says. libvfio-user fills up to what was asked for, which is reported.
    """
    link = begin(t)
    go(link, STOP_COPY)
    read_stream(link, t.facts.transfer)
    reply = link.ok(READ, wire.mig_data(256))
    extra = len(reply.payload) - 8
    check(extra in (0, 256), f"{extra} bytes follow a size of {struct.unpack_from('<I', reply.payload, 4)[0]}")
    t.saw("short MIG_DATA_READ replies", "filled up" if extra else "short", recommended=not extra)


@AREA.case(35, SHOULD, "R275")
def read_nothing(t: Trial) -> None:
    """A read of no bytes is no error.

    Sends: MIG_DATA_READ of size 0 in STOP_COPY.
    Expects: success with size 0; the stream is not at its end.
    """
    link = begin(t)
    go(link, STOP_COPY)
    same(b"", read_chunk(link, 0), "data")
    rest = read_stream(link, t.facts.transfer)
    go(link, STOP, STOP_COPY)
    same(len(read_stream(link, t.facts.transfer)), len(rest), "bytes of the stream after a read of nothing")


@AREA.case(36, MUST, "R278")
def write_needs_resuming(t: Trial) -> None:
    """The stream is written in RESUMING only.

    Sends: MIG_DATA_WRITE in RUNNING, STOP, STOP_COPY, and PRE_COPY if there is one.
    Expects: errors.
    """
    link = begin(t)
    for state in (RUNNING, STOP, STOP_COPY, *([PRE_COPY] if t.facts.pre_copy else [])):
        back(link)
        go(link, state)
        link.refused(WRITE, wire.mig_data(4, b"\0" * 4))


def state_of(t: Trial, link: RawLink) -> bytes:
    """What identifies the device's state, as far as it can be told."""
    if t.target.stimulus is not None and t.target.stimulus.name == "test":
        return t.target.stimulus.state(link)
    if t.facts.scratch is not None:
        offset, width = t.facts.scratch
        return t.read_config(link, offset, width)
    return b""


def change_state(t: Trial, link: RawLink, seed: int) -> None:
    """Give the device a state that differs from others, as far as that can be done."""
    if t.target.stimulus is not None and t.target.stimulus.name == "test":
        t.target.stimulus.change_state(link, seed)
    if t.facts.scratch is not None:
        offset, width = t.facts.scratch
        t.write(link, 7, offset, bytes([seed]) * width)


@AREA.case(37, MUST, "R277 R286")
def save_and_load(t: Trial) -> None:
    """A device that loads its own stream is what it was when it was saved.

    Sends: a change of state, a save, another change, then RESUMING, the stream, and RUNNING.
    Expects: the state of the time of the save.
    """
    link = begin(t)
    change_state(t, link, 0x21)
    before = state_of(t, link)
    data = save(t, link)
    back(link)
    change_state(t, link, 0x42)
    go(link, RESUMING)
    write_stream(link, data, t.facts.transfer)
    go(link, RUNNING)
    same(before.hex(), state_of(t, link).hex(), "state of the device after it was loaded")


@AREA.case(38, MUST, "R281")
def cut_anywhere(t: Trial) -> None:
    """The stream may be cut anywhere.

    Sends: a stream read in large pieces, written in pieces of 1, 2, 3 … bytes.
    Expects: success, and the state of the time of the save.
    """
    link = begin(t)
    change_state(t, link, 0x33)
    before = state_of(t, link)
    data = save(t, link)
    back(link)
    change_state(t, link, 0x44)
    go(link, RESUMING)
    at = 0
    for size in range(1, 40):
        write_chunk(link, data[at : at + size])
        at += size
    if at < len(data):
        write_stream(link, data[at:], t.facts.transfer)
    go(link, STOP, RUNNING)
    same(before.hex(), state_of(t, link).hex(), "state of the device after it was loaded")


@AREA.case(39, MUST, "R282")
def half_a_stream(t: Trial) -> None:
    """A device that got half a stream does not start with it.

    Sends: the first half of a stream in RESUMING, then SET STOP; DEVICE_RESET.
    Expects: the SET fails; after a reset, or a SET, the device runs.
    """
    link = begin(t)
    data = save(t, link)
    if len(data) < 2:
        raise NotApplicable("the stream is too short to be cut")
    go(link, RESUMING)
    write_stream(link, data[: len(data) // 2], t.facts.transfer)
    check(try_state(link, STOP).failed, "SET STOP succeeded after half a stream")
    back(link)


@AREA.case(40, MUST, "R286 R281")
def to_another_device(t: Trial) -> None:
    """A device saved here goes on there.

    Sends: a save on the server, a load on the second server (--destination-socket).
    Expects: the second device has the state of the first.
    """
    t.facts.migratable()
    path = t.destination()
    link = begin(t)
    change_state(t, link, 0x55)
    before = state_of(t, link)
    data = save(t, link)
    other = t.attach(path=path)
    t.at_end(lambda: back(other))
    go(other, RESUMING)
    write_stream(other, data, t.facts.transfer)
    go(other, RUNNING)
    same(before.hex(), state_of(t, other).hex(), "state of the second device")


@AREA.case(41, MUST, "R287")
def second_save(t: Trial) -> None:
    """A second save begins at the beginning.

    Sends: STOP_COPY, a part of the stream, STOP, STOP_COPY, the whole stream; then a load of it.
    Expects: a stream that begins anew and can be loaded.
    """
    link = begin(t)
    go(link, STOP_COPY)
    part = read_chunk(link, 16)
    go(link, STOP, STOP_COPY)
    data = read_stream(link, t.facts.transfer)
    check(len(data) >= len(part), f"the second save has {len(data)} bytes, the begin of the first had {len(part)}")
    go(link, STOP, RESUMING)
    write_stream(link, data, t.facts.transfer)
    go(link, STOP, RUNNING)


@AREA.case(42, MUST, "R285 R286")
def with_pre_copy(t: Trial) -> None:
    """A save that begins while the device runs is whole.

    Sends: PRE_COPY, reads until a short one, a change of state, STOP_COPY, the rest; then a load of it all.
    Expects: the state of the end of the save.
    """
    pre_copy(t)
    link = begin(t)
    change_state(t, link, 0x66)
    go(link, PRE_COPY)
    data = read_stream(link, t.facts.transfer)
    change_state(t, link, 0x67)
    before = state_of(t, link)
    go(link, STOP_COPY)
    data += read_stream(link, t.facts.transfer)
    go(link, STOP, RUNNING)
    change_state(t, link, 0x68)
    go(link, RESUMING)
    write_stream(link, data, t.facts.transfer)
    go(link, RUNNING)
    same(before.hex(), state_of(t, link).hex(), "state of the device after it was loaded")


@AREA.case(43, SHOULD, "R288")
def cancelled(t: Trial) -> None:
    """A cancelled pre-copy leaves nothing behind.

    Sends: PRE_COPY, a read, RUNNING, then a whole save from PRE_COPY on, and a load of it.
    Expects: a stream that can be loaded.
    """
    pre_copy(t)
    link = begin(t)
    go(link, PRE_COPY)
    read_chunk(link, 16)
    go(link, RUNNING, PRE_COPY)
    data = read_stream(link, t.facts.transfer)
    go(link, STOP_COPY)
    data += read_stream(link, t.facts.transfer)
    go(link, STOP, RESUMING)
    write_stream(link, data, t.facts.transfer)
    go(link, STOP, RUNNING)


@AREA.case(44, MUST, "R269")
def golden_read(t: Trial) -> None:
    """The golden bytes of MIG_DATA_READ read.

    Sends: MIG_DATA_READ of 64 bytes in STOP_COPY, byte by byte as it is written down.
    Expects: a success whose argsz is 8 more than its size.
    """
    link = begin(t)
    go(link, STOP_COPY)
    link.send(vectors.message("read 64 bytes of migration data"))
    reply = link.reply(16, READ)
    check(not reply.failed, f"MIG_DATA_READ failed with error {reply.error}")
    argsz, size = wire.MIG_DATA.unpack_from(reply.payload)
    same(8 + size, argsz, "argsz")


@AREA.case(45, MUST, "R269 R009")
def pipelined_reads(t: Trial) -> None:
    """Reads that are sent in one piece give the stream in its order.

    Sends: ten MIG_DATA_READ of 8 bytes in one piece; the same, one by one, after STOP and STOP_COPY.
    Expects: as many bytes both times; a short read only at the end.
    """
    link = begin(t)
    go(link, STOP_COPY)
    link.send(b"".join(wire.pack(READ, wire.mig_data(8), msg_id=n) for n in range(10)))
    sizes = []
    for n in range(10):
        reply = link.reply(n, READ)
        check(not reply.failed, f"MIG_DATA_READ failed with error {reply.error}")
        sizes.append(wire.MIG_DATA.unpack_from(reply.payload)[1])
    same(sorted(sizes, reverse=True), sizes, "sizes of ten reads of 8 bytes")


@AREA.case(46, SHOULD, "R280")
def write_nothing(t: Trial) -> None:
    """A write of no bytes is no error.

    Sends: MIG_DATA_WRITE of size 0 in RESUMING.
    Expects: success without a payload.
    """
    link = begin(t)
    go(link, RESUMING)
    write_chunk(link, b"")


def _saving(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    begin(t, t.link)
    go(t.link, STOP_COPY)
    return [(READ, payload) for payload in payloads]


def _loading(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    begin(t, t.link)
    go(t.link, RESUMING)
    return [(WRITE, payload) for payload in payloads]


refusals(
    AREA,
    (
        RefusedRequest(
            50, MUST, "R273",
            "A MIG_DATA_READ that is too small, or has no room for its reply, is refused.",
            "MIG_DATA_READ with 4 and 7 bytes, and of 64 bytes with argsz 8 and 71, in STOP_COPY",
            lambda t: _saving(
                t, wire.mig_data(64)[:4], wire.mig_data(64)[:7], wire.mig_data(64, argsz=8), wire.mig_data(64, argsz=71)
            ),
            CaseEffect.DEVICE,
        ),
        RefusedRequest(
            51, MUST, "R279",
            "A MIG_DATA_WRITE that has fewer data than it says is refused.",
            "MIG_DATA_WRITE with 4 and 7 bytes, of 64 bytes with 8, and of 2^32 - 1, in RESUMING",
            lambda t: _loading(
                t, wire.mig_data(64)[:4], wire.mig_data(64)[:7], wire.mig_data(64, b"\0" * 8),
                wire.mig_data(0xFFFFFFFF, b"\0" * 8, argsz=0xFFFFFFFF),
            ),
            CaseEffect.DEVICE,
        ),
        RefusedRequest(
            52, SHOULD, "R279",
            "A MIG_DATA_WRITE whose argsz is smaller than itself is refused.",
            "MIG_DATA_WRITE of 8 bytes with argsz 8, in RESUMING",
            lambda t: _loading(t, wire.mig_data(8, b"\0" * 8, argsz=8)),
            CaseEffect.DEVICE,
        ),
    ),
)  # fmt: skip
