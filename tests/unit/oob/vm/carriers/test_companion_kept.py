"""Carrier F goes on in another daemon: with the same connection, what was said of it, and the log of written pages."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from carrierbed import vhostclient
from carrierbed.hand import Hand
from carrierbed.vhostclient import VhostClient, sealed_file
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.transport.listener import Listener, listen_on_path
from vfiouser_oob.transport.reaper import REAPER
from vfiouser_oob.vm.carriers import port
from vfiouser_oob.vm.carriers.companion_notes import CompanionNotes
from vfiouser_oob.vm.carriers.interface import GoAsked, LogChanged, Lost, QemuAttached, SaveAsked, StopAsked
from vfiouser_oob.vm.carriers.state_pipe import TRAIL
from vfiouser_oob.vm.carriers.vhost_user_fs import VhostUserFs
from vmkit.keeping import KeepingManager


@pytest.fixture
def manager() -> Iterator[KeepingManager]:
    """Somebody who keeps descriptors."""
    with closing(KeepingManager()) as manager:
        yield manager
    assert REAPER.settle(5)


def ledger_of(manager: KeepingManager) -> tuple[Ledger, CompanionNotes]:
    """What a daemon finds."""
    with manager.daemon() as survival:
        ledger = survival.ledger_of("vm")
        assert ledger is not None
        return ledger, CompanionNotes(ledger)


@asynccontextmanager
async def daemon(manager: KeepingManager, path: Path, *, calls: bool = False) -> AsyncIterator[Hand]:
    """A daemon with a companion, which is killed at the end of the block."""
    ledger, notes = ledger_of(manager)
    with closing(ledger), closing(notes):
        listener: Listener | None = None
        if not calls:
            listener = listen_on_path(path)
        hand = Hand(VhostUserFs(listener, path, notes=notes), b"state")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand.run)
            await nursery.start(hand.carrier.run)
            await wait_all_tasks_blocked(0.01)
            yield hand
            await wait_all_tasks_blocked(0.01)
            notes.leave()
            nursery.cancel_scope.cancel()


async def test_the_connection_and_what_was_said_go_on(manager: KeepingManager, tmp_path: Path) -> None:
    """QEMU says nothing again, and finds the device where it was; it may have asked while nobody was there."""
    path = tmp_path / "vhost"
    async with daemon(manager, path):
        qemu = await VhostClient.connect(path)
        assert await qemu.begin() == [0, 0]
    await qemu.send(vhostclient.GET_VRING_BASE, struct.pack("<II", 0, 0))
    async with daemon(manager, path) as hand:
        assert await qemu.reply() == (vhostclient.GET_VRING_BASE, struct.pack("<II", 0, 7))
        assert [type(event) for event in hand.events] == [QemuAttached, StopAsked]
        assert await qemu.begin() == [0, 0]
        assert await qemu.save()
        assert [type(event) for event in hand.events[2:4]] == [GoAsked, SaveAsked]
    async with daemon(manager, path) as hand:
        assert await qemu.end() == [struct.pack("<II", 0, 7), struct.pack("<II", 1, 8)]
        await qemu.stream.aclose()
        await hand.until(Lost)
    assert not [name for name in manager.kept if "companion" in name]
    async with daemon(manager, path) as hand:
        assert hand.events == []


async def test_the_log_goes_on(manager: KeepingManager, tmp_path: Path) -> None:
    """What is written is marked in QEMU's own file as before, until it asks for the stop; then there is none."""
    path = tmp_path / "vhost"
    number = sealed_file(4096)
    async with daemon(manager, path):
        qemu = await VhostClient.connect(path)
        await qemu.begin()
        for _ in range(2):
            await qemu.begin_log(number, 4096)
    async with daemon(manager, path) as hand:
        log = (await hand.until(LogChanged)).log
        assert log is not None
        log.mark(5 * 32768, 1)
        assert os.pread(number, 4096, 0)[5] == 0xFF
        await qemu.end()
        assert hand.told(StopAsked) == [StopAsked(sure=True)]
    async with daemon(manager, path) as hand:
        assert hand.told(LogChanged) == []
        await qemu.begin()
    os.close(number)
    await qemu.stream.aclose()


@pytest.mark.parametrize("calls", [False, True])
@pytest.mark.parametrize("question", [StopAsked, SaveAsked, GoAsked])
async def test_a_question_that_was_open(
    manager: KeepingManager, tmp_path: Path, question: type, calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what was answered, so the connection ends: QEMU's migration fails, and its VM goes on."""
    monkeypatch.setattr(port, "AGAIN_S", 0.01)
    path = tmp_path / "vhost"
    listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    if calls:
        await listening.bind(str(path))
        listening.listen(1)
    async with daemon(manager, path, calls=calls) as hand:
        if calls:
            qemu = VhostClient(trio.SocketStream((await listening.accept())[0]))
        else:
            qemu = await VhostClient.connect(path)
        if question is not GoAsked:
            await qemu.begin()
        hand.ignores = (question,)
        if question is StopAsked:
            await qemu.send(vhostclient.GET_VRING_BASE, struct.pack("<II", 0, 0))
        elif question is GoAsked:
            await qemu.send(vhostclient.SET_VRING_BASE, struct.pack("<II", 0, 0))
            await qemu.send(vhostclient.SET_VRING_ENABLE, struct.pack("<II", 0, 1), flags=9)
        else:
            reader, writer = os.pipe()
            await qemu.send(vhostclient.SET_DEVICE_STATE_FD, struct.pack("<II", 0, 0), [writer])
            os.close(reader)
            os.close(writer)
        await hand.until(question)
    listening.close()
    ledger, notes = ledger_of(manager)
    with closing(ledger), closing(notes):
        assert notes.left is None
        assert "middle of a message" in notes.lost
    with trio.fail_after(5):
        assert await qemu.stream.receive_some(100) == b""
    await qemu.stream.aclose()


async def test_a_daemon_leaves_when_all_is_answered(manager: KeepingManager, tmp_path: Path) -> None:
    """Who leaves in order has the time for it, and nothing is lost."""
    path = tmp_path / "vhost"
    ledger, notes = ledger_of(manager)
    with closing(ledger), closing(notes):
        hand = Hand(VhostUserFs(listen_on_path(path), path, notes=notes), ignores=(StopAsked,))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand.run)
            await nursery.start(hand.carrier.run)
            await notes.come_to_rest()
            qemu = await VhostClient.connect(path)
            await qemu.begin()
            await qemu.send(vhostclient.GET_VRING_BASE, struct.pack("<II", 0, 0))
            await hand.until(StopAsked)
            rested = trio.Event()

            @nursery.start_soon
            async def rests() -> None:
                await notes.come_to_rest()
                rested.set()

            await wait_all_tasks_blocked()
            assert not rested.is_set()
            hand.carrier.answer()
            await rested.wait()
            notes.leave()
            nursery.cancel_scope.cancel()
    async with daemon(manager, path) as hand:
        assert (await qemu.reply())[0] == vhostclient.GET_VRING_BASE
        assert hand.told(Lost) == []
        await qemu.stream.aclose()
        await hand.until(Lost)


async def test_a_state_that_was_on_its_way(manager: KeepingManager, tmp_path: Path) -> None:
    """It breaks off, and the next daemon says that it did not go well; the connection then moves another one."""
    path = tmp_path / "vhost"
    async with daemon(manager, path) as hand:
        qemu = await VhostClient.connect(path)
        await qemu.begin()
        hand.state = bytes(1 << 20)  # more than a pipe holds
        reader, writer = os.pipe()
        assert await qemu.transfer(0, writer) == 1 << 8
        os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert len(await trio.to_thread.run_sync(pipe.read)) < (1 << 20) + TRAIL
    async with daemon(manager, path) as hand:
        assert await qemu.check() != 0
        assert await qemu.save()
        assert hand.told(Lost) == []
        await qemu.stream.aclose()


async def test_where_qemu_listens_the_next_daemon_connects(
    manager: KeepingManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is where it was, and the same goes for its log."""
    monkeypatch.setattr(port, "AGAIN_S", 0.01)
    path = tmp_path / "qemu"
    number = sealed_file(4096)
    listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listening.bind(str(path))
    listening.listen(1)
    async with daemon(manager, path, calls=True):
        qemu = VhostClient(trio.SocketStream((await listening.accept())[0]))
        await qemu.begin()
        await qemu.begin_log(number, 4096)
    await qemu.stream.aclose()
    async with daemon(manager, path, calls=True) as hand:
        qemu = VhostClient(trio.SocketStream((await listening.accept())[0]))
        assert (await hand.until(LogChanged)).log is not None
        assert await qemu.end() == [struct.pack("<II", 0, 7), struct.pack("<II", 1, 8)]
        assert hand.told(StopAsked) == [StopAsked(sure=True)]
    await qemu.stream.aclose()
    listening.close()
    os.close(number)
