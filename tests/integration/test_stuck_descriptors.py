"""A client whose descriptors cannot be closed holds up nobody: another function answers while the close is stuck."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from daemonkit import function, serving
from rawclient import (
    DMA_MAP,
    GET_INFO,
    REGION_READ,
    SET_IRQS,
    VERSION,
    RawClient,
    attached,
    connect,
    map_request,
    memfd,
)
from stuckfds import KINDS, Stuck, StuckFile, lingering, stuck_file
from vfiouser_oob.transport.reaper import REAPER

MAGIC = 0x75666F76
FULL = (1 << 64) - 2
READ = struct.pack("<QII", 0, 0, 4)


@pytest.fixture(params=sorted(KINDS))
def stuck(request: Any, tmp_path: Path) -> Iterator[Stuck]:
    """A descriptor of each kind that there is; when it is released, everything gets closed."""
    with KINDS[request.param](tmp_path) as made:
        yield made
        made.release()
    assert REAPER.settle(30)


def send(client: RawClient, stuck: Stuck, data: bytes, at: int = 0) -> None:
    """Send a message with a descriptor attached to one of its bytes, and keep no copy of it."""
    fd = stuck.give()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    with socket.socket(fileno=os.dup(client.sock.fileno())) as plain:
        if at:
            plain.send(data[:at])
        plain.sendmsg([data[at:]], rights)
    os.close(fd)
    stuck.arm()


async def surplus(client: RawClient, stuck: Stuck) -> None:
    """A command that no descriptor means anything to."""
    send(client, stuck, client.pack(REGION_READ, READ))
    assert (await client.receive()).flags == 1


async def refused_irqs(client: RawClient, stuck: Stuck) -> None:
    """A SET_IRQS whose descriptor is no eventfd."""
    send(client, stuck, client.pack(SET_IRQS, struct.pack("<IIIII", 20, 0x24, 2, 0, 1)))
    assert (await client.receive()).error == 22


async def refused_map(client: RawClient, stuck: Stuck) -> None:
    """A DMA_MAP that is longer than any file."""
    send(client, stuck, client.pack(DMA_MAP, map_request(0, 1 << 40)))
    assert (await client.receive()).error


async def attached_to_a_body(client: RawClient, stuck: Stuck) -> None:
    """A descriptor where none is expected: the kernel must not discard it in the middle of our call."""
    send(client, stuck, client.pack(REGION_READ, READ), at=20)
    assert (await client.receive()).flags == 1


async def unread(client: RawClient, stuck: Stuck) -> None:
    """A broken stream, with descriptors behind what broke it."""
    with socket.socket(fileno=os.dup(client.sock.fileno())) as plain:
        plain.send(struct.pack("<HHIII", 0, GET_INFO, 3, 0, 0))
        send(client, stuck, client.pack(GET_INFO, bytes(16)))
    with suppress(EOFError, ConnectionResetError):
        while True:
            await client.receive()


async def in_a_header(client: RawClient, stuck: Stuck) -> None:
    """A client that leaves in the middle of a header."""
    send(client, stuck, client.pack(GET_INFO, bytes(16))[:7])
    client.close()


@pytest.mark.parametrize("attack", [surplus, refused_irqs, refused_map, attached_to_a_body, unread, in_a_header])
async def test_others_are_served_while_a_close_is_stuck(
    tmp_path: Path, stuck: Stuck, attack: Callable[[RawClient, Stuck], Awaitable[None]]
) -> None:
    """Wherever a foreign descriptor is closed, the attacker's function and the innocent one go on at once."""
    with trio.fail_after(60):
        async with (
            serving(function(tmp_path, "f0"), function(tmp_path, "f1")),
            attached(tmp_path / "f1.sock") as innocent,
        ):
            client = await connect(tmp_path / "f0.sock")
            assert (await client.negotiate()).flags == 1
            await attack(client, stuck)
            assert MAGIC == await innocent.read32(0, 0)
            client.close()
            # The next client of the same function is served as well.
            async with attached(tmp_path / "f0.sock") as following:
                assert MAGIC == await following.read32(0, 0)
            assert MAGIC == await innocent.read32(0, 0)
            # What goes unread with a socket is released without a FLUSH, so a file holds nobody up there.
            closed = attack is unread and isinstance(stuck, StuckFile)
            assert closed or not REAPER.settle(0), "it was closed already: nothing was stuck"
            stuck.release()


async def refused_late(client: RawClient, stuck: StuckFile) -> None:
    """A DMA_MAP of a file whose server does not say what it is."""
    stuck.mount.hold("GETATTR")
    await map_file(client, stuck)
    assert (await client.receive()).error == errno.ETIMEDOUT


async def mapped(client: RawClient, stuck: StuckFile) -> None:
    """A DMA_MAP of a file that nobody can close any more when the client leaves."""
    await map_file(client, stuck)
    assert (await client.receive()).flags == 1
    stuck.arm()


async def written(client: RawClient, stuck: StuckFile) -> None:
    """A device that writes into such a file, which takes as long as its server likes."""
    await map_file(client, stuck)
    assert (await client.receive()).flags == 1
    await client.enable_bus_master()
    stuck.mount.hold("WRITE")
    await start_write(client)
    await trio.to_thread.run_sync(stuck.mount.caught.wait)


async def locked(client: RawClient, stuck: StuckFile) -> None:
    """A device that writes into memory whose inode the client has locked, by a write of its own that never ends."""
    memory, source = memfd(1 << 16), stuck.give()
    await client.dma_map(0, 1 << 16, memory)
    await client.enable_bus_master()
    stuck.mount.hold("READ")
    page = mmap.mmap(source, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)

    def write() -> None:
        os.pwrite(memory, page, 0)
        for fd in (memory, source):
            os.close(fd)

    threading.Thread(target=write, daemon=True).start()
    await trio.to_thread.run_sync(stuck.mount.caught.wait)
    await start_write(client)


async def start_write(client: RawClient) -> None:
    """Let the device write into client memory."""
    await client.write(0, 0x18, bytes(8))
    await client.write32(0, 0x20, 4096)
    await client.write32(0, 0x24, 2)
    assert await client.read32(0, 0x28) == 1  # busy


async def map_file(client: RawClient, stuck: StuckFile) -> None:
    """Send a DMA_MAP of the file."""
    fd = stuck.give()
    await client.send(client.pack(DMA_MAP, map_request(0, 1 << 16)), [fd])
    await trio.to_thread.run_sync(os.close, fd)


@pytest.mark.parametrize("attack", [refused_late, mapped, written, locked] if "fuse" in KINDS else [])
async def test_others_are_served_while_a_file_system_does_not_answer(
    tmp_path: Path, attack: Callable[[RawClient, StuckFile], Awaitable[None]]
) -> None:
    """What a file system has to be asked waits in its client's thread; nobody else does."""
    with trio.fail_after(60), stuck_file(tmp_path) as stuck:
        async with (
            serving(function(tmp_path, "f0"), function(tmp_path, "f1"), reply_budget_s=0.5),
            attached(tmp_path / "f1.sock") as innocent,
        ):
            async with attached(tmp_path / "f0.sock") as client:
                await attack(client, stuck)
                assert MAGIC == await innocent.read32(0, 0)
                assert MAGIC == await client.read32(0, 0)
            async with attached(tmp_path / "f0.sock") as following:
                assert MAGIC == await following.read32(0, 0)
            assert MAGIC == await innocent.read32(0, 0)
            assert await trio.to_thread.run_sync(stuck.mount.caught.wait, 10), "nothing was stuck"
            stuck.release()
        await trio.to_thread.run_sync(REAPER.settle, 30)


async def test_a_first_message_with_a_stuck_descriptor(tmp_path: Path, stuck: Stuck) -> None:
    """VERSION with a descriptor is refused, and the function is free for the next client at once."""
    with trio.fail_after(60):
        async with serving(function(tmp_path, "f0")):
            client = await connect(tmp_path / "f0.sock")
            send(client, stuck, client.pack(VERSION, struct.pack("<HH", 0, 0)))
            assert (await client.receive()).error
            client.close()
            async with attached(tmp_path / "f0.sock") as following:
                assert MAGIC == await following.read32(0, 0)
            assert not REAPER.settle(0), "it was closed already: nothing was stuck"
            stuck.release()


async def test_a_full_eventfd_that_blocks(tmp_path: Path) -> None:
    """A client that fills an eventfd and makes it block cannot stop us by an interrupt, and keeps its own flags."""
    event = os.eventfd(0)
    with trio.fail_after(30):
        async with (
            serving(function(tmp_path, "f0"), function(tmp_path, "f1")),
            attached(tmp_path / "f1.sock") as innocent,
            attached(tmp_path / "f0.sock") as client,
        ):
            await client.set_irqs(2, 0, 1, [event])
            assert os.get_blocking(event), "the flag is the client's"
            os.eventfd_write(event, FULL)
            for flags in (0x21, 0x21):  # DATA_NONE, ACTION_TRIGGER: loopback
                await client.succeed(SET_IRQS, struct.pack("<IIIII", 20, flags, 2, 0, 1))
            assert MAGIC == await innocent.read32(0, 0)
            assert os.eventfd_read(event) >= FULL
            await client.succeed(SET_IRQS, struct.pack("<IIIII", 20, 0x21, 2, 0, 1))
            assert 1 == os.eventfd_read(event)
    os.close(event)


async def test_an_eventfd_that_unmasks_and_blocks(tmp_path: Path) -> None:
    """An eventfd that the client reads itself just before us is not waited for; its next write unmasks all the same."""
    event, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    with trio.fail_after(30):
        async with serving(function(tmp_path, "f0")), attached(tmp_path / "f0.sock") as client:
            await client.set_irqs(0, 0, 1, [event])
            await client.write32(0, 0x14, 1)
            assert 1 == os.eventfd_read(event)
            await client.set_irqs(0, 0, 1, [resample], flags=0x14)
            assert os.get_blocking(resample)
            for _ in range(50):
                os.eventfd_write(resample, 1)
                os.eventfd_read(resample)
                assert MAGIC == await client.read32(0, 0)
            os.eventfd_write(resample, 1)
            await trio.lowlevel.wait_readable(event)
    for fd in (event, resample):
        os.close(fd)


async def test_a_daemon_ends_while_a_close_is_stuck(tmp_path: Path) -> None:
    """Told to stop, the daemon does not wait for a socket that lingers.

    A FLUSH that a FUSE server has taken and does not answer, the kernel itself waits for when a process ends.
    """
    path = tmp_path / "f0.sock"
    command = [sys.executable, "-m", "vfiouser_oob", "serve", f"--socket-path={path}", "--device=model:test"]
    with trio.fail_after(60), lingering(tmp_path) as stuck:
        process = await trio.lowlevel.open_process([*command, "--control-socket=none"])
        while not path.exists():  # noqa: ASYNC110 - the other process tells nobody
            await trio.sleep(0.01)
        async with attached(path) as client:
            await surplus(client, stuck)
            assert MAGIC == await client.read32(0, 0)
            process.terminate()
            assert 0 == await process.wait()
