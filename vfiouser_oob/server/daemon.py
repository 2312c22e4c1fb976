"""The daemon: many functions, one control socket, and an orderly end.

signals ──► stop accepting ──► clients turned out ──► devices stopped ──► sockets removed
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import trio

from vfiouser_agents.registry import make_agent
from vfiouser_oob import __version__
from vfiouser_oob.config.agents import OWN_AGENT
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import DEFAULT_SOCKET_GROUP, DaemonConfig, FunctionConfig
from vfiouser_oob.devices.base import DeviceBackend
from vfiouser_oob.devices.factory import make_backend
from vfiouser_oob.migration.pool import AgentMaker, AgentPool
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.sharing import Sharing
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.observability.status import DaemonStatus, Status, StatusProvider
from vfiouser_oob.persist.capabilities import CapabilityStore, agent_identity
from vfiouser_oob.server.function import EngineMaker, Function
from vfiouser_oob.server.status import function_status, iso_time
from vfiouser_oob.systemd.listen import assign_sockets, inherited_sockets
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
        daemon = Daemon(config, resources, agents, control, beside)
        await daemon.run(task_status)


class Daemon:
    """All functions of one process; knows their state for the control socket.

    Args:
        config: what to serve.
        resources: closes whatever was opened, also when opening the next thing fails.
        agents: makes agents by kind and options.
        control: answers on the control socket; without it there is none.
        beside: what else has to be there before we are ready.
    """

    def __init__(
        self,
        config: DaemonConfig,
        resources: ExitStack,
        agents: AgentMaker = make_agent,
        control: ServeControl | None = None,
        beside: Companion | None = None,
    ) -> None:
        self._config = config
        self._serve_control = control
        self._beside = beside
        self._agents = AgentPool(agents)
        self._log = log.get("daemon")
        self._memory = CapabilityStore(config.state_directory, log.get("persist"))
        self._notifier = Notifier.from_environment()
        self._started = time.time()
        self._events = EventHub()
        self._sharing = Sharing()
        self._activity = Activity()
        self._activity.busy = lambda: self._sharing.busy
        resources.callback(self._activity.close)
        _raise_fd_limit()
        inherited = inherited_sockets()
        control_fds = inherited.pop(CONTROL_NAME, [])
        assigned = assign_sockets(config.functions, inherited)
        self._control = self._open_control(control_fds, resources)
        self._listeners: list[tuple[Function, Listener]] = []
        self._connected: list[tuple[Function, socket.socket]] = []
        self.functions: list[Function] = []
        for entry in config.functions:
            self._add(entry, assigned.get(entry.name, []), resources)

    # Opening

    def _add(self, config: FunctionConfig, inherited: list[int], resources: ExitStack) -> None:
        backend = make_backend(config, self._activity)
        function = Function(
            config.name,
            backend,
            reply_budget_s=self._config.reply_budget_s,
            activity=self._activity,
            events=self._events,
            log=log.get("function"),
            allow_uids=config.allow_uids,
            migration=self._engine_maker(config, backend),
        )
        resources.callback(function.close)
        self.functions.append(function)
        for fd in [*inherited, *([] if config.fd is None else [config.fd])]:
            self._adopt(function, adopt_socket(fd), resources)
        if not inherited and config.fd is None and config.socket is not None:
            group = config.socket_group or _default_group()
            listener = listen_on_path(config.socket, config.socket_mode, group)
            resources.callback(listener.close)
            self._listeners.append((function, listener))

    def _engine_maker(self, config: FunctionConfig, backend: DeviceBackend) -> EngineMaker | None:
        agent = config.agent
        if agent is None:
            return None
        try:
            # The device's own driver is an agent that belongs to one function; all others may be shared.
            own = backend.agent() if agent.kind == OWN_AGENT else None
            connected = own or self._agents.agent(agent)
        except (ValueError, OSError) as error:
            raise ConfigError(f"function {config.name!r}: agent: {error}", line=config.line) from error
        identity = agent_identity(agent.kind, agent.function, agent.options, config.device.describe())
        memory = self._memory.drawer(config.name, identity)

        def make(name: str, events: EventHub, logger: log.Logger) -> MigrationRunner:
            return MigrationRunner(
                name, connected, agent.function, config.migration, events, logger, memory, self._sharing
            )

        return make

    def _adopt(self, function: Function, sock: socket.socket, resources: ExitStack) -> None:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener = Listener(sock, None)
            resources.callback(listener.close)
            self._listeners.append((function, listener))
        else:
            self._connected.append((function, sock))

    def _open_control(self, inherited: list[int], resources: ExitStack) -> Listener | None:
        if self._serve_control is None:
            return None
        if inherited:
            listener = Listener(adopt_socket(inherited[0]), None)
        elif self._config.control_socket is not None:
            _make_runtime_directory(self._config.control_socket.parent)
            listener = listen_on_path(self._config.control_socket, _CONTROL_MODE)
        else:
            return None
        resources.callback(listener.close)
        return listener

    # Running

    async def run(self, task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until told to stop."""
        async with self._agents, trio.open_nursery() as devices:
            devices.start_soon(self._notifier.run)
            for function in self.functions:
                devices.start_soon(function.run_device)
                devices.start_soon(function.run_migration)
            if self._control is not None and self._serve_control is not None:
                await devices.start(self._serve_control, self, self._control.sock.dup())
            with trio.open_signal_receiver(*_ENDING, *_WITHOUT_MEANING) as signals:
                async with trio.open_nursery() as serving:
                    serving.start_soon(self._await_signal, signals, serving.cancel_scope)
                    self._start_serving(serving)
                    await self._start_beside(devices)
                    task_status.started(self)
            await self._bring_back()
            devices.cancel_scope.cancel()
        self._events.close()

    async def _start_beside(self, nursery: trio.Nursery) -> None:
        for function in self.functions:
            if function.engine is not None:
                await function.engine.ready()
        text = "" if self._beside is None else f"; {await self._beside(self, nursery)}"
        self._announce_ready(text)

    def _start_serving(self, nursery: trio.Nursery) -> None:
        for function, listener in self._listeners:
            nursery.start_soon(function.serve, listener)
        if self._connected:
            nursery.start_soon(self._serve_connected, nursery.cancel_scope)

    async def _serve_connected(self, scope: trio.CancelScope) -> None:
        """Serve inherited connections; when they have ended and nothing else can connect, so has our work."""
        async with trio.open_nursery() as nursery:
            for function, sock in self._connected:
                nursery.start_soon(function.serve_connected, sock)
        if not self._listeners:
            self._log.info("the inherited connection ended; nothing is left to serve")
            scope.cancel()

    async def _bring_back(self) -> None:
        """Give functions that stand still for a migration that ends with us the time to go on."""
        with trio.CancelScope(shield=True), trio.move_on_after(self._config.reply_budget_s):
            async with trio.open_nursery() as nursery:
                for function in self.functions:
                    if function.engine is not None:
                        nursery.start_soon(function.engine.settle)

    async def _await_signal(self, signals: Any, scope: trio.CancelScope) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if number in _WITHOUT_MEANING:
                self._log.warning("signal ignored", signal=name, what_to_do=_WITHOUT_MEANING[number])
                continue
            self._log.info("stopping", signal=name)
            self._notifier.stopping("turning clients out")
            # Cancels the accept loops and, with them, the connections; each tears down what it holds.
            scope.cancel()
            return

    def _announce_ready(self, more: str) -> None:
        for function, listener in self._listeners:
            function.address = listener.address
            function.log.info("listening", socket=listener.address, device=function.backend.summary)
        count = len(self.functions)
        text = f"{count} function{'s' if count != 1 else ''}"
        self._log.info("ready", version=__version__, pid=os.getpid(), functions=count)
        self._notifier.ready(f"serving {text}{more}")

    # For the control socket

    def status(self) -> Status:
        """Describe everything at this moment."""
        daemon = DaemonStatus(
            version=__version__, pid=os.getpid(), started=iso_time(self._started), functions=len(self.functions)
        )
        return Status(daemon=daemon, functions=[function_status(function) for function in self.functions])

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Watch what happens from now on."""
        return self._events.subscribe()


def _raise_fd_limit() -> None:
    """Every client brings descriptors; the soft limit is a default for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _default_group() -> str | None:
    """QEMU's group, so that a VMM running as its own user can connect on day one; only root may give files away."""
    if os.geteuid() != 0:
        return None
    import grp

    try:
        return grp.getgrnam(DEFAULT_SOCKET_GROUP).gr_name
    except KeyError:
        return None


def _make_runtime_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError:  # listening will fail, and say so with the path
        pass
