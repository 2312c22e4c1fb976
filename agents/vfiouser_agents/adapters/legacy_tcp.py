"""The wire protocol of the 2022 plug-in example, for vendors' servers that were built from it, with a careful client.

The protocol has no answer to SET_STATE and LOAD_BUFFER, so both are followed by GET_STATE. It has no ids either, so a
request that took too long ends the connection: what comes next could not be told from its answer. One that nobody
waits for any more is let finish all the same, since such servers do not survive a client that vanishes: they take one
at a time, and know its end only by FINISH. So the connection is kept only while a migration needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import trio

from vfiouser_agents.api import AgentInfo, Descriptor, FunctionInfo
from vfiouser_agents.errors import AgentError, NotFound, ProtocolError, TransportLost
from vfiouser_agents.operations import Operation
from vfiouser_agents.options import OptionError, number, seconds, text
from vfiouser_agents.rpc.core import broken
from vfiouser_agents.rpc.endpoint import Address, TlsOptions
from vfiouser_agents.rpc.legacy_messages import DEFAULT_PORT, HEADERS, MAX_CHUNK, VALUE_SIZE, LegacyRequest
from vfiouser_agents.rpc.remote import Remote, read_remote_options, remote_readers

from .descriptor_option import read_descriptor
from .primitive import PrimitiveAgent
from .unbroken import unbroken
from .vfio_v1 import V1Function, v1_caps

DEFAULT_CALL_TIMEOUT = 10.0
DEFAULT_CONNECT_TIMEOUT = 5.0
DEFAULT_MAX_STATE = 64 << 20
FORMAT = "legacy-tcp"
#: Seconds to tell a server that did not answer that this is the end.
_GOOD_BYE_S = 0.1


def _byte_order(name: str, value: Any) -> str:
    if value not in HEADERS:
        raise OptionError(f"{name} must be {' or '.join(HEADERS)}, got {value!r}")
    return str(value)


_READERS = {
    **remote_readers(DEFAULT_PORT),
    "device": text,
    "byte_order": _byte_order,
    "call_timeout_s": seconds(0.01, 3600),
    "max_state": number(1, 4 << 30),
    "chunk_size": number(4096, MAX_CHUNK),
    "descriptor": lambda _, value: read_descriptor(value),
}


class LegacyTcpAgent(PrimitiveAgent):
    """A server of the example's protocol, which has one device.

    Args:
        address: where it is.
        device: what its device is to be called here; the protocol has no names.
        tls: for `tls` addresses, such as a TLS terminator before the server.
        allow_plaintext: `tcp` addresses may be other hosts.
        byte_order: of the machine that the server was compiled for.
        connect_timeout_s: seconds for connection and TLS.
        call_timeout_s: seconds that one request may take.
        max_state: bytes that a state may have.
        chunk_size: bytes of one SAVE_BUFFER or LOAD_BUFFER.
        descriptor: what must be equal on both sides.
    """

    def __init__(
        self,
        address: Address,
        *,
        device: str = "device",
        tls: TlsOptions | None = None,
        allow_plaintext: bool = False,
        byte_order: str = "little",
        connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT,
        call_timeout_s: float = DEFAULT_CALL_TIMEOUT,
        max_state: int = DEFAULT_MAX_STATE,
        chunk_size: int = MAX_CHUNK,
        descriptor: Descriptor | None = None,
    ) -> None:
        super().__init__(detached=True)
        self._remote = Remote(address, tls, allow_plaintext=allow_plaintext)
        self.address = address
        self.byte_order = byte_order
        self.call_timeout_s = call_timeout_s
        self._device = device
        self._connect_timeout_s = connect_timeout_s
        self._descriptor = descriptor or Descriptor(FORMAT, 1, "", "", "", "", 0)
        self._caps = v1_caps(max_state, chunk_size, self._descriptor.format_id or FORMAT)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LegacyTcpAgent:
        """Make one out of options.

        Args:
            options: `address`, and optionally what the constructor has.

        Raises:
            OptionError: an option cannot be used.
        """
        return cls(**read_remote_options(options, _READERS, "tcp://127.0.0.1:3333"))

    async def connect(self) -> AgentInfo:
        """See whether a server of this protocol is there, by asking for the state."""
        if self._device not in self.books:
            await (await self.open(self._device)).aclose()
        await self.books[self._device].call(Operation.STATUS, self.books[self._device].refresh)
        about = self._descriptor
        return AgentInfo(
            about.vendor or "a vendor", about.model or "legacy-tcp server", protocol=FORMAT, max_sessions=1
        )

    async def functions(self) -> Sequence[FunctionInfo]:
        """The only one."""
        await trio.lowlevel.checkpoint()
        return [FunctionInfo(self._device, self._descriptor.kind)]

    async def find(self, function_id: str) -> LegacyFunction:
        """The only function."""
        await trio.lowlevel.checkpoint()
        if function_id != self._device:
            raise NotFound(f"no function {function_id!r}; the only device of this server is {self._device!r}")
        return LegacyFunction(self, self._caps, self._descriptor)

    async def stream(self) -> trio.abc.Stream:
        """A new connection.

        Raises:
            ConnectError: nobody answers in time.
        """
        return await self._remote.connect_within(self._connect_timeout_s)


class LegacyFunction(V1Function):
    """The device of a server; the connection is made when it is needed."""

    def __init__(self, agent: LegacyTcpAgent, caps: Any, descriptor: Descriptor) -> None:
        super().__init__(caps, descriptor)
        self._agent = agent
        self._header = HEADERS[agent.byte_order]
        self._stream: trio.abc.Stream | None = None
        self._buffer = bytearray()
        #: The whole of the last request was sent.
        self._sent = False

    async def get_state(self) -> int:
        """GET_STATE."""
        return await self._ask(LegacyRequest.GET_STATE)

    async def set_state(self, state: int) -> None:
        """SET_STATE, which has no answer."""
        await self._exchange(self._header.pack(LegacyRequest.SET_STATE, VALUE_SIZE, state), 0)

    async def pending(self) -> int:
        """UPDATE_PENDING."""
        return await self._ask(LegacyRequest.UPDATE_PENDING)

    async def save_bytes(self, size: int) -> bytes:
        """SAVE_BUFFER, whose answer has no header."""
        return await self._exchange(self._header.pack(LegacyRequest.SAVE_BUFFER, size, 0), size)

    async def load_bytes(self, data: bytes) -> None:
        """LOAD_BUFFER, which has no answer."""
        await self._exchange(self._header.pack(LegacyRequest.LOAD_BUFFER, len(data), 0) + data, 0)

    async def release(self) -> None:
        """Say good-bye and close, since such servers take one client at a time."""
        stream, self._stream = self._stream, None
        self._buffer.clear()
        if stream is not None:
            await self._say_good_bye(stream, self._agent.call_timeout_s)

    async def _say_good_bye(self, stream: trio.abc.Stream, limit_s: float) -> None:
        with trio.CancelScope(shield=True):
            try:
                with trio.move_on_after(limit_s):
                    await stream.send_all(self._header.pack(LegacyRequest.FINISH, 0, 0))
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass  # it is gone already, which is what was wanted
            await trio.aclose_forcefully(stream)

    async def aclose(self) -> None:
        """Close."""
        await self.release()

    async def _ask(self, request: LegacyRequest) -> int:
        raw = await self._exchange(self._header.pack(request, 0, 0), self._header.size)
        code, size, value = self._header.unpack(raw)
        if (code, size) == (LegacyRequest.MESSAGE_REPLY, VALUE_SIZE):
            return int(value)
        await self._drop()
        swapped = int.from_bytes(code.to_bytes(4, "little"), "big") == LegacyRequest.MESSAGE_REPLY
        advice = "; the server uses the other byte_order" if swapped else ""
        raise ProtocolError(
            f"the answer to {request.name} has code {code} and size {size}, expected "
            f"{int(LegacyRequest.MESSAGE_REPLY)} and {VALUE_SIZE}{advice}; the connection is closed"
        )

    async def _exchange(self, data: bytes, expected: int) -> bytes:
        """Send, and take so many bytes; whatever goes wrong ends the connection."""
        done = False
        limit = self._agent.call_timeout_s
        too_late = f"agent {self._agent.address} did not answer within {limit:g} s; the connection is closed"
        try:
            answer = await unbroken(partial(self._talk, data, expected), limit, too_late)
            done = True
            return answer
        finally:
            if not done:
                await self._drop()

    async def _talk(self, data: bytes, expected: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = await self._agent.stream()
            self._sent = False
            await self._stream.send_all(data)
            self._sent = True
            while len(self._buffer) < expected:
                piece = await self._stream.receive_some(max(4096, expected - len(self._buffer)))
                if not piece:
                    raise self._short(len(self._buffer), expected)
                self._buffer += piece
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise broken(error) from error
        if len(self._buffer) > expected:
            raise ProtocolError(f"the server sent {len(self._buffer)} bytes, {expected} were expected; it is cut off")
        answer = bytes(self._buffer)
        self._buffer.clear()
        return answer

    def _short(self, got: int, expected: int) -> AgentError:
        return TransportLost(f"agent {self._agent.address} closed the connection after {got} of {expected} bytes")

    async def _drop(self) -> None:
        """Close; a server that had the request as a whole, and is only slow, is told that this is the end."""
        stream, self._stream = self._stream, None
        self._buffer.clear()
        if stream is not None:
            await self._say_good_bye(stream, _GOOD_BYE_S if self._sent else 0)
