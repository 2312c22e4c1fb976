"""`simulate-soc`: the device side of an IPU/DPU, as two processes that can be killed apart.

    device process: the functions' vfio-user sockets stand for PCIe; all state is here
      ▲ device.sock
    agent process: a daemon on the host reaches it over the network; keeps nothing

So a daemon in front may die and come back, and so may the agent, while the functions and what they do live on.
"""

from __future__ import annotations

from functools import partial

import trio

from vfiouser_agents.options import OptionError
from vfiouser_agents.rpc.endpoint import open_listeners, parse_address
from vfiouser_agents.rpc.server import serve_agent
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.devices.base import ResetKind
from vfiouser_oob.devices.model_backend import ModelBackend
from vfiouser_oob.server.daemon import Daemon, run_daemon
from vfiouser_oob.server.function import Function
from vfiouser_soc.agent.function import AgentFunction, MigrationOptions
from vfiouser_soc.agent.process import check_addresses, run_agent
from vfiouser_soc.agent.session import NvmeAgent
from vfiouser_soc.agent.state_memory import StateMemoryOptions
from vfiouser_soc.agent.supervisor import Supervisor
from vfiouser_soc.nvme.function import NvmeFunction
from vfiouser_soc.options import SocOptions, SocPart


async def run_soc(options: SocOptions) -> None:
    """Play the SoC, or a part of it, until SIGTERM or SIGINT.

    Args:
        options: what it consists of.

    Raises:
        ConfigError: the directory for the sockets cannot be made, an image cannot be used, or the agent cannot listen.
    """
    if options.part is not SocPart.NO_AGENT:
        check_addresses(options.agent)
    try:
        options.socket_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {options.socket_dir}: {error.strerror}") from error
    if options.part is SocPart.AGENT:
        await run_agent(options)
    elif options.part is SocPart.NO_AGENT:
        await run_daemon(options.daemon_config())
    else:
        try:
            await run_daemon(options.daemon_config(), beside=partial(_serve_beside, options))
        finally:
            options.device_socket.unlink(missing_ok=True)


async def _serve_beside(options: SocOptions, daemon: Daemon, nursery: trio.Nursery) -> str:
    """Let an agent process in, and start one unless it is left to others."""
    agent = NvmeAgent([_agent_function(function, options) for function in daemon.functions])
    try:
        listeners = await open_listeners(parse_address(f"unix://{options.device_socket.absolute()}"))
    except (OptionError, OSError) as error:
        raise ConfigError(f"cannot listen on {options.device_socket}: {error}") from error
    await nursery.start(serve_agent, agent, listeners)
    if options.part is SocPart.DEVICE:
        return "waiting for agent processes"
    supervisor = Supervisor(options)
    await nursery.start(supervisor.run)
    return f"agent at {', '.join(supervisor.addresses)}"


def _agent_function(function: Function, options: SocOptions) -> AgentFunction:
    backend = function.backend
    assert isinstance(backend, ModelBackend)
    assert isinstance(backend.model, NvmeFunction)
    memory = StateMemoryOptions(options.agent.state_size, options.agent.state_churn)
    return AgentFunction(
        function.name,
        backend.model,
        MigrationOptions(memory, options.agent.firmware),
        reset_device=partial(backend.reset, ResetKind.FUNCTION_LEVEL),
    )
