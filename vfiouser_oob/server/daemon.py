"""The daemon: many functions, one control socket, and an orderly end.

signals ──► stop accepting ──► clients turned out ──► devices stopped ──► sockets removed
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import trio

from vfiouser_agents.extras import missing
from vfiouser_agents.registry import make_agent
from vfiouser_oob import __version__
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import DaemonConfig
from vfiouser_oob.migration.pool import AgentMaker, AgentPool
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.latency import MARK_S
from vfiouser_oob.observability.measured import Measured
from vfiouser_oob.observability.status import DaemonStatus, MigrationEntry, StatusReport
from vfiouser_oob.persist.capabilities import CapabilityStore
from vfiouser_oob.persist.history import HistoryStore
from vfiouser_oob.persist.starts import StartCount
from vfiouser_oob.server.administration import Administration, ChangeRefused, Reread
from vfiouser_oob.server.certificates import CertificateBook
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.life import Life
from vfiouser_oob.server.measure import measure_function, measure_vm
from vfiouser_oob.server.opening import SharedParts, function_kind
from vfiouser_oob.server.pulse import Pulse
from vfiouser_oob.server.registry import FindFunction, Registry, Units, find_function
from vfiouser_oob.server.sockets import SocketShelf
from vfiouser_oob.server.status import iso_time
from vfiouser_oob.server.survival import Survival, find_survival
from vfiouser_oob.server.unit import UnitKind
from vfiouser_oob.systemd.listen import METRICS_NAME
from vfiouser_oob.systemd.notify import Notifier
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.fd_table import make_room_for_fds
from vfiouser_oob.transport.listener import Listener, adopt_socket, listen_on_path

#: Name of the control socket among systemd's sockets.
CONTROL_NAME = "control"
_CONTROL_MODE = 0o660
_ENDING = (signal.SIGTERM, signal.SIGINT)
_RELOAD = signal.SIGHUP
#: Signals that would end the process by default, though nobody who sends them means that; and what they may have meant.
_WITHOUT_MEANING = MappingProxyType(
    {
        signal.SIGUSR1: "see `vfiouser-oob status`",
        signal.SIGUSR2: "see `vfiouser-oob status`",
    }
)

#: Starts what belongs to a daemon beside its functions, in a nursery that lasts until they are gone. Returns once it
#: works, with a few words for the status line.
Companion: TypeAlias = Callable[["Daemon", trio.Nursery], Awaitable[str]]


#: Says what a VM is, given where changes are announced, how the functions are found, the sockets that systemd passed,
#: and what is kept for the daemon after this one; that is above this room.
VmKindMaker: TypeAlias = Callable[[EventHub, FindFunction, SocketShelf, Survival], UnitKind]


class ServeControl(Protocol):
    """Answers on the control socket; what does that is above this room."""

    async def __call__(self, provider: Daemon, sock: socket.socket, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled.

        Args:
            provider: what is asked, and changed.
            sock: the listening socket; its owner is this from now on.
            task_status: told when connections are accepted.
        """


async def run_daemon(
    config: DaemonConfig,
    *,
    agents: AgentMaker = make_agent,
    control: ServeControl | None = None,
    metrics: ServeControl | None = None,
    beside: Companion | None = None,
    reread: Reread | None = None,
    vms: VmKindMaker | None = None,
    task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled.

    Args:
        config: what to serve.
        agents: makes agents by kind and options.
        control: answers on the control socket; without it there is none.
        metrics: answers on the metrics socket; without it there is none.
        beside: what else has to be there before we are ready.
        reread: reads the configuration again; None if it did not come from a file.
        vms: says what a VM is; without it there are none.
        task_status: told when every socket listens.

    Raises:
        ConfigError: no function can be had, as configured; one that cannot is a failed one as long as there are others.
        ListenError: likewise, or the control socket cannot be listened on.
    """
    with ExitStack() as resources:
        activity = Activity()
        resources.callback(activity.close)
        make_room_for_fds()
        notifier = Notifier.from_environment()
        inherited, survival = await find_survival(config.fd_store, notifier)
        resources.callback(survival.close)
        means = SharedParts(
            config.reply_budget_s,
            AgentPool(agents),
            CapabilityStore(config.state_directory, log.get("persist")),
            HistoryStore(config.state_directory, log.get("persist")),
            activity,
            recorded=lambda name: any(name in vm.functions for vm in (*config.vms, *units.configured_vms())),
            survival=survival,
        )
        activity.busy = lambda: means.sharing.busy
        control_fds = inherited.pop(CONTROL_NAME, [])
        scraped = None if metrics is None else _open_metrics(config, inherited.pop(METRICS_NAME, []), resources)
        shelf = SocketShelf(inherited, [*(f.name for f in config.functions), *(table.name for table in config.spoiled)])
        resources.callback(shelf.close)
        listener = None if control is None else _open_control(config, control_fds, resources)
        functions = function_kind(shelf, means)
        units = Units([functions])
        if vms is not None:
            units.kinds.append(vms(means.events, partial(find_function, units), shelf, survival))
        resources.callback(units.close)
        for kind in units.kinds:
            units.open_all(kind, kind.of(config), config.spoiled)
        survival.settle()
        for passed in shelf.unclaimed(config.functions):
            log.get("daemon").warning("systemd passed a socket that fits no function", socket=str(passed))
        async with means.agents, trio.open_nursery() as nursery:
            books = DaemonBooks(
                StartCount(config.state_directory, log.get("persist")),
                CertificateBook(units.configured, log.get("agents")),
            )
            daemon = Daemon(units, means, books, nursery, config, reread, _readers(listener), notifier, survival)
            for serve, place in ((control, listener), (metrics, scraped)):
                if serve is not None and place is not None:
                    await nursery.start(serve, daemon, place.sock.dup())
            await daemon.run(beside, task_status)
            nursery.cancel_scope.cancel()
        means.events.close()


class DaemonBooks(NamedTuple):
    """What is kept of the process as a whole.

    Args:
        starts: how often one began.
        certificates: when those of agents expire.
    """

    starts: StartCount
    certificates: CertificateBook


class Daemon:
    """All functions of one process while it runs; knows their state for the control socket.

    Args:
        units: its functions, opened.
        means: what they share.
        books: what is kept of the process.
        nursery: where everything lives; cancelled by the caller when `run` has returned.
        config: as it was started.
        reread: reads the configuration again; None if it did not come from a file.
        readers: groups whose members may ask by the control socket.
        notifier: tells the service manager how far we are.
        survival: how clients outlive us.
    """

    def __init__(
        self,
        units: Units,
        means: SharedParts,
        books: DaemonBooks,
        nursery: trio.Nursery,
        config: DaemonConfig,
        reread: Reread | None,
        readers: frozenset[int],
        notifier: Notifier,
        survival: Survival,
    ) -> None:
        self._events = means.events
        self._log = log.get("daemon")
        self._notifier = notifier
        self._survival = survival
        self._started = time.time()
        self._books = books
        self._nursery = nursery
        self._serving = trio.CancelScope()
        #: Its functions; they may come and go while it runs.
        self.registry = Registry(units, nursery, self._nothing_left)
        self.administration = Administration(self.registry, config, reread, nursery, readers)

    @property
    def functions(self) -> Sequence[Function]:
        """Its functions, in the order of the configuration; those that could not be opened are no functions yet."""
        return [unit.life.function for unit in self.registry.units if isinstance(unit.life, Life)]

    async def run(self, beside: Companion | None, task_status: trio.TaskStatus[Daemon]) -> None:
        """Serve until told to stop."""
        self._nursery.start_soon(self._notifier.run)
        for background in (self._keep_time, self._books.starts.run, self._books.certificates.run, self._survival.run):
            self._nursery.start_soon(background)
        with trio.open_signal_receiver(*_ENDING, _RELOAD, *_WITHOUT_MEANING) as signals:
            self._nursery.start_soon(self._await_signal, signals)
            with self._serving:
                await self.registry.start()
                text = "" if beside is None else f"; {await beside(self, self._nursery)}"
                self._announce_ready(text)
                if (watchdog_s := self._notifier.watchdog_s) is not None:
                    pulse = Pulse(lambda: self.registry.units, watchdog_s, self._notifier.alive, self._log)
                    self._nursery.start_soon(pulse.run)
                task_status.started(self)
                await trio.sleep_forever()
        if await self._survival.ready():
            await self.registry.leave()
        await self.registry.stop()

    async def _keep_time(self) -> None:
        """Tell what commands took of late from what they took before."""
        while True:
            await trio.sleep(MARK_S)
            now = time.monotonic()
            for function in self.functions:
                function.context.timings.mark(now)

    def _nothing_left(self) -> None:
        self._log.info("the inherited connection ended, so there is nothing left to serve")
        self._serving.cancel()

    async def _await_signal(self, signals: Any) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if number in _WITHOUT_MEANING:
                self._log.warning("signal ignored", signal=name, what_to_do=_WITHOUT_MEANING[number])
                continue
            if number == _RELOAD:
                self._nursery.start_soon(self._reload)
                continue
            self._log.info("stopping", signal=name)
            self._notifier.stopping("leaving" if self._survival.works else "disconnecting clients")
            self._serving.cancel()
            return

    async def _reload(self) -> None:
        """Do what `vfiouser-oob reload` does; who sent the signal reads the log."""
        try:
            await self.administration.reload(force=False)
        except ChangeRefused as refusal:
            self._log.error("reload refused", reason=str(refusal))

    def _announce_ready(self, more: str) -> None:
        count = sum(function.failed is None for function in self.functions)
        failed = sum(unit.failed is not None for unit in self.registry.units)
        text = f"{count} function{'s' if count != 1 else ''}" + (f"; {failed} failed" if failed else "")
        self._log.info("ready", version=__version__, pid=os.getpid(), functions=count)
        self._notifier.ready(f"serving {text}{more}")

    # For the control socket

    def status(self) -> StatusReport:
        """Describe everything at this moment."""
        units = self.registry.units
        functions, *others = ([kind.describe(unit) for unit in units.of(kind)] for kind in units.kinds)
        vms = others[0] if others else []
        daemon = DaemonStatus(
            version=__version__,
            python=platform.python_version(),
            kernel=os.uname().release,
            pid=os.getpid(),
            started=iso_time(self._started),
            functions=len(functions),
        )
        return StatusReport(daemon=daemon, functions=functions, vms=vms)

    def metrics(self) -> Measured:
        """What was measured so far."""
        return Measured(
            version=__version__,
            python=platform.python_version(),
            kernel=os.uname().release,
            started_s=self._started,
            starts=self._books.starts.count,
            functions=[measure_function(function) for function in self.functions],
            vms=[measure_vm(vm) for vm in self.status().get("vms", [])],
            certificates=dict(self._books.certificates.expiries),
        )

    def migrations(self) -> list[MigrationEntry]:
        """The last migrations of each function, the oldest first."""
        runners = [function.migration for function in self.functions if function.migration is not None]
        entries = [entry for runner in runners if runner.history is not None for entry in runner.history.entries]
        return sorted(entries, key=lambda entry: entry["ended"])

    async def check_migration(self, vm: str, destination: str | None) -> dict[str, Any]:
        """Find what would be in the way of a VM's migration.

        Args:
            vm: its name.
            destination: what the other host says of itself; None to leave it out.

        Raises:
            ChangeRefused: that cannot be asked.
        """
        units = [unit for unit in self.registry.units if unit.kind.check is not None]
        found = next((unit for unit in units if unit.name == vm), None)
        if found is None:
            names = ", ".join(unit.name for unit in units) or "none"
            raise ChangeRefused(f"there is no VM {vm!r} (VMs: {names})")
        assert found.kind.check is not None
        return await found.kind.check(found, destination)

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Watch what happens from now on."""
        return self._events.subscribe()


def _open_control(config: DaemonConfig, inherited: Sequence[int], resources: ExitStack) -> Listener | None:
    path = config.control_socket
    if inherited:
        listener = Listener(adopt_socket(inherited[0]), None)
    elif path is not None:
        _make_runtime_directory(path.parent)
        listener = listen_on_path(path, _CONTROL_MODE, config.control_group)
    else:
        return None
    resources.callback(listener.close)
    return listener


def _readers(control: Listener | None) -> frozenset[int]:
    """The group that the control socket's file belongs to: who may connect there may ask."""
    try:
        return frozenset() if control is None else frozenset({os.stat(control.address).st_gid})
    except OSError:  # a socket without a path, or one that is out of our sight
        return frozenset()


def _open_metrics(config: DaemonConfig, inherited: Sequence[int], resources: ExitStack) -> Listener | None:
    if not inherited and config.metrics_socket is None:
        return None
    lacking = missing("metrics")
    if lacking is not None:
        raise ConfigError(f"the metrics socket cannot be served: {lacking}")
    if inherited:
        listener = Listener(adopt_socket(inherited[0], local=False), None)
    else:
        assert config.metrics_socket is not None
        _make_runtime_directory(config.metrics_socket.parent)
        listener = listen_on_path(config.metrics_socket, _CONTROL_MODE)
    resources.callback(listener.close)
    return listener


def _make_runtime_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError:  # listening will fail, and say so with the path
        pass
