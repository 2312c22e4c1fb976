"""Carrier F with a front-end that asks as QEMU does, and with front-ends that do not."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from carrierbed import vhostclient
from carrierbed.hand import Hand
from carrierbed.vhostclient import VhostClient, sealed_file
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.transport.reaper import REAPER
from vfiouser_oob.vm.carriers import port
from vfiouser_oob.vm.carriers.interface import (
    AnswerDue,
    GoAsked,
    LogChanged,
    Lost,
    QemuAttached,
    SaveAsked,
    StateLoaded,
    StateTaken,
    StopAsked,
)
from vfiouser_oob.vm.carriers.vhost_user_fs import VhostUserFs, companion_arguments

MIB = 1 << 20


class Bed(Hand):
    """A hand, and the clients of its carrier."""

    path: Path

    def __init__(self, carrier: VhostUserFs, state: bytes) -> None:
        super().__init__(carrier, state)
        self.clients: list[VhostClient] = []

    async def client(self) -> VhostClient:
        """A QEMU that has connected."""
        self.clients.append(await VhostClient.connect(self.path))
        return self.clients[-1]


@asynccontextmanager
async def carrier(tmp_path: Path, state: bytes = b"") -> AsyncIterator[Bed]:
    """A carrier that listens, and its hand."""
    path = tmp_path / "vhost"
    hand = Bed(VhostUserFs(listen_on_path(path), path), state)
    hand.path = path
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hand.run)
        await nursery.start(hand.carrier.run)
        yield hand
        for each in hand.clients:
            await each.stream.aclose()
        nursery.cancel_scope.cancel()
    assert REAPER.settle(5)


async def test_features(tmp_path: Path) -> None:
    """What QEMU's device needs, and nothing else."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        features = int.from_bytes(await qemu.ask(vhostclient.GET_FEATURES), "little")
        protocol = int.from_bytes(await qemu.ask(vhostclient.GET_PROTOCOL_FEATURES), "little")
        assert features == 1 << 26 | 1 << 30 | 1 << 32
        assert protocol == 1 << 1 | 1 << 3 | 1 << 19
        assert [type(event) for event in hand.events] == [QemuAttached]


@pytest.mark.parametrize("size", [0, 5, 20 * MIB])
async def test_a_state_goes_out_and_comes_in(tmp_path: Path, size: int) -> None:
    """What is written at the source is what the destination is asked to load, while its stream is not at its end."""
    state = os.urandom(size)
    async with carrier(tmp_path, state) as hand:
        qemu = await hand.client()
        data = await qemu.save()
        await qemu.stream.aclose()
        await hand.until(Lost)
        assert [type(event) for event in hand.events] == [QemuAttached, SaveAsked, StateTaken, Lost]
        hand.carrier.expect(20 * MIB)
        assert await (await hand.client()).load(data) == 0
        assert hand.told(StateLoaded)[0].state == state


async def test_a_load_is_asked_before_the_last_byte_and_checked_after_the_answer(tmp_path: Path) -> None:
    """The main loop is free at first; when QEMU waits for the check, that is told."""
    async with carrier(tmp_path, b"state") as hand:
        data = await (await hand.client()).save()
        await hand.clients[0].stream.aclose()
        hand.carrier.expect(MIB)
        hand.ignores = (StateLoaded,)
        qemu = await hand.client()
        reader, writer = os.pipe()
        assert await qemu.transfer(1, reader) == 1 << 8
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            await trio.to_thread.run_sync(pipe.write, data[:-1])
            assert (await hand.until(StateLoaded)).free
            pipe.write(data[-1:])
        await qemu.send(vhostclient.CHECK_DEVICE_STATE)
        await hand.until(AnswerDue)
        assert hand.carrier.answer()
        assert await qemu.reply() == (vhostclient.CHECK_DEVICE_STATE, bytes(8))


async def test_a_refused_save_and_a_refused_load(tmp_path: Path) -> None:
    """A save fails at once, a load at its check; what nobody expects is not taken."""
    async with carrier(tmp_path, b"state") as hand:
        qemu = await hand.client()
        data = await qemu.save()
        hand.refuses = (SaveAsked, StateLoaded)
        with pytest.raises(OSError, match="refused"):
            await qemu.save()
        assert await qemu.check() == 1
        with pytest.raises(OSError, match="refused"):
            await qemu.load(data)
        hand.carrier.expect(MIB)
        assert await qemu.load(data) == 1
        assert await qemu.load(b"rubbish" * 100) == 1
        assert await qemu.load(data[:-1]) == 1
        hand.carrier.reset()
        with pytest.raises(OSError, match="refused"):
            await qemu.load(data)


async def test_stop_and_go(tmp_path: Path) -> None:
    """The stop is asked before the first vring's base is told, the go before the last vring's enable is."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        assert await qemu.begin() == [0, 0]
        assert [type(event) for event in hand.events] == [QemuAttached, GoAsked]
        assert await qemu.end() == [struct.pack("<II", 0, 7), struct.pack("<II", 1, 8)]
        assert hand.told(StopAsked) == [StopAsked(sure=False)]
        hand.ignores = (GoAsked,)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.begin)
            await hand.until(GoAsked, 2)
            await wait_all_tasks_blocked(0.01)
            assert hand.carrier.answer()


async def test_a_refused_stop_is_an_answer_that_qemu_does_not_take(tmp_path: Path) -> None:
    """A reply to another question: QEMU then fails the migration."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        await qemu.begin()
        hand.refuses = (StopAsked,)
        await qemu.send(vhostclient.GET_VRING_BASE, struct.pack("<II", 0, 0))
        assert (await qemu.reply())[0] == vhostclient.GET_FEATURES


async def test_written_pages_are_logged_until_the_stop_is_answered(tmp_path: Path) -> None:
    """In QEMU's own file; a stop in a migration is sure to be one."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        await qemu.begin()
        number = sealed_file(4096)
        await qemu.begin_log(number, 4096)
        log = (await hand.until(LogChanged)).log
        assert log is not None
        log.mark(5 * 32768, 1)
        assert os.pread(number, 4096, 0)[5] == 0xFF
        hand.ignores = (StopAsked,)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.end)
            assert (await hand.until(StopAsked)).sure
            log.mark(6 * 32768, 1)
            assert os.pread(number, 4096, 0)[6] == 0xFF
            assert hand.carrier.answer()
            assert (await hand.until(LogChanged, 2)).log is None
        log.mark(7 * 32768, 1)
        assert os.pread(number, 4096, 0)[7] == 0
        os.close(number)


async def test_a_log_ends_with_its_feature(tmp_path: Path) -> None:
    """As QEMU does it when a migration was cancelled; one that cannot be used is none from the beginning."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        for sealed in (False, True):
            number = sealed_file(4096, sealed=sealed)
            await qemu.begin_log(number, 4096)
            os.close(number)
        await hand.until(LogChanged)
        await qemu.send(vhostclient.SET_FEATURES, (1 << 32).to_bytes(8, "little"))
        await hand.until(LogChanged, 2)
        assert [event.log is None for event in hand.told(LogChanged)] == [False, True]


@pytest.mark.parametrize("when", ["stop", "load"])
async def test_a_question_ends_with_its_qemu(tmp_path: Path, when: str) -> None:
    """The end is noticed while the question is open, and a later answer goes nowhere."""
    async with carrier(tmp_path, b"state") as hand:
        qemu = await hand.client()
        data = await qemu.save()
        await qemu.begin()
        hand.carrier.expect(MIB)
        hand.ignores = (StopAsked, StateLoaded)
        async with trio.open_nursery() as nursery:
            if when == "stop":
                nursery.start_soon(qemu.end)
                await hand.until(StopAsked)
            else:
                nursery.start_soon(qemu.load, data)
                await hand.until(StateLoaded)
            await wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()
        await qemu.stream.aclose()
        await hand.until(Lost)
        assert not hand.carrier.answer()


async def test_a_second_state_is_saved_after_a_failed_one(tmp_path: Path) -> None:
    """QEMU went away in the middle of the first; nothing of it is left."""
    async with carrier(tmp_path, os.urandom(4 * MIB)) as hand:
        qemu = await hand.client()
        reader, writer = os.pipe()
        assert await qemu.transfer(0, writer) == 1 << 8
        os.close(writer)
        os.close(reader)
        assert await qemu.check() == 1
        assert len(await qemu.save()) > 4 * MIB
        assert len(hand.told(StateTaken)) == 1


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n" * 100,
        struct.pack("<III", 1, 1, 1 << 31),
        struct.pack("<IIIII", 18, 1, 8, 1 << 20, 1),
    ],
)
async def test_rubbish_ends_its_own_connection(tmp_path: Path, noise: bytes) -> None:
    """And the next QEMU is served."""
    async with carrier(tmp_path, b"state") as hand:
        bad = await hand.client()
        with suppress(trio.BrokenResourceError):
            await bad.stream.send_all(noise)
            while await bad.stream.receive_some(65536):
                pass
        assert await (await hand.client()).save()


async def test_descriptors_are_closed_at_last(tmp_path: Path) -> None:
    """What nobody takes at once, what is kept when it is replaced, and the rest with the connection."""
    async with carrier(tmp_path) as hand:
        qemu = await hand.client()
        readers = []
        table = struct.pack("<II4Q", 1, 0, 0, 4096, 0, 0)
        # An error's descriptor is of no use; the second of each other kind replaces the first.
        for request, payload in [(14, bytes(8)), *[(12, bytes(8)), (13, bytes(8)), (5, table)] * 2]:
            reader, writer = os.pipe()
            await qemu.send(request, payload, [writer])
            os.close(writer)
            readers.append(reader)
        for number, reader in enumerate(readers):
            if number == 4:
                await qemu.stream.aclose()
            with os.fdopen(reader, "rb") as pipe:
                assert await trio.to_thread.run_sync(pipe.read) == b""


def test_a_comma_in_a_chardev_is_written_twice() -> None:
    """And further properties are the device's."""
    arguments = companion_arguments(Path("/run/a,b"), addr="0x10")
    assert arguments[1] == "socket,id=oobvhost,path=/run/a,,b"
    assert '"addr": "0x10"' in arguments[3]


async def test_where_qemu_listens_it_is_called_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first connection was told is known to the next one; a QEMU that begins anew is a new one."""
    monkeypatch.setattr(port, "AGAIN_S", 0.01)
    path = tmp_path / "qemu"
    hand = Bed(VhostUserFs(None, path), b"state")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hand.run)
        await nursery.start(hand.carrier.run)
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listening.bind(str(path))
        listening.listen(1)

        async def called() -> VhostClient:
            hand.clients.append(VhostClient(trio.SocketStream((await listening.accept())[0])))
            return hand.clients[-1]

        qemu = await called()
        await qemu.begin()
        await qemu.stream.aclose()
        qemu = await called()
        assert await qemu.end() == [struct.pack("<II", 0, 7), struct.pack("<II", 1, 8)]
        assert len(hand.told(StopAsked)) == len(hand.told(GoAsked)) == 1
        await qemu.begin()
        await qemu.stream.aclose()
        qemu = await called()
        await qemu.send(vhostclient.SET_OWNER)
        assert await qemu.end() == [struct.pack("<II", 0, 0), struct.pack("<II", 1, 0)]
        assert len(hand.told(StopAsked)) == 1
        assert len(hand.told(QemuAttached)) == 3
        await qemu.stream.aclose()
        listening.close()
        nursery.cancel_scope.cancel()
    assert REAPER.settle(5)


async def test_a_user_that_may_not_listen_is_not_served(tmp_path: Path) -> None:
    """The other direction of the same check."""
    path = tmp_path / "qemu"
    hand = Hand(VhostUserFs(None, path, frozenset({os.geteuid() + 1})), b"state")
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listening:
        await listening.bind(str(path))
        listening.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hand.run)
            await nursery.start(hand.carrier.run)
            async with trio.SocketStream((await listening.accept())[0]) as stream:
                assert await stream.receive_some(1) == b""
            nursery.cancel_scope.cancel()
    assert not hand.events
    assert REAPER.settle(5)
