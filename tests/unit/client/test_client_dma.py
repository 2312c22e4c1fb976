"""The server's own commands: served in order, on the right socket, and like QEMU only in their turn."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from fakeserver import Answer, connected
from vfiouser_oob.client.dma import DmaServer, DmaService
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.transport.message_socket import MessageSocket
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import DmaFault, ReplyError
from vfiouser_protocol.messages import DmaRead, DmaWrite, RegionRead, RegionReadReply
from vfiouser_protocol.session import CommandReceived, ReplyReceived
from wire_pair import joined


@pytest.mark.parametrize("grant_twin", [False, True])
async def test_client_memory_is_served(grant_twin: bool) -> None:
    """The device reads and writes memory by messages, over the main or the twin socket."""
    with ClientMemory(65536, base=0x10000) as memory:
        async with connected(grant_twin=grant_twin, dma_server=memory) as (_, server):
            await server.dma_write(0x10010, b"from the device")
            assert b"the device" == await server.dma_read(0x10015, 10)
        assert (1, 1) == (memory.message_reads, memory.message_writes)
        with memory.view(0x10010, 4) as view:
            assert b"from" == bytes(view)


@pytest.mark.parametrize(
    ("address", "count", "number"),
    [(0xFFFF, 2, errno.ENODEV), (0x1FFFF, 2, errno.ENODEV), (0x10000, 2 << 20, errno.E2BIG)],
)
async def test_impossible_accesses_get_an_errno(address: int, count: int, number: int) -> None:
    """Memory that is not there and transfers beyond the announced size are refused with QEMU's numbers."""
    with ClientMemory(65536, base=0x10000) as memory:
        async with connected(dma_server=memory) as (_, server):
            with pytest.raises(ReplyError) as caught:
                await server.dma_read(address, count)
            assert number == caught.value.errno
            assert bytes(4) == await server.dma_read(0x10000, 4)


async def test_client_without_memory_refuses() -> None:
    """A client that serves nothing answers ENODEV."""
    async with connected() as (_, server):
        for access in (server.dma_read(0, 4), server.dma_write(0, b"data")):
            with pytest.raises(ReplyError) as caught:
                await access
            assert errno.ENODEV == caught.value.errno


async def test_malformed_command_is_answered() -> None:
    """A DMA_WRITE whose count contradicts its length is refused, and the next one is served."""
    with ClientMemory(4096) as memory:
        async with connected(dma_server=memory) as (_, server):
            reply = await server.submit(Command.DMA_WRITE, encode(DmaRead(0, 100)) + b"short")()
            assert reply.header.is_error
            assert errno.EINVAL == reply.header.error
            await server.dma_write(0, b"good")


class SlowMemory(DmaServer):
    """Memory that takes its time, and notes what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.go_on = trio.Event()

    async def read(self, address: int, count: int) -> bytes:
        """Serve at once."""
        self.log.append(f"read {address:#x}")
        return bytes(count)

    async def write(self, address: int, data: bytes) -> None:
        """Serve when the test allows it."""
        self.log.append(f"write {address:#x} begins")
        await self.go_on.wait()
        self.log.append(f"write {address:#x} ends")
        if not data:
            raise DmaFault("nothing to write", errno.EPERM)


async def test_commands_are_served_in_order() -> None:
    """A read that follows a write is served after it, even when the device waited for neither."""
    memory = SlowMemory()
    async with connected(dma_server=memory) as (_, server):
        write = server.submit(Command.DMA_WRITE, encode(DmaWrite(0x10, 1, b"x")))
        read = server.submit(Command.DMA_READ, encode(DmaRead(0x20, 1)))
        await trio.testing.wait_all_tasks_blocked()
        memory.go_on.set()
        await read()
        await write()
    assert ["write 0x10 begins", "write 0x10 ends", "read 0x20"] == memory.log


async def test_refusal_has_its_turn() -> None:
    """A command too short to be executed is refused after those that came before it were answered."""
    memory = SlowMemory()
    async with connected(dma_server=memory) as (_, server):
        write = server.submit(Command.DMA_WRITE, encode(DmaWrite(0x10, 1, b"x")))
        read = server.submit(Command.DMA_READ, bytes(4))
        await trio.testing.wait_all_tasks_blocked()
        assert [] == server.replies
        memory.go_on.set()
        await read()
        await write()
    assert [0, errno.EINVAL] == [reply.header.error for reply in server.replies]


async def test_posted_dma_write_is_not_answered() -> None:
    """NO_REPLY holds in this direction, too."""
    with ClientMemory(4096) as memory:
        async with connected(dma_server=memory) as (_, server):
            _, data = server.session.command(Command.DMA_WRITE, encode(DmaWrite(0, 4, b"post")), no_reply=True)
            server.main.send(data)
            assert b"post" == await server.dma_read(0, 4)


@pytest.mark.parametrize("patient", [False, True])
async def test_dma_during_an_own_region_access(patient: bool) -> None:
    """With `serve_dma_when_idle` DMA waits for the reply to our access, as in QEMU; without, it does not."""
    with ClientMemory(4096) as memory:
        served_during_access: list[bool] = []

        async def read(event: CommandReceived) -> Answer:
            request = decode(RegionRead, event.payload)
            answer = server.submit(Command.DMA_READ, encode(DmaRead(0, 4)))
            assert server.nursery is not None
            server.nursery.start_soon(note, answer)
            await trio.testing.wait_all_tasks_blocked()
            served_during_access.append(memory.message_reads == 1)
            return Answer(encode(RegionReadReply(*request, bytes(request.count))))

        async def note(answer: Callable[[], Awaitable[ReplyReceived]]) -> None:
            await answer()
            answered.set()

        answered = trio.Event()
        async with connected(handlers={Command.REGION_READ: read}, dma_server=memory, serve_dma_when_idle=patient) as (
            client,
            server,
        ):
            await client.region_read(0, 0, 4)
            await answered.wait()
    assert [not patient] == served_during_access


async def test_cancelled_access_lets_dma_through() -> None:
    """An access that is given up, like QEMU's after its time-out, does not block DMA for ever."""

    def never(_: CommandReceived) -> Answer:
        return Answer(raw=b"")

    with ClientMemory(4096) as memory:
        async with connected(handlers={Command.REGION_READ: never}, dma_server=memory, serve_dma_when_idle=True) as (
            client,
            server,
        ):
            with trio.move_on_after(0.01):
                await client.region_read(0, 0, 4)
            assert bytes(4) == await server.dma_read(0, 4)


async def test_flood_without_waiting_ends_the_connection() -> None:
    """A server that sends DMA without end while none can be served is cut off instead of buffered."""
    memory = SlowMemory()
    async with connected(dma_server=memory) as (client, server):
        for _ in range(5000):
            server.submit(Command.DMA_WRITE, encode(DmaWrite(0, 1, b"x")))
        assert "commands" in await client.wait_gone()


async def test_flood_of_large_writes_waits_in_the_servers_socket() -> None:
    """What is not served yet is not read, either: 64 MiB stay where they are, and arrive once there is room."""
    gate = trio.Event()
    memory = GatedMemory(gate)
    async with connected(dma_server=memory) as (client, server):
        answers = [server.submit(Command.DMA_WRITE, encode(DmaWrite(0, 1 << 20, bytes(1 << 20)))) for _ in range(64)]
        await memory.began.wait()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert server.main.congested
        assert client.failure is None
        gate.set()
        for answer in answers:
            await answer()
    assert 64 == memory.written


async def test_flood_of_large_writes_that_cannot_be_served_ends_the_connection() -> None:
    """Behind an access of our own they have to be read, since its reply comes after them; but not without end."""

    def never(_: CommandReceived) -> Answer:
        for _turn in range(100):
            server.submit(Command.DMA_WRITE, encode(DmaWrite(0, 1 << 20, bytes(1 << 20))))
        return Answer(raw=b"")

    with ClientMemory(1 << 20) as memory:
        async with connected(handlers={Command.REGION_READ: never}, dma_server=memory, serve_dma_when_idle=True) as (
            client,
            server,
        ):
            with pytest.raises(ServerGone, match="without waiting"):
                await client.region_read(0, 0, 4)


class GatedMemory(DmaServer):
    """Takes writes once a gate is open."""

    def __init__(self, gate: trio.Event) -> None:
        self.gate = gate
        self.began = trio.Event()
        self.written = 0

    async def read(self, address: int, count: int) -> bytes:
        """There is nothing to read."""
        raise DmaFault("nothing to read")

    async def write(self, address: int, data: bytes) -> None:
        """Wait for the gate."""
        self.began.set()
        await self.gate.wait()
        self.written += 1


async def test_every_message_can_be_traced() -> None:
    """Commands and replies of both sides appear as one readable line each, in order, without their data."""
    lines: list[str] = []
    with ClientMemory(4096) as memory:
        async with connected(dma_server=memory, trace=lines.append) as (client, server):
            await client.region_write(0, 0, b"secret!!")
            await server.dma_write(0, b"secret!!")
    marks = [(line.split()[0], line.split()[1], "reply" in line.split()) for line in lines]
    assert [
        (">", "VERSION", False),
        ("<", "VERSION", True),
        (">", "REGION_WRITE", False),
        ("<", "REGION_WRITE", True),
        ("<", "DMA_WRITE", False),
        (">", "DMA_WRITE", True),
    ] == marks
    assert not any("secret" in line for line in lines)


async def test_what_comes_after_the_end_is_not_served() -> None:
    """What waited when the connection ended is never answered, so nothing behind it may be: it is not its turn."""
    pair = joined()
    ours, theirs = socket.socketpair()
    channel = MessageSocket(ours, 1 << 20)
    with ClientMemory(4096) as memory, theirs:
        service = DmaService(memory, pair.client, 1 << 20, lambda reply: None)

        def ask() -> None:
            _, data = pair.server.command(Command.DMA_WRITE, encode(DmaWrite(0, 4, b"data")), token=None)
            pair.send(pair.server, data)
            [event] = pair.receive(pair.client)
            assert isinstance(event, CommandReceived)
            service.take(channel, event.header, event.payload)

        ask()
        service.close()
        ask()  # the reader is in the middle of a burst
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert 0 == memory.message_writes
    channel.close()
