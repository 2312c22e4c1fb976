"""Who may talk to whom: TLS in both directions, and no state in the clear on a network."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from agentbed import Served, served
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.errors import AuthError, ConnectError
from vfiouser_agents.memory import MemoryAgent
from vfiouser_agents.options import OptionError
from vfiouser_agents.rpc.endpoint import TlsOptions, client_context, connect, open_listeners, parse_address


def client_with(server: Served, tls: TlsOptions) -> MsgpackRpcAgent:
    """A client that has these files."""
    options = {name: value for name, value in asdict(tls).items() if value is not None}
    agent = MsgpackRpcAgent.from_options({"address": str(server.address), "tls": options})
    assert isinstance(agent, MsgpackRpcAgent)
    return agent


async def test_a_server_that_is_not_trusted(tmp_path: Path) -> None:
    """A client whose CA did not issue the server's certificate stops before anything is said."""
    async with served(MemoryAgent(), "tls", tmp_path) as server:
        assert server.certificates is not None
        async with client_with(server, TlsOptions()) as client:
            with pytest.raises(AuthError, match="certificate is not accepted"):
                await client.connect()


async def test_a_server_with_another_name(tmp_path: Path) -> None:
    """A good certificate for another name is not enough."""
    async with served(MemoryAgent(), "tls", tmp_path) as server:
        assert server.certificates is not None
        async with client_with(server, replace(server.certificates.nobody, server_name="elsewhere")) as client:
            with pytest.raises(AuthError, match="elsewhere"):
                await client.connect()
        async with client_with(server, replace(server.certificates.nobody, server_name="localhost")) as client:
            await client.connect()


@pytest.mark.parametrize("who", ["nobody", "stranger"])
async def test_a_client_that_is_not_trusted(who: str, tmp_path: Path) -> None:
    """With mTLS a client without a certificate, or with a stranger's, gets no answer."""
    async with served(MemoryAgent(), "mtls", tmp_path) as server:
        async with client_with(server, getattr(server.certificates, who)) as client:
            with pytest.raises((AuthError, ConnectError), match=r"TLS failed|may not accept our certificate"):
                await client.connect()
        async with server.client() as client:
            await client.connect()


@pytest.mark.parametrize("address", ["tcp://192.0.2.7:7711", "tcp://soc.example", "tcp://[2001:db8::1]:7711"])
async def test_plain_text_is_refused(address: str) -> None:
    """TCP without TLS to another host needs an explicit word, on both sides."""
    with pytest.raises(OptionError, match="TCP without TLS is for this host only"):
        MsgpackRpcAgent.from_options({"address": address})
    MsgpackRpcAgent.from_options({"address": address, "allow_plaintext": True})
    MsgpackRpcAgent.from_options({"address": address, "allow_plaintext": "true"})
    with pytest.raises(OptionError, match="TCP without TLS is for this host only"):
        await open_listeners(parse_address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost"])
def test_plain_text_is_allowed_on_this_host(host: str) -> None:
    """Loopback needs no word."""
    MsgpackRpcAgent.from_options({"address": f"tcp://{host}:7711"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "'address' is missing"),
        ({"address": "http://x"}, "must be tcp://HOST:PORT"),
        ({"address": "tcp://localhost:99999"}, "must be tcp://HOST:PORT"),
        ({"address": "unix://relative"}, "must be absolute"),
        ({"address": "unix:///" + "x" * 200}, "at most 107 bytes"),
        ({"address": "unix:///x", "tls": {"ca": "y"}}, "tls does not apply"),
        ({"address": "tls://x", "tls": {"ca": "/nonexistent.pem"}}, "cannot be used"),
        ({"address": "tls://x", "tls": {"ka": "y"}}, "unknown key 'ka' in tls"),
        ({"address": "tls://x", "tls": {"key": "y"}}, "needs tls.cert"),
        ({"address": "unix:///x", "keepalive_s": -1}, "keepalive_s must be"),
        ({"address": "unix:///x", "keepalive_s": True}, "keepalive_s must be"),
        ({"address": "unix:///x", "chunk_size": "1X"}, "chunk_size must be"),
        ({"address": "unix:///x", "allow_plaintext": "yes"}, "must be true or false"),
        ({"address": "unix:///x", "adress": "y"}, "did you mean 'address'"),
        ({"address": 5}, "must be text"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], says: str) -> None:
    """Each mistake in the options is said before anything is connected."""
    with pytest.raises(OptionError, match=says):
        MsgpackRpcAgent.from_options(options)


def test_options_as_text() -> None:
    """Numbers and sizes may come as text from a command line."""
    agent = MsgpackRpcAgent.from_options({"address": "unix:///x", "chunk_size": "64K", "keepalive_s": "2.5"})
    assert isinstance(agent, MsgpackRpcAgent)
    assert 65536 == agent.chunk_size


async def test_unix_sockets(tmp_path: Path) -> None:
    """A socket is for its owner only, one that is left over is replaced, and one in use is not."""
    path = tmp_path / "agent.sock"
    first = (await open_listeners(parse_address(f"unix://{path}")))[0]
    assert 0o600 == path.stat().st_mode & 0o777
    with pytest.raises(OSError, match="in use"):
        await open_listeners(parse_address(f"unix://{path}"))
    await first.aclose()
    second = (await open_listeners(parse_address(f"unix://{path}")))[0]
    await second.aclose()


async def test_a_tls_server_needs_a_certificate() -> None:
    """Listening for TLS without one is refused rather than failing at the first client."""
    with pytest.raises(OptionError, match=r"needs tls\.cert"):
        await open_listeners(parse_address("tls://127.0.0.1:0"))


async def test_a_certificate_that_expires_soon(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An agent whose certificate is good for some days only is used, and its certificate warned of."""
    authority = trustme.CA()
    soon = authority.issue_cert("localhost", not_after=datetime.now(UTC) + timedelta(days=5, hours=1))
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    soon.private_key_and_cert_chain_pem.write_to_path(tmp_path / "agent.pem")
    server = await open_listeners(parse_address("tls://127.0.0.1:0"), TlsOptions(cert=str(tmp_path / "agent.pem")))
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, _greet, list(server)))
        tls = TlsOptions(ca=str(tmp_path / "ca.pem"), server_name="localhost")
        port = server[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
        address = parse_address(f"tls://127.0.0.1:{port}")
        with caplog.at_level(logging.WARNING):
            stream = await connect(address, tls, client_context(tls), allow_plaintext=False)
        await stream.aclose()
        nursery.cancel_scope.cancel()
    assert f"the certificate of agent {address} needs renewal: it expires in 5 days" in caplog.text


async def _greet(stream: trio.abc.Stream) -> None:
    assert isinstance(stream, trio.SSLStream)
    try:
        await stream.do_handshake()
        await stream.receive_some(1)
    except trio.BrokenResourceError:  # the client has what it came for
        pass
