"""The VMs of a daemon: their sockets, which exist before any QEMU does, and who comes to them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import trio

from vfiouser_oob.config.vms import Listens, VmConfig
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.status import ClientStatus, VmFunctionStatus, VmStatus
from vfiouser_oob.server.administration import ChangeRefused
from vfiouser_oob.server.containment import Contained, root_cause
from vfiouser_oob.server.ledger import Ledger
from vfiouser_oob.server.opening import default_group
from vfiouser_oob.server.registry import FindFunction
from vfiouser_oob.server.sockets import SocketShelf
from vfiouser_oob.server.status import iso_time
from vfiouser_oob.server.unit import RollCall, Unit
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_oob.transport.listener import Listener, adopt_socket, listen_on_path
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.vm.carriers.companion_notes import CompanionNotes
from vfiouser_oob.vm.carriers.dbus_vmstate import DbusVmstate
from vfiouser_oob.vm.carriers.interface import VmCarrier
from vfiouser_oob.vm.carriers.vhost_user_fs import VhostUserFs
from vfiouser_oob.vm.carriers.vmstate_notes import VmstateNotes
from vfiouser_oob.vm.checking import check_migration
from vfiouser_oob.vm.counterpart import CounterpartError, VmOffer
from vfiouser_oob.vm.events import QemuGone
from vfiouser_oob.vm.hosted import HostedFunction
from vfiouser_oob.vm.monitor import Monitor, MonitorPort
from vfiouser_oob.vm.notes import VmNotes
from vfiouser_oob.vm.record import CarrierKind, FunctionPlace, VmRecord
from vfiouser_oob.vm.runner import VmRunner

_MONITOR = "monitor"
#: Seconds that a VM may take to come to rest before its QEMU is left to another daemon, and to part with it.
REST_S = 1.0
#: The field of /proc/PID/stat that says when a process began, counted behind its name.
_STARTED = 19


def open_vm(
    config: VmConfig, events: EventHub, find: FindFunction, shelf: SocketShelf, ledger: Ledger | None
) -> HostedVm:
    """Open a VM's sockets; it does nothing yet.

    Args:
        config: what is configured for it.
        events: where changes are announced.
        find: finds a function among those that are served.
        shelf: sockets that systemd has passed; one of a VM is found by its path, or is called as `web1.monitor`.
        ledger: what it leaves to the daemon after this one; None if nothing is kept.
    """
    with ExitStack() as resources:
        listeners: dict[str, Listener] = {}
        for what, path in config.sockets.items():
            if what == "vhost_user_fs" and config.vhost_user_fs_listens is Listens.QEMU:
                continue
            listeners[what] = _listen(config, what, path, shelf, ledger)
            resources.callback(listeners[what].close)
        if ledger is not None:
            resources.callback(ledger.close)
        return HostedVm(config, listeners, events, find, ledger, resources.pop_all())


def _listen(config: VmConfig, what: str, path: Path, shelf: SocketShelf, ledger: Ledger | None) -> Listener:
    passed = shelf.lend(f"{config.name}.{what}", path)
    if passed is not None:
        return Listener(adopt_socket(passed), None)
    listener = None if ledger is None else ledger.listener(what, path)
    if listener is None:
        listener = listen_on_path(path, config.socket_mode, config.socket_group or default_group())
    if ledger is not None:
        ledger.keep_listener(what, listener)
    return listener


def vm_status(unit: Unit) -> VmStatus:
    """Describe a VM of the configuration at this moment, whether it could be opened or not."""
    life, failure = unit.life, unit.failure
    if isinstance(life, HostedVm) and life.begun:
        return life.status()
    config = unit.config if isinstance(unit.config, VmConfig) else None
    return VmStatus(
        name=unit.name,
        phase="starting" if failure is None else "failed",
        since=iso_time(time.time() if failure is None else failure.since),
        migration="none",
        qemu=None,
        version=None,
        carrier="none",
        carriers=[],
        refused=None,
        functions=[],
        sockets={} if config is None else {what: str(path) for what, path in config.sockets.items()},
        last_error=unit.failed,
    )


async def check_vm(unit: Unit, destination: str | None) -> dict[str, Any]:
    """Find what would be in the way of a VM's migration; see `check_migration`.

    Args:
        unit: the VM.
        destination: what the other host says of itself; None to leave it out.

    Raises:
        ChangeRefused: the VM is not served, or the destination's document is none.
    """
    life = unit.life
    if not isinstance(life, HostedVm) or not life.begun:
        raise ChangeRefused(f"VM {unit.name!r} is not served: {unit.failed or 'it is being started'}")
    try:
        return await life.check(None if destination is None else VmOffer.read(destination))
    except CounterpartError as error:
        raise ChangeRefused(f"cannot use the destination's description of itself: {error}") from error


class HostedVm:
    """One VM, from its opening to its end; a unit of its daemon.

    Args:
        config: the VM.
        listeners: its sockets, by the keys of the configuration.
        events: where changes are announced.
        find: finds a function among those that are served.
        ledger: what it leaves to the daemon after this one; None if nothing is kept.
        resources: gives back whatever was opened for it.
    """

    #: Its QEMU may always come again.
    exhausted = False

    def __init__(
        self,
        config: VmConfig,
        listeners: Mapping[str, Listener],
        events: EventHub,
        find: FindFunction,
        ledger: Ledger | None,
        resources: ExitStack,
    ) -> None:
        self.ended = trio.Event()
        #: Why it is not served any more.
        self.failure: str | None = None
        self._find = find
        self._ledger = ledger
        self._left = False
        self._resources = resources
        self._scope = trio.CancelScope()
        self._roll_call = RollCall()
        self._started = False
        self._draining = False
        #: The QEMU whose monitor is connected, in words, and when it will have gone.
        self.user: str | None = None
        self._vacant = trio.Event()
        self._config = config
        self._listeners = listeners
        self._events = events
        self._log = log.get("vm").bind(vm=config.name)
        self._notes = VmNotes(config, ledger, self._log)
        self._companion = None if ledger is None else CompanionNotes(ledger)
        self._vmstate = None if ledger is None else VmstateNotes(ledger)
        self._runner: VmRunner | None = None
        self._strangers = count()
        self._watched = ""
        self._nursery: trio.Nursery

    async def run(
        self, exhausted: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve its QEMUs, one after the other. What goes wrong ends this VM, and nothing else.

        Args:
            exhausted: never called, since a QEMU may always come again.
            task_status: told when QEMU can come.
        """
        try:
            with Contained() as outcome, self._scope:
                await self._serve(task_status)
            if outcome.error is not None:
                error = outcome.taken()
                if not self._started:
                    raise error
                self.failure = f"it is not served any more: {root_cause(error)}"
                self._log.exception("bug: a VM is not served any more", root_cause(error))
        finally:
            if self._ledger is not None and not self._left:
                self._ledger.abolish()
            self.close()
            self.ended.set()

    def drain(self) -> None:
        """Take no new QEMU."""
        self._draining = True

    def reopen(self) -> None:
        """Take QEMUs again."""
        self._draining = False

    async def vacated(self) -> None:
        """Wait until no QEMU has its monitor connected."""
        while self.user is not None:
            await self._vacant.wait()

    def adopt(self, config: VmConfig) -> None:
        """Nothing of a VM can be changed while it lives."""
        raise AssertionError(config.name)

    async def prove(self) -> str | None:
        """Answer from its own tasks."""
        if not self._scope.cancel_called:
            await self._roll_call.answered()
        return None

    def condemn(self, reason: str) -> None:
        """Serve it no more."""
        self.failure = reason
        self.stop()

    async def leave(self) -> None:
        """Leave its QEMU to the daemon after this one, which finds out by the monitor what it has done meanwhile."""
        if self.ended.is_set() or self._ledger is None or not self._ledger.usable:
            return
        with trio.move_on_after(REST_S):
            if self._runner is not None:
                await self._runner.come_to_rest()
            if self._companion is not None:
                await self._companion.come_to_rest()
        self._notes.close()
        for connection in (self._companion, self._vmstate):
            if connection is not None:
                connection.leave()
        self._left = True
        for listener in self._listeners.values():
            listener.leave()
        self.stop()
        with trio.move_on_after(REST_S):
            await self.ended.wait()

    def stop(self) -> None:
        """Part with its QEMU and end."""
        self._scope.cancel()

    def close(self) -> None:
        """Give back what was opened for it."""
        for connection in (self._companion, self._vmstate):
            if connection is not None:
                connection.close()
        self._resources.close()

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        config = self._config
        left = None if self._notes.left is None else self._notes.left.record
        functions = [
            HostedFunction(name, self._find, config.untracked_max, came=left is not None and _came(left, name))
            for name in config.functions
        ]
        for served in filter(None, map(self._find, config.functions)):
            served.recorded = True
            await served.settled()
        if self._companion is not None and self._companion.lost:
            self._log.error(
                "the connection of the VM's companion is lost, and stays lost as long as the VM lives",
                reason=self._companion.lost,
            )
        self._runner = VmRunner(config, functions, self._carriers(), self._events, self._notes)
        port = MonitorPort(config.name, self._attend, allow_uids=self._allowed)
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._roll_call.run)
            await self._nursery.start(self._runner.run)
            if left is not None:
                self._go_on(left.qemu)
            await self._nursery.start(port.serve, self._listeners[_MONITOR])
            self._log.info("listening", **{what: str(path) for what, path in config.sockets.items()})
            self._started = True
            task_status.started()

    @property
    def begun(self) -> bool:
        """Whether there is anything to be told of it."""
        return self._runner is not None

    @property
    def _allowed(self) -> frozenset[int] | None:
        return None if self._config.allow_uids is None else frozenset(self._config.allow_uids)

    def _carriers(self) -> dict[CarrierKind, VmCarrier]:
        made: dict[CarrierKind, VmCarrier] = {}
        for what, path in self._config.sockets.items():
            if what == "dbus_vmstate":
                carrier = DbusVmstate(self._listeners[what], path, allow_uids=self._allowed, notes=self._vmstate)
                made[CarrierKind.DBUS_VMSTATE] = carrier
            elif what == "vhost_user_fs":
                made[CarrierKind.VHOST_USER_FS] = VhostUserFs(
                    self._listeners.get(what), path, self._allowed, notes=self._companion
                )
        return made

    async def _attend(self, monitor: Monitor) -> None:
        if self._draining:
            self._log.warning("QEMU refused: the VM is drained", qemu=monitor.peer)
            return
        self.user = str(monitor.peer or "an unknown QEMU")
        self._vacant = trio.Event()
        try:
            await self._attend_to(monitor)
        finally:
            self.user = None
            self._vacant.set()

    async def _attend_to(self, monitor: Monitor) -> None:
        assert self._runner is not None
        qemu = f"stranger {next(self._strangers)}" if monitor.peer is None else identity(monitor.peer)
        if monitor.peer is not None and monitor.peer.pid and qemu != self._watched:
            self._watched = qemu
            self._nursery.start_soon(self._watch, monitor.peer.pid, qemu)
        await self._runner.attend(monitor, qemu or f"stranger {next(self._strangers)}")

    def _go_on(self, qemu: str) -> None:
        """Go on with a QEMU that another daemon knew, if it is there still; it connects its monitor again by itself."""
        assert self._runner is not None
        pid = qemu.partition(":")[0]
        if pid.isdecimal() and identity(Peer(int(pid), 0, 0, "")) == qemu:
            self._watched = qemu
            self._nursery.start_soon(self._watch, int(pid), qemu)
        else:
            self._runner.feed(QemuGone())

    async def _watch(self, pid: int, qemu: str) -> None:
        """Wait until a QEMU has ended: its monitor may be lost and it live on, or the other way round."""
        assert self._runner is not None
        try:
            process = OwnedFd(os.pidfd_open(pid))
        except OSError:
            pass
        else:
            with closing(process):
                await trio.lowlevel.wait_readable(process.fileno())
        if self._runner.record.qemu == qemu:
            self._runner.feed(QemuGone())

    @property
    def name(self) -> str:
        """Its name."""
        return self._config.name

    async def check(self, destination: VmOffer | None) -> dict[str, Any]:
        """Find what would be in the way of its migration."""
        assert self._runner is not None
        return await check_migration(self._runner, destination)

    def status(self) -> VmStatus:
        """Describe it at this moment."""
        assert self._runner is not None
        record, monitor = self._runner.record, self._runner.monitor
        failed = self.failure is not None
        peer = None if monitor is None else monitor.peer
        return VmStatus(
            name=self._config.name,
            phase="failed" if failed else record.phase.value,
            since=iso_time(self._runner.since),
            migration=record.migration.value,
            qemu=None if peer is None else ClientStatus(pid=peer.pid, uid=peer.uid, command=peer.command),
            version=None if monitor is None else ".".join(map(str, monitor.greeting.version)),
            carrier=record.carrier.value,
            carriers=sorted(kind.value for kind in self._runner.carriers.attached),
            refused=record.refused or None,
            functions=[
                VmFunctionStatus(
                    name=each.name, place=each.place.value, doing=None if each.doing is None else each.doing.value
                )
                for each in record.functions
            ],
            sockets={what: str(path) for what, path in self._config.sockets.items()},
            last_error=self.failure or record.last_error or None,
        )


def _came(left: VmRecord, name: str) -> bool:
    """Whether a function's state has come from another host, and it has not run here since."""
    function = left.function(name)
    return function is not None and function.place is FunctionPlace.LOADED


def identity(peer: Peer) -> str:
    """What tells a process from any other, also from a later one with its number; empty if that cannot be told.

    Args:
        peer: the process.
    """
    try:
        with open(f"/proc/{peer.pid}/stat", encoding="utf-8", errors="replace") as stat:
            return f"{peer.pid}:{stat.read().rpartition(')')[2].split()[_STARTED]}"
    except (OSError, IndexError):  # it has gone already, or lives in another pid namespace
        return ""
