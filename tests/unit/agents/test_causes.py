"""Errors in words: no exception's name, no tuple of an address, and expired certificates are called so."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from datetime import UTC, datetime, timedelta

import pytest
import trio
import trustme

from vfiouser_agents.causes import words_of
from vfiouser_agents.rpc.core import broken
from vfiouser_agents.rpc.endpoint import TlsOptions, connect, parse_address


def caused(error: Exception, cause: BaseException) -> Exception:
    """An error that another one has caused."""
    error.__cause__ = cause
    return error


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (trio.BrokenResourceError(), "the other side left"),
        (trio.ClosedResourceError(), "it was closed"),
        (trio.TooSlowError(), "it took too long"),
        (EOFError(), "the other side left in the middle of a message"),
        (caused(trio.BrokenResourceError(), OSError(errno.EPIPE, "x: Broken pipe")), "Broken pipe"),
        (OSError(errno.ECONNREFUSED, "Error connecting to ('127.0.0.1', 1): Connection refused"), "Connection refused"),
        (caused(OSError("all attempts to connect failed"), ExceptionGroup("x", [REFUSED])), "Connection refused"),
        (OSError(errno.EINVAL, "no such thing at all"), "no such thing at all"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (ExceptionGroup("x", [ExceptionGroup("y", [ValueError("bad\n  word")])]), "bad word"),
        (MemoryError(), "there is not enough memory"),
        (KeyError(), "KeyError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_words(error: Exception, words: str) -> None:
    """What has happened is said; an exception's name is the last resort."""
    assert words == words_of(error)


async def test_nobody_listens() -> None:
    """An agent that is not there is told of by its address and the system's word, once each."""
    with pytest.raises(Exception, match=r"^cannot reach agent tcp://127\.0\.0\.1:1: Connection refused$"):
        await connect(parse_address("tcp://127.0.0.1:1"), TlsOptions(), None, allow_plaintext=False)


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[str, ...]:
    """What both sides of a handshake in memory say when it fails: the client, the server."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    said = ["", ""]
    for _ in range(6):
        for index, side in enumerate(sides):
            try:
                side.do_handshake()
                side.read(1)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                said[index] = said[index] or str(broken(error))
    return tuple(said)


@pytest.mark.parametrize("who", ["server", "client"])
def test_expired_certificates(who: str) -> None:
    """Whoever's certificate has expired, both sides say so in so many words."""
    authority = trustme.CA()
    past = datetime.now(UTC) - timedelta(days=1)
    ends = {"server": None, "client": None, who: past}
    certificates = {side: authority.issue_cert("localhost", not_after=end) for side, end in ends.items()}
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.verify_mode = ssl.CERT_REQUIRED
    for context, side in ((client, "client"), (server, "server")):
        authority.configure_trust(context)
        certificates[side].configure_cert(context)
    told = dict(zip(("client", "server"), handshake(client, server), strict=True))
    other = {"server": "client", "client": "server"}[who]
    assert "TLS failed: the peer's certificate has expired" == told[other]
    assert "TLS failed: the peer says that our certificate has expired" == told[who]
