"""JSON-RPC 2.0 as SPDK speaks it: the reference protocol in JSON, or a vendor's own methods by a map.

Without a map, methods and rules are those of docs/reference/agent-protocol.md, with bytes as base64. With `methods` or
`preset`, each operation is a method of the vendor's (see `jsonrpc_map`). There are no sessions and no greeting then,
and what the vendor has no method for is done on this side or refused (see `primitive`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import trio

from vfiouser_agents.api import Agent, AgentInfo, FunctionInfo
from vfiouser_agents.errors import AgentError, DeadlineExceeded, NotFound, TransportLost, Unsupported
from vfiouser_agents.options import OptionError, number, seconds, text
from vfiouser_agents.rpc.core import NoRequests, RpcConnection
from vfiouser_agents.rpc.endpoint import Address, TlsOptions
from vfiouser_agents.rpc.json_codec import JsonCodec
from vfiouser_agents.rpc.messages import Codec
from vfiouser_agents.rpc.methods import OVERHEAD
from vfiouser_agents.rpc.remote import Readers, Remote, read_remote_options, remote_readers

from .jsonrpc_map import MethodMap, read_map
from .jsonrpc_mapped import MappedFunction, list_functions
from .msgpack_rpc import DEFAULT_CONNECT_TIMEOUT, MsgpackRpcAgent
from .primitive import Primitive, PrimitiveAgent

#: SPDK takes requests of 256 KiB, and base64 makes four bytes out of three.
MAX_CHUNK = 128 << 10
#: What SPDK takes.
MAX_REQUEST = 256 << 10
#: Seconds that a vendor's method may take; what vendors' own clients wait.
DEFAULT_CALL_TIMEOUT = 60.0

_MAP = ("preset", "methods", "functions", "state", "caps", "descriptor")
_MAPPED = {**remote_readers(), "call_timeout_s": seconds(0.01, 3600), "info_method": text}


def _needs_map(name: str, value: Any) -> Any:
    raise OptionError(f"{name}: only for a method map, but both 'methods' and 'preset' are missing")


class JsonRpcAgent(MsgpackRpcAgent):
    """An agent that speaks the reference protocol in JSON; `from_options` also makes one with a method map.

    Args: those of `MsgpackRpcAgent`.
    """

    readers: ClassVar[Readers] = {
        **MsgpackRpcAgent.readers,
        "chunk_size": number(4096, MAX_CHUNK),
        **dict.fromkeys(_MAP, _needs_map),
    }
    example = "unix:///var/tmp/spdk.sock or tls://soc:7711"
    default_chunk = MAX_CHUNK

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Agent:
        """Make one out of options.

        Args:
            options: `address`, and optionally `tls`, `allow_plaintext`, `connect_timeout_s`; without a map also
                `keepalive_s` and `chunk_size`; with one `call_timeout_s` and what `jsonrpc_map` describes.

        Raises:
            OptionError: an option cannot be used.
        """
        if not {"preset", "methods"} & set(options):
            return super().from_options(options)
        methods = read_map({name: value for name, value in options.items() if name in _MAP})
        rest = {name: value for name, value in options.items() if name not in _MAP}
        return MappedAgent(methods, **read_remote_options(rest, _MAPPED, cls.example))

    def make_codec(self) -> Codec:
        """JSON."""
        return JsonCodec()

    def largest_chunk(self, max_message: int) -> int:
        """Bytes of state that one message can carry as base64."""
        return min(self.chunk_size, (max_message - OVERHEAD) // 4 * 3)


class MappedAgent(PrimitiveAgent):
    """An agent that speaks a vendor's own methods.

    Args:
        methods: the map.
        address: where it is.
        tls: for `tls` addresses.
        allow_plaintext: `tcp` addresses may be other hosts.
        connect_timeout_s: seconds for connection and TLS.
        call_timeout_s: seconds that one method may take.
        info_method: a method without parameters whose result says who answers, such as `spdk_get_version`.
    """

    def __init__(
        self,
        methods: MethodMap,
        address: Address,
        *,
        tls: TlsOptions | None = None,
        allow_plaintext: bool = False,
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT,
        call_timeout_s: float = DEFAULT_CALL_TIMEOUT,
        info_method: str = "",
    ) -> None:
        # A device that does not tell what it does must not be left in the middle of a call.
        super().__init__(detached=True)
        self._remote = Remote(address, tls, allow_plaintext=allow_plaintext)
        self.address = address
        self._map = methods
        self._connect_timeout_s = connect_timeout_s
        self._call_timeout_s = call_timeout_s
        self._info_method = info_method
        self._connection: RpcConnection | None = None
        self._connecting = trio.Lock()
        self._info: AgentInfo | None = None

    async def connect(self) -> AgentInfo:
        """Reach it, and ask who it is if there is a method for that."""
        await self._connected()
        if self._info is None:
            told = await self.call(self._info_method, {}) if self._info_method else ""
            version = told.get("version", told) if isinstance(told, dict) else told
            about = self._map.descriptor
            self._info = AgentInfo(
                about.vendor or "a vendor", about.model or "JSON-RPC methods", str(version)[:200], protocol="JSON-RPC"
            )
        return self._info

    async def functions(self) -> Sequence[FunctionInfo]:
        """What is configured, or what the vendor lists."""
        if not self._map.functions and "functions" not in self._map.methods:
            raise Unsupported("neither the configuration nor a method of the vendor lists the functions")
        return [FunctionInfo(name, self._map.descriptor.kind) for name in await list_functions(self.call, self._map)]

    async def find(self, function_id: str) -> Primitive:
        """The function, if it is listed, or if its status can be had."""
        listed = await list_functions(self.call, self._map)
        if listed and function_id not in listed:
            raise NotFound(f"no function {function_id!r} (there are: {', '.join(listed)})")
        function = MappedFunction(function_id, self._map, self.call, self._connected)
        if not listed:
            try:
                told = await function.state()
            except AgentError as error:
                raise NotFound(f"no function {function_id!r}: {error}") from error
            if told is None:
                raise NotFound(f"no function {function_id!r} (the agent has none)")
        return function

    async def aclose(self) -> None:
        """Close the connection."""
        await super().aclose()
        if self._connection is not None:
            self._connection.close(TransportLost("this side closed the agent"))

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """Call a method of the vendor's.

        Raises:
            DeadlineExceeded: it took longer than `call_timeout_s`.
            AgentError: as the vendor answered.
        """
        connection = await self._connected()
        with trio.move_on_after(self._call_timeout_s):
            return await connection.call(method, params)
        raise DeadlineExceeded(f"{method} at {self.address} did not answer within {self._call_timeout_s:g} s")

    async def _connected(self) -> RpcConnection:
        nursery = self.nursery
        async with self._connecting:
            if self._connection is None or self._connection.lost is not None:
                stream = await self._remote.connect_within(self._connect_timeout_s)
                self._connection = RpcConnection(stream, JsonCodec(), NoRequests())
                self._connection.max_outgoing = MAX_REQUEST
                nursery.start_soon(self._connection.run)
            return self._connection
