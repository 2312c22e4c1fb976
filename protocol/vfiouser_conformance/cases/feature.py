"""DEVICE_FEATURE: probing, getting, setting."""

from __future__ import annotations

import struct

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import Area, CaseEffect, Level, NotApplicable, RefusedRequest, check, refusals, same
from vfiouser_conformance.migration import FEATURE, RUNNING, begin, check_set_reply, get_state, name, set_request
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import MigrationFlags

AREA = Area("FEATURE", "device features", CaseEffect.NONE)
MUST, SHOULD = Level.MUST, Level.SHOULD
GET, SET, PROBE = 0x10000, 0x20000, 0x40000
_KNOWN = int(MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY)


@AREA.case(1, MUST, "R241 R243")
def migration(t: Trial) -> None:
    """The migration feature says what the device can.

    Sends: GET of feature 1 with argsz 16, and with 64.
    Expects: 16 bytes, argsz 16, flags as sent; STOP_COPY, and no unknown flags. P2P, which the specification does not
    speak of and QEMU demands of several functions, is reported.
    """
    t.facts.migratable()
    link = t.attach()
    for argsz in (16, 64):
        payload = link.ok(FEATURE, wire.feature(GET | 1, argsz=argsz)).payload
        same(16, len(payload), "payload")
        same((16, GET | 1), wire.FEATURE.unpack_from(payload), "argsz and flags")
        flags = struct.unpack_from("<Q", payload, 8)[0]
        check(flags & MigrationFlags.STOP_COPY, f"migration flags {flags:#x} lack STOP_COPY")
        check(not flags & ~_KNOWN, f"unknown migration flags {flags:#x}")
    t.saw("P2P states", "offered" if flags & MigrationFlags.P2P else "not offered", recommended=True)


@AREA.case(2, MUST, "R245")
def probe_get(t: Trial) -> None:
    """PROBE repeats its request when the method is there.

    Sends: PROBE and GET of feature 1.
    Expects: the 8 bytes of the request.
    """
    t.facts.migratable()
    request = wire.feature(PROBE | GET | 1)
    same(request.hex(), t.attach().ok(FEATURE, request).payload.hex(), "payload")


@AREA.case(3, MUST, "R247")
def probe_alone(t: Trial) -> None:
    """PROBE alone asks whether a feature exists.

    Sends: PROBE of feature 1, and of 2.
    Expects: the request's 8 bytes.
    """
    t.facts.migratable()
    link = t.attach()
    for index in (1, 2):
        request = wire.feature(PROBE | index)
        same(request.hex(), link.ok(FEATURE, request).payload.hex(), "payload")


@AREA.case(4, MUST, "R248")
def probe_both(t: Trial) -> None:
    """PROBE may ask for GET and SET at once.

    Sends: PROBE, GET and SET of feature 2.
    Expects: the request's 8 bytes.
    """
    t.facts.migratable()
    request = wire.feature(PROBE | GET | SET | 2)
    same(request.hex(), t.attach().ok(FEATURE, request).payload.hex(), "payload")


@AREA.case(5, MUST, "R255 R265", effect=CaseEffect.DEVICE)
def set_echo(t: Trial) -> None:
    """SET repeats its request when it is done.

    Sends: SET of state RUNNING on a running device, with data_fd -1, and with 0.
    Expects: the request's 16 bytes; where data_fd was 0 it may be -1, which says that there is no descriptor.
    """
    link = begin(t)
    for data_fd in (-1, 0):
        request = set_request(RUNNING, data_fd)
        check_set_reply(request, link.ok(FEATURE, request).payload)


@AREA.case(6, MUST, "R241")
def golden(t: Trial) -> None:
    """The golden bytes of GET of the migration feature get a golden reply.

    Sends: GET of feature 1, byte by byte as it is written down.
    Expects: a reply of 32 bytes that begins as it is written down.
    """
    t.facts.migratable()
    link = t.attach()
    link.send(vectors.message("get migration feature"))
    reply = link.receive()
    head = wire.HEADER.pack(reply.msg_id, reply.command, reply.size, reply.flags, reply.error)
    same("0d001000200000000100000000000000", head.hex(), "header")
    same("1000000001000100", reply.payload[:8].hex(), "argsz and flags")


@AREA.case(7, SHOULD, "R252")
def without_migration(t: Trial) -> None:
    """A device without migration has no migration features.

    Sends: GET of features 1 and 2, PROBE of 1 and 2, SET of RUNNING, MIG_DATA_READ and MIG_DATA_WRITE.
    Expects: errors; the connection goes on.
    """
    if t.facts.migration is not None:
        raise NotApplicable("the server offers migration")
    link = t.attach()
    for payload in (
        wire.feature(GET | 1, argsz=16),
        wire.feature(GET | 2, argsz=16),
        wire.feature(PROBE | 1),
        wire.feature(PROBE | 2),
        set_request(RUNNING),
    ):
        link.refused(FEATURE, payload)
    link.refused(17, wire.mig_data(16))
    link.refused(18, wire.mig_data(4, b"\0" * 4))
    link.alive()


@AREA.case(8, MUST, "R245", effect=CaseEffect.DEVICE)
def probe_changes_nothing(t: Trial) -> None:
    """PROBE of SET sets nothing.

    Sends: PROBE and SET of feature 2, with a state behind it; GET of the state.
    Expects: success or an error for the surplus; the state is RUNNING.
    """
    link = begin(t)
    link.call(FEATURE, wire.feature(PROBE | SET | 2, struct.pack("<II", 1, 0)))
    same(name(RUNNING), name(get_state(link)), "state")


def _migratable(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    t.facts.migratable()
    return [(FEATURE, payload) for payload in payloads]


def _logging(t: Trial, *payloads: bytes) -> list[tuple[int, bytes]]:
    t.facts.logs()
    return [(FEATURE, payload) for payload in payloads]


refusals(
    AREA,
    (
        RefusedRequest(
            20, MUST, "R240",
            "A DEVICE_FEATURE without its fixed part is refused.",
            "DEVICE_FEATURE with 4 and 7 bytes",
            lambda t: _migratable(t, wire.feature(GET | 1)[:4], wire.feature(GET | 1)[:7]),
        ),
        RefusedRequest(
            21, MUST, "R242",
            "GET without room for the reply is refused.",
            "GET of feature 1 and 2 with argsz 0, 8 and 15",
            lambda t: _migratable(t, *(wire.feature(GET | n, argsz=size) for n in (1, 2) for size in (0, 8, 15))),
        ),
        RefusedRequest(
            22, MUST, "R244 R246",
            "The migration feature cannot be set.",
            "SET, and PROBE and SET, of feature 1",
            lambda t: _migratable(t, wire.feature(SET | 1, b"\0" * 8), wire.feature(PROBE | SET | 1)),
        ),
        RefusedRequest(
            23, MUST, "R246",
            "PROBE of a method that a feature lacks fails.",
            "PROBE and GET of features 6 and 7, PROBE and SET of feature 8",
            lambda t: _logging(t, *(wire.feature(PROBE | flags) for flags in (GET | 6, GET | 7, SET | 8))),
        ),
        RefusedRequest(
            24, MUST, "R247 R251",
            "Features that vfio-user does not have are refused.",
            "PROBE of 77, GET of 0, 3, 4, 5, 10, 0xffff (9 is what QEMU's client with migration asks for)",
            lambda t: _migratable(
                t, wire.feature(PROBE | 77), *(wire.feature(GET | n, argsz=64) for n in (0, 3, 4, 5, 10, 0xFFFF))
            ),
        ),
        RefusedRequest(
            25, SHOULD, "R249",
            "PROBE without room for its reply is refused.",
            "PROBE and GET of feature 1 with argsz 0",
            lambda t: _migratable(t, wire.feature(PROBE | GET | 1, argsz=0)),
        ),
        RefusedRequest(
            26, MUST, "R250",
            "Without PROBE exactly one of GET and SET is asked for.",
            "GET and SET of feature 2, and neither",
            lambda t: _migratable(t, wire.feature(GET | SET | 2, b"\2\0\0\0\0\0\0\0"), wire.feature(2, b"\0" * 8)),
            CaseEffect.DEVICE,
        ),
        RefusedRequest(
            27, MUST, "R251",
            "Flags that do not exist are refused.",
            "GET of feature 1 with bits 19 and 31",
            lambda t: _migratable(t, *(wire.feature(GET | 1 | bit, argsz=16) for bit in (1 << 19, 1 << 31))),
        ),
        RefusedRequest(
            28, MUST, "R253",
            "SET without room for its reply is refused.",
            "SET of state RUNNING with argsz 8 and 15",
            lambda t: _migratable(t, *(struct.pack("<I", size) + set_request(RUNNING)[4:] for size in (8, 15))),
            CaseEffect.DEVICE,
        ),
        RefusedRequest(
            29, SHOULD, "R254",
            "SET of the state needs the state.",
            "SET of feature 2 without data, and with 2 bytes of it",
            lambda t: _migratable(t, wire.feature(SET | 2), wire.feature(SET | 2, b"\2\0")),
            CaseEffect.DEVICE,
        ),
    ),
)  # fmt: skip
