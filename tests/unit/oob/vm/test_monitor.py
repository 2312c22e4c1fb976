"""The monitor over a real UNIX socket, with QEMU played by the test: deaths, floods, silence, rubbish, a second one."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.vm import monitor as monitor_module
from vfiouser_oob.vm import qmp
from vfiouser_oob.vm.monitor import Found, GoneError, Monitor, MonitorPort, RefusedError, UnansweredError
from vfiouser_oob.vm.monitor_wire import EVENTS_MAX

GREETING = {"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}}


class Player:
    """The other end: what QEMU does."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def say(self, *messages: Any) -> None:
        """Send messages, in one piece."""
        await self.stream.send_all(b"".join(json.dumps(each).encode() + b"\r\n" for each in messages))

    async def hear(self) -> Any:
        """The next command."""
        while b"\n" not in self._buffer:
            data = await self.stream.receive_some(4096)
            assert data, "we were sent away"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    async def answer(self, command: str, result: Any) -> None:
        """Hear one command and answer it."""
        heard = await self.hear()
        assert heard["execute"] == command
        await self.say({"return": result, "id": heard["id"]})

    async def come(self, runstate: str = "running", *, migration: str = "") -> None:
        """Greet, and tell what we are doing."""
        await self.say(GREETING)
        await self.answer("qmp_capabilities", {})
        await self.answer("migrate-set-capabilities", {})
        await self.answer("query-status", {"status": runstate, "running": runstate == "running"})
        await self.answer("query-migrate", {"status": migration} if migration else {})

    async def sent_away(self) -> None:
        """Wait until we are."""
        with trio.fail_after(5):
            try:
                while await self.stream.receive_some(65536):
                    pass
            except trio.BrokenResourceError:
                pass


class House:
    """Attends to whoever comes: hands the monitors to the test, and keeps them until they go."""

    def __init__(self) -> None:
        self._came, self.come = trio.open_memory_channel[Monitor](10)

    async def attend(self, monitor: Monitor) -> None:
        """Wait for its end, events being the test's."""
        self._came.send_nowait(monitor)
        await monitor.gone()

    async def next(self) -> Monitor:
        """The next that has come."""
        with trio.fail_after(5):
            return await self.come.receive()


class Bed:
    """A port on a path."""

    def __init__(self, path: Path, port: MonitorPort, house: House) -> None:
        self.path, self.port, self.house = path, port, house
        self.players: list[Player] = []

    async def connect(self) -> Player:
        """Somebody connects."""
        player = Player(await trio.open_unix_socket(str(self.path)))
        self.players.append(player)
        return player

    async def qemu(self, runstate: str = "running", *, migration: str = "") -> tuple[Player, Monitor]:
        """A QEMU comes."""
        player = await self.connect()
        await player.come(runstate, migration=migration)
        return player, await self.house.next()


@asynccontextmanager
async def running(
    path: Path, attend: Callable[[Monitor], Awaitable[None]] | None = None, **options: Any
) -> AsyncIterator[Bed]:
    """A port that listens."""
    house = House()
    port = MonitorPort("vm1", attend or house.attend, **options)
    bed = Bed(path / "m", port, house)
    async with trio.open_nursery() as nursery:
        await nursery.start(port.serve, listen_on_path(bed.path))
        try:
            yield bed
        finally:
            for player in bed.players:
                player.stream.socket.close()
            nursery.cancel_scope.cancel()


async def test_found_as_it_is(tmp_path: Path) -> None:
    """What a QEMU is doing is known when it is told of."""
    async with running(tmp_path) as bed:
        _, monitor = await bed.qemu("inmigrate", migration="setup")
        assert monitor.found == Found("inmigrate", "setup")
        assert monitor.greeting.version == (11, 1, 3)
        assert monitor.peer is not None
        assert monitor.peer.pid == os.getpid()
        assert bed.port.current is monitor


async def test_only_events_after_the_state(tmp_path: Path) -> None:
    """Events before the answer that tells the state are older than it; those behind it in the same bytes are not."""
    async with running(tmp_path) as bed:
        player = await bed.connect()
        await player.say(GREETING)
        negotiate = await player.hear()
        await player.say({"event": "SUSPEND"}, {"return": {}, "id": negotiate["id"]}, {"event": "RESUME"})
        await player.answer("migrate-set-capabilities", {})
        status = await player.hear()
        answer = {"return": {"status": "paused"}, "id": status["id"]}
        await player.say({"event": "WAKEUP"}, answer, {"event": "STOP", "data": {"a": 1}})
        await player.answer("query-migrate", {})
        monitor = await bed.house.next()
        event = await monitor.next_event()
        assert (event.name, event.data) == ("STOP", {"a": 1})
        assert [] == monitor.pending_events()


@pytest.mark.parametrize(
    ("capabilities", "tells"),
    [
        ([{"capability": "events", "state": True}], True),
        ([{"capability": "events", "state": False}], False),
        (7, False),
    ],
)
async def test_events_that_cannot_be_turned_on(tmp_path: Path, capabilities: Any, tells: bool) -> None:
    """In the middle of a migration QEMU refuses; then what it was told before counts."""
    async with running(tmp_path) as bed:
        player = await bed.connect()
        await player.say(GREETING)
        await player.answer("qmp_capabilities", {})
        heard = await player.hear()
        assert heard["arguments"] == {"capabilities": [{"capability": "events", "state": True}]}
        await player.say({"error": {"class": "GenericError", "desc": "in progress"}, "id": heard["id"]})
        await player.answer("query-migrate-capabilities", capabilities)
        await player.answer("query-status", {"status": "running"})
        await player.answer("query-migrate", {"status": "active"})
        assert (await bed.house.next()).found == Found("running", "active", tells)


async def test_answers_out_of_order(tmp_path: Path) -> None:
    """Each gets its own, whatever their order."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()
        got: dict[str, Any] = {}

        async def ask(command: str) -> None:
            got[command] = await monitor.execute(command, {"x": 1})

        async with trio.open_nursery() as nursery:
            for command in ("query-a", "query-b", "query-c"):
                nursery.start_soon(ask, command)
            heard = [await player.hear() for _ in range(3)]
            assert all(each["arguments"] == {"x": 1} for each in heard)
            await player.say(*[{"return": each["execute"], "id": each["id"]} for each in reversed(heard)])
        assert got == {name: name for name in ("query-a", "query-b", "query-c")}


async def test_refusal_and_human_monitor(tmp_path: Path) -> None:
    """QEMU's words are in the error; the human monitor's output comes as it is."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()

        async def play() -> None:
            heard = await player.hear()
            await player.say({"error": {"class": "GenericError", "desc": "not now"}, "id": heard["id"]})
            heard = await player.hear()
            assert heard["arguments"] == {"command-line": "i /w 0xcf8"}
            await player.say({"return": "portl[0x0cf8] = 0x80002850\r\n", "id": heard["id"]})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(play)
            with pytest.raises(RefusedError, match="refused migrate_cancel: not now") as caught:
                await monitor.execute("migrate_cancel")
            assert (caught.value.kind, caught.value.text) == ("GenericError", "not now")
            assert "portl[0x0cf8] = 0x80002850\r\n" == await monitor.hmp("i /w 0xcf8")


async def test_late_answer(tmp_path: Path) -> None:
    """A command without an answer fails alone; the late answer is dropped, and the conversation goes on."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()
        with pytest.raises(UnansweredError, match=r"did not answer query-pci within 0.05 s"):
            await monitor.execute("query-pci", seconds=0.05)
        late = await player.hear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(monitor.execute, "query-status"))
            heard = await player.hear()
            await player.say({"return": [], "id": late["id"]}, {"return": {"status": "x"}, "id": heard["id"]})
        assert bed.port.current is monitor


async def test_cancelled_command(tmp_path: Path) -> None:
    """Whoever asked has gone: the answer disturbs nobody."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(monitor.execute, "query-a")
                heard = await player.hear()
                scope.cancel()
        await player.say({"return": 1, "id": heard["id"]}, {"event": "STOP"})
        assert "STOP" == (await monitor.next_event()).name


async def test_never_answers(tmp_path: Path) -> None:
    """Commands without answers are bounded, also in what they leave unsent."""
    async with running(tmp_path) as bed:
        _, monitor = await bed.qemu()
        for _ in range(qmp.UNANSWERED_MAX):
            with pytest.raises(UnansweredError):
                await monitor.execute("query-status", seconds=0)
        with pytest.raises(UnansweredError, match="was not sent"):
            await monitor.execute("query-status")


@pytest.mark.parametrize("abrupt", [False, True])
async def test_death_and_restart(tmp_path: Path, abrupt: bool) -> None:
    """A QEMU that dies ends every wait; events that came before are taken first; the next one is told of anew."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()

        async def ask() -> None:
            with pytest.raises(GoneError):
                await monitor.execute("query-a")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await player.hear()
            await player.say({"event": "STOP"})
            if abrupt:
                player.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await player.stream.aclose()
        assert "STOP" == (await monitor.next_event()).name
        with pytest.raises(GoneError, match="QEMU closed the monitor"):
            await monitor.next_event()
        with pytest.raises(GoneError):
            await monitor.execute("query-a")
        _, again = await bed.qemu("inmigrate")
        assert again.found.runstate == "inmigrate"


async def test_second_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as one lives, another one is sent away; when it has gone, the other is served."""
    monkeypatch.setattr(monitor_module, "HANDOVER_S", 0.05)
    async with running(tmp_path) as bed:
        first, monitor = await bed.qemu()
        second = await bed.connect()
        await second.come()
        await second.sent_away()
        assert bed.port.current is monitor
        await first.say({"event": "STOP"})
        assert "STOP" == (await monitor.next_event()).name
        await first.stream.aclose()
        await bed.qemu()


async def test_successor_is_quicker_than_the_end(tmp_path: Path) -> None:
    """A newcomer waits a moment for the end of the QEMU before it."""
    async with running(tmp_path) as bed:
        first, _ = await bed.qemu()
        second = await bed.connect()
        await second.come("paused")
        await first.stream.aclose()
        assert "paused" == (await bed.house.next()).found.runstate


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 100,
        b"{}\n",
        b"x" * (qmp.LINE_MAX + 20_000),
        json.dumps(GREETING).encode() * 2,
    ],
    ids=["http", "zeros", "wrong", "endless", "twice"],
)
async def test_rubbish(tmp_path: Path, rubbish: bytes) -> None:
    """Who talks rubbish is sent away, before and after the greeting, and a QEMU is served afterwards."""
    async with running(tmp_path) as bed:
        stranger = await bed.connect()
        with trio.move_on_after(5):
            try:
                await stranger.stream.send_all(rubbish + b"\n")
            except trio.BrokenResourceError:
                pass
        await stranger.sent_away()
        player, monitor = await bed.qemu()
        try:
            await player.stream.send_all(rubbish + b"\n")
        except trio.BrokenResourceError:
            pass
        with trio.fail_after(5), pytest.raises(GoneError):
            await monitor.next_event()
        await player.sent_away()
        await bed.qemu()


async def test_flood_of_events(tmp_path: Path) -> None:
    """Events that nobody takes are bounded; those that were kept are still told before the end."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()
        flood = [{"event": "STOP", "data": {"n": n}} for n in range(EVENTS_MAX + 1)]
        await player.say(*flood)
        await player.sent_away()
        for n in range(EVENTS_MAX):
            assert {"n": n} == (await monitor.next_event()).data
        with pytest.raises(GoneError, match="more than 1024 events"):
            await monitor.next_event()


async def test_endless_events_leave_room_for_others(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Who sends more messages than anybody needs waits for the next second, and meanwhile so does nobody else."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(partial(player.say, *[{"event": "X"}] * 1000))
                for _ in range(1000):
                    await monitor.next_event()
        assert 2 <= trio.current_time() - began < 4


async def test_pending_events(tmp_path: Path) -> None:
    """What QEMU sent before somebody looks is there, whether a task has read it or not."""
    async with running(tmp_path) as bed:
        player, monitor = await bed.qemu()
        number = player.stream.socket.fileno()
        # Sent past trio, so no task of ours has had a turn since.
        os.write(number, b'{"event": "STOP"}\r\n{"event": "RESUME"}\r\n{"event": "ST')
        assert ["STOP", "RESUME"] == [event.name for event in monitor.pending_events()]
        os.write(number, b'OP"}\r\n')
        assert ["STOP"] == [event.name for event in monitor.pending_events()]
        os.write(number, b'{"event": "STOP"}\r\nrubbish\r\n')
        assert ["STOP"] == [event.name for event in monitor.pending_events()]
        assert [] == monitor.pending_events()
        with pytest.raises(GoneError, match="not JSON"):
            await monitor.next_event()


async def test_silence(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Who does not greet, or does not answer, keeps nobody out, and is sent away in time."""
    async with running(tmp_path) as bed:
        silent, greeted = await bed.connect(), await bed.connect()
        await greeted.say(GREETING)
        await greeted.hear()
        await bed.qemu()
        with trio.fail_after(70):
            assert b"" == await silent.stream.receive_some(1)
            assert b"" == await greeted.stream.receive_some(1)


async def test_too_many_silent(tmp_path: Path) -> None:
    """Of many who say nothing, the oldest goes."""
    async with running(tmp_path) as bed:
        strangers = [await bed.connect() for _ in range(monitor_module.SILENT_MAX + 1)]
        await strangers[0].sent_away()
        await strangers[-1].come()
        await bed.house.next()


async def test_descriptors_are_refused(tmp_path: Path) -> None:
    """Descriptors are no part of this conversation; whoever sends them is sent away, and they are closed."""
    async with running(tmp_path) as bed:
        stranger = await bed.connect()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))
            await stranger.stream.socket.sendmsg([b"{"], [rights])
            theirs.close()
            await stranger.sent_away()
            ours.settimeout(5)
            assert b"" == await trio.to_thread.run_sync(ours.recv, 1)


async def test_users(tmp_path: Path) -> None:
    """Only the users that are allowed may be QEMU."""
    async with running(tmp_path, allow_uids=frozenset({os.getuid() + 1})) as bed:
        stranger = await bed.connect()
        await stranger.sent_away()
    (tmp_path / "b").mkdir()
    async with running(tmp_path / "b", allow_uids=frozenset({os.getuid()})) as bed:
        await bed.qemu()


@pytest.mark.parametrize("status", [{}, 7, {"status": 1}])
async def test_state_that_is_not_told(tmp_path: Path, status: Any) -> None:
    """A QEMU that does not say what it is doing is none."""
    async with running(tmp_path) as bed:
        player = await bed.connect()
        await player.say(GREETING)
        await player.answer("qmp_capabilities", {})
        await player.answer("migrate-set-capabilities", {})
        await player.answer("query-status", status)
        await player.answer("query-migrate", {})
        await player.sent_away()


async def test_attention_ends(tmp_path: Path) -> None:
    """When whoever attends has had enough, or was surprised by the end, the next one is served."""
    seen = trio.Semaphore(0)

    async def attend(monitor: Monitor) -> None:
        seen.release()
        if monitor.found.runstate == "running":
            await monitor.next_event()

    async with running(tmp_path, attend) as bed:
        for runstate in ("paused", "running", "paused"):
            player = await bed.connect()
            await player.come(runstate)
            await seen.acquire()
            if runstate == "running":
                await player.stream.aclose()
            else:
                await player.sent_away()
