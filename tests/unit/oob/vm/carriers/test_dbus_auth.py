"""D-Bus's opening: who may in, and who may not."""

from __future__ import annotations

import pytest

from vfiouser_oob.vm.carriers.dbus_auth import LINE_MAX, LINES_MAX, SaslError, SaslServer

GUID = "0123456789abcdef" * 2
UID = 1000
CLAIM = b"1000".hex().encode()


def said(*lines: bytes) -> bytes:
    """A client's words."""
    return b"\0" + b"".join(line + b"\r\n" for line in lines)


def answers(data: bytes, step: int) -> tuple[list[str], bytes, bool]:
    """The server's lines, what it left, and whether it is done, fed in pieces."""
    server = SaslServer(UID, GUID)
    left = b""
    for at in range(0, len(data), step):
        left += server.receive_data(data[at : at + step]) if not server.done else data[at : at + step]
    return server.data_to_send().decode().splitlines(), left, server.done


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"AUTH EXTERNAL " + CLAIM], [f"OK {GUID}"]),
        ([b"AUTH EXTERNAL", b"DATA"], ["DATA", f"OK {GUID}"]),
        ([b"AUTH", b"AUTH EXTERNAL " + CLAIM, b"NEGOTIATE_UNIX_FD"], ["REJECTED EXTERNAL", f"OK {GUID}", "ERROR no"]),
        ([b"AUTH DBUS_COOKIE_SHA1 00", b"AUTH EXTERNAL " + CLAIM], ["REJECTED EXTERNAL", f"OK {GUID}"]),
        ([b"NONSENSE", b"DATA 00", b"AUTH EXTERNAL " + CLAIM], ["ERROR not", "ERROR there", f"OK {GUID}"]),
    ],
)
def test_openings_that_succeed(lines: list[bytes], expected: list[str], step: int) -> None:
    """However the bytes are cut, what follows BEGIN is left alone."""
    told, left, done = answers(said(*lines, b"BEGIN") + b"rest", step)
    assert [line[: len(start)] for line, start in zip(told, expected, strict=True)] == expected
    assert (left, done) == (b"rest", True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"AUTH EXTERNAL\r\n", "first byte"),
        (said(b"BEGIN"), "before it has authenticated"),
        (said(b"AUTH EXTERNAL " + CLAIM, b"CANCEL", b"BEGIN"), "before it has authenticated"),
        (said(b"AUTH EXTERNAL " + b"0".hex().encode()), "user '0', and the kernel says 1000"),
        (said(b"AUTH EXTERNAL zz"), "not hexadecimal"),
        (said(b"AUTH EXTERNAL ffff"), "not hexadecimal"),
        (b"\0" + b"A" * LINE_MAX, "a line of the opening"),
        (said(*[b"AUTH"] * (LINES_MAX + 1)), "more than 16 lines"),
    ],
)
def test_openings_that_fail(data: bytes, reason: str) -> None:
    """The connection is to be closed, and the error says why."""
    with pytest.raises(SaslError, match=reason):
        SaslServer(UID, GUID).receive_data(data)
