"""Clients that come, go, misbehave or are not welcome; functions that share a daemon; upstream servers that die."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from openfds import open_fds
from rawclient import (
    DMA_MAP,
    DMA_READ,
    GET_INFO,
    HEADER,
    REGION_READ,
    REGION_WRITE,
    RESET,
    VERSION,
    RawClient,
    attached,
    connect,
    map_request,
    memfd,
)
from vfiouser_oob.config import models
from vfiouser_oob.config.schema import FunctionConfig, ModelDevice, UpstreamDevice
from vfiouser_oob.server.daemon import Daemon
from vfiouser_oob.transport.listener import ListenError, listen_on_path

MAGIC = 0x75666F76


def pair(directory: Path) -> list[FunctionConfig]:
    """A test device `up` and the function `f0` that the `vfio-user` backend puts in front of it."""
    return [function(directory, "up"), function(directory, "f0", UpstreamDevice(socket=directory / "up.sock"))]


async def until_detached(daemon: Daemon) -> None:
    """Wait until no function has a client."""
    events = daemon.subscribe()
    while any(each.connection is not None for each in daemon.functions):
        await events.receive()
    events.close()


@pytest.mark.slow
async def test_200_clients_leave_nothing_behind(tmp_path: Path) -> None:
    """Memory files, eventfds and sockets of 200 clients are all gone; each found the function free."""
    async with serving(*pair(tmp_path)) as daemon:
        before: list[str] = []
        for number in range(201):
            fd = memfd(1 << 16)
            event = os.eventfd(0)
            async with attached(tmp_path / "f0.sock") as client:
                await client.dma_map(0, 1 << 16, fd)
                await client.set_irqs(2, 0, 1, [event])
                assert MAGIC == await client.read32(0, 0)
            os.close(fd)
            os.close(event)
            await until_detached(daemon)
            if number == 0:
                before = sorted(open_fds().values())
        assert before == sorted(open_fds().values())


async def test_client_that_vanishes_mid_message(tmp_path: Path) -> None:
    """A client may go in the middle of a header or body, with descriptors under way, and nothing is kept."""
    async with serving(*pair(tmp_path)) as daemon:
        async with attached(tmp_path / "f0.sock"):
            pass
        await until_detached(daemon)
        before = sorted(open_fds().values())
        message = HEADER.pack(1, DMA_MAP, 48, 0, 0) + map_request(0, 4096)
        for cut in (1, 15, 16, 17, 40):
            client = await connect(tmp_path / "f0.sock")
            await client.negotiate()
            fd = memfd(4096)
            await client.send(message[:cut], [fd] * 3)
            os.close(fd)
            client.close()
        for cut in (0, 3, 20):
            client = await connect(tmp_path / "f0.sock")
            await client.send(HEADER.pack(0, VERSION, 20, 0, 0)[:cut] + bytes(max(0, cut - 16)))
            client.close()
        async with attached(tmp_path / "f0.sock") as client:
            assert MAGIC == await client.read32(0, 0)
        await until_detached(daemon)
        assert before == sorted(open_fds().values())


async def test_second_client_is_refused_while_the_first_is_served(tmp_path: Path) -> None:
    """A function has one client; a second one is turned away and the first does not notice."""
    async with serving(function(tmp_path)) as daemon, attached(tmp_path / "f0.sock") as first:
        second = await connect(tmp_path / "f0.sock")
        assert errno.EBUSY == (await second.negotiate()).error
        second.close()
        assert MAGIC == await first.read32(0, 0)
        assert "uses the function" in (daemon.functions[0].last_error or "")


async def test_next_client_may_connect_before_the_last_is_gone(tmp_path: Path) -> None:
    """A client that connects while the one before it is still there is served as soon as that one has left."""
    async with serving(function(tmp_path)):
        first = await connect(tmp_path / "f0.sock")
        await first.negotiate()
        second = await connect(tmp_path / "f0.sock")
        await second.send(second.pack(VERSION, struct.pack("<HH", 0, 0) + b"{}\0"))
        first.close()
        assert 1 == (await second.receive()).flags
        second.close()


async def test_users_that_may_not_connect(tmp_path: Path) -> None:
    """`allow_uids` turns other users away."""
    mine = os.getuid()
    functions = [
        function(tmp_path, "open", allow_uids=(mine,)),
        function(tmp_path, "closed", allow_uids=(mine + 1,), socket_mode=0o600),
    ]
    async with serving(*functions):
        async with attached(tmp_path / "open.sock"):
            pass
        client = await connect(tmp_path / "closed.sock")
        assert errno.EACCES == (await client.negotiate()).error
        client.close()
        assert 0o600 == (tmp_path / "closed.sock").stat().st_mode & 0o777


async def test_eight_functions_at_once(tmp_path: Path) -> None:
    """Eight functions of one daemon are served side by side, each with registers of its own."""
    functions = [function(tmp_path, f"f{number}") for number in range(8)]

    async def use(number: int) -> None:
        async with attached(tmp_path / f"f{number}.sock") as client:
            for value in range(200):
                await client.write32(0, 4, number << 16 | value)
                assert number << 16 | value == await client.read32(0, 4)

    async with serving(*functions), trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(use, number)


@pytest.mark.slow
async def test_65535_ranges(tmp_path: Path) -> None:
    """As many ranges as promised can be mapped with one file behind them, one more is ENOSPC, and all can go again."""
    fd = memfd(1 << 16)
    bursts = [range(first, min(first + 64, 65535)) for first in range(0, 65535, 64)]
    async with serving(function(tmp_path)) as daemon, attached(tmp_path / "f0.sock") as client:
        before = len(open_fds())

        async def answers() -> None:
            for _ in range(65535):
                assert 1 == (await client.receive()).flags

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers)
            for burst in bursts:  # descriptors belong to the first message of a burst, the others have none
                maps = [client.pack(DMA_MAP, map_request(number << 13, 4096)) for number in burst]
                await client.send(b"".join(maps), [fd])
        assert errno.ENOSPC == await client.errno(DMA_MAP, map_request(1 << 40, 4096), [fd])
        status = daemon.status()["functions"][0]["maps"]
        assert (65535, 1) == (status["count"], status["files"])
        assert before + 1 == len(open_fds())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answers)
            for burst in bursts:
                requests = [struct.pack("<IIQQ", 24, 0, number << 13, 4096) for number in burst]
                await client.send(b"".join(client.pack(3, request) for request in requests))
        assert 0 == daemon.status()["functions"][0]["maps"]["count"]
        assert before == len(open_fds())
    os.close(fd)


async def test_client_that_reads_nothing_does_not_stop_others(tmp_path: Path) -> None:
    """A client that sends without reading replies fills its own socket, and another function is served meanwhile."""
    async with serving(function(tmp_path), function(tmp_path, "f1")):
        async with attached(tmp_path / "f0.sock") as flood, attached(tmp_path / "f1.sock") as other:
            request = flood.pack(REGION_READ, struct.pack("<QII", 0, 1, 1 << 16)) * 64
            with trio.move_on_after(0.5):
                while True:
                    await flood.send(request)
            with trio.fail_after(5):
                for _ in range(50):
                    assert MAGIC == await other.read32(0, 0)
        async with attached(tmp_path / "f0.sock") as client:
            assert MAGIC == await client.read32(0, 0)


async def test_client_that_never_pauses_leaves_others_their_turn(tmp_path: Path) -> None:
    """Spinning for a client that asks again at once must not keep the daemon's other tasks and timers waiting."""
    stop = threading.Event()

    def hammer() -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "f0.sock"))
            hello = struct.pack("<HH", 0, 0) + b"{}\0"
            sock.sendall(HEADER.pack(0, VERSION, 16 + len(hello), 0, 0) + hello)
            sock.recv(16, socket.MSG_WAITALL)
            sock.recv(4096)
            request = HEADER.pack(1, REGION_READ, 32, 0, 0) + struct.pack("<QII", 0, 0, 4)
            for number in range(500_000):
                if stop.is_set():
                    return number
                sock.sendall(request)
                sock.recv(36, socket.MSG_WAITALL)
        return -1

    async with serving(function(tmp_path)), trio.open_nursery() as nursery:
        asked: list[int] = []

        async def run_hammer() -> None:
            asked.append(await trio.to_thread.run_sync(hammer))

        nursery.start_soon(run_hammer)
        for _ in range(20):
            await trio.sleep(0.01)
        stop.set()
    assert asked[0] > 100


async def test_twin_socket_carries_the_servers_commands(tmp_path: Path) -> None:
    """With a twin socket, DMA messages go there and nowhere else."""
    asked = b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true}}}\0'
    async with serving(*pair(tmp_path)):
        client = await connect(tmp_path / "f0.sock")
        answer = await client.negotiate(asked)
        assert b'"twin_socket":{"supported":true,"fd_index":0}' in answer.payload
        (twin_fd,) = answer.fds
        client.received.clear()
        twin = RawClient(trio.socket.from_stdlib_socket(socket.socket(fileno=twin_fd)))
        await client.enable_bus_master()
        await client.dma_map(0, 4096)
        await client.write(0, 0x18, struct.pack("<Q", 0x10))
        await client.write32(0, 0x20, 4)
        await client.write32(0, 0x24, 1)
        request = await twin.receive()
        assert (DMA_READ, struct.pack("<QQ", 0x10, 4)) == (request.command, request.payload)
        await twin.send(HEADER.pack(request.msg_id, DMA_READ, 36, 1, 0) + request.payload + b"data")
        while await client.read32(0, 0x28) == 1:
            pass
        assert b"data" == await client.read(1, 0, 4)
        twin.close()
        client.close()


# Upstream servers that are slow, dead or absent


async def test_upstream_server_missing(tmp_path: Path) -> None:
    """Without an upstream server a client is turned away with ENODEV, and served once there is one."""
    lonely = function(tmp_path, "f0", UpstreamDevice(socket=tmp_path / "up.sock"))
    async with serving(lonely) as daemon:
        client = await connect(tmp_path / "f0.sock")
        answer = await client.negotiate()
        assert (0x21, errno.ENODEV) == (answer.flags, answer.error)
        client.close()
        assert "up.sock cannot be used" in (daemon.functions[0].last_error or "")
        shown = daemon.status()["functions"][0]
        assert "up.sock cannot be used" in (shown["unavailable"] or "")
        assert shown["unavailable_since"]
        assert shown["last_error_at"]
        async with serving(function(tmp_path, "up")):
            assert daemon.status()["functions"][0]["unavailable"] is None
            async with attached(tmp_path / "f0.sock") as client:
                assert MAGIC == await client.read32(0, 0)
                shown = daemon.status()["functions"][0]
                assert (None, None) == (shown["last_error"], shown["last_error_at"])
                assert 1 == shown["commands"]["REGION_READ"]["count"]
                assert 0 < shown["commands"]["REGION_READ"]["p50_s"] <= shown["commands"]["REGION_READ"]["p99_s"] < 60


async def test_upstream_server_dies(tmp_path: Path) -> None:
    """When the upstream server dies its client gets EIO until it reconnects, and everything of it is released."""
    async with serving(function(tmp_path, "f0", UpstreamDevice(socket=tmp_path / "up.sock"))) as daemon:
        async with serving(function(tmp_path, "up")):
            client = await connect(tmp_path / "f0.sock")
            await client.negotiate()
            assert MAGIC == await client.read32(0, 0)
            events = daemon.subscribe()
            since = daemon.status()["functions"][0]["since"]
        with trio.fail_after(10):
            while (told := await events.receive())["type"] != "phase":
                pass
        assert "failed" == told["phase"]
        shown = daemon.status()["functions"][0]
        assert ("failed", True) == (shown["phase"], shown["since"] > since)
        assert "up.sock has gone" in (shown["failed"] or "")
        for command, payload in (
            (REGION_READ, struct.pack("<QII", 0, 0, 4)),
            (REGION_WRITE, struct.pack("<QIII", 4, 0, 4, 1)),
            (DMA_MAP, map_request(0, 4096)),
        ):
            assert errno.EIO == await client.errno(command, payload)
        client.close()
        await until_detached(daemon)
        assert "up.sock has gone" in (daemon.status()["functions"][0]["unavailable"] or "")
        async with serving(function(tmp_path, "up")), attached(tmp_path / "f0.sock") as client:
            assert MAGIC == await client.read32(0, 0)
            assert "attached" == daemon.status()["functions"][0]["phase"]


@pytest.mark.parametrize("silent_after", ["connect", "version"])
async def test_upstream_server_never_answers(tmp_path: Path, silent_after: str) -> None:
    """One deadline holds for a client's message and all that it causes: the client is answered in time."""
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(tmp_path / "up.sock"))
    listener.listen()
    lonely = function(tmp_path, "f0", UpstreamDevice(socket=tmp_path / "up.sock"))
    async with serving(lonely, function(tmp_path, "f1"), reply_budget_s=0.3):
        client = await connect(tmp_path / "f0.sock")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_silent_server, listener, silent_after)
            with trio.fail_after(3):
                answer = await client.negotiate()
                if silent_after == "connect":
                    assert errno.ENODEV == answer.error
                else:
                    assert 1 == answer.flags
                    start = trio.current_time()
                    request = struct.pack("<QII", 0, 7, 4)
                    for _ in range(3):  # pipelined: each has its own deadline, counted from its arrival
                        await client.send(client.pack(REGION_READ, request))
                    for _ in range(3):
                        answer = await client.receive()
                        assert (0x21, errno.ETIMEDOUT) == (answer.flags, answer.error)
                    assert trio.current_time() - start < 1
                    async with attached(tmp_path / "f1.sock") as other:
                        assert MAGIC == await other.read32(0, 0)
            nursery.cancel_scope.cancel()
        client.close()
    listener.close()


async def _silent_server(listener: trio.socket.SocketType, silent_after: str) -> None:
    """Answer like a server with nine empty regions and a config space, but no register access, or nothing at all."""
    sock, _ = await listener.accept()
    peer = RawClient(sock)
    try:
        await _answer_set_up(peer, silent_after)
    finally:
        peer.close()


async def _answer_set_up(peer: RawClient, silent_after: str) -> None:
    if silent_after == "connect":
        await trio.sleep_forever()
    while True:
        request = await peer.receive()
        if request.command == VERSION:
            payload = struct.pack("<HH", 0, 0) + b'{"capabilities":{}}\0'
        elif request.command == GET_INFO:
            payload = struct.pack("<4I", 16, 3, 9, 5)
        elif request.command == 5:
            (index,) = struct.unpack_from("<I", request.payload, 8)
            payload = struct.pack("<IIIIQQ", 32, 3, index, 0, 4096 if index == 7 else 0, 0)
        elif request.command == RESET:
            payload = b""
        elif request.command == 7:
            payload = struct.pack("<4I", 16, 1, *struct.unpack_from("<I", request.payload, 8), 0)
        else:
            continue
        await peer.send(HEADER.pack(request.msg_id, request.command, 16 + len(payload), 1, 0) + payload)


# Sockets in the file system


async def test_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    """A dead process's socket file is no obstacle; a live server's is left alone."""
    path = tmp_path / "f0.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    async with serving(function(tmp_path)):
        with pytest.raises(ListenError, match="another process listens on it"):
            listen_on_path(path)
        async with attached(path) as client:
            assert MAGIC == await client.read32(0, 0)
    assert not path.exists()


def test_paths_that_cannot_be_listened_on(tmp_path: Path) -> None:
    """Each mistake gets a sentence of its own."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ListenError, match="is not a socket"):
        listen_on_path(tmp_path / "file")
    with pytest.raises(ListenError, match="does not exist; create it"):
        listen_on_path(tmp_path / "nowhere" / "f0.sock")
    with pytest.raises(ListenError, match="group 'no-such-group' does not exist"):
        listen_on_path(tmp_path / "f0.sock", group="no-such-group")
    assert not (tmp_path / "f0.sock").exists()


async def test_device_whose_task_dies_takes_only_its_function_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in a device ends that function with EIO and a reason in `status`; the others go on."""
    monkeypatch.setattr(models, "BUILT_IN", {**models.BUILT_IN, "broken": "brokendevice:build"})
    broken = function(tmp_path, "f0", ModelDevice(model="broken"))
    async with serving(broken, function(tmp_path, "f1")) as daemon:
        events = daemon.subscribe()
        async with attached(tmp_path / "f0.sock") as client:
            await client.write32(0, 0x24, 1)
            while (await events.receive())["type"] != "device-failed":
                pass
            assert errno.EIO == await client.errno(REGION_READ, struct.pack("<QII", 0, 0, 4))
            status = daemon.status()["functions"][0]
            assert "failed" == status["phase"]
            assert "a bug in the device" in (status["last_error"] or "")
        async with attached(tmp_path / "f1.sock") as other:
            assert MAGIC == await other.read32(0, 0)
