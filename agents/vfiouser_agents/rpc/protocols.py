"""Every protocol that an agent can be served with, under the kind of the adapter that speaks it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Protocol, cast

import trio

from vfiouser_agents.api import Agent
from vfiouser_agents.options import OptionError, hint

from .endpoint import Address, TlsOptions, open_at
from .json_codec import JsonCodec
from .legacy_server import serve_legacy
from .server import serve_agent


class Serve(Protocol):
    """Serves an agent at an address until cancelled."""

    async def __call__(
        self,
        agent: Agent,
        address: Address,
        tls: TlsOptions | None,
        *,
        allow_plaintext: bool,
        task_status: trio.TaskStatus[Address],
    ) -> None:
        """Serve, and tell the address with the port that was really taken."""


async def _on_streams(
    serve: Callable[..., Awaitable[None]],
    agent: Agent,
    address: Address,
    tls: TlsOptions | None,
    *,
    allow_plaintext: bool,
    task_status: trio.TaskStatus[Address],
) -> None:
    """Open the address for what serves an agent on listeners."""
    listeners, shown = await open_at(address, tls, allow_plaintext=allow_plaintext)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, agent, listeners)
        task_status.started(shown)


#: How each is served: a function, or where to find one that needs more than is always installed.
PROTOCOLS: Mapping[str, Serve | str] = {
    "msgpack-rpc": partial(_on_streams, serve_agent),
    "jsonrpc": partial(_on_streams, partial(serve_agent, codec=JsonCodec)),
    "legacy-tcp": partial(_on_streams, serve_legacy),
    "grpc": "vfiouser_agents.adapters.grpc_server:serve_grpc",
}


async def serve_at(
    protocol: str,
    agent: Agent,
    address: Address,
    tls: TlsOptions | None = None,
    *,
    allow_plaintext: bool = False,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an agent until cancelled.

    Args:
        protocol: one of `PROTOCOLS`.
        agent: the agent, entered.
        address: where; port 0 is any.
        tls: certificate and, for client certificates, CA; needed for `tls`.
        allow_plaintext: TCP without TLS may be for other hosts.
        task_status: told the address when clients may come.

    Raises:
        OptionError: there is no such protocol, what it needs is not installed, or the address or TLS cannot be used.
        OSError: the address cannot be used.
    """
    serve = PROTOCOLS.get(protocol)
    if serve is None:
        raise OptionError(f"unknown protocol {protocol!r}{hint(protocol, PROTOCOLS)}")
    if isinstance(serve, str):
        module, _, name = serve.partition(":")
        try:
            serve = cast("Serve", getattr(import_module(module), name))
        except ImportError as error:
            raise OptionError(f"protocol {protocol!r} cannot be served: {error}; is its extra installed?") from error
    await serve(agent, address, tls, allow_plaintext=allow_plaintext, task_status=task_status)
