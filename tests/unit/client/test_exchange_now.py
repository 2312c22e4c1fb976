"""`exchange_now`: a reply found by looking for it, together with the reader task that would find it otherwise."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio
import trio.testing

from fakeserver import Answer, connected
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.dma import DmaServer
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.transport.activity import Activity
from vfiouser_protocol.capabilities import VersionCapabilities, encode_version
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import HEADER_SIZE, Command
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.header import pack_header, unpack_header
from vfiouser_protocol.messages import DmaRead, RegionRead, RegionReadReply
from vfiouser_protocol.session import CommandReceived

#: Long enough for a thread to answer on a busy machine; the spin ends with the answer.
PATIENT_NS = 2_000_000_000

Talk = Callable[[socket.socket, int, bytes], None]


def receive(sock: socket.socket) -> tuple[int, int, bytes]:
    """Read one message with blocking calls: id, command, payload."""
    header = unpack_header(sock.recv(HEADER_SIZE, socket.MSG_WAITALL))
    size = header.msg_size - HEADER_SIZE
    return header.msg_id, header.command, sock.recv(size, socket.MSG_WAITALL) if size else b""


def send(sock: socket.socket, msg_id: int, command: int, payload: bytes, flags: int = 1, error: int = 0) -> None:
    """Send one message, a reply unless `flags` says otherwise."""
    sock.sendall(pack_header(msg_id, command, HEADER_SIZE + len(payload), flags, error) + payload)


def echo(sock: socket.socket, msg_id: int, payload: bytes) -> None:
    """Answer a read with its own offset."""
    offset, region, count = decode(RegionRead, payload)
    reply = RegionReadReply(offset, region, count, offset.to_bytes(count, "little"))
    send(sock, msg_id, Command.REGION_READ, encode(reply))


@contextmanager
def thread_server(talk: Talk) -> Iterator[socket.socket]:
    """A server in a thread, since one in our own event loop cannot answer while we spin."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            msg_id, command, _ = receive(theirs)
            send(theirs, msg_id, command, encode_version(VersionCapabilities(), 0))
            try:
                while True:
                    msg_id, command, payload = receive(theirs)
                    if command == Command.REGION_READ:
                        talk(theirs, msg_id, payload)
                    else:
                        send(theirs, msg_id, command, b"")
            except Exception:  # noqa: BLE001  the client has gone, or `talk` wants to
                return

    thread = threading.Thread(target=serve)
    thread.start()
    yield ours
    thread.join()


def patient() -> Activity:
    """Spinning that outlasts every answer, also where a single processor would switch it off."""
    activity = Activity()
    activity._spin_ns = PATIENT_NS
    return activity


@asynccontextmanager
async def spinning_client(talk: Talk, dma_server: DmaServer | None = None) -> AsyncIterator[Client]:
    """A client that has seen a quick reply, so that it thinks looking is worth while."""
    activity = patient()
    with thread_server(talk) as sock:
        async with Client.from_socket(sock, activity=activity, dma_server=dma_server) as client:
            # However slow this machine is, the last round trip counts as quick.
            client._round_trip_ns = 0
            yield client
    activity.close()


async def test_reply_is_found_without_waiting() -> None:
    """The reply is there when the call returns, and no other task has run meanwhile."""
    async with spinning_client(echo) as client:
        others_ran = False

        async def other() -> None:
            nonlocal others_ran
            others_ran = True

        call = client.exchange_now(Command.REGION_READ, encode(RegionRead(0x1234, 0, 4)))
        assert call.done
        assert b"\x34\x12\0\0" == decode(RegionReadReply, call.take().payload).data
        assert not others_ran
        assert 0 == client.outstanding


async def test_typed_accesses_return_at_once() -> None:
    """Read and write come back as values, not as something to wait for, and mix with ordinary calls."""
    async with spinning_client(echo) as client:
        for offset in range(0, 400, 4):
            client._round_trip_ns = 0
            assert offset.to_bytes(4, "little") == client.region_read_now(0, offset, 4)
            assert b"\7\0" == await client.region_read(0, 7, 2)


async def test_error_reply_is_raised() -> None:
    """A refusal found by looking is raised like any other."""

    def refuse(sock: socket.socket, msg_id: int, payload: bytes) -> None:
        send(sock, msg_id, Command.REGION_READ, b"", flags=0x21, error=22)

    async with spinning_client(refuse) as client:
        with pytest.raises(ReplyError):
            client.region_read_now(0, 0, 4)


async def test_servers_command_in_between_is_served_in_order() -> None:
    """A DMA_READ that arrives before the reply is handed to its task, and answered once that may run."""
    answered = threading.Event()

    def read_memory_first(sock: socket.socket, msg_id: int, payload: bytes) -> None:
        send(sock, 9, Command.DMA_READ, encode(DmaRead(0, 4)), flags=0)
        echo(sock, msg_id, payload)
        assert (9, Command.DMA_READ) == receive(sock)[:2]
        answered.set()

    with ClientMemory(4096) as memory:
        async with spinning_client(read_memory_first, dma_server=memory) as client:
            result = client.region_read_now(0, 4, 4)
            assert b"\4\0\0\0" == (result if isinstance(result, bytes) else await result)
            assert await trio.to_thread.run_sync(answered.wait, 10)
            assert 1 == memory.message_reads


async def test_server_that_goes_while_we_look() -> None:
    """The end of the stream found by looking fails the call and ends the connection."""

    def leave(sock: socket.socket, msg_id: int, payload: bytes) -> None:
        raise ConnectionAbortedError

    async with spinning_client(leave) as client:
        with pytest.raises(ServerGone):
            client.region_read_now(0, 0, 4)
        assert "closed" in await client.wait_gone()


async def test_late_reply_is_waited_for() -> None:
    """When the moment passes without a reply the caller waits as usual, and the reader task delivers."""
    activity = Activity(spin_ns=1000)
    release = trio.Event()

    async def later(event: CommandReceived) -> Answer:
        await release.wait()
        return server.region_read(event)

    async with connected(handlers={Command.REGION_READ: later}, activity=activity) as (client, server):
        client._round_trip_ns = 0
        result = client.region_read_now(0, 0, 4)
        assert not isinstance(result, bytes)
        release.set()
        assert bytes(4) == await result
    activity.close()


async def test_nobody_looks_while_others_have_work() -> None:
    """With another socket readable or another task ready the call does not spin at all."""
    activity = patient()
    busy, peer = socket.socketpair()
    with busy, peer:
        activity.register(busy.fileno())
        peer.send(b"work")
        async with connected(activity=activity) as (client, _):
            client._round_trip_ns = 0
            # With a server in this very event loop, a spin would last for seconds and then find nothing.
            with trio.fail_after(1):
                result = client.region_read_now(0, 0, 4)
                assert bytes(4) == (result if isinstance(result, bytes) else await result)
        activity.unregister(busy.fileno())
    activity.close()


async def test_slow_servers_are_not_looked_for() -> None:
    """After a slow reply the client does not spin, since it would be in vain."""
    activity = patient()
    async with connected(activity=activity) as (client, _):
        client._round_trip_ns = 1_000_000
        with trio.fail_after(1):
            result = client.region_read_now(0, 0, 4)
            assert bytes(4) == (result if isinstance(result, bytes) else await result)
    activity.close()
