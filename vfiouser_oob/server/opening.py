"""Opening what a function consists of, as its configuration says: its device, its migration, its sockets."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from vfiouser_agents.api import Agent
from vfiouser_oob.config.agents import OWN_AGENT
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.p2p import settled
from vfiouser_oob.config.schema import DEFAULT_SOCKET_GROUP, AgentConfig, FunctionConfig
from vfiouser_oob.devices.base import DeviceBackend
from vfiouser_oob.devices.factory import make_backend
from vfiouser_oob.migration.pool import AgentLease, AgentPool
from vfiouser_oob.migration.sharing import BufferShare
from vfiouser_oob.observability import levels, log
from vfiouser_oob.observability.events import EventHub
from vfiouser_oob.persist.capabilities import CapabilityStore, agent_identity
from vfiouser_oob.persist.history import HistoryStore
from vfiouser_oob.server.estate import Estate
from vfiouser_oob.server.function import Function, MigrationMaker
from vfiouser_oob.server.life import LIVE_KEYS, Life
from vfiouser_oob.server.sockets import SocketShelf
from vfiouser_oob.server.status import unit_status
from vfiouser_oob.server.survival import Survival
from vfiouser_oob.server.unit import UnitKind
from vfiouser_oob.transport.activity import Activity
from vfiouser_oob.transport.listener import Listener, ListenError, adopt_socket, listen_on_path

if TYPE_CHECKING:
    from vfiouser_oob.migration.runner import MigrationRunner

#: Systemd sets it for every service.
_UNIT = "INVOCATION_ID"
#: Errors that say that a directory is not for us, as the unit stands.
_NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT})


@dataclass(frozen=True)
class SharedParts:
    """What all functions of a daemon share.

    Args:
        reply_budget_s: seconds within which each client message is answered.
        agents: their agents.
        memory: where agents' capabilities are kept.
        history: where migrations that are over are kept.
        activity: the daemon's sockets.
        events: where changes are announced.
        sharing: the memory for state on its way.
        recorded: tells whether a function's writes to client memory are recorded, since its VM's migration asks for
            them.
        survival: how clients outlive the daemon; None: they do not.
    """

    reply_budget_s: float
    agents: AgentPool
    memory: CapabilityStore
    history: HistoryStore
    activity: Activity
    events: EventHub = field(default_factory=EventHub)
    sharing: BufferShare = field(default_factory=BufferShare)
    recorded: Callable[[str], bool] = lambda name: False
    survival: Survival | None = None


def open_function(config: FunctionConfig, inherited: Sequence[int], means: SharedParts) -> Life:
    """Open a function; it does nothing yet.

    Args:
        config: what it is.
        inherited: descriptors of sockets that systemd passed for it.
        means: what it shares with others.

    Returns:
        Its life, which the caller runs, or closes.

    Raises:
        ConfigError: its device or its agent cannot be used.
        ListenError: one of its sockets cannot be listened on.
    """
    with ExitStack() as resources:
        backend = make_backend(config, means.activity)
        resources.callback(backend.close)
        estate = means.survival.estate_of(config) if means.survival is not None and backend.survives else None
        if estate is not None:
            resources.callback(estate.close)
        leases: list[AgentLease] = []
        function = Function(
            config.name,
            backend,
            reply_budget_s=means.reply_budget_s,
            activity=means.activity,
            events=means.events,
            log=log.get("function"),
            allow_uids=config.allow_uids,
            migration=_engine_maker(config, backend, means, leases, estate),
            recorded=means.recorded(config.name),
            estate=estate,
        )
        for lease in leases:
            resources.callback(lease.release)
        listeners, connected = _open_sockets(config, inherited, resources, means.survival, estate)
        levels.choose(config.name, config.log_level)
        return Life(function, leases, listeners, connected, resources.pop_all())


def function_kind(shelf: SocketShelf, means: SharedParts) -> UnitKind:
    """What a function is as a unit of a daemon.

    Args:
        shelf: the sockets that systemd passed.
        means: what functions share.
    """

    def open_one(config: FunctionConfig) -> Life:
        return open_function(config, shelf.take(config), means)

    return UnitKind(
        "function", "[[function]]", lambda config: config.functions, open_one, unit_status, LIVE_KEYS, vital=True
    )


def _engine_maker(
    config: FunctionConfig,
    backend: DeviceBackend,
    means: SharedParts,
    leases: list[AgentLease],
    estate: Estate | None,
) -> MigrationMaker | None:
    agent = config.agent
    if agent is None:
        return None
    try:
        connected, probes = _agent(agent, backend, means.agents, leases)
    except (ValueError, OSError) as error:
        raise ConfigError(f"function {config.name!r}: agent: {error}", line=config.line) from error
    identity = agent_identity(agent.kind, agent.function, agent.options, config.device.describe())
    memory = means.memory.drawer(config.name, identity)
    migration = settled(config)
    # Loaded with the first function that has an agent: a daemon without any saves their memory, and no client waits.
    from vfiouser_oob.migration.runner import MigrationRunner

    import_module("vfiouser_oob.migration.port")

    def make(name: str, events: EventHub, logger: log.Logger) -> MigrationRunner:
        return MigrationRunner(
            name,
            connected,
            agent.function,
            migration,
            events,
            logger,
            memory,
            means.sharing,
            means.history.drawer(name),
            estate,
            None if estate is None else estate.migration_left,
            probes,
        )

    return make


def _agent(
    config: AgentConfig, backend: DeviceBackend, pool: AgentPool, leases: list[AgentLease]
) -> tuple[Agent, trio.CapacityLimiter | None]:
    """An agent, and what those who share it take turns by; the device's own driver belongs to one function."""
    own = backend.agent() if config.kind == OWN_AGENT else None
    if own is not None:
        return own, None
    lease = pool.lease(config)
    leases.append(lease)
    return lease.agent, lease.probes


def _open_sockets(
    config: FunctionConfig,
    inherited: Sequence[int],
    resources: ExitStack,
    survival: Survival | None,
    estate: Estate | None,
) -> tuple[list[Listener], list[socket.socket]]:
    """Take over the sockets that were passed, or listen where the configuration says."""
    listeners: list[Listener] = []
    connected: list[socket.socket] = []
    for fd in [*inherited, *([] if config.fd is None else [config.fd])]:
        sock = adopt_socket(fd)
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listeners.append(Listener(sock, None))
            resources.callback(listeners[-1].close)
        else:
            connected.append(sock)
            resources.callback(sock.close)
    if not listeners and not connected and config.socket is not None:
        listener = None
        if survival is not None and estate is not None:
            listener = survival.listener_of(config.name, config.socket)
        if listener is None:
            listener = _listen(config, config.socket)
        listeners.append(listener)
        if survival is not None and estate is not None:
            survival.keep_listener(estate, listener)
        resources.callback(listeners[-1].close)
    return listeners, connected


def _listen(config: FunctionConfig, path: Path) -> Listener:
    """Make a function's socket; where we may not, the error names the line that is missing."""
    try:
        return listen_on_path(path, config.socket_mode, config.socket_group or default_group())
    except ListenError as error:
        cause = error.__cause__
        if _UNIT not in os.environ or not isinstance(cause, OSError) or cause.errno not in _NOT_OURS:
            raise
        raise ListenError(
            f"{error}; either the service may write there (`ReadWritePaths={path.parent}` by `systemctl edit "
            f"vfiouser-oob.service`, and a directory that it may write), or systemd makes the socket "
            f"(`ListenStream={path}` by `systemctl edit vfiouser-oob.socket`)"
        ) from cause


def default_group() -> str | None:
    """The group of socket files unless another one is configured; None for the daemon's own.

    It is QEMU's, so that a VMM running as its own user can connect on day one; who is not root may give files only to
    groups that it is in.
    """
    import grp

    try:
        group = grp.getgrnam(DEFAULT_SOCKET_GROUP)
    except KeyError:
        return None
    return group.gr_name if os.geteuid() == 0 or group.gr_gid in os.getgroups() else None
