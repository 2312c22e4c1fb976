"""What `simulate-soc` is asked for, and the daemon configuration that plays it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from vfiouser_agents.rpc.kinds import DEFAULT_KIND
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import (
    DaemonConfig,
    FunctionConfig,
    LogFormat,
    LogLevel,
    ModelDevice,
)
from vfiouser_protocol.pci_header import FUNCTIONS_PER_BUS
from vfiouser_soc.nvme.options import DEFAULT_SIZE, Doorbells, NvmeOptions

#: Where the agent listens unless something else was asked for: any free port, for this host only.
DEFAULT_AGENT_ADDRESS = "tcp://127.0.0.1:0"
#: In the directory of the sockets: through which the agent process reaches the device process, and where it can be
#: reached itself.
DEVICE_SOCKET = "device.sock"
AGENT_FILE = "agent.json"


class SocPart(StrEnum):
    """What one process plays."""

    #: The devices, with an agent as a child process.
    ALL = "all"
    #: The devices alone; an agent process may come and go.
    DEVICE = "device"
    #: The agent alone.
    AGENT = "agent"
    #: The devices of a SoC that has no agent.
    NO_AGENT = "no-agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class SocAgentOptions:
    """The agent of a simulated IPU/DPU.

    Args:
        listen: addresses; a port of 0 is any free one.
        protocol: what is spoken there; the kind of the adapter that reaches it.
        tls_cert: its certificate, for `tls` addresses.
        tls_key: that certificate's key; None = in the same file.
        tls_ca: whose certificates clients must show; None = they need none.
        allow_plaintext: `tcp` addresses may be for other hosts.
        state_size: bytes of state memory that each function carries in a migration.
        state_churn: bytes of it per second that a running function rewrites.
        firmware: the version that the functions claim to run; None = the model's.
    """

    listen: tuple[str, ...] = (DEFAULT_AGENT_ADDRESS,)
    protocol: str = DEFAULT_KIND
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    allow_plaintext: bool = False
    state_size: int = 0
    state_churn: int = 0
    firmware: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SocOptions:
    """One simulated IPU/DPU.

    Args:
        socket_dir: directory of the functions' sockets, `f0.sock`, `f1.sock` …; made if it is not there.
        functions: how many NVMe functions it has.
        size: bytes of each namespace; None = the image's size, or 64 MiB of RAM.
        image: file behind the namespace; with several functions, function N uses the file `IMAGE.N`.
        cmb: bytes of controller memory buffer of each function; 0 = none.
        shared_image: other simulators may have the image open too.
        retain_state: whether a client finds what the one before it left in a function.
        doorbells: trapped as messages, or mapped and polled.
        part: what this process plays.
        agent: the agent.
        log_level: least important log records to write.
        log_format: for people or for machines.
    """

    socket_dir: Path
    functions: int = 1
    size: int | None = None
    image: Path | None = None
    shared_image: bool = False
    retain_state: bool = False
    cmb: int = 0
    doorbells: Doorbells = Doorbells.TRAPPED
    part: SocPart = SocPart.ALL
    agent: SocAgentOptions = field(default_factory=SocAgentOptions)
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.HUMAN

    def __post_init__(self) -> None:
        if not 1 <= self.functions <= FUNCTIONS_PER_BUS:
            raise ConfigError(f"functions must be a number from 1 to {FUNCTIONS_PER_BUS}, got {self.functions}")
        if self.shared_image and self.image is None:
            raise ConfigError("only an image can be shared, because RAM belongs to one process")

    @property
    def device_socket(self) -> Path:
        """Through which the agent process reaches the device process."""
        return self.socket_dir / DEVICE_SOCKET

    @property
    def agent_file(self) -> Path:
        """Where the agent process says how it can be reached."""
        return self.socket_dir / AGENT_FILE

    def daemon_config(self) -> DaemonConfig:
        """The configuration of a server that exports these functions, without a control socket."""
        return DaemonConfig(
            functions=tuple(self._function(index) for index in range(self.functions)),
            log_level=self.log_level,
            log_format=self.log_format,
        )

    def _function(self, index: int) -> FunctionConfig:
        image = self.image
        if image is not None and self.functions > 1:
            image = image.with_name(f"{image.name}.{index}")
        size = self.size
        if size is None and image is None:
            size = DEFAULT_SIZE
        try:
            options = NvmeOptions(
                size=size, image=image, cmb=self.cmb, doorbells=self.doorbells, shared=self.shared_image
            )
        except ValueError as error:
            raise ConfigError(str(error).replace("with key 'image'", "with --image FILE")) from error
        name = f"f{index}"
        return FunctionConfig(
            name=name,
            socket=self.socket_dir / f"{name}.sock",
            device=ModelDevice(model="nvme", options=options),
            retain_state=self.retain_state,
        )
