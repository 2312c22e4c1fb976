"""What `simulate-soc` is asked for, and the daemon configuration that plays it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import (
    DaemonConfig,
    Doorbells,
    FunctionConfig,
    LogFormat,
    LogLevel,
    ModelDevice,
    NvmeOptions,
)

DEFAULT_NAMESPACE_SIZE = 64 << 20
# As many as one PCI bus can name without ARI: a typing error is refused before it becomes a thousand sockets.
FUNCTIONS_MAX = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SocOptions:
    """One simulated IPU/DPU.

    Args:
        socket_dir: directory of the functions' sockets, `f0.sock`, `f1.sock` …; made if it is not there.
        functions: how many NVMe functions it has.
        size: bytes of each namespace; None = the image's size, or 64 MiB of RAM.
        image: file behind the namespace; with several functions, function N uses the file `IMAGE.N`.
        cmb: bytes of controller memory buffer of each function; 0 = none.
        doorbells: trapped as messages, or mapped and polled.
        log_level: least important record that is written.
        log_format: for people or for machines.
    """

    socket_dir: Path
    functions: int = 1
    size: int | None = None
    image: Path | None = None
    cmb: int = 0
    doorbells: Doorbells = Doorbells.TRAPPED
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.HUMAN

    def __post_init__(self) -> None:
        if not 1 <= self.functions <= FUNCTIONS_MAX:
            raise ConfigError(f"functions must be a number from 1 to {FUNCTIONS_MAX}, got {self.functions}")

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
            size = DEFAULT_NAMESPACE_SIZE
        options = NvmeOptions(size=size, image=image, cmb=self.cmb, doorbells=self.doorbells)
        name = f"f{index}"
        return FunctionConfig(
            name=name,
            socket=self.socket_dir / f"{name}.sock",
            device=ModelDevice(model="nvme", options=options),
        )
