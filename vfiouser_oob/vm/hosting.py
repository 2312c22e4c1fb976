"""The VMs of a daemon: their sockets, which exist before any QEMU does, and who comes to them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import count

import trio

from vfiouser_oob.config.vms import Listens, VmConfig
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.status import ClientStatus, VmFunctionStatus, VmStatus
from vfiouser_oob.server.containment import Contained, root_cause
from vfiouser_oob.server.daemon import FindFunction
from vfiouser_oob.server.opening import default_group
from vfiouser_oob.server.status import iso_time
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_oob.transport.listener import Listener, listen_on_path
from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.vm.carriers.dbus_vmstate import DbusVmstate
from vfiouser_oob.vm.carriers.interface import VmCarrier
from vfiouser_oob.vm.carriers.vhost_user_fs import VhostUserFs
from vfiouser_oob.vm.events import QemuGone
from vfiouser_oob.vm.hosted import HostedFunction
from vfiouser_oob.vm.monitor import Monitor, MonitorPort
from vfiouser_oob.vm.record import CarrierKind
from vfiouser_oob.vm.runner import VmRunner

_MONITOR = "monitor"
#: The field of /proc/PID/stat that says when a process began, counted behind its name.
_STARTED = 19


def open_vms(configs: Sequence[VmConfig], events: EventHub, resources: ExitStack) -> Vms:
    """Open the sockets of VMs; nobody is served yet.

    Args:
        configs: the VMs.
        events: where changes are announced.
        resources: closes the sockets.

    Raises:
        ListenError: one of them cannot be listened on.
    """
    opened = []
    for config in configs:
        listeners: dict[str, Listener] = {}
        for what, path in config.sockets.items():
            if what == "vhost_user_fs" and config.vhost_user_fs_listens is Listens.QEMU:
                continue
            listeners[what] = listen_on_path(path, config.socket_mode, config.socket_group or default_group())
            resources.callback(listeners[what].close)
        opened.append(HostedVm(config, listeners, events))
    return Vms(opened)


class Vms:
    """All VMs of a daemon.

    Args:
        vms: opened.
    """

    def __init__(self, vms: Sequence[HostedVm]) -> None:
        self._vms = vms

    async def start(self, find: FindFunction, nursery: trio.Nursery) -> None:
        """Begin to serve them; returns when their QEMUs can come."""
        for vm in self._vms:
            await nursery.start(vm.run, find)

    def status(self) -> list[VmStatus]:
        """Describe them at this moment."""
        return [vm.status() for vm in self._vms]


class HostedVm:
    """One VM, from the daemon's start to its end.

    Args:
        config: the VM.
        listeners: its sockets, by the keys of the configuration.
        events: where changes are announced.
    """

    def __init__(self, config: VmConfig, listeners: Mapping[str, Listener], events: EventHub) -> None:
        self._config = config
        self._listeners = listeners
        self._events = events
        self._log = log.get("vm").bind(vm=config.name)
        self._runner: VmRunner | None = None
        self._strangers = count()
        self._watched = ""
        self._nursery: trio.Nursery

    async def run(self, find: FindFunction, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve its QEMUs, one after the other. What goes wrong ends this VM, and nothing else.

        Args:
            find: the function of a name, if it is served.
            task_status: told when QEMU can come.
        """
        with Contained() as outcome:
            await self._serve(find, task_status)
        if outcome.error is not None:
            self._log.exception("bug: a VM is not served any more", root_cause(outcome.error))

    async def _serve(self, find: FindFunction, task_status: trio.TaskStatus[None]) -> None:
        config = self._config
        functions = [HostedFunction(name, find, config.untracked_max) for name in config.functions]
        self._runner = VmRunner(config, functions, self._carriers(), self._events)
        port = MonitorPort(config.name, self._attend, allow_uids=self._allowed)
        async with trio.open_nursery() as self._nursery:
            await self._nursery.start(self._runner.run)
            await self._nursery.start(port.serve, self._listeners[_MONITOR])
            self._log.info("listening", **{what: str(path) for what, path in config.sockets.items()})
            task_status.started()

    @property
    def _allowed(self) -> frozenset[int] | None:
        return None if self._config.allow_uids is None else frozenset(self._config.allow_uids)

    def _carriers(self) -> dict[CarrierKind, VmCarrier]:
        made: dict[CarrierKind, VmCarrier] = {}
        for what, path in self._config.sockets.items():
            if what == "dbus_vmstate":
                carrier = DbusVmstate(self._listeners[what], path, allow_uids=self._allowed)
                made[CarrierKind.DBUS_VMSTATE] = carrier
            elif what == "vhost_user_fs":
                made[CarrierKind.VHOST_USER_FS] = VhostUserFs(self._listeners.get(what), path, self._allowed)
        return made

    async def _attend(self, monitor: Monitor) -> None:
        assert self._runner is not None
        qemu = f"stranger {next(self._strangers)}" if monitor.peer is None else identity(monitor.peer)
        if monitor.peer is not None and monitor.peer.pid and qemu != self._watched:
            self._watched = qemu
            self._nursery.start_soon(self._watch, monitor.peer.pid, qemu)
        await self._runner.attend(monitor, qemu or f"stranger {next(self._strangers)}")

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

    def status(self) -> VmStatus:
        """Describe it at this moment."""
        assert self._runner is not None
        record, monitor = self._runner.record, self._runner.monitor
        peer = None if monitor is None else monitor.peer
        return VmStatus(
            name=self._config.name,
            phase=record.phase.value,
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
            last_error=record.last_error or None,
        )


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
