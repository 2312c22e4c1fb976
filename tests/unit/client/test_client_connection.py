"""The client's connection: replies matched to commands, commands given up, a server that goes, no leak."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from fakeserver import Answer, FakeServer, Handler, connected
from openfds import open_fds
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.connecting import connect_socket
from vfiouser_oob.client.errors import ServerGone, TooLate
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import HEADER_SIZE, Command, RegionIndex
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.header import pack_header
from vfiouser_protocol.messages import RegionRead, RegionReadReply
from vfiouser_protocol.session import CommandReceived

GET_INFO_REPLY = bytes.fromhex("10000000 03000000 09000000 05000000")


def held_back(release: trio.Event) -> Handler:
    """A handler that answers a read with its own offset, once it is released."""

    async def answer(event: CommandReceived) -> Answer:
        await release.wait()
        offset, region, count = decode(RegionRead, event.payload)
        return Answer(encode(RegionReadReply(offset, region, count, offset.to_bytes(count, "little"))))

    return answer


async def test_many_outstanding_calls_get_their_own_replies() -> None:
    """Hundreds of pipelined commands are answered in order and each caller gets the reply to its command."""
    release = trio.Event()
    async with connected(handlers={Command.REGION_READ: held_back(release)}) as (client, _):
        payloads = [encode(RegionRead(offset, 0, 4)) for offset in range(300)]
        calls = [client.submit(Command.REGION_READ, payload) for payload in payloads]
        assert 300 == client.outstanding
        release.set()
        # Waited for in another order than sent.
        for offset in reversed(range(300)):
            reply = decode(RegionReadReply, (await calls[offset].wait()).payload)
            assert offset == int.from_bytes(reply.data, "little")
        assert 0 == client.outstanding


async def test_concurrent_tasks_do_not_mix_their_replies() -> None:
    """Tasks that use one client at the same time each see their own data."""
    async with connected() as (client, server):
        server.memory[:] = bytes(number // 4 & 0xFF for number in range(len(server.memory)))

        async def read(word: int) -> None:
            assert bytes([word]) * 4 == await client.region_read(0, 4 * word, 4)

        async with trio.open_nursery() as nursery:
            for word in range(256):
                nursery.start_soon(read, word)


async def test_error_reply_carries_the_errno() -> None:
    """A refusal becomes ReplyError with the server's number, and the connection goes on."""
    async with connected(handlers={Command.DEVICE_RESET: lambda _: Answer(errno=errno.EBUSY)}) as (client, _):
        with pytest.raises(ReplyError, match="DEVICE_RESET") as caught:
            await client.reset()
        assert errno.EBUSY == caught.value.errno
        assert bytes(4) == await client.region_read(0, 0, 4)


async def test_error_reply_with_payload_is_tolerated() -> None:
    """libvfio-user attaches its output buffer to some error replies; it is skipped, not taken for more."""

    def fail(event: CommandReceived) -> Answer:
        header = pack_header(event.header.msg_id, Command.REGION_READ, HEADER_SIZE + 20, 0x21, errno.EINVAL)
        return Answer(raw=header + b"\xaa" * 20)

    async with connected(handlers={Command.REGION_READ: fail}) as (client, _):
        with pytest.raises(ReplyError) as caught:
            await client.region_read(0, 0, 4)
        assert errno.EINVAL == caught.value.errno
        await client.region_write(0, 0, b"abcd")


async def test_cancelled_call_drops_its_late_reply() -> None:
    """A call given up at its deadline is forgotten; its late reply neither reaches another call nor hurts."""
    release = trio.Event()
    async with connected(handlers={Command.DEVICE_GET_INFO: held_back_info(release)}) as (client, _):
        with trio.move_on_after(0.01) as scope:
            await client.get_info()
        assert scope.cancelled_caught
        assert 0 == client.outstanding
        release.set()
        assert bytes(4) == await client.region_read(0, 0, 4)
        assert 1 == client.late_replies


def held_back_info(release: trio.Event) -> Handler:
    """A handler for DEVICE_GET_INFO that waits until it is released."""

    async def answer(_: CommandReceived) -> Answer:
        await release.wait()
        return Answer(GET_INFO_REPLY)

    return answer


async def test_id_of_a_forgotten_call_is_not_used_again() -> None:
    """No new command gets the id of one whose late reply may still come."""
    release = trio.Event()
    async with connected(handlers={Command.DEVICE_GET_INFO: held_back_info(release)}) as (client, _):
        forgotten = client.submit(Command.DEVICE_GET_INFO, bytes(16))
        forgotten.abandon()
        calls = [client.submit(Command.DEVICE_RESET) for _ in range(100)]
        assert forgotten.msg_id not in {call.msg_id for call in calls}
        release.set()
        for call in calls:
            await call.wait()


async def test_reply_to_a_posted_command_is_tolerated() -> None:
    """A server that answers a NO_REPLY command does no harm."""

    def answer_all_the_same(event: CommandReceived) -> Answer:
        return Answer(raw=pack_header(event.header.msg_id, Command.REGION_WRITE, HEADER_SIZE, 0x1))

    async with connected() as (client, server):
        server.handlers[Command.REGION_WRITE] = answer_all_the_same
        await client.region_write(0, 0, b"\1\2\3\4", posted=True)
        await client.region_write(0, 4, b"\1\2\3\4", posted=True)
        assert bytes(4) == await client.region_read(0, 0, 4)


async def test_posted_write_is_done_before_a_later_read() -> None:
    """NO_REPLY commands are executed in order, so that a read sees them."""
    async with connected() as (client, server):
        await client.region_write(0, 8, b"late", posted=True)
        assert b"late" == await client.region_read(0, 8, 4)
        assert server.received[0].header.no_reply


async def test_server_that_goes_fails_outstanding_and_later_calls() -> None:
    """The end of the stream reaches everybody who waits, and everybody who comes later, by a clear error."""
    async with connected(handlers={Command.DEVICE_RESET: held_back(trio.Event())}) as (client, server):
        failed = []

        async def reset() -> None:
            with pytest.raises(ServerGone, match="DEVICE_RESET"):
                await client.reset()
            failed.append(True)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reset)
            while client.outstanding < 3:
                await trio.lowlevel.checkpoint()
            server.close()
        assert 3 == len(failed)
        assert client.failure == await client.wait_gone()
        with pytest.raises(ServerGone):
            await client.reset()
        with pytest.raises(ServerGone):
            client.post(Command.REGION_WRITE, bytes(16))


async def test_closing_the_client_fails_outstanding_calls() -> None:
    """Our own close ends a wait as well."""
    async with connected(handlers={Command.DEVICE_RESET: held_back(trio.Event())}) as (client, _):
        call = client.submit(Command.DEVICE_RESET)
        client.close()
        with pytest.raises(ServerGone, match="our side"):
            await call.wait()


async def test_garbage_ends_the_connection_with_a_reason() -> None:
    """A stream that cannot be followed is a server that has gone."""
    async with connected() as (client, server):
        call = client.submit(Command.DEVICE_RESET)
        server.main.send(pack_header(1, Command.DEVICE_RESET, 3, 0x1))
        with pytest.raises(ServerGone, match="3 bytes"):
            await call.wait()


async def test_server_that_refuses_version() -> None:
    """A refused negotiation is reported as the server's errno, and nothing is left behind."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)

        async def refuse() -> None:
            await trio.lowlevel.wait_readable(theirs)
            theirs.recv(4096)
            theirs.send(pack_header(1, Command.VERSION, HEADER_SIZE, 0x21, errno.EPERM))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(ReplyError) as caught:
                async with Client.from_socket(ours):
                    pytest.fail("it was not negotiated")
    assert errno.EPERM == caught.value.errno


async def test_server_that_closes_instead_of_negotiating() -> None:
    """A server that hangs up on VERSION is gone, in one error and not in a group."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ServerGone):
        async with Client.from_socket(ours):
            pytest.fail("it was not negotiated")


async def test_nobody_listens(tmp_path: os.PathLike[str]) -> None:
    """Connecting where nobody listens names the path."""
    path = os.path.join(tmp_path, "none.sock")
    with pytest.raises(FileNotFoundError) as caught:
        async with Client.connect(path):
            pytest.fail("nobody listens")
    assert path == caught.value.filename


async def test_error_in_the_block_leaves_it_unchanged() -> None:
    """The client's own tasks do not wrap the caller's error into a group."""
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        await nursery.start(FakeServer(theirs).run)
        with pytest.raises(KeyError):
            async with Client.from_socket(ours):
                raise KeyError("mine")
        nursery.cancel_scope.cancel()


async def test_run_in_a_nursery_of_the_callers() -> None:
    """`run` serves those who want the client's tasks in their own nursery, and ends with `close`."""
    ours, theirs = socket.socketpair()
    async with trio.open_nursery() as nursery:
        await nursery.start(FakeServer(theirs).run)
        client: Client = await nursery.start(Client(ours).run)
        assert bytes(2) == await client.region_read(RegionIndex.CONFIG, 0, 2)
        client.close()


async def test_twin_socket_is_used_only_when_granted() -> None:
    """With a grant the server's commands come over the second socket; without, over the first."""
    async with connected(grant_twin=True) as (client, server):
        assert client.has_twin_socket
        assert server.twin is not None
    async with connected(grant_twin=True, twin_socket=False) as (client, server):
        assert not client.has_twin_socket
        assert server.twin is None


async def test_no_descriptor_is_left_behind() -> None:
    """Connections that end well, badly, with descriptors in flight or given up, all close everything."""
    memory = os.memfd_create("region")
    before = open_fds()
    release = trio.Event()

    async def region(_: CommandReceived) -> Answer:
        await release.wait()
        return Answer(bytes.fromhex("20000000 07000000 00000000 00000000") + bytes(16), [memory])

    surplus = Answer(GET_INFO_REPLY, [memory, memory])
    handlers: dict[int, Handler] = {
        Command.DEVICE_GET_REGION_INFO: region,
        Command.DEVICE_GET_INFO: lambda _: surplus,
    }
    for grant_twin in (False, True):
        async with connected(grant_twin=grant_twin, handlers=handlers) as (client, server):
            await client.get_info()
            # Given up, but its reply brings a descriptor all the same.
            client.submit(Command.DEVICE_GET_REGION_INFO, bytes(32)).abandon()
            # Answered, but nobody takes the answer.
            ignored = client.submit(Command.DEVICE_GET_REGION_INFO, bytes(32))
            release.set()
            (await client.get_region_info(0)).close()
            assert ignored.done
            ignored.abandon()
            server.close()
            await client.wait_gone()
    os.close(memory)
    assert before.keys() - {memory} == open_fds().keys()


async def test_descriptors_of_a_waiting_message_may_be_closed_at_once() -> None:
    """A descriptor whose message had to wait for its turn arrives although its owner closed it meanwhile."""
    go_on = trio.Event()
    seen: list[int] = []

    async def slow(_: CommandReceived) -> Answer:
        await go_on.wait()
        return Answer()

    def note(event: CommandReceived) -> Answer:
        seen.append(os.fstat(event.fds[0].fileno()).st_ino)
        return Answer()

    handlers: dict[int, Handler] = {Command.DEVICE_RESET: slow, Command.DMA_MAP: note}
    async with connected(handlers=handlers) as (client, _):
        client.submit(Command.DEVICE_RESET).abandon()
        stuffing = [client.submit(Command.MIG_DATA_WRITE, bytes(1 << 20)) for _ in range(2)]
        memory = os.memfd_create("memory")
        inode = os.fstat(memory).st_ino
        call = client.submit_dma_map(0, 4096, fd=LentFd(memory))
        os.close(memory)
        go_on.set()
        await call.wait()
        for filler in stuffing:
            await filler.wait()
    assert [inode] == seen


async def test_nothing_is_sent_when_the_time_is_almost_up() -> None:
    """A command whose reply could hardly come in time fails before it is sent; one with more time is sent."""
    async with connected(send_guard_s=5.0) as (client, server):
        with trio.fail_after(4), pytest.raises(TooLate, match="DEVICE_RESET was not sent") as caught:
            await client.reset()
        assert errno.ETIMEDOUT == caught.value.errno
        with trio.fail_after(60):
            await client.reset()
        assert [Command.DEVICE_RESET] == [event.header.command for event in server.received]


async def test_who_was_cancelled_is_not_told_of_time() -> None:
    """A command of a cancelled caller ends as cancelled, since nobody is there for another reason."""
    async with connected(send_guard_s=5.0) as (client, server):
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.reset()
        assert scope.cancelled_caught
        await client.reset()
        assert [Command.DEVICE_RESET] == [event.header.command for event in server.received]


async def test_time_that_is_lost_behind_others() -> None:
    """A command that could be sent only when its time is almost up, since too much was unsent before, is not sent."""
    go_on = trio.Event()

    async def slow(_: CommandReceived) -> Answer:
        await go_on.wait()
        return Answer()

    async with connected(handlers={Command.DEVICE_GET_IRQ_INFO: slow}, send_guard_s=10.0) as (client, server):
        client.submit(Command.DEVICE_GET_IRQ_INFO, bytes(16)).abandon()
        while not client.congested:
            client.submit(Command.MIG_DATA_WRITE, bytes(1 << 20)).abandon()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_release_later, go_on)
            with trio.fail_after(10.2), pytest.raises(TooLate):
                await client.reset()
        assert Command.DEVICE_RESET not in {event.header.command for event in server.received}


async def _release_later(event: trio.Event) -> None:
    await trio.sleep(0.5)
    event.set()


async def test_a_server_without_room_is_waited_for(tmp_path: Path) -> None:
    """A full queue of clients means "not yet": connect_socket gives a socket that is connected, when there is room."""
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        first.connect(str(path))  # the one that the kernel keeps
        found: list[socket.socket] = []

        async def connect() -> None:
            found.append(stack.enter_context(await connect_socket(path)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert [] == found
            stack.enter_context(listener.accept()[0])
        served = stack.enter_context(listener.accept()[0])
        assert str(path) == found[0].getpeername()
        served.sendall(b"x")
        assert b"x" == found[0].recv(1)


async def test_a_wait_for_room_can_be_given_up(tmp_path: Path) -> None:
    """A caller that has no more time gets its way, and no descriptor is left behind."""
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
            first.connect(str(path))
            before = open_fds()
            with trio.move_on_after(0.02) as scope:
                await connect_socket(path)
            assert scope.cancelled_caught
            assert before == open_fds()
