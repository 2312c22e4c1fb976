"""What the daemon can be told, as dataclasses.

    DaemonConfig
     └── functions: FunctionConfig …
          └── device: ModelDevice | UpstreamDevice | KernelVfioDevice

A configuration file (`load`), the short form of the command line (`devices`) and `simulate-soc` (`soc`) all
end here, so the server sees one shape whichever way it was started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from vfiouser_oob.config.values import format_size

# Stock QEMU gives up on a reply after 5 s and is then out of step with the stream for good: stay well below.
DEFAULT_REPLY_BUDGET_S = 4.0
DEFAULT_SOCKET_MODE = 0o660
# Debian, Fedora and libvirt all run QEMU in this group, so that a VM can connect on day one.
DEFAULT_SOCKET_GROUP = "kvm"
# A socket holds 208 KiB by default on Linux; what is larger arrives in parts, which some servers cannot read.
DEFAULT_MAX_WRITE = 128 << 10
CONTROL_SOCKET_NAME = "control.sock"


class DmaMode(StrEnum):
    """How a device reaches the client's memory."""

    FILES = "files"
    MESSAGES = "messages"


class Doorbells(StrEnum):
    """How a simulated NVMe controller learns of a doorbell."""

    TRAPPED = "trapped"
    POLLED = "polled"


class Generations(StrEnum):
    """Which generations of migration a client may use."""

    #: v2 always; v1's region only for clients that announce migration.
    AUTO = "auto"
    BOTH = "both"
    V1 = "v1"
    V2 = "v2"
    NONE = "none"


class RegionPolicy(StrEnum):
    """By which descriptor a client maps the regions of a real function."""

    #: A dma-buf of the region where the kernel can map one, else the device.
    AUTO = "auto"
    #: The device itself: works on every kernel, and gives the client the whole device.
    DEVICE_FD = "device-fd"
    #: A dma-buf, or nothing.
    DMABUF = "dmabuf"
    #: Nothing: every access is a message.
    TRAP = "trap"


class VfioInterface(StrEnum):
    """By which interface of the kernel a real function is opened."""

    #: The device's own node and an iommufd where there are both and they may be opened, else the group's node.
    AUTO = "auto"
    #: The IOMMU group's node and a container.
    GROUP = "group"
    #: The device's own node and an iommufd.
    CDEV = "cdev"


class LogFormat(StrEnum):
    """How log records are written."""

    HUMAN = "human"
    JSON = "json"


class LogLevel(StrEnum):
    """The least important record that is still written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _doubled_commas(path: Path) -> str:
    return str(path).replace(",", ",,")


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeOptions:
    """The simulated NVMe controller's settings.

    Args:
        size: bytes of its namespace; None = the size of `image`, or 64 MiB of RAM without one.
        image: file that holds the namespace; None = RAM.
        cmb: bytes of controller memory buffer in a mappable BAR of its own; 0 = none.
        doorbells: trapped as messages, or in a mapped page that the model polls.
        shared: other simulators may use `image` too; only one of them runs the function at any time.
    """

    size: int | None = None
    image: Path | None = None
    cmb: int = 0
    doorbells: Doorbells = Doorbells.TRAPPED
    shared: bool = False

    def describe(self) -> str:
        """The settings that differ from the defaults, as the short form writes them."""
        parts = []
        if self.size is not None:
            parts.append(f"size={format_size(self.size)}")
        if self.image is not None:
            parts.append(f"image={_doubled_commas(self.image)}")
        if self.cmb:
            parts.append(f"cmb={format_size(self.cmb)}")
        if self.doorbells is not Doorbells.TRAPPED:
            parts.append(f"doorbells={self.doorbells.value}")
        if self.shared:
            parts.append("shared=true")
        return ",".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDevice:
    """A function that is played by a Python model.

    Args:
        model: name of the model, for example ``nvme``.
        options: that model's settings.
    """

    kind: ClassVar[str] = "model"

    model: str = "nvme"
    options: NvmeOptions = field(default_factory=NvmeOptions)

    def describe(self) -> str:
        """The device as ``--device`` takes it."""
        options = self.options.describe()
        return f"{self.kind}:{self.model}" + (f",{options}" if options else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamDevice:
    """A function that another vfio-user server provides.

    Args:
        socket: that server's UNIX socket.
        max_write: bytes of data in one message to that server; what is larger is split.
    """

    kind: ClassVar[str] = "vfio-user"

    socket: Path
    max_write: int = DEFAULT_MAX_WRITE

    def describe(self) -> str:
        """The device as ``--device`` takes it."""
        size = "" if self.max_write == DEFAULT_MAX_WRITE else f",max_write={format_size(self.max_write)}"
        return f"{self.kind}:{_doubled_commas(self.socket)}{size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelVfioDevice:
    """A PCI function of this machine that is bound to the kernel's vfio-pci driver, or a mediated device; one of both.

    Args:
        bdf: the function's address, such as ``0000:3b:00.2``.
        mdev: the mediated device's UUID.
        region_policy: how a client may map its regions.
        interface: by which interface of the kernel it is opened.
    """

    kind: ClassVar[str] = "kernel-vfio"

    bdf: str | None = None
    mdev: str | None = None
    region_policy: RegionPolicy = RegionPolicy.AUTO
    interface: VfioInterface = VfioInterface.AUTO

    @property
    def name(self) -> str:
        """What the kernel calls it."""
        return self.bdf or self.mdev or ""

    def describe(self) -> str:
        """The device as ``--device`` takes it."""
        policy = "" if self.region_policy is RegionPolicy.AUTO else f",region_policy={self.region_policy.value}"
        interface = "" if self.interface is VfioInterface.AUTO else f",interface={self.interface.value}"
        return f"{self.kind}:{self.name}{policy}{interface}"


DeviceConfig: TypeAlias = ModelDevice | UpstreamDevice | KernelVfioDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """The service that stops, saves, loads and resumes a function.

    Args:
        kind: which adapter speaks to it.
        function: the agent's own name for the function.
        options: what the adapter needs: address, credentials …
    """

    kind: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """The agent in a few words."""
        address = self.options.get("address")
        return f"{self.kind}:{address or ''} function {self.function}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationConfig:
    """How a function with an agent is migrated.

    Args:
        generations: which generations a client may use.
        precopy: whether the state PRE_COPY is offered.
        pad_reads: whether replies to MIG_DATA_READ have the size that was asked for, for clients that insist.
        chunk_size: bytes of state asked of the agent at once; about two chunks are in memory, and they become smaller
            while many functions migrate at once.
        v1_data_size: bytes of the data section of the v1 region.
        call_s: seconds that the agent may take for a call without much work.
        stop_s: seconds for a call that drains, starts or resets the function.
        data_s: seconds for a chunk of state, and for applying it.
        retry_s: seconds before the first repetition; they double with each.
    """

    generations: Generations = Generations.AUTO
    precopy: bool = True
    pad_reads: bool = False
    chunk_size: int = 4 << 20
    v1_data_size: int = 1 << 20
    call_s: float = 2.0
    stop_s: float = 5.0
    data_s: float = 30.0
    retry_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionConfig:
    """One exported PCI function.

    Args:
        name: its name in logs, in status and among systemd's sockets.
        device: where it comes from.
        socket: path to listen on; None = `fd`, or the socket that systemd passes under `name`.
        fd: number of an inherited UNIX socket to serve on, instead of a path.
        socket_mode: permission bits of the socket file that we create.
        socket_group: group of that file; None = `kvm` if we are root and there is such a group.
        allow_uids: user ids that may connect; None = whoever the file's permissions let in.
        dma: how the device reaches the client's memory.
        retain_state: whether a client finds what the one before it left in registers and device memory.
        agent: what migrates it; None = it cannot be migrated.
        migration: how it is migrated.
        line: where the function stands in its configuration file, for messages.
    """

    name: str
    device: DeviceConfig
    socket: Path | None = None
    fd: int | None = None
    socket_mode: int = DEFAULT_SOCKET_MODE
    socket_group: str | None = None
    allow_uids: tuple[int, ...] | None = None
    dma: DmaMode = DmaMode.FILES
    retain_state: bool = False
    agent: AgentConfig | None = None
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """All that one daemon process needs to know.

    Args:
        functions: the exported functions; names and sockets are unique.
        control_socket: path of the control socket; None = no control socket.
        state_directory: where what agents can do is kept beyond the daemon's end; None = it is not.
        log_level: least important record that is written.
        log_format: for people or for machines.
        reply_budget_s: seconds after which a client message is answered, come what may.
        source: the file that it was read from.
    """

    functions: tuple[FunctionConfig, ...]
    control_socket: Path | None = None
    state_directory: Path | None = None
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.HUMAN
    reply_budget_s: float = DEFAULT_REPLY_BUDGET_S
    source: Path | None = None

    def function(self, name: str) -> FunctionConfig | None:
        """The function of that name, if there is one."""
        return next((function for function in self.functions if function.name == name), None)


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
