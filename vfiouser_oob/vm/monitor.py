"""The monitor of one VM: QEMU connects its `monitor-qmp` to our socket, and we ask and listen.

QEMU comes back by itself (`reconnect-ms`), so the socket outlives QEMU's death, a restart of either side and whoever
else connects. One QEMU is served at a time; whoever comes meanwhile is sent away, and tries again by itself.

Rule 1: *nothing is missed and nothing is old*. What a QEMU was doing when it came is asked before anybody is told of
        it, and of the events only those that came after that answer are told.
Rule 2: *silence is no end*. QEMU's main loop stands still for seconds in a migration. A command that is not answered
        in time fails alone; its answer is dropped when it comes, and the conversation goes on.
Rule 3: *rubbish and floods are*. Who does not speak QMP, or tells more events than are taken, is sent away; a QEMU
        comes again and is asked anew.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from vfiouser_agents.causes import words_of
from vfiouser_oob.observability import log
from vfiouser_oob.transport.listener import Listener
from vfiouser_oob.transport.peer import Peer, peer_of
from vfiouser_oob.vm.monitor_wire import STATUS, GoneError, MonitorError, MonitorWire, RefusedError, UnansweredError
from vfiouser_oob.vm.qmp import NEGOTIATE, QmpEvent, QmpGreeting

__all__ = ["Found", "GoneError", "Monitor", "MonitorError", "MonitorPort", "RefusedError", "UnansweredError"]

#: Seconds for a command, unless its caller says otherwise.
ANSWER_S = 5.0
#: Seconds until a QEMU has greeted and told what it is doing. A migration may be under way when it comes, and its main
#: loop stands still for as long as a carrier may take.
HELLO_S = 60.0
#: Seconds for which a newcomer waits for the QEMU before it, whose end may not have been read yet.
HANDOVER_S = 1.0
#: Newcomers that have not told what they are doing; of more, the oldest goes.
SILENT_MAX = 8


@dataclass(frozen=True, slots=True)
class Found:
    """What a QEMU was doing when it came.

    Args:
        runstate: as QEMU names it, such as running or inmigrate.
        migration: the migration's status as QEMU names it; empty if there is none.
        tells: it sends events about migrations.
    """

    runstate: str
    migration: str = ""
    tells: bool = True


class Monitor:
    """The monitor of a QEMU that was greeted and asked; made by `MonitorPort`.

    Args:
        wire: what carries it.
        peer: the process that connected; None if the kernel does not say.
        greeting: its first words.
        found: what it was doing then.
    """

    def __init__(self, wire: MonitorWire, peer: Peer | None, greeting: QmpGreeting, found: Found) -> None:
        self._wire = wire
        self.peer = peer
        self.greeting = greeting
        self.found = found

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float = ANSWER_S
    ) -> Any:
        """Have a command carried out.

        Args:
            command: such as query-pci.
            arguments: by the names that QMP has for them.
            seconds: how long to wait for the answer.

        Returns:
            What the command returns.

        Raises:
            RefusedError: QEMU did not do it.
            UnansweredError: there was no answer in time, or too many are missing.
            GoneError: the monitor was lost.
        """
        return await self._wire.execute(command, arguments, seconds)

    async def hmp(self, line: str, *, seconds: float = ANSWER_S) -> str:
        """Have a line of the human monitor carried out.

        Args:
            line: such as `i /w 0xcf8`.
            seconds: how long to wait for the answer.

        Returns:
            What it prints, complaints included.

        Raises:
            MonitorError: as `execute`.
        """
        return str(await self.execute("human-monitor-command", {"command-line": line}, seconds=seconds))

    async def next_event(self) -> QmpEvent:
        """Wait for the next event.

        Raises:
            GoneError: the monitor was lost, and all events that came before were taken.
        """
        return await self._wire.next_event()

    async def gone(self) -> None:
        """Wait until the monitor is lost."""
        await self._wire.lost.wait()

    def pending_events(self) -> list[QmpEvent]:
        """Take the events that are here already, also those that the kernel holds.

        A carrier's call comes on another socket and may overtake an event that QEMU sent before it. Whoever serves one
        looks here first.
        """
        return self._wire.pending_events()


class MonitorPort:
    """Takes the connections of a VM's QEMU, one after the other.

    Args:
        name: the VM's.
        attend: called with each QEMU that has come. It takes the events and returns soon after `GoneError`; until then
            no other QEMU is served. When it returns by itself, the monitor is closed.
        allow_uids: users whose processes may be QEMU; None allows whoever can open the socket.
        hello_s: seconds until a newcomer must have told what it is doing.
    """

    def __init__(
        self,
        name: str,
        attend: Callable[[Monitor], Awaitable[None]],
        *,
        allow_uids: frozenset[int] | None = None,
        hello_s: float = HELLO_S,
    ) -> None:
        self._attend = attend
        self._allow_uids = allow_uids
        self._hello_s = hello_s
        self._log = log.get("monitor").bind(vm=name)
        self._noise = log.RateLimited(self._log)
        self._silent: dict[MonitorWire, None] = {}
        self._vacant = trio.Event()
        self.current: Monitor | None = None

    async def serve(self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled.

        Args:
            listener: what QEMU connects to; it is closed in the end.
            task_status: told when connections are accepted.
        """
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    self._admit(await listener.next_client(self._not_accepted), nursery)
        finally:
            listener.close()

    def _not_accepted(self, reason: str) -> None:
        self._noise.warning("cannot accept a monitor now", error=reason)

    def _admit(self, sock: socket.socket, nursery: trio.Nursery) -> None:
        peer = _peer_or_none(sock)
        if self._allow_uids is not None and (peer is None or peer.uid not in self._allow_uids):
            self._noise.warning("monitor refused: not one of allow_uids", peer=peer)
            sock.close()
            return
        wire = MonitorWire(sock)
        self._silent[wire] = None
        if len(self._silent) > SILENT_MAX:
            next(iter(self._silent)).lose("too many send nothing")
        nursery.start_soon(self._serve, wire, peer)

    async def _serve(self, wire: MonitorWire, peer: Peer | None) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.run_reader)
                nursery.start_soon(wire.run_sender)
                await self._converse(wire, peer)
                nursery.cancel_scope.cancel()
        except* MonitorError as errors:
            self._noise.warning("monitor lost", peer=peer, reason=words_of(errors))
        finally:
            self._silent.pop(wire, None)
            wire.close()

    async def _converse(self, wire: MonitorWire, peer: Peer | None) -> None:
        with trio.move_on_after(self._hello_s) as scope:
            monitor = await _meet(wire, peer)
        if scope.cancelled_caught:
            raise GoneError(f"it did not report its state within {self._hello_s:g} s")
        self._silent.pop(wire, None)
        await self._claim(monitor)
        try:
            version = ".".join(map(str, monitor.greeting.version))
            self._log.info("QEMU connected", peer=peer, version=version, runstate=monitor.found.runstate)
            await self._attend(monitor)
            self._log.info("QEMU disconnected", peer=peer, reason=wire.why_lost or "the monitor was closed")
        finally:
            self.current = None
            self._vacant.set()

    async def _claim(self, monitor: Monitor) -> None:
        """Make this the QEMU that is served.

        Raises:
            GoneError: another one is.
        """
        with trio.move_on_after(HANDOVER_S):
            while self.current is not None:
                await self._vacant.wait()
        if self.current is not None:
            raise GoneError(f"{self.current.peer} is this VM's QEMU, and is alive")
        self.current = monitor
        self._vacant = trio.Event()


async def _meet(wire: MonitorWire, peer: Peer | None) -> Monitor:
    """Greet a QEMU, and ask what it is doing.

    Raises:
        MonitorError: it went, or is no QEMU.
    """
    greeting = await wire.greeting()
    await wire.execute(NEGOTIATE, None, math.inf)
    tells = await _have_it_tell(wire)
    runstate = _field(await wire.execute(STATUS, None, math.inf))
    migration = _field(await wire.execute("query-migrate", None, math.inf))
    if not runstate:
        raise GoneError("it does not report its state")
    return Monitor(wire, peer, greeting, Found(runstate, migration, tells))


async def _have_it_tell(wire: MonitorWire) -> bool:
    """Have QEMU send events about migrations, which it does not by itself; returns whether it will."""
    wanted = {"capabilities": [{"capability": "events", "state": True}]}
    try:
        await wire.execute("migrate-set-capabilities", wanted, math.inf)
    except RefusedError:
        # Not in the middle of a migration; it may have been told before.
        found = await wire.execute("query-migrate-capabilities", None, math.inf)
        return isinstance(found, list) and {"capability": "events", "state": True} in found
    return True


def _field(answer: Any) -> str:
    status = answer.get("status", "") if isinstance(answer, dict) else ""
    return status if isinstance(status, str) else ""


def _peer_or_none(sock: socket.socket) -> Peer | None:
    try:
        return peer_of(sock)
    except OSError:
        return None
