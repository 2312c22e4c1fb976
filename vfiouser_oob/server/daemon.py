"""The daemon: many functions, one control socket, and an orderly end.

signals ──► stop accepting ──► clients turned out ──► devices stopped ──► sockets removed
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import trio

from vfiouser_agents.registry import make_agent
from vfiouser_oob import __version__
from vfiouser_oob.config.schema import DaemonConfig
from vfiouser_oob.migration.pool import AgentMaker, AgentPool
from vfiouser_oob.observability import log
from vfiouser_oob.observability.status import DaemonStatus, StatusProvider, StatusReport
from vfiouser_oob.persist.capabilities import CapabilityStore
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.life import Life
from vfiouser_oob.server.opening import SharedParts, open_function
from vfiouser_oob.server.registry import Registry
from vfiouser_oob.server.status import function_status, iso_time
from vfiouser_oob.server.survival import Survival, find_survival
from vfiouser_oob.systemd.listen import assign_sockets
from vfiouser_oob.systemd.notify import Notifier
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import Listener, adopt_socket, listen_on_path

#: Name of the control socket among systemd's sockets.
CONTROL_NAME = "control"
_CONTROL_MODE = 0o660
_ENDING = (signal.SIGTERM, signal.SIGINT)
#: Signals that would end the process by default, though nobody who sends them means that; and what they may have meant.
_WITHOUT_MEANING = MappingProxyType(
    {
        signal.SIGHUP: "restart the daemon to have it read its configuration again",
        signal.SIGUSR1: "see `vfiouser-oob status`",
        signal.SIGUSR2: "see `vfiouser-oob status`",
    }
)

#: Starts what belongs to a daemon beside its functions, in a nursery that lasts until they are gone. Returns once it
#: works, with a few words for the status line.
Companion: TypeAlias = Callable[["Daemon", trio.Nursery], Awaitable[str]]


class ServeControl(Protocol):
    """Answers on the control socket; what does that is above this room."""

    async def __call__(
        self, provider: StatusProvider, sock: socket.socket, *, task_status: trio.TaskStatus[None]
    ) -> None:
        """Serve until cancelled.

        Args:
            provider: what is asked.
            sock: the listening socket; its owner is this from now on.
            task_status: told when connections are accepted.
        """


async def run_daemon(
    config: DaemonConfig,
    *,
    agents: AgentMaker = make_agent,
    control: ServeControl | None = None,
    beside: Companion | None = None,
    task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled.

    Args:
        config: what to serve.
        agents: makes agents by kind and options.
        control: answers on the control socket; without it there is none.
        beside: what else has to be there before we are ready.
        task_status: told when every socket listens.

    Raises:
        ConfigError: the configuration does not fit the sockets that systemd passed, or names an unusable device.
        ListenError: a socket cannot be listened on.
    """
    with ExitStack() as resources:
        activity = Activity()
        resources.callback(activity.close)
        store = CapabilityStore(config.state_directory, log.get("persist"))
        _raise_fd_limit()
        notifier = Notifier.from_environment()
        inherited, survival = await find_survival(config.fd_store, notifier)
        resources.callback(survival.close)
        means = SharedParts(config.reply_budget_s, AgentPool(agents), store, activity, survival=survival)
        activity.busy = lambda: means.sharing.busy
        control_fds = inherited.pop(CONTROL_NAME, [])
        assigned = assign_sockets(config.functions, inherited)
        listener = None if control is None else _open_control(config.control_socket, control_fds, resources)
        lives: list[Life] = []
        for entry in config.functions:
            lives.append(open_function(entry, assigned.get(entry.name, []), means))
            resources.callback(lives[-1].close)
        survival.settle()
        async with means.agents, trio.open_nursery() as nursery:
            daemon = Daemon(lives, means, nursery, notifier, survival)
            if control is not None and listener is not None:
                await nursery.start(control, daemon, listener.sock.dup())
            await daemon.run(beside, task_status)
            nursery.cancel_scope.cancel()
        means.events.close()


class Daemon:
    """All functions of one process while it runs; knows their state for the control socket.

    Args:
        lives: its functions, opened.
        means: what they share.
        nursery: where everything lives; cancelled by the caller when `run` has returned.
        notifier: tells the service manager how far we are.
        survival: how clients outlive us.
    """

    def __init__(
        self,
        lives: Sequence[Life],
        means: SharedParts,
        nursery: trio.Nursery,
        notifier: Notifier,
        survival: Survival,
    ) -> None:
        self._events = means.events
        self._log = log.get("daemon")
        self._notifier = notifier
        self._survival = survival
        self._started = time.time()
        self._nursery = nursery
        self._serving = trio.CancelScope()
        #: Its functions; they may come and go while it runs.
        self.registry = Registry(lives, means, nursery, self._nothing_left)

    @property
    def functions(self) -> Sequence[Function]:
        """Its functions, in the order of the configuration."""
        return self.registry.functions

    async def run(self, beside: Companion | None, task_status: trio.TaskStatus[Daemon]) -> None:
        """Serve until told to stop."""
        self._nursery.start_soon(self._notifier.run)
        self._nursery.start_soon(self._survival.run)
        with trio.open_signal_receiver(*_ENDING, *_WITHOUT_MEANING) as signals:
            self._nursery.start_soon(self._await_signal, signals)
            with self._serving:
                await self.registry.start()
                text = "" if beside is None else f"; {await beside(self, self._nursery)}"
                self._announce_ready(text)
                task_status.started(self)
                await trio.sleep_forever()
        if await self._survival.ready():
            await self.registry.leave()
        await self.registry.stop()

    def _nothing_left(self) -> None:
        self._log.info("the inherited connection ended; nothing is left to serve")
        self._serving.cancel()

    async def _await_signal(self, signals: Any) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if number in _WITHOUT_MEANING:
                self._log.warning("signal ignored", signal=name, what_to_do=_WITHOUT_MEANING[number])
                continue
            self._log.info("stopping", signal=name)
            self._notifier.stopping("leaving" if self._survival.works else "turning clients out")
            self._serving.cancel()
            return

    def _announce_ready(self, more: str) -> None:
        count = len(self.functions)
        text = f"{count} function{'s' if count != 1 else ''}"
        self._log.info("ready", version=__version__, pid=os.getpid(), functions=count)
        self._notifier.ready(f"serving {text}{more}")

    # For the control socket

    def status(self) -> StatusReport:
        """Describe everything at this moment."""
        daemon = DaemonStatus(
            version=__version__, pid=os.getpid(), started=iso_time(self._started), functions=len(self.functions)
        )
        return StatusReport(daemon=daemon, functions=[function_status(function) for function in self.functions])

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Watch what happens from now on."""
        return self._events.subscribe()


def _raise_fd_limit() -> None:
    """Every client brings descriptors; the soft limit is a default for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_control(path: Path | None, inherited: Sequence[int], resources: ExitStack) -> Listener | None:
    if inherited:
        listener = Listener(adopt_socket(inherited[0]), None)
    elif path is not None:
        _make_runtime_directory(path.parent)
        listener = listen_on_path(path, _CONTROL_MODE)
    else:
        return None
    resources.callback(listener.close)
    return listener


def _make_runtime_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError:  # listening will fail, and say so with the path
        pass
