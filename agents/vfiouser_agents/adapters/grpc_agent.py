"""The reference protocol over gRPC, as proto/oob_migration/v1/oob_migration.proto has it. Needs the extra `grpc`.

Sessions, reconnecting and taking over are those of `msgpack_rpc`; only the connection is another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import grpc
import trio

from vfiouser_agents.options import OptionError, number
from vfiouser_agents.rpc.core import AgentConnection, Handler
from vfiouser_agents.rpc.endpoint import Address, TlsOptions, client_context
from vfiouser_agents.rpc.messages import DEFAULT_MAX_MESSAGE
from vfiouser_agents.rpc.methods import OVERHEAD
from vfiouser_agents.rpc.remote import Readers, remote_readers

from .grpc_channel import GrpcConnection
from .msgpack_rpc import DEFAULT_CONNECT_TIMEOUT, DEFAULT_KEEPALIVE, MsgpackRpcAgent

DEFAULT_PORT = 50051
#: Calls that may be waited for at a time, each in a thread.
DEFAULT_THREADS = 32
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----\n?", re.DOTALL)


class GrpcAgent(MsgpackRpcAgent):
    """An agent that speaks oob_migration.v1.

    Args:
        address: where it is.
        tls: for `tls` addresses.
        allow_plaintext: `tcp` addresses may be other hosts.
        keepalive_s: silence in seconds after which the agent is asked whether it is there.
        connect_timeout_s: seconds for connection, TLS and greeting together.
        chunk_size: bytes of state in one message at most.
        threads: calls that may be waited for at a time.
    """

    readers: ClassVar[Readers] = {
        **MsgpackRpcAgent.readers,
        **remote_readers(DEFAULT_PORT),
        "threads": number(1, 256),
    }
    #: gRPC copies every message several times, so larger ones gain nothing.
    default_chunk = 1 << 20
    example = "tls://soc:50051 or unix:///run/agent.sock"

    def __init__(
        self,
        address: Address,
        *,
        tls: TlsOptions | None = None,
        allow_plaintext: bool = False,
        keepalive_s: float = DEFAULT_KEEPALIVE,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT,
        chunk_size: int | None = None,
        threads: int = DEFAULT_THREADS,
    ) -> None:
        super().__init__(
            address,
            tls=tls,
            allow_plaintext=allow_plaintext,
            keepalive_s=keepalive_s,
            connect_timeout_s=connect_timeout_s,
            chunk_size=chunk_size,
        )
        self._credentials = channel_credentials(self.remote.tls) if self.remote.encrypted else None
        # Not trio's own, so that agents that are slow to answer cannot keep others from their threads.
        self._threads = threads
        self._limiter: trio.CapacityLimiter | None = None

    async def reach(self) -> Callable[[Handler], AgentConnection]:
        """Make a channel; it connects by the first call."""
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(self._threads)
        limiter, channel = self._limiter, self._channel()
        await trio.lowlevel.checkpoint()
        return lambda handler: GrpcConnection(channel, handler, limiter)

    def _channel(self) -> grpc.Channel:
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", DEFAULT_MAX_MESSAGE + OVERHEAD),
            # A call that was sent may have had its effect, so whether to repeat it is not for the channel to decide.
            ("grpc.enable_retries", 0),
            # A function's state goes to the agent and nowhere else, whatever the environment says.
            ("grpc.enable_http_proxy", 0),
            # A lost connection must be seen as lost, not shared with what another agent's object has.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        target = target_of(self.address)
        if self._credentials is None:
            return grpc.insecure_channel(target, options)
        if self.remote.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.remote.tls.server_name))
        return grpc.secure_channel(target, self._credentials, options)


def target_of(address: Address) -> str:
    """An address as gRPC writes it.

    Args:
        address: where.
    """
    if address.scheme == "unix":
        return f"unix:{address.path}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"


def channel_credentials(tls: TlsOptions) -> grpc.ChannelCredentials:
    """TLS for a client.

    Raises:
        OptionError: a file cannot be used.
    """
    client_context(tls)  # which says better than gRPC what is wrong with a file
    roots = Path(tls.ca).read_bytes() if tls.ca is not None else None
    if tls.cert is None:
        return grpc.ssl_channel_credentials(roots)
    key, chain = key_and_chain(tls)
    return grpc.ssl_channel_credentials(roots, key, chain)


def key_and_chain(tls: TlsOptions) -> tuple[bytes, bytes]:
    """Our own key and certificates, which may be in one file.

    Raises:
        OptionError: one of them is not there.
    """
    assert tls.cert is not None
    text_ = Path(tls.cert).read_bytes()
    key = _KEY.search(Path(tls.key).read_bytes() if tls.key is not None else text_)
    chain = _CERTIFICATE.findall(text_)
    if key is None or not chain:
        raise OptionError(f"TLS files {tls.cert}, {tls.key or tls.cert}: no certificate or no key without a password")
    return key[0], b"".join(chain)
