"""Carrier V with a client that asks as QEMU does, and with clients that do not."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from jeepney import new_method_call
from trio.testing import wait_all_tasks_blocked

from carrierbed.busclient import BUS, BusClient, BusError, owner
from carrierbed.hand import Hand
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.transport.reaper import REAPER
from vfiouser_oob.vm.carriers import port
from vfiouser_oob.vm.carriers.dbus_vmstate import DbusVmstate, vmstate_object
from vfiouser_oob.vm.carriers.interface import Lost, QemuAttached, SaveAsked, StateLoaded, StateTaken

MIB = 1 << 20


class Bed(Hand):
    """A hand, and the clients of its carrier."""

    path: Path

    def __init__(self, carrier: DbusVmstate, state: bytes) -> None:
        super().__init__(carrier, state)
        self.clients: list[BusClient] = []

    async def connect(self) -> BusClient:
        """A client that has said nothing yet."""
        self.clients.append(await BusClient.connect(self.path))
        return self.clients[-1]

    async def client(self) -> BusClient:
        """A QEMU that has connected."""
        return await (await self.connect()).open()


@asynccontextmanager
async def carrier(tmp_path: Path, state: bytes = b"", uids: frozenset[int] | None = None) -> AsyncIterator[Bed]:
    """A carrier that listens, and its hand."""
    path = tmp_path / "bus"
    hand = Bed(DbusVmstate(listen_on_path(path), path, allow_uids=uids), state)
    hand.path = path
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hand.run)
        await nursery.start(hand.carrier.run)
        yield hand
        for each in hand.clients:
            await each.stream.aclose()
        nursery.cancel_scope.cancel()
    assert REAPER.settle(5)


@pytest.mark.parametrize("size", [0, 5, MIB, 3 * MIB])
async def test_a_state_goes_out_and_comes_in(tmp_path: Path, size: int) -> None:
    """What is saved in pieces is loaded from them; no piece is larger than QEMU takes."""
    state = os.urandom(size)
    async with carrier(tmp_path, state) as hand:
        qemu = await hand.client()
        pieces = await qemu.save()
        assert max(map(len, pieces.values())) <= MIB
        await qemu.stream.aclose()
        await hand.until(Lost)
        assert [type(event) for event in hand.events] == [QemuAttached, SaveAsked, StateTaken, Lost]
        hand.carrier.expect(4 * MIB)
        qemu = await hand.client()
        await qemu.load(dict(reversed(pieces.items())))
        assert hand.told(StateLoaded)[0].state == state


async def test_a_refused_save_is_an_error_to_the_first_question(tmp_path: Path) -> None:
    """QEMU has then nothing that it could send; it may ask again."""
    async with carrier(tmp_path, b"state") as hand:
        qemu = await hand.client()
        hand.refuses = (SaveAsked,)
        with pytest.raises(BusError, match=Hand.reason):
            await qemu.proxies()
        hand.refuses = ()
        assert len(await qemu.save()) == 1


async def test_a_state_leaves_once(tmp_path: Path) -> None:
    """A second Save without having asked for the owners gets nothing: the answer would be an old one."""
    async with carrier(tmp_path, b"state") as hand:
        qemu = await hand.client()
        await qemu.save()
        with pytest.raises(BusError, match="no state to save"):
            await qemu.call(owner(":1.1"), "Save")
        await qemu.save()
        with trio.fail_after(10):
            while len(hand.told(StateTaken)) < 2:
                await wait_all_tasks_blocked(0.01)


async def test_what_is_too_large_is_neither_offered_nor_expected(tmp_path: Path) -> None:
    """The bound is told before QEMU is."""
    async with carrier(tmp_path) as hand:
        with pytest.raises(ValueError, match="268435456"):
            hand.carrier.expect(257 * MIB)
        with pytest.raises(ValueError, match="268435456"):
            hand.carrier.offer(bytearray(257 * MIB))


@pytest.mark.parametrize("expects", [True, False])
async def test_a_state_that_is_not_wanted_is_refused(tmp_path: Path, expects: bool) -> None:
    """One that is refused, that is foreign, or that nobody expects; each in words that QEMU prints."""
    async with carrier(tmp_path, b"state") as hand:
        qemu = await hand.client()
        pieces = await qemu.save()
        if expects:
            hand.carrier.expect(MIB)
            hand.refuses = (StateLoaded,)
            with pytest.raises(BusError, match=Hand.reason):
                await qemu.load(pieces)
            with pytest.raises(BusError, match="not a piece of a state"):
                await qemu.load(dict.fromkeys(pieces, b"foreign"))
        else:
            with pytest.raises(BusError, match="no state is expected"):
                await qemu.load(pieces)
        assert len(hand.told(StateLoaded)) == expects


async def test_a_reset_refuses_what_is_open(tmp_path: Path) -> None:
    """And from then on a source is asked again."""
    async with carrier(tmp_path, b"state") as hand:
        hand.carrier.expect(MIB)
        hand.carrier.reset()
        hand.ignores = (SaveAsked,)
        qemu = await hand.client()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def refused() -> None:
                with pytest.raises(BusError, match="given up"):
                    await qemu.proxies()

            await hand.until(SaveAsked)
            hand.carrier.reset()


async def test_a_question_ends_with_its_qemu(tmp_path: Path) -> None:
    """The end is noticed while the question is open, and a later answer goes nowhere."""
    async with carrier(tmp_path, b"state") as hand:
        hand.ignores = (SaveAsked,)
        qemu = await hand.client()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.proxies)
            await hand.until(SaveAsked)
            nursery.cancel_scope.cancel()
        await qemu.stream.aclose()
        await hand.until(Lost)
        assert not hand.carrier.offer(b"late")


async def test_one_qemu_is_served_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is sent away, and served once the first has gone."""
    monkeypatch.setattr(port, "HANDOVER_S", 0.05)
    async with carrier(tmp_path, b"state") as hand:
        first = await hand.client()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await hand.client()
        assert len(await first.save()) == 1
        await first.stream.aclose()
        assert len(await (await hand.client()).save()) == 1
        assert len(hand.told(QemuAttached)) == 2


async def test_a_users_id_decides(tmp_path: Path) -> None:
    """By the kernel's word; whoever may not is closed without a word."""
    async with carrier(tmp_path, uids=frozenset({os.geteuid() + 1})) as hand:
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await hand.client()
        assert not hand.events


async def test_those_who_only_sit_there_keep_nobody_out(tmp_path: Path) -> None:
    """Silent connections, more than there are places: the surplus is closed, the rest after some seconds."""
    async with carrier(tmp_path, b"state") as hand:
        silent = [await hand.connect() for _ in range(port.CONNECTIONS_MAX + 3)]
        await wait_all_tasks_blocked(0.01)
        assert await silent[-1].stream.receive_some(1) == b""
        await silent[0].stream.aclose()
        await wait_all_tasks_blocked(0.01)
        assert len(await (await hand.client()).save()) == 1
        assert len(hand.told(QemuAttached)) == 1
        for each in silent:
            await each.stream.aclose()


@pytest.mark.parametrize("noise", [b"\0GET / HTTP/1.1\r\n" * 2000, os.urandom(1 << 20), b"\0" + b"x" * 2000])
async def test_rubbish_ends_its_own_connection(tmp_path: Path, noise: bytes) -> None:
    """And nobody is told, since it was no QEMU."""
    async with carrier(tmp_path, b"state") as hand:
        bad = await hand.connect()
        async with bad.stream:
            with suppress(trio.BrokenResourceError):
                await bad.stream.send_all(noise)
                while await bad.stream.receive_some(65536):
                    pass
        assert not hand.events
        assert len(await (await hand.client()).save()) == 1


async def test_rubbish_after_the_opening_is_a_lost_qemu(tmp_path: Path) -> None:
    """The reason is told."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        await qemu.stream.send_all(bytes(16))
        assert "not a D-Bus message" in (await hand.until(Lost)).reason


async def test_a_flood_that_nobody_reads_the_answers_of_is_held_up(tmp_path: Path) -> None:
    """The peer's own writes block; memory does not grow, and the loop goes on."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        sent = 0
        with trio.move_on_after(0.5):
            while True:
                await qemu.stream.send_all(_hello_again())
                sent += 1
        assert sent < 20_000
        await qemu.stream.aclose()
        await hand.until(Lost)


def _hello_again() -> bytes:
    message: bytes = new_method_call(BUS, "Hello").serialise(serial=9)
    return message


async def test_descriptors_are_closed(tmp_path: Path) -> None:
    """Nobody wants them here; they are received all the same, and closed elsewhere."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        ours, theirs = socket.socketpair()
        with ours:
            raw = socket.socket(fileno=os.dup(qemu.stream.socket.fileno()))
            with raw:
                socket.send_fds(raw, [_hello_again()], [theirs.fileno()])
            theirs.close()
            ours.setblocking(False)
            await trio.lowlevel.wait_readable(ours)
            assert ours.recv(1) == b""
        await qemu.stream.aclose()
        await hand.until(Lost)


@pytest.mark.parametrize(
    ("member", "signature", "arguments", "expected"),
    [
        ("NameHasOwner", "s", ("org.qemu.VMState1",), (False,)),
        ("RequestName", "su", ("a.b", 0), (3,)),
        ("StartServiceByName", "su", ("a.b", 0), (2,)),
        ("GetNameOwner", "s", ("org.freedesktop.DBus",), ("org.freedesktop.DBus",)),
    ],
)
async def test_the_buses_own_methods(
    tmp_path: Path, member: str, signature: str, arguments: tuple[object, ...], expected: tuple[object, ...]
) -> None:
    """As little of a bus as a client of GDBus may ask for."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        assert await qemu.call(BUS, member, signature, *arguments) == expected
        for bad in (("GetNameOwner", "s", ":1.99999999999"), ("GetNameOwner", "s", ":1.٣"), ("Nonsense",), ("Hello",)):
            with pytest.raises(BusError):
                await qemu.call(BUS, *bad)
        for method in ("Save", "Load"):
            with pytest.raises(BusError):
                await qemu.call(owner(":1.7"), method, *(("ay", b"x") if method == "Load" else ()))


def test_the_address_is_escaped() -> None:
    """A path with characters that mean something in a D-Bus address."""
    assert vmstate_object(Path("/run/a b,c;d.bus"), "x")["addr"] == "unix:path=/run/a%20b%2Cc%3Bd.bus"
