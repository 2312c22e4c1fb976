"""Whose a descriptor is when its client leaves in the middle of something: never somebody else's."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from daemonkit import function, serving
from fakeserver import Answer, FakeServer, Handler
from openfds import open_fds
from rawclient import DMA_MAP, REGION_READ, RawClient, attached, map_request, memfd
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.transport.reaper import REAPER
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, DeviceInfoFlags
from vfiouser_protocol.messages import DeviceInfo, IrqInfo, RegionInfo
from vfiouser_protocol.session import CommandReceived

MAGIC = 0x75666F76


def get_info(event: CommandReceived) -> Answer:
    """A PCI device."""
    return Answer(encode(DeviceInfo(16, DeviceInfoFlags.PCI | DeviceInfoFlags.RESET, 9, 5)))


def get_region_info(event: CommandReceived) -> Answer:
    """Regions of 4096 bytes that are read and written by messages."""
    return Answer(encode(RegionInfo(32, 3, decode(RegionInfo, event.payload).index, 0, 4096, 0)))


def get_irq_info(event: CommandReceived) -> Answer:
    """One interrupt of each kind."""
    return Answer(encode(IrqInfo(16, 1, decode(IrqInfo, event.payload).index, 1)))


@asynccontextmanager
async def upstream(path: Path, **handlers: Handler) -> AsyncIterator[list[FakeServer]]:
    """An upstream server for one connection, whose answers the test decides."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        async with trio.open_nursery() as nursery:
            server: list[FakeServer] = []

            async def run() -> None:
                await trio.lowlevel.wait_readable(listener)
                table: dict[int, Handler] = {Command[name.upper()]: handler for name, handler in handlers.items()}
                table |= {
                    Command.DEVICE_GET_INFO: get_info,
                    Command.DEVICE_GET_REGION_INFO: get_region_info,
                    Command.DEVICE_GET_IRQ_INFO: get_irq_info,
                }
                server.append(FakeServer(listener.accept()[0], handlers=table))
                await server[0].run()

            nursery.start_soon(run)
            yield server
            nursery.cancel_scope.cancel()


async def test_a_client_that_leaves_while_its_map_waits_closes_nobodys_descriptor(tmp_path: Path) -> None:
    """The queue's head gives its memory file to a handler that waits; leaving then must close that file once.

    The number is another client's as soon as it was closed for the first time: here it is, at once.
    """
    read, queued, asked, go_on = trio.Event(), trio.Event(), trio.Event(), trio.Event()

    async def wait_to_read(event: CommandReceived) -> Answer:
        read.set()
        await queued.wait()
        return Answer(event.payload + bytes(4))

    async def wait(event: CommandReceived) -> Answer:
        asked.set()
        await go_on.wait()
        return Answer()

    up = UpstreamDevice(socket=tmp_path / "up.sock")
    with trio.fail_after(30):
        async with (
            upstream(tmp_path / "up.sock", dma_map=wait, region_read=wait_to_read),
            serving(function(tmp_path, "f0", up)) as daemon,
            trio.open_nursery() as nursery,
        ):
            victims: list[int] = []
            async with attached(tmp_path / "f0.sock") as client:
                # Not answered at once, so that the map behind it queues before it is begun.
                await client.send(client.pack(REGION_READ, struct.pack("<QII", 0, 0, 4)))
                await read.wait()
                fd = memfd(1 << 16, "claimed")
                await client.send(client.pack(DMA_MAP, map_request(0, 4096)), [fd])
                os.close(fd)
                while not daemon.functions[0].counts[DMA_MAP]:
                    await trio.lowlevel.checkpoint()
                queued.set()
                await asked.wait()
                nursery.start_soon(claim, kept("claimed"), victims)
            while daemon.functions[0].phase != "closing":
                await trio.lowlevel.checkpoint()
            go_on.set()
            while daemon.functions[0].connection is not None:
                await trio.lowlevel.checkpoint()
            while not victims:
                await trio.lowlevel.checkpoint()
            for victim in victims:
                assert "/memfd:victim (deleted)" == os.readlink(f"/proc/self/fd/{victim}")
                os.close(victim)


def kept(name: str) -> list[int]:
    """Which descriptors of this process are of a memory file."""
    return [fd for fd, target in open_fds().items() if target == f"/memfd:{name} (deleted)"]


async def claim(numbers: list[int], victims: list[int]) -> None:
    """Take the first of some descriptor numbers that is free, as soon as it is."""
    while not (free := set(numbers) - set(kept("claimed"))):
        await trio.lowlevel.checkpoint()
    while free.isdisjoint(victims):
        victims.append(os.memfd_create("victim"))


async def test_a_connection_that_cannot_be_set_up_costs_its_client_only(tmp_path: Path) -> None:
    """A socket whose descriptor is unusable ends one client; the function serves the next."""
    async with serving(function(tmp_path)) as daemon:
        broken, _other = socket.socketpair()
        with _other:
            os.close(broken.fileno())
            await daemon.functions[0].serve_connected(broken)
        assert "cannot be served" in str(daemon.functions[0].last_error)
        async with attached(tmp_path / "f0.sock") as client:
            assert MAGIC == await client.read32(0, 0)


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until something is so."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
        await trio.sleep(0.01)


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """A small limit of descriptors for this process, set by the test with the returned number."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield 400
    resource.setrlimit(resource.RLIMIT_NOFILE, old)


async def test_one_client_leaves_descriptors_for_others(tmp_path: Path, few_descriptors: int) -> None:
    """A client that takes all it can is refused in words, and others are served: new clients, maps, `status`."""
    control = tmp_path / "control.sock"
    functions = [function(tmp_path, "f0"), function(tmp_path, "f1")]
    with trio.fail_after(30):
        async with serving(*functions, control_socket=control) as daemon, attached(tmp_path / "f0.sock") as greedy:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few_descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            for number in range(few_descriptors):
                fd = memfd(4096)
                answer = await greedy.command(DMA_MAP, map_request(number << 12, 4096), [fd])
                os.close(fd)
                if answer.error:
                    break
            assert errno.EMFILE == answer.error
            assert few_descriptors // 4 < number < few_descriptors // 2
            assert "LimitNOFILE" in str(daemon.functions[0].last_error)
            async with attached(tmp_path / "f1.sock") as other:
                for number in range(32):
                    fd = memfd(4096)
                    await other.dma_map(number << 12, 4096, fd)
                    os.close(fd)
            assert 2 == await trio.to_thread.run_sync(count_functions, control)
            # What it gives back, it may take again.
            for number in range(8):
                await greedy.dma_unmap(number << 12, 4096)
            assert REAPER.settle(10)
            fd = memfd(4096)
            await greedy.dma_map(0, 4096, fd)
            os.close(fd)


def count_functions(control: Path) -> int:
    """Ask for the status."""
    with ControlClient(control) as client:
        return client.status()["daemon"]["functions"]


async def test_descriptors_that_our_own_limit_lost(tmp_path: Path, few_descriptors: int) -> None:
    """Control data that our own limit truncated is said to be our own limit's doing, and costs the client."""
    async with serving(function(tmp_path)) as daemon, attached(tmp_path / "f0.sock") as client:
        fds = [memfd(4096) for _ in range(8)]
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        await client.send(client.pack(REGION_READ, struct.pack("<QII", 0, 0, 4)), fds)
        with trio.fail_after(30), pytest.raises((EOFError, ConnectionResetError)):
            await client.receive()
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for fd in fds:
            os.close(fd)
        assert "LimitNOFILE" in str(daemon.functions[0].last_error)


async def test_an_inherited_listener_is_left_as_it_is(tmp_path: Path) -> None:
    """A listening socket that blocks goes on blocking for its owner, and an owner who is quicker holds up nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(tmp_path / "in.sock"))
        listener.listen()
        inherited = replace(function(tmp_path, "f0"), socket=None, fd=os.dup(listener.fileno()))
        with trio.fail_after(30):
            async with (
                serving(inherited, function(tmp_path, "f1")),
                attached(tmp_path / "f1.sock") as innocent,
            ):
                async with attached(tmp_path / "in.sock") as client:
                    assert MAGIC == await client.read32(0, 0)
                assert os.get_blocking(listener.fileno())
                for _ in range(20):
                    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stolen:
                        stolen.connect(os.fspath(tmp_path / "in.sock"))
                        listener.accept()[0].close()
                    assert MAGIC == await innocent.read32(0, 0)
                async with attached(tmp_path / "in.sock") as client:
                    assert MAGIC == await client.read32(0, 0)


async def test_clients_wait_while_there_is_no_descriptor_for_them(
    tmp_path: Path, few_descriptors: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a single descriptor left, clients and control connections are accepted as soon as there is one."""
    control = tmp_path / "control.sock"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with trio.fail_after(30):
        async with serving(function(tmp_path), control_socket=control) as daemon:
            with socket.socket(socket.AF_UNIX) as asking, trio.socket.socket(socket.AF_UNIX) as joining:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                asking.connect(os.fspath(control))
                await joining.connect(os.fspath(tmp_path / "f0.sock"))
                await until(lambda: "cannot accept a control connection now" in caplog.text)
                await until(lambda: "cannot accept a client" in str(daemon.functions[0].last_error))
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert (await RawClient(joining).negotiate()).flags == 1
                assert b"hello" in await trio.to_thread.run_sync(asking.recv, 1000)
            assert "Traceback" not in caplog.text
