"""What the daemon can be told, as dataclasses, each of them a section that declares its keys (see `tables`).

    DaemonConfig
     ├── functions: FunctionConfig …
     │    ├── device: ModelDevice | UpstreamDevice | KernelVfioDevice
     │    ├── agent: AgentConfig
     │    └── migration: MigrationConfig
     └── vms: VmConfig …

A configuration file (`load`), the short form of the command line (`devices`, `agents`) and `simulate-soc` all end here,
so the server sees one shape whichever way it was started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

from vfiouser_oob.config.agents import AGENT, MIGRATION, AgentConfig, Generations, MigrationConfig, P2p
from vfiouser_oob.config.devices import (
    DEVICE,
    DeviceConfig,
    KernelVfioDevice,
    ModelDevice,
    RegionPolicy,
    UpstreamDevice,
    VfioInterface,
)
from vfiouser_oob.config.tables import SpoiledTable, key, section
from vfiouser_oob.config.values import (
    ABSOLUTE_SOCKET_PATH,
    CONTROL_SOCKET,
    GROUP,
    MODE,
    NAME,
    STATE_DIRECTORY,
    SWITCH,
    UIDS,
    Word,
    one_of,
    seconds_between,
)
from vfiouser_oob.config.vms import CarrierChoice, Listens, VmConfig

__all__ = [
    "DEFAULT_SOCKET_GROUP",
    "AgentConfig",
    "CarrierChoice",
    "DaemonConfig",
    "DeviceConfig",
    "DmaMode",
    "FunctionConfig",
    "Generations",
    "KernelVfioDevice",
    "Listens",
    "LogFormat",
    "LogLevel",
    "MigrationConfig",
    "ModelDevice",
    "P2p",
    "RegionPolicy",
    "UpstreamDevice",
    "VfioInterface",
    "VmConfig",
    "default_control_socket",
    "default_state_directory",
]

# Debian, Fedora and libvirt all run QEMU in this group, so that a VM can connect on day one.
DEFAULT_SOCKET_GROUP = "kvm"
CONTROL_SOCKET_NAME = "control.sock"


class DmaMode(Word):
    """How a device reaches the client's memory."""

    FILES = "files", "through descriptors that the client sends"
    MESSAGES = "messages", "by asking the client for each transfer"


class LogFormat(Word):
    """How log records are written."""

    HUMAN = "human", "for people"
    JSON = "json", "one object per line"


class LogLevel(Word):
    """The least important record that is still written."""

    DEBUG = "debug", "every message is one line"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@section
class FunctionConfig:
    """One exported PCI function."""

    constraints: ClassVar[Mapping[str, Any]] = {"dependencies": {"migration": ["agent"]}}

    name: str = key(NAME, "its name in logs, in status and among systemd's sockets; unique")
    device: DeviceConfig = key(DEVICE, "the device behind the function, see below")
    socket: Path | None = key(
        ABSOLUTE_SOCKET_PATH,
        "path to listen on; unique",
        default=None,
        unset="the socket that systemd passes under `name`",
    )
    #: Number of an inherited UNIX socket to serve on, instead of a path; of the command line only.
    fd: int | None = None
    socket_mode: int = key(MODE, "permission bits of the socket file", default=0o660)
    socket_group: str | None = key(
        GROUP,
        "group of the socket file",
        default=None,
        unset=f"`{DEFAULT_SOCKET_GROUP}`, if that group exists and the daemon is root or in it; else the daemon's own",
    )
    allow_uids: tuple[int, ...] | None = key(
        UIDS,
        "users who may connect, regardless of the file's permissions",
        default=None,
        unset="everyone whom the permissions let in",
    )
    log_level: LogLevel | None = key(
        one_of(LogLevel), "least important log records of this function to write", default=None, unset="the daemon's"
    )
    dma: DmaMode = key(one_of(DmaMode), "how the device reaches guest memory", default=DmaMode.FILES)
    retain_state: bool = key(
        SWITCH,
        "whether a client finds what its predecessor left in registers and device memory, as the vfio-user "
        "specification allows, and may share mapped memory with it. Otherwise it finds a reset function with new "
        "memory, see [trust](../explanation/trust.md#what-one-client-leaves-for-the-next). Real functions do not "
        "have this: the kernel resets them",
        default=False,
    )
    agent: AgentConfig | None = key(
        AGENT,
        "the agent that migrates the function, see [below](#agent)",
        default=None,
        unset="none: the function cannot be migrated",
    )
    migration: MigrationConfig = key(
        MIGRATION,
        "how it is migrated, see [below](#migration); only with an `agent`",
        factory=MigrationConfig,
        unset="the defaults there",
    )
    #: Where the function stands in its configuration file, for messages.
    line: int | None = None


@section
class DaemonConfig:
    """All that one daemon process needs to know; names and sockets of its functions are unique."""

    functions: tuple[FunctionConfig, ...] = field()
    vms: tuple[VmConfig, ...] = ()
    control_socket: Path | None = key(
        CONTROL_SOCKET,
        "path of the [control socket](control-socket.md)",
        default=None,
        unset="`/run/vfiouser-oob/control.sock`; for users other than root "
        "`$XDG_RUNTIME_DIR/vfiouser-oob/control.sock`, if the variable is set",
    )
    metrics_socket: Path | None = key(
        ABSOLUTE_SOCKET_PATH,
        "path of a socket that answers `GET /metrics`, see [metrics](metrics.md); it needs the extra `metrics`",
        default=None,
        unset="the socket that systemd passes under the name `metrics`, which may be a TCP socket; else none",
    )
    state_directory: Path | None = key(
        STATE_DIRECTORY,
        "directory in which the daemon remembers [what agents can "
        "do](../explanation/migration.md#what-is-remembered); the daemon creates it",
        default=None,
        unset='the unit\'s `StateDirectory=`, which systemd passes in `$STATE_DIRECTORY`; without it `"none"`',
    )
    log_level: LogLevel = key(one_of(LogLevel), "least important log records to write", default=LogLevel.INFO)
    log_format: LogFormat = key(one_of(LogFormat), "format of log records", default=LogFormat.HUMAN)
    # Stock QEMU gives up on a reply after 5 s and is then out of step with the stream for good: stay well below.
    reply_budget_s: float = key(
        seconds_between(0.1, 3600),
        "time within which the daemon answers every message of a client",
        default=4.0,
    )
    admin_uids: tuple[int, ...] = key(
        UIDS,
        "users who may change the running daemon, see [control socket](control-socket.md#who-may); root and the "
        "daemon's own user always may",
        factory=tuple,
        unset="nobody else",
    )
    control_group: str | None = key(
        GROUP,
        "group of the control socket's file, whose members may ask but not change anything",
        default=None,
        unset="the daemon's own",
    )
    #: The file that it was read from.
    source: Path | None = None
    #: Socket of a keeper of descriptors; None: the service manager's, if there is one.
    fd_store: str | None = None
    #: Functions of that file that cannot be used.
    spoiled: tuple[SpoiledTable, ...] = ()

    def function(self, name: str) -> FunctionConfig | None:
        """The function of that name, if there is one."""
        return next((function for function in self.functions if function.name == name), None)

    def vm(self, name: str) -> VmConfig | None:
        """The VM of that name, if there is one."""
        return next((vm for vm in self.vms if vm.name == name), None)


def default_control_socket(euid: int | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the control socket is unless something else was asked for.

    Args:
        euid: effective user id; None = ours.
        environ: the environment, for XDG_RUNTIME_DIR.

    Returns:
        ``/run/vfiouser-oob/control.sock`` for root; for others the same below XDG_RUNTIME_DIR, if set.
    """
    euid = os.geteuid() if euid is None else euid
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    base = Path("/run") if euid == 0 or not runtime.startswith("/") else Path(runtime)
    return base / "vfiouser-oob" / CONTROL_SOCKET_NAME


def default_state_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the daemon keeps what outlives it unless something else was asked for: what systemd made for it.

    Args:
        environ: the environment, for STATE_DIRECTORY.

    Returns:
        The first directory of a unit's ``StateDirectory=``; None without one.
    """
    first = environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(first) if first.startswith("/") else None
