"""The control socket over a real UNIX socket: answers, events, refusals and hostile peers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfiouser_oob import __version__
from vfiouser_oob.control import protocol, server
from vfiouser_oob.control.client import ControlClient, ControlError
from vfiouser_oob.control.metrics_http import MetricsServer
from vfiouser_oob.control.protocol import ErrorCode, RequestError
from vfiouser_oob.control.server import AccessPolicy, ControlServer
from vfiouser_oob.control.verbs import VERBS, ControlRole
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.measured import Measured
from vfiouser_oob.observability.status import MigrationEntry, StatusReport
from vfiouser_oob.server.administration import Administration
from vfiouser_oob.transport.listener import EXHAUSTED_WAIT_S, Listener
from vfiouser_oob.transport.peer import Peer

STATUS: StatusReport = {
    "daemon": {
        "version": "1",
        "python": "3.11.7",
        "kernel": "6.1",
        "pid": 42,
        "started": "2026-01-01T00:00:00+00:00",
        "functions": 0,
    },
    "functions": [],
}


class ReadersPolicy(AccessPolicy):
    """Lets everybody ask and nobody change anything, also root."""

    def role(self, peer: Peer, groups: frozenset[int]) -> ControlRole | None:
        """The same for all."""
        return ControlRole.READER


class FakeDaemon:
    """A daemon with a fixed state, a real hub of events, and nobody who changes it."""

    def __init__(self) -> None:
        self.hub = EventHub()

    @property
    def administration(self) -> Administration:
        """Tests that change things use a real daemon."""
        raise AssertionError("asked for a change")

    async def check_migration(self, vm: str, destination: str | None) -> dict[str, Any]:
        """It has no VM."""
        raise AssertionError("asked for a VM")

    def status(self) -> StatusReport:
        """The fixed state."""
        return STATUS

    def metrics(self) -> Measured:
        """Nothing so far."""
        return {
            "version": "1",
            "python": "3.11.7",
            "kernel": "6.1",
            "started_s": 0.0,
            "starts": None,
            "functions": [],
            "certificates": {},
        }

    def migrations(self) -> list[MigrationEntry]:
        """None so far."""
        return []

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """The hub's events."""
        return self.hub.subscribe()


@asynccontextmanager
async def running(path: Path, policy: AccessPolicy | None = None) -> AsyncIterator[FakeDaemon]:
    """A control server on `path`."""
    daemon = FakeDaemon()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(daemon, policy or AccessPolicy()).serve, sock)
        yield daemon
        nursery.cancel_scope.cancel()


async def read_json(stream: trio.SocketStream, buffer: bytearray) -> Any:
    """The next message on a raw connection, or None at its end."""
    while b"\n" not in buffer:
        data = await stream.receive_some()
        if not data:
            return None
        buffer += data
    line, _, rest = bytes(buffer).partition(b"\n")
    buffer[:] = rest
    return json.loads(line)


async def in_thread(function: Callable[[], Any]) -> Any:
    """Run the blocking client beside the server."""
    with trio.fail_after(10):
        return await trio.to_thread.run_sync(function)


async def test_status(tmp_path: Path) -> None:
    """The client gets the provider's document, as often as it asks on one connection."""
    path = tmp_path / "c"

    def ask() -> list[StatusReport]:
        with ControlClient(path) as client:
            return [client.status(), client.status()]

    async with running(path):
        assert [STATUS, STATUS] == await in_thread(ask)


async def test_watch(tmp_path: Path) -> None:
    """A watcher gets the state, then the events in order, and the stream ends with the daemon's hub."""
    path = tmp_path / "c"

    def follow() -> list[dict[str, Any]]:
        with ControlClient(path) as client:
            return list(client.watch())

    async with running(path) as daemon, trio.open_nursery() as nursery:
        seen: list[dict[str, Any]] = []

        async def collect() -> None:
            seen.extend(await in_thread(follow))

        nursery.start_soon(collect)
        await watchers(daemon, 1)
        daemon.hub.publish("client-connected", function="f0", pid=7)
        daemon.hub.publish("client-gone", function="f0")
        daemon.hub.close()
    state, *events = seen
    assert {"status": STATUS} == state
    assert [("client-connected", "f0", 7), ("client-gone", "f0", None)] == [
        (event["type"], event["function"], event.get("pid")) for event in events
    ]


async def test_a_watcher_that_leaves_is_forgotten(tmp_path: Path) -> None:
    """A closed watch connection ends its subscription, so that nothing is queued for it any more."""
    path = tmp_path / "c"
    async with running(path) as daemon:
        stream = await trio.open_unix_socket(path)
        await stream.send_all(b'{"id":1,"method":"watch"}\n')
        await watchers(daemon, 1)
        await stream.aclose()
        with trio.fail_after(5):
            while len(daemon.hub):
                daemon.hub.publish("tick")
                await trio.lowlevel.checkpoint()


async def test_a_slow_watcher_learns_what_it_missed() -> None:
    """Publishing never waits; a watcher that was too far behind is told how many events it lost."""
    hub = EventHub(queue_max=2)
    slow, quick = hub.subscribe(), hub.subscribe()
    for number in range(5):
        hub.publish("tick", n=number)
        assert number == (await quick.receive())["n"]
    assert [0, 1] == [(await slow.receive())["n"] for _ in range(2)]
    hub.publish("tick", n=5)
    event = await slow.receive()
    assert (5, 3) == (event["n"], event["lost"])


async def test_hello_names_protocol_and_methods(tmp_path: Path) -> None:
    """The first line tells a client what it talks to, before it says anything."""
    async with running(tmp_path / "c"):
        stream = await trio.open_unix_socket(tmp_path / "c")
        async with stream:
            expected = {
                "hello": "vfiouser-oob",
                "protocol": 1,
                "version": __version__,
                "methods": list(VERBS),
            }
            assert expected == await read_json(stream, bytearray())


async def test_an_unknown_method_does_not_end_the_connection(tmp_path: Path) -> None:
    """A method that does not exist is an error with the allowed ones; the next request is served."""
    async with running(tmp_path / "c"):
        stream = await trio.open_unix_socket(tmp_path / "c")
        buffer = bytearray()
        async with stream:
            await read_json(stream, buffer)
            await stream.send_all(b'{"id":"a","method":"explode"}\n{"id":2,"method":"status"}\n')
            refusal = await read_json(stream, buffer)
            assert ("a", "unknown-method") == (refusal["id"], refusal["error"]["code"])
            assert "allowed: status, migrations, metrics, watch, add" in refusal["error"]["message"]
            assert {"id": 2, "result": STATUS} == await read_json(stream, buffer)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"id":1}',
        b'{"method":"status"}',
        b'{"id":true,"method":"status"}',
        b'{"id":[],"method":"status"}',
        b'{"id":1,"method":7}',
        b"[" * 60_000,
        b'{"id":' + b"9" * 60_000 + b"}",
        b"x" * (protocol.REQUEST_MAX + 1),
    ],
    ids=lambda line: f"{line[:24]!r}-{len(line)}",
)
async def test_bad_requests_end_only_their_own_connection(tmp_path: Path, line: bytes) -> None:
    """Whatever a peer sends, it gets one error and the end of its connection; the next client is served."""
    async with running(tmp_path / "c"):
        stream = await trio.open_unix_socket(tmp_path / "c")
        buffer = bytearray()
        async with stream:
            await read_json(stream, buffer)
            await stream.send_all(line + b"\n")
            answer = await read_json(stream, buffer)
            assert (None, "bad-request") == (answer["id"], answer["error"]["code"])
            assert await read_json(stream, buffer) is None
        assert STATUS == await in_thread(partial(status_of, tmp_path / "c"))


async def test_a_line_without_end_is_bounded(tmp_path: Path) -> None:
    """A peer that never ends its line is refused at the limit instead of being buffered."""
    async with running(tmp_path / "c", ReadersPolicy()):
        stream = await trio.open_unix_socket(tmp_path / "c")
        buffer = bytearray()
        async with stream:
            await read_json(stream, buffer)
            await stream.send_all(b" " * (protocol.REQUEST_MAX + server._RECEIVE_SIZE))
            answer = await read_json(stream, buffer)
            assert "longer than" in answer["error"]["message"]


async def test_strangers_are_refused(tmp_path: Path) -> None:
    """A policy that does not name the peer's user or group ends the conversation before the hello."""

    class NobodyPolicy(AccessPolicy):
        """Root is always allowed by the real one, and tests may run as root."""

        def role(self, peer: Peer, groups: frozenset[int]) -> ControlRole | None:
            assert peer.pid == os.getpid()
            return None

    async with running(tmp_path / "c", NobodyPolicy()):
        with pytest.raises(ControlError, match=f"user id {os.geteuid()} may not use this control socket"):
            await in_thread(partial(status_of, tmp_path / "c"))


@pytest.mark.parametrize(
    ("peer", "groups", "role"),
    [
        (Peer(1, 0, 0, ""), frozenset(), ControlRole.ADMIN),
        (Peer(1, 1000, 1000, ""), frozenset(), ControlRole.ADMIN),
        (Peer(1, 1000, 36, ""), frozenset(), ControlRole.ADMIN),
        (Peer(1, 1001, 1001, ""), frozenset(), None),
        (Peer(1, 1001, 36, ""), frozenset(), ControlRole.READER),
        (Peer(1, 1001, 1001, ""), frozenset({4, 36}), ControlRole.READER),
        (Peer(1, 1001, 1001, ""), frozenset({0}), None),
    ],
)
def test_policy(peer: Peer, groups: frozenset[int], role: ControlRole | None) -> None:
    """Root and the named users may change things; members of the named groups may ask."""
    policy = AccessPolicy(uids=frozenset({1000}), gids=frozenset({36}))
    assert role is policy.role(peer, groups)


async def test_own_groups_are_seen(tmp_path: Path) -> None:
    """The kernel tells a peer's supplementary groups, by which an administrator's group gets in."""
    with trio.socket.socket(socket.AF_UNIX) as sock:
        await sock.bind(str(tmp_path / "c"))
        sock.listen()
        async with await trio.open_unix_socket(tmp_path / "c"):
            connection, _ = await sock.accept()
            with connection:
                peer, groups = server.credentials(trio.SocketStream(connection))
    assert (os.getpid(), os.getuid(), os.getgid()) == (peer.pid, peer.uid, peer.gid)
    assert set(os.getgroups()) == groups


async def test_connections_are_limited(tmp_path: Path) -> None:
    """Too many open connections are refused with a reason, and room is made when one ends."""
    async with running(tmp_path / "c"):
        streams = [await trio.open_unix_socket(tmp_path / "c") for _ in range(server.CONNECTIONS_MAX)]
        for stream in streams:
            await read_json(stream, bytearray())
        with pytest.raises(ControlError, match="32 control connections are open already"):
            await in_thread(partial(status_of, tmp_path / "c"))
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(5):
            while await in_thread(partial(status_or_none, tmp_path / "c")) is None:
                await trio.lowlevel.checkpoint()


def status_of(path: Path) -> StatusReport:
    """Ask once."""
    with ControlClient(path) as client:
        return client.status()


def status_or_none(path: Path) -> StatusReport | None:
    """Ask once; None when refused."""
    try:
        return status_of(path)
    except ControlError:
        return None


async def watchers(daemon: FakeDaemon, count: int) -> None:
    """Wait until that many watch."""
    with trio.fail_after(5):
        while len(daemon.hub) != count:
            await trio.lowlevel.checkpoint()


@given(st.binary(max_size=200))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parsing_never_fails_otherwise(line: bytes) -> None:
    """Any bytes are a request or a RequestError, never another exception."""
    try:
        request = protocol.parse_request(line)
    except RequestError as error:
        code = error.code
    else:
        assert isinstance(request.method, str)
        return
    assert ErrorCode.BAD_REQUEST == code


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection"),
        (b"SSH-2.0\n", "does not speak JSON"),
        (b"[]\n", "is not vfiouser-oob"),
        (b'{"hello":"other"}\n', "is not vfiouser-oob"),
        (b'{"hello":"vfiouser-oob","protocol":2}\n', "speaks control protocol 2, this program 1"),
        (b'{"hello":"vfiouser-oob","protocol":1}\n', "closed the connection"),
        (b'{"hello":"vfiouser-oob","protocol":1}\n{"id":9,"result":1}\n', "does not fit the request"),
    ],
)
async def test_client_meets_a_stranger(tmp_path: Path, answer: bytes, words: str) -> None:
    """A socket that belongs to another program, or another version, is one clear line."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "c"))
        sock.listen()

        def stranger() -> None:
            connection, _ = sock.accept()
            with connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1000):
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, stranger)
            with pytest.raises(ControlError, match=words):
                await in_thread(partial(status_of, tmp_path / "c"))


def test_client_without_daemon(tmp_path: Path) -> None:
    """No socket, and a socket nobody listens on, are told apart."""
    with pytest.raises(ControlError, match=r"no daemon answers at .*No such file"):
        status_of(tmp_path / "c")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "c"))
    with pytest.raises(ControlError, match=r"no daemon answers at .*refused"):
        status_of(tmp_path / "c")


def test_client_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A daemon that accepts and says nothing is given up after the timeout."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "c"))
        sock.listen()
        with pytest.raises(ControlError, match="does not answer"):
            ControlClient(tmp_path / "c", timeout_s=0.05)


@pytest.mark.parametrize("make", [ControlServer, MetricsServer])
async def test_a_socket_that_nobody_can_be_accepted_from(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again now and then, and not in a loop that never waits."""
    accept, tried = Listener.accept, 0

    async def counted(listener: Listener) -> Any:
        nonlocal tried
        tried += 1
        return await accept(listener)

    monkeypatch.setattr(Listener, "accept", counted)
    with trio.move_on_after(0.5) as scope:
        await make(None).serve(socket.socket(socket.AF_UNIX))  # which does not listen
    assert scope.cancelled_caught
    assert 1 <= tried <= 1 + 0.5 / EXHAUSTED_WAIT_S
