"""VERSION: proposals that have to be turned down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfiouser_conformance import wire
from vfiouser_conformance.case import Body, Level, check
from vfiouser_conformance.cases.version import AREA as AREA
from vfiouser_conformance.link import Closed
from vfiouser_conformance.trial import Trial
from vfiouser_protocol.constants import Command

MUST, SHOULD = Level.MUST, Level.SHOULD


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    level: Level
    requirements: str
    summary: str
    sent: str
    payloads: Sequence[bytes]


def _with(member: bytes) -> bytes:
    return wire.version(b'{"capabilities":{' + member + b"}}\0")


_ROWS = (
    _Row(
        40,
        MUST,
        "R044",
        "A major version that does not exist is refused.",
        "VERSION 1.0, and 65535.0",
        (wire.version(b"{}\0", major=1), wire.version(b"{}\0", major=0xFFFF)),
    ),
    _Row(
        41,
        MUST,
        "R045 R046",
        "A VERSION without a whole version number is refused.",
        "VERSION with a payload of 0, 1 and 3 bytes",
        (b"", b"\0", b"\0\0\0"),
    ),
    _Row(
        42,
        SHOULD,
        "R047",
        "Version data without its NUL is refused.",
        "VERSION with `{}` that no NUL follows",
        (wire.version(b"{}"), wire.version(b'{"capabilities":{"max_msg_fds":8}}')),
    ),
    _Row(
        43,
        SHOULD,
        "R048",
        "Version data that is not JSON is refused.",
        "VERSION with JSON that lacks its closing brace, a quote, or everything but the NUL",
        (
            wire.version(b'{"capabilities":{"max_msg_fds":8}\0'),
            wire.version(b'{"capabilities:{"max_msg_fds":8}}\0'),
            wire.version(b"{,}\0"),
        ),
    ),
    _Row(
        44,
        SHOULD,
        "R049",
        "Capabilities that are not an object are refused.",
        "VERSION with a list, a string and a number for `capabilities`",
        tuple(wire.version(b'{"capabilities":' + value + b"}\0") for value in (b"[]", b'"x"', b"7")),
    ),
    _Row(
        45,
        SHOULD,
        "R050",
        "A number of descriptors that is not an integer is refused.",
        'VERSION with max_msg_fds "8" and 8.5',
        (_with(b'"max_msg_fds":"8"'), _with(b'"max_msg_fds":8.5')),
    ),
    _Row(
        46,
        SHOULD,
        "R051",
        "A negative number of descriptors is refused.",
        "VERSION with max_msg_fds -1",
        (_with(b'"max_msg_fds":-1'),),
    ),
    _Row(
        47,
        SHOULD,
        "R052",
        "A transfer size that is not a number is refused.",
        'VERSION with max_data_xfer_size "x"',
        (_with(b'"max_data_xfer_size":"x"'),),
    ),
    _Row(
        48,
        SHOULD,
        "R053",
        "A migration capability of a wrong form is refused.",
        'VERSION with migration [] and migration {"pgsize": "x"}',
        (_with(b'"migration":[]'), _with(b'"migration":{"pgsize":"x"}')),
    ),
    _Row(
        49,
        SHOULD,
        "R055",
        "A twin_socket capability of a wrong form is refused.",
        'VERSION with twin_socket [] and twin_socket {"supported": 1}',
        (_with(b'"twin_socket":[]'), _with(b'"twin_socket":{"supported":1}')),
    ),
)


def _body(row: _Row) -> Body:
    def body(t: Trial) -> None:
        for payload in row.payloads:
            link = t.connect()
            msg_id = link.command(Command.VERSION, payload)
            try:
                reply = link.reply(msg_id, Command.VERSION)
                check(reply.failed, f"VERSION succeeded with {payload!r}")
                ended = link.ends(min(1.0, t.timeout))
                t.saw("connection after a failed VERSION", "closed" if ended else "open", recommended=True)
            except Closed:
                pass
            t.drop(link)
        t.attach().alive()

    return body


for _row in _ROWS:
    _expected = "an error reply or the end of the connection; the next client is served"
    AREA.add(_row.number, _row.level, _row.requirements, (_row.summary, _row.sent, _expected), _body(_row))
