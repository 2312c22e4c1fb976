"""The agent process: on the network for daemons, and a client of the device process. It has no state of its own.

Under a supervisor its standard input is a socket to the device process: on it the agent says where it listens, and its
end is the end of the agent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import Agent, AgentInfo, FunctionInfo, Session
from vfiouser_agents.options import OptionError
from vfiouser_agents.rpc.endpoint import (
    Address,
    TlsOptions,
    check_plaintext,
    parse_address,
    server_context,
)
from vfiouser_agents.rpc.protocols import serve_at
from vfiouser_oob._version import __version__
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.observability import log
from vfiouser_oob.systemd.notify import Notifier
from vfiouser_soc.options import SocAgentOptions, SocOptions

#: Set for an agent process whose standard input is a socket to its supervisor.
SUPERVISED = "VFIOUSER_OOB_SUPERVISED"


class ProxyAgent(Agent):
    """What daemons reach; every session is one with the device process.

    Args:
        device: the device process.
    """

    def __init__(self, device: Agent) -> None:
        self._device = device
        self._info = AgentInfo("vfiouser-oob", "simulated SoC", __version__, instance=uuid.uuid4().hex)

    async def connect(self) -> AgentInfo:
        """Say who we are; the device process is asked when it is needed."""
        await trio.lowlevel.checkpoint()
        return self._info

    async def aclose(self) -> None:
        """Let go of the device process."""
        await self._device.aclose()

    async def open(self, function_id: str) -> Session:
        """A session with the device process."""
        return await self._device.open(function_id)

    async def functions(self) -> Sequence[FunctionInfo]:
        """The functions that the device process has."""
        return await self._device.functions()


def check_addresses(options: SocAgentOptions) -> list[Address]:
    """Read the addresses to listen at, and see to it that they can be used with the other options.

    Raises:
        ConfigError: they cannot.
    """
    tls = _tls(options)
    try:
        addresses = [parse_address(text) for text in options.listen]
        for address in addresses:
            check_plaintext(address, allowed=options.allow_plaintext)
        if any(address.scheme == "tls" for address in addresses):
            server_context(tls)
    except OptionError as error:
        raise ConfigError(f"agent: {error}") from error
    return addresses


def _tls(options: SocAgentOptions) -> TlsOptions:
    ca, cert, key = (
        None if path is None else str(path) for path in (options.tls_ca, options.tls_cert, options.tls_key)
    )
    return TlsOptions(ca, cert, key)


async def run_agent(options: SocOptions, environ: Mapping[str, str] = os.environ) -> None:
    """Be the agent until SIGTERM, SIGINT or the end of the supervisor.

    Args:
        options: of the whole SoC.
        environ: says whether there is a supervisor.

    Raises:
        ConfigError: it cannot listen.
    """
    logger = log.get("agent")
    notifier = Notifier.from_environment()
    check_addresses(options.agent)
    device = MsgpackRpcAgent(parse_address(f"unix://{options.device_socket.absolute()}"))
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with device, _supervisor(environ) as supervisor, trio.open_nursery() as nursery:
            addresses = [str(address) for address in await _serve(ProxyAgent(device), options.agent, nursery)]
            with _AgentFile(options.agent_file, addresses):
                logger.info("agent ready", addresses=", ".join(addresses), pid=os.getpid())
                notifier.ready(f"agent at {', '.join(addresses)}")
                if supervisor is not None:
                    await supervisor.send_all(json.dumps({"addresses": addresses}).encode() + b"\n")
                    nursery.start_soon(_end_with, supervisor, nursery.cancel_scope)
                await _end_on_signal(signals)
            nursery.cancel_scope.cancel()
        logger.info("agent stopped")


async def _serve(agent: Agent, options: SocAgentOptions, nursery: trio.Nursery) -> list[Address]:
    addresses = []
    for address in check_addresses(options):
        serve = partial(
            serve_at, options.protocol, agent, address, _tls(options), allow_plaintext=options.allow_plaintext
        )
        try:
            addresses.append(await nursery.start(serve))
        except OptionError as error:
            raise ConfigError(f"agent: {error}") from error
        except OSError as error:
            raise ConfigError(f"agent: cannot listen at {address}: {error.strerror or error}") from error
    return addresses


class _AgentFile:
    """The file that says where the agent is, for as long as it is there.

    Args:
        path: the file; replaced as a whole.
        addresses: what it says.
    """

    def __init__(self, path: Path, addresses: Sequence[str]) -> None:
        self._path = path
        self._addresses = addresses

    def __enter__(self) -> None:
        new = self._path.with_suffix(f".{os.getpid()}")
        try:
            new.write_text(json.dumps({"pid": os.getpid(), "addresses": list(self._addresses)}) + "\n")
            new.replace(self._path)
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)


@asynccontextmanager
async def _supervisor(environ: Mapping[str, str]) -> AsyncIterator[trio.SocketStream | None]:
    if not environ.get(SUPERVISED):
        yield None
        return
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(0))))
    async with stream:
        yield stream


async def _end_with(supervisor: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        while await supervisor.receive_some(1024):
            pass
    except trio.BrokenResourceError:
        pass
    log.get("agent").info("the device process has gone")
    scope.cancel()


async def _end_on_signal(signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        return
