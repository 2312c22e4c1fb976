"""Carrier V over the end of its daemon: QEMU never takes a state for whole of which it has not got every piece."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
from jeepney import new_method_call
from trio.testing import wait_all_tasks_blocked

from carrierbed.busclient import BUS, SERVICE, BusClient, BusError, owner
from carrierbed.hand import Hand
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.transport.reaper import REAPER
from vfiouser_oob.vm.carriers.dbus_vmstate import DbusVmstate
from vfiouser_oob.vm.carriers.interface import Lost, QemuAttached, SaveAsked, StateTaken
from vfiouser_oob.vm.carriers.vmstate_notes import VmstateNotes
from vmkit.keeping import KeepingManager

LOST = "the state that QEMU had not read yet was lost"


@pytest.fixture
def manager() -> Iterator[KeepingManager]:
    """Somebody who keeps descriptors."""
    with closing(KeepingManager()) as manager:
        yield manager
    assert REAPER.settle(5)


def ledger_of(manager: KeepingManager) -> tuple[Ledger, VmstateNotes]:
    """What a daemon finds."""
    with manager.daemon() as survival:
        ledger = survival.ledger_of("vm")
        assert ledger is not None
        return ledger, VmstateNotes(ledger)


@asynccontextmanager
async def daemon(manager: KeepingManager, path: Path) -> AsyncIterator[Hand]:
    """A daemon with a state of three pieces, which is killed at the end of the block."""
    ledger, notes = ledger_of(manager)
    with closing(ledger), closing(notes):
        hand = Hand(DbusVmstate(listen_on_path(path), path, notes=notes), bytes(5 << 19))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand.run)
            await nursery.start(hand.carrier.run)
            yield hand
            notes.leave()  # as for somebody who is killed: nothing is taken back
            nursery.cancel_scope.cancel()


def kept(manager: KeepingManager) -> list[str]:
    """The connections that a service manager keeps."""
    return [name for name in manager.kept if "vmstate." in name]


@pytest.mark.parametrize("named", range(4))
async def test_killed_before_the_bytes_are_asked_for(manager: KeepingManager, tmp_path: Path, named: int) -> None:
    """The next daemon answers to every name that QEMU still asks for, so QEMU asks for the bytes, which are refused."""
    path = tmp_path / "bus"
    async with daemon(manager, path):
        qemu = await BusClient.connect(path)
        owners = await (await qemu.open()).owners()
        found = await qemu.proxies(owners[:named])
    assert len(kept(manager)) == 1
    finished = trio.Event()

    async def goes_on() -> None:
        found.update(await qemu.proxies(owners[named:]))
        assert len(found) == 3
        with pytest.raises(BusError, match=LOST):
            await qemu.call(owner(found["vfiouser-oob.0"]), "Save")
        finished.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(goes_on)  # it asks while nobody is there
        await wait_all_tasks_blocked()
        async with daemon(manager, path) as hand:
            await finished.wait()
            assert [type(event) for event in hand.events] == [QemuAttached]
            assert not kept(manager)
            assert len(await qemu.save()) == 3  # the connection is as any other
            assert hand.told(SaveAsked)
            await qemu.stream.aclose()
            await hand.until(Lost)


async def test_killed_while_the_number_is_told(manager: KeepingManager, tmp_path: Path) -> None:
    """The call may have been answered, or not: it is refused, which is nothing to a QEMU that has its answer."""
    path = tmp_path / "bus"
    ours, theirs = socket.socketpair()
    ledger, notes = ledger_of(manager)
    with closing(ledger), closing(ours):
        notes.hold(ours, 2, 1)
    theirs.setblocking(False)
    qemu = BusClient(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
    finished = trio.Event()

    async def asks() -> None:
        with pytest.raises(BusError, match=LOST):
            await qemu.owners()
        finished.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(asks)
        await wait_all_tasks_blocked()
        async with daemon(manager, path) as hand:
            await finished.wait()
            await qemu.stream.aclose()
            await hand.until(Lost)


async def test_killed_while_the_bytes_are_asked_for(manager: KeepingManager, tmp_path: Path) -> None:
    """The connection ends with the daemon, which fails the migration by itself."""
    path = tmp_path / "bus"
    async with daemon(manager, path) as hand:
        qemu = await (await BusClient.connect(path)).open()
        found = await qemu.proxies()
        await qemu.call(owner(found["vfiouser-oob.1"]), "Save")
        assert not kept(manager)
        assert not hand.told(StateTaken)
    with pytest.raises((EOFError, trio.BrokenResourceError)):
        await qemu.call(owner(found["vfiouser-oob.0"]), "Save")
    await qemu.stream.aclose()
    async with daemon(manager, path) as hand:
        assert hand.events == []


async def test_what_comes_at_once_is_not_cut(manager: KeepingManager, tmp_path: Path) -> None:
    """GDBus sends several calls without waiting, more than is otherwise read in one go."""
    path = tmp_path / "bus"
    async with daemon(manager, path):
        qemu = await (await BusClient.connect(path)).open()
        owners = await qemu.owners()
        messages = [
            new_method_call(BUS, "AddMatch", "s", (f"type='signal',sender='{name}'",)).serialise(serial=100 + number)
            for number, name in enumerate(owners * 4)
        ]
        assert len(b"".join(messages)) > 1 << 10
        await qemu.stream.send_all(b"".join(messages))
        found = await qemu.proxies(owners)
        assert len(kept(manager)) == 1
        assert len(found) == 3
        await qemu.stream.aclose()


async def test_half_a_message_ends_with_the_daemon(manager: KeepingManager, tmp_path: Path) -> None:
    """Nobody could go on in the middle of it; GDBus sends none."""
    path = tmp_path / "bus"
    async with daemon(manager, path):
        qemu = await (await BusClient.connect(path)).open()
        await qemu.owners()
        message = new_method_call(BUS, "NameHasOwner", "s", (SERVICE,)).serialise(serial=99)
        await qemu.stream.send_all(message[:40])
        with trio.fail_after(10):
            while kept(manager):
                await wait_all_tasks_blocked()
    assert await qemu.stream.receive_some(1) == b""
    await qemu.stream.aclose()


async def test_descriptors_that_come_there_are_closed(manager: KeepingManager, tmp_path: Path) -> None:
    """Those of what stays in the socket, too."""
    path = tmp_path / "bus"
    async with daemon(manager, path):
        qemu = await (await BusClient.connect(path)).open()
        await qemu.owners()
        reading, writing = os.pipe()
        message = new_method_call(BUS, "NameHasOwner", "s", (SERVICE,)).serialise(serial=99)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [writing]))
        await qemu.stream.socket.sendmsg([message], [rights])
        os.close(writing)
        await qemu.stream.receive_some(1)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(reading)
        assert os.read(reading, 1) == b""
        os.close(reading)
        await qemu.stream.aclose()
