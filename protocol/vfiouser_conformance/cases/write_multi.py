"""REGION_WRITE_MULTI, for servers that offer it."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.trial import SILENCE_S, Trial
from vfiouser_protocol.constants import Command, RegionIndex

AREA = Area("WRITE-MULTI", "several writes in one message", CaseEffect.DEVICE)
MUST, SHOULD = Level.MUST, Level.SHOULD
MULTI = int(Command.REGION_WRITE_MULTI)
CONFIG = int(RegionIndex.CONFIG)


def _register(t: Trial) -> int:
    """Offset of a byte of config space that can be written, on a server that takes several writes at once."""
    if not t.facts.writes_multi:
        raise NotApplicable("the server does not offer write_multiple")
    return t.scratch()[0]


@AREA.case(1, MUST, "R222")
def with_reply(t: Trial) -> None:
    """Three writes are done, and the reply says three.

    Sends: REGION_WRITE_MULTI with 3 writes of the same register.
    Expects: 8 bytes: wr_cnt 3; the register has the last value.
    """
    offset = _register(t)
    link = t.attach()
    writes = [(CONFIG, offset, bytes([value])) for value in (0x11, 0x22, 0x33)]
    same(struct.pack("<Q", 3).hex(), link.ok(MULTI, wire.write_multi(writes)).payload.hex(), "reply")
    same("33", t.read_config(link, offset, 1).hex(), "register")


@AREA.case(2, MUST, "R221 R395")
def flood_without_reply(t: Trial) -> None:
    """Two hundred writes in one message are applied in their order, and nothing is answered.

    Sends: REGION_WRITE_MULTI with NO_REPLY and 200 writes, as QEMU packs them; five times; then a read.
    Expects: no reply; the register has the last value each time.
    """
    offset = _register(t)
    link = t.attach()
    for turn in range(5):
        writes = [(CONFIG, offset, bytes([(turn * 7 + n) & 0xFF])) for n in range(200)]
        link.command(MULTI, wire.write_multi(writes), flags=wire.NO_REPLY)
        same(writes[-1][2].hex(), t.read_config(link, offset, 1).hex(), "register")
    link.silent(SILENCE_S)


@AREA.case(3, SHOULD, "R225")
def failing_write(t: Trial) -> None:
    """A write that fails ends the message; the ones before it stay done.

    Sends: three writes, the second beyond its region.
    Expects: wr_cnt 1, or an error; the register has the first value, not the third.
    """
    offset = _register(t)
    link = t.attach()
    size = t.facts.region(CONFIG).size
    t.write(link, CONFIG, offset, b"\x00")
    reply = link.call(
        MULTI, wire.write_multi([(CONFIG, offset, b"\x5a"), (CONFIG, size, b"\0"), (CONFIG, offset, b"\x77")])
    )
    if not reply.failed:
        same(struct.pack("<Q", 1).hex(), reply.payload.hex(), "reply")
    t.saw("REGION_WRITE_MULTI with a bad write", "refused" if reply.failed else "wr_cnt 1", recommended=True)
    same("5a", t.read_config(link, offset, 1).hex(), "register")


@AREA.case(4, MUST, "R222")
def golden(t: Trial) -> None:
    """The golden bytes of REGION_WRITE_MULTI are two writes.

    Sends: writes of the interrupt line and of the command register, byte by byte as they are written down.
    Expects: wr_cnt 2, and command register bits as far as the device has them.
    """
    if not t.facts.writes_multi:
        raise NotApplicable("the server does not offer write_multiple")
    link = t.attach()
    link.send(vectors.message("two config writes in one"))
    reply = link.reply(12, MULTI)
    check(not reply.failed, f"REGION_WRITE_MULTI failed with error {reply.error}")
    same(struct.pack("<Q", 2).hex(), reply.payload.hex(), "reply")


def _offered(t: Trial) -> Trial:
    _register(t)
    return t


def _one(t: Trial) -> bytes:
    return wire.write_multi([(CONFIG, t.scratch()[0], b"\0")])


def _not_offered(t: Trial) -> list[tuple[int, bytes]]:
    t.drop(t.link)
    t.link = t.attach_with({"max_msg_fds": 8})
    return [(MULTI, _one(t))]


refusals(
    AREA,
    (
        RefusedRequest(
            10, MUST, "R223",
            "The message has as many entries as it says.",
            "REGION_WRITE_MULTI with wr_cnt 2 and one entry, and with wr_cnt 1 and two",
            lambda t: [
                (MULTI, wire.write_multi([(CONFIG, _offered(t).scratch()[0], b"\0")], 2)),
                (MULTI, wire.write_multi([(CONFIG, t.scratch()[0], b"\0")] * 2, 1)),
            ],
        ),
        RefusedRequest(
            11, MUST, "R223",
            "An entry has at most 8 bytes.",
            "REGION_WRITE_MULTI with an entry of count 9, and of count 0xffffffff",
            lambda t: [
                (MULTI, struct.pack("<QQII8s", 1, _offered(t).scratch()[0], CONFIG, count, b""))
                for count in (9, 0xFFFFFFFF)
            ],
        ),
        RefusedRequest(
            12, SHOULD, "R224",
            "A giant number of entries is refused, and nothing that big is made room for.",
            "REGION_WRITE_MULTI with wr_cnt 2^61 and 2^64 - 1",
            lambda t: [(MULTI, struct.pack("<Q", count) + _one(_offered(t))[8:]) for count in (1 << 61, wire.U64)],
        ),
        RefusedRequest(
            13, SHOULD, "R220",
            "A command that was not negotiated is refused.",
            "REGION_WRITE_MULTI on a connection whose client did not propose it",
            lambda t: [(MULTI, _one(t))] if t.facts.scratch and not t.facts.writes_multi else _not_offered(t),
        ),
    ),
)  # fmt: skip
