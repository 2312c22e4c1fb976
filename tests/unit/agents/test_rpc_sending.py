"""Several tasks that send on one connection at the same time: every message goes out, whole."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vfiouser_agents.rpc.carrier import carrier
from vfiouser_agents.rpc.core import Answer, NoRequests, RpcConnection
from vfiouser_agents.rpc.messages import Codec
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec

ROUNDS = 200
MOST_UNSENT = int(Path("/proc/sys/net/core/wmem_max").read_text(encoding="ascii"))


class Talkative(NoRequests):
    """A peer that tells of each call while it answers, from another task."""

    def __init__(self) -> None:
        self.connection: RpcConnection | None = None
        self.nursery: trio.Nursery | None = None

    def request(self, method: str, params: dict[str, Any]) -> Answer:
        """Answer with what came, and have events sent meanwhile."""
        assert self.nursery is not None
        assert self.connection is not None
        for number in range(3):
            self.nursery.start_soon(self.connection.notify, "event", {"number": number})

        async def answer() -> Any:
            await trio.lowlevel.checkpoint()
            return params

        return answer


class Listens(NoRequests):
    """Counts events."""

    def __init__(self) -> None:
        self.events = 0

    def notification(self, method: str, params: dict[str, Any]) -> None:
        """An event."""
        self.events += 1


async def talk(near: trio.abc.Stream, far: trio.abc.Stream, codec: type[Codec] = MsgpackCodec) -> int:
    """Make calls over a pair of streams, all of which have to be answered; returns the number of events that came."""
    peer, listener = Talkative(), Listens()
    caller = RpcConnection(near, codec(), listener)
    peer.connection = RpcConnection(far, codec(), peer)
    async with trio.open_nursery() as nursery:
        peer.nursery = nursery
        nursery.start_soon(caller.run)
        nursery.start_soon(peer.connection.run)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(ROUNDS):
            with trio.fail_after(5):
                assert {"n": number} == await caller.call("m", {"n": number})
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    return listener.events


async def test_answers_beside_events_over_any_stream() -> None:
    """A stream without a descriptor, as TLS is, where each message has to be waited for."""
    assert 3 * ROUNDS == await talk(*trio.testing.memory_stream_pair())


async def test_answers_beside_events_over_a_socket() -> None:
    """A socket, where messages are sent at once if nobody else is sending."""
    near, far = trio.socket.socketpair()
    assert 3 * ROUNDS == await talk(trio.SocketStream(near), trio.SocketStream(far))


@pytest.mark.parametrize("size", [1, 300_000])
async def test_answers_beside_events_over_a_full_socket(size: int) -> None:
    """A socket that takes only a part of what is to be sent: what is sent by another task comes behind the rest."""
    near, far = trio.socket.socketpair()
    far.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
    listener = Listens()
    caller = RpcConnection(trio.SocketStream(near), MsgpackCodec(), listener)
    peer = Talkative()
    peer.connection = RpcConnection(trio.SocketStream(far), MsgpackCodec(), peer)
    async with trio.open_nursery() as nursery:
        peer.nursery = nursery
        nursery.start_soon(caller.run)
        nursery.start_soon(peer.connection.run)
        await trio.testing.wait_all_tasks_blocked()

        async def call(number: int) -> None:
            data = bytes([number]) * size
            assert {"n": number, "data": data} == await caller.call("m", {"n": number, "data": data})

        with trio.fail_after(20):
            async with trio.open_nursery() as calls:
                for number in range(40):
                    calls.start_soon(call, number)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert 120 == listener.events


@pytest.mark.parametrize(("own", "size"), [("127.0.0.1", 512 << 10), ("127.0.0.2", 2 << 20)])
async def test_less_is_under_way_within_one_machine(own: str, size: int) -> None:
    """A connection between two addresses may hold a whole message, one within an address only what caches hold; where
    the system permits neither, it is left as it is.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        plain = socket.create_connection(listener.getsockname(), source_address=(own, 0))
        before = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(plain)) as stream:
            carrier(stream)
            held = stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    # The system counts its own bookkeeping, for which it doubles what it is told.
    assert (2 * size if size <= MOST_UNSENT else before) == held
