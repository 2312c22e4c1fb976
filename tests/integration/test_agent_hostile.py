"""Peers that break the rules, on either side: their own connection ends, memory is bounded, reasons are clear."""

from __future__ import annotations

import socket
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
import trio.lowlevel

from agentbed import served
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import Phase, Range, Role
from vfiouser_agents.errors import AgentError, ConnectError, ProtocolError, TransportLost
from vfiouser_agents.memory import MemoryAgent
from vfiouser_agents.rpc.core import NoRequests, RpcConnection
from vfiouser_agents.rpc.endpoint import parse_address
from vfiouser_agents.rpc.methods import PROTOCOL
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.rpc.server import HELLO_TIMEOUT, MAX_CONNECTIONS

HELLO = {"protocol": PROTOCOL, "versions": [1], "max_message": 1 << 20}
GREETING = {"vendor": "v", "product": "p", "protocol": PROTOCOL, "protocol_version": 1}
#: Bytes that are no messages of the protocol, or promise more than they are.
GARBAGE = {
    "reserved byte": b"\xc1",
    "a number": b"\x05",
    "text": msgpack.packb("hello"),
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "empty array": b"\x90",
    "unknown type": msgpack.packb([7, 1, "x", []]),
    "boolean type": msgpack.packb([False, 1, "x", []]),
    "negative id": msgpack.packb([0, -1, "x", []]),
    "id of 64 bits": msgpack.packb([0, 1 << 40, "x", []]),
    "method of bytes": msgpack.packb([0, 1, b"x", []]),
    "two params": msgpack.packb([0, 1, "x", [{}, {}]]),
    "params of numbers": msgpack.packb([0, 1, "x", [5]]),
    "params with bytes as key": msgpack.packb([0, 1, "x", [{b"a": 1}]]),
    "numbers as keys": msgpack.packb({1: 2}),
    "extension": msgpack.packb(msgpack.ExtType(4, b"abcd")),
    "timestamp": msgpack.packb(msgpack.Timestamp(1, 1)),
    "text that is no UTF-8": b"\xa2\xff\xfe",
    "array of 4G": b"\xdd\xff\xff\xff\xff",
    "map of 4G": b"\xdf\xff\xff\xff\xff",
    "extension of 4G": b"\xc9\xff\xff\xff\xff\x01",
    "deep arrays": b"\x91" * 100_000,
    "deep maps": b"\x81\xa0" * 100_000,
    "deep and wide": b"\xdc\x08\x00" * 100_000,
    "many values": msgpack.packb([0, 1, "x", [{"a": [[0] * 2000] * 40}]]),
    "an answer that nobody waits for": msgpack.packb([1, 99, None, None]),
}


class Raw:
    """A client that says what it likes.

    Args:
        stream: the connection.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._unpacker = msgpack.Unpacker()

    async def say(self, message: Any) -> None:
        """Send anything that msgpack can write."""
        await self.stream.send_all(msgpack.packb(message))

    async def hear(self) -> Any:
        """The next message; None when the connection has ended."""
        while True:
            for message in self._unpacker:
                return message
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self._unpacker.feed(data)

    async def call(self, method: str, params: Any, id_: int = 1) -> Any:
        """A request and its answer: the pair of error and result."""
        await self.say([0, id_, method, [params]])
        answer = await self.hear()
        assert [1, id_] == answer[:2]
        return answer[2:]


@asynccontextmanager
async def raw_client(path: Path) -> AsyncIterator[Raw]:
    """A `Raw` at a server's socket."""
    async with await trio.open_unix_socket(path) as stream:
        yield Raw(stream)


@asynccontextmanager
async def hostile_agent(path: Path, behave: Callable[[Raw], Awaitable[None]]) -> AsyncIterator[MsgpackRpcAgent]:
    """A client of an agent that behaves as it is told on each connection."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await behave(Raw(stream))
        except trio.BrokenResourceError:
            pass

    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(path))
    socket.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(socket)])
        async with MsgpackRpcAgent(parse_address(f"unix://{path}")) as client:
            yield client
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", GARBAGE)
@pytest.mark.parametrize("greeted", [False, True])
async def test_garbage_to_the_server(name: str, greeted: bool, tmp_path: Path) -> None:
    """Garbage ends its own connection, costs little memory, and other clients notice nothing."""
    async with served(MemoryAgent(), "unix", tmp_path) as server, server.client() as good:
        session = await good.open("f0")
        tracemalloc.start()
        try:
            async with raw_client(tmp_path / "agent.sock") as bad:
                if greeted:
                    assert (await bad.call("agent.hello", HELLO))[0] is None
                try:
                    await bad.stream.send_all(GARBAGE[name])
                except trio.BrokenResourceError:
                    pass
                with trio.fail_after(5):
                    assert await bad.hear() is None
            assert 64 << 20 > tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        await session.stop()
        await session.resume()


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_to_the_client(name: str, tmp_path: Path) -> None:
    """An agent that sends garbage instead of an answer: the call fails as a broken protocol, and is not repeated."""

    async def behave(raw: Raw) -> None:
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, None, GREETING])
        await raw.hear()
        await raw.stream.send_all(GARBAGE[name])
        await raw.hear()

    async with hostile_agent(tmp_path / "x.sock", behave) as client:
        with trio.fail_after(5), pytest.raises(ProtocolError, match="connection is closed"):
            await client.functions()


@pytest.mark.parametrize(
    "head",
    [b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x94\x00\x01\xa1x\x91\x81\xa1a\xdc\x07\xff"],
    ids=["bytes of 4G", "text of 4G", "a list of long texts"],
)
async def test_a_message_without_end(head: bytes, tmp_path: Path) -> None:
    """A message that grows beyond the limit is cut off, although none of its parts may be too large."""
    piece = msgpack.packb("x" * 60_000)
    async with served(MemoryAgent(), "unix", tmp_path), raw_client(tmp_path / "agent.sock") as bad:
        await bad.stream.send_all(head)
        sent = 0
        try:
            while sent < 100 << 20:
                await bad.stream.send_all(piece)
                sent += len(piece)
        except trio.BrokenResourceError:
            pass
        assert sent < 20 << 20


async def test_a_client_that_never_greets(tmp_path: Path, autojump_clock: trio.abc.Clock) -> None:
    """A connection that does not say hello in time is closed; before it, nothing else is answered."""
    async with served(MemoryAgent(), "unix", tmp_path), raw_client(tmp_path / "agent.sock") as bad:
        error, _ = await bad.call("agent.functions", {})
        assert "invalid-state" == error["code"]
        assert await bad.hear() is None
        assert HELLO_TIMEOUT == pytest.approx(trio.current_time(), abs=1)


async def test_too_many_connections(tmp_path: Path) -> None:
    """Connections beyond the limit are closed at once, and there is room again when one goes."""
    async with served(MemoryAgent(), "unix", tmp_path) as server:
        streams = [await trio.open_unix_socket(tmp_path / "agent.sock") for _ in range(MAX_CONNECTIONS)]
        for stream in streams:
            assert (await Raw(stream).call("agent.hello", HELLO))[0] is None
        async with server.client() as client:
            with pytest.raises(ConnectError, match="ended the connection"):
                await client.connect()
            for stream in streams:
                await stream.aclose()
            with trio.fail_after(30):
                while True:  # a connection is over when its server has heard so
                    try:
                        await client.connect()
                        break
                    except ConnectError:
                        await trio.lowlevel.checkpoint()
            await client.connect()


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("agent.hello", {"protocol": PROTOCOL, "versions": [9], "max_message": 1 << 20}, "unsupported"),
        ("agent.hello", {"protocol": "other", "versions": [1], "max_message": 1 << 20}, "unsupported"),
        ("agent.hello", {"protocol": PROTOCOL, "versions": "1", "max_message": 1 << 20}, "invalid-argument"),
        ("agent.hello", {"protocol": PROTOCOL, "versions": [1], "max_message": 1}, "invalid-argument"),
        ("no.such", {}, "unsupported"),
        ("session.open", {}, "invalid-argument"),
        ("session.open", {"function": b"f0"}, "invalid-argument"),
        ("session.open", {"function": "f9"}, "not-found"),
        ("migration.stop", {"session": 77}, "not-found"),
        ("migration.stop", {"session": True}, "invalid-argument"),
        ("migration.stop", {}, "invalid-argument"),
        ("migration.begin", {"session": 1, "role": "boss", "migration_id": "m"}, "invalid-argument"),
        ("migration.save", {"session": 1, "offset": -1, "limit": 1, "phase": "final"}, "invalid-argument"),
        ("migration.save", {"session": 1, "offset": 1 << 63, "limit": 1, "phase": "final"}, "invalid-state"),
        ("migration.load", {"session": 1, "offset": 0, "data": "no base64!"}, "invalid-argument"),
        ("migration.check", {"session": 1, "descriptor": {"format_id": "x"}}, "invalid-argument"),
        ("dirty.start", {"session": 1, "ranges": [[1]], "page_size": 4096}, "invalid-argument"),
        ("dirty.start", {"session": 1, "ranges": [5], "page_size": 4096}, "invalid-argument"),
        ("dirty.start", {"session": 1, "page_size": 4096}, "invalid-argument"),
        ("dirty.report", {"session": 1, "iova": 0, "length": 1.5}, "invalid-argument"),
    ],
)
async def test_parameters_that_cannot_be_used(method: str, params: dict[str, Any], code: str, tmp_path: Path) -> None:
    """A wrong parameter is answered with a typed error, and the connection goes on."""
    async with served(MemoryAgent(), "unix", tmp_path), raw_client(tmp_path / "agent.sock") as client:
        await client.call("agent.hello", HELLO)
        assert 1 == (await client.call("session.open", {"function": "f0"}))[1]["session"]
        error, result = await client.call(method, params, 2)
        assert (code, None) == (error["code"], result)
        assert [None, None] == await client.call("agent.ping", {}, 3)


async def test_sessions_are_limited(tmp_path: Path) -> None:
    """A connection cannot open sessions without bound, and closing one makes room."""
    async with served(MemoryAgent(), "unix", tmp_path), raw_client(tmp_path / "agent.sock") as client:
        _, info = await client.call("agent.hello", HELLO)
        for _ in range(info["max_sessions"]):
            assert (await client.call("session.open", {"function": "f0"}))[0] is None
        error, _ = await client.call("session.open", {"function": "f0"})
        assert ("no-resources", info["max_sessions"]) == (error["code"], error["limits"]["max_sessions"])
        await client.call("session.close", {"session": 1})
        assert (await client.call("session.open", {"function": "f0"}))[0] is None


async def test_a_client_that_asks_and_never_reads(tmp_path: Path) -> None:
    """A flood of requests whose answers nobody reads is held up rather than stored, and others are served."""
    async with (
        served(MemoryAgent(), "unix", tmp_path) as server,
        server.client() as good,
        raw_client(tmp_path / "agent.sock") as bad,
    ):
        await bad.call("agent.hello", HELLO)
        request = msgpack.packb([0, 7, "agent.functions", [{}]]) * 1000
        with trio.move_on_after(0.5) as scope:
            while True:
                await bad.stream.send_all(request)
        assert scope.cancelled_caught
        await good.open("f0")


LIES: dict[str, tuple[str, Any, Callable[[Any], Awaitable[Any]]]] = {
    "too much state": (
        "migration.save",
        {"data": bytes(101), "eof": False, "drained": False},
        lambda session: session.save(0, 100, Phase.FINAL),
    ),
    "no state": ("migration.save", {"data": b""}, lambda session: session.save(0, 100, Phase.FINAL)),
    "eof in pre-copy": (
        "migration.save",
        {"data": b"x", "eof": True},
        lambda session: session.save(0, 9, Phase.PRECOPY),
    ),
    "text as state": ("migration.save", {"data": "x"}, lambda session: session.save(0, 9, Phase.FINAL)),
    "unknown state": ("migration.status", {"state": "asleep"}, lambda session: session.status()),
    "no status": ("migration.status", None, lambda session: session.status()),
    "negative estimate": ("migration.estimate", {"stop_copy_bytes": -1}, lambda session: session.estimate()),
    "half a descriptor": ("migration.describe", {"format_id": "x"}, lambda session: session.describe()),
    "odd page size": ("dirty.start", {"page_size": 3000}, lambda session: session.dirty_start([Range(0, 4096)], 4096)),
    "no page size": ("dirty.start", 4096, lambda session: session.dirty_start([Range(0, 4096)], 0)),
    "short bitmap": ("dirty.report", {"bitmap": b""}, lambda session: session.dirty_report(0, 4096)),
    "ranges elsewhere": ("dirty.report", {"ranges": [[8192, 4096]]}, lambda session: session.dirty_report(0, 4096)),
}


@pytest.mark.parametrize("name", LIES)
async def test_answers_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    """An agent's answer is checked before anybody believes it; the connection goes on."""
    lying, answer, ask = LIES[name]
    if isinstance(answer, int):
        answer = {"page_size": 0}

    async def behave(raw: Raw) -> None:
        truth = {
            "agent.hello": GREETING,
            "session.open": {"session": 1, "capabilities": {}},
            "migration.status": {"state": "running"},
        }
        while message := await raw.hear():
            _, id_, method, _ = message
            await raw.say([1, id_, None, answer if method == lying else truth.get(method)])

    async with hostile_agent(tmp_path / "x.sock", behave) as client:
        session = await client.open("f0")
        with pytest.raises(ProtocolError):
            await ask(session)
        await session.stop()


@pytest.mark.parametrize(
    "greeting",
    [
        {},
        {**GREETING, "protocol": "other"},
        {**GREETING, "protocol_version": 2},
        {**GREETING, "max_message": "much"},
        5,
        None,
    ],
)
async def test_greetings_that_cannot_be_used(greeting: Any, tmp_path: Path) -> None:
    """An agent that speaks something else is named as such."""

    async def behave(raw: Raw) -> None:
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, None, greeting])
        await raw.hear()

    async with hostile_agent(tmp_path / "x.sock", behave) as client:
        with pytest.raises(ProtocolError):
            await client.connect()


async def test_an_agent_that_accepts_and_is_silent(tmp_path: Path, autojump_clock: trio.abc.Clock) -> None:
    """Without a greeting in time the attempt ends; several callers wait for the same one."""

    async def behave(raw: Raw) -> None:
        await trio.sleep_forever()

    async with hostile_agent(tmp_path / "x.sock", behave) as client, trio.open_nursery() as nursery:

        async def attempt() -> None:
            with pytest.raises(ConnectError, match="did not answer within 5 s"):
                await client.connect()

        for _ in range(3):
            nursery.start_soon(attempt)


@pytest.mark.parametrize(
    "error",
    [
        "a word",
        5,
        [],
        {},
        {"code": 5},
        {"code": "from-the-future", "message": "m"},
        {"code": "no-resources", "limits": 1},
    ],
)
async def test_errors_that_are_not_understood(error: Any, tmp_path: Path) -> None:
    """Whatever an agent sends as its error, the caller gets an `AgentError`."""

    async def behave(raw: Raw) -> None:
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, None, GREETING])
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, error, None])
        await raw.hear()

    async with hostile_agent(tmp_path / "x.sock", behave) as client:
        with pytest.raises(AgentError):
            await client.functions()


async def test_an_answer_that_comes_twice(tmp_path: Path) -> None:
    """A second answer to the same call breaks the protocol, rather than becoming the answer to another call."""

    async def behave(raw: Raw) -> None:
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, None, GREETING])
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, None, {"functions": []}])
        await raw.hear()
        await raw.say([1, id_, None, {"functions": []}])
        await raw.hear()

    async with hostile_agent(tmp_path / "x.sock", behave) as client:
        assert () == await client.functions()
        with pytest.raises(ProtocolError, match="is not open"):
            await client.functions()


async def test_a_connection_cut_in_the_middle_of_a_message(tmp_path: Path) -> None:
    """Half an answer and the end of the connection: the call is lost."""

    async def behave(raw: Raw) -> None:
        _, id_, *_ = await raw.hear()
        await raw.say([1, id_, None, GREETING])
        _, id_, *_ = await raw.hear()
        await raw.stream.send_all(msgpack.packb([1, id_, None, {"functions": []}])[:-3])
        await raw.stream.aclose()

    async with hostile_agent(tmp_path / "x.sock", behave) as client:
        with pytest.raises(TransportLost):
            await client.functions()


async def test_an_agent_with_a_mistake_in_it(tmp_path: Path) -> None:
    """An agent's method that raises anything else ends that call and nothing more."""

    class Mistaken(MemoryAgent):
        async def functions(self) -> Any:
            raise KeyError("secret")

    async with served(Mistaken(), "unix", tmp_path) as server, server.client() as client:
        with pytest.raises(AgentError, match="failed inside the agent: KeyError") as caught:
            await client.functions()
        assert "secret" not in str(caught.value)
        session = await client.open("f0")
        await session.begin(Role.SOURCE, "m")


FLOOD = """
import socket, sys
import msgpack
event = {"session": 1, "event": {"kind": "size-changed", "detail": "x" * 50}}
data = msgpack.packb([2, "session.event", [event]]) * 2000
sock = socket.socket(fileno=int(sys.argv[1]))
try:
    while True:
        sock.sendall(data)
except OSError:
    pass
"""


async def test_a_flood_of_events_has_its_turn_and_no_more(tmp_path: Path) -> None:
    """An agent that always has sent more than was read, faster than it can be read, holds up nobody else."""
    ours, theirs = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    connection = RpcConnection(stream, MsgpackCodec(), NoRequests())
    with theirs:
        command = [sys.executable, "-c", FLOOD, str(theirs.fileno())]
        process = await trio.lowlevel.open_process(command, pass_fds=[theirs.fileno()])
    longest = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        while connection.received < 2 << 20:
            before = time.monotonic()
            await trio.lowlevel.checkpoint()
            longest = max(longest, time.monotonic() - before)
        connection.close(TransportLost("enough"))
    process.kill()
    await process.wait()
    assert longest < 0.25
