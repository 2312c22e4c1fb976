"""`simulate-soc`: the device side of an IPU/DPU as one process.

Its functions' vfio-user sockets stand for PCIe, so a daemon in front of it may die and come back while the functions
and their state live on.
"""

from __future__ import annotations

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.soc import SocOptions
from vfiouser_oob.server.daemon import run_daemon


async def run_soc(options: SocOptions) -> None:
    """Play the SoC until SIGTERM or SIGINT.

    Args:
        options: what it consists of.

    Raises:
        ConfigError: the directory for the sockets cannot be made, or an image cannot be used.
    """
    try:
        options.socket_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {options.socket_dir}: {error.strerror}") from error
    await run_daemon(options.daemon_config())
