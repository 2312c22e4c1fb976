"""vhost-user messages out of a stream, each with the descriptors that came with its first byte."""

from __future__ import annotations

from dataclasses import dataclass, field

from vfiouser_oob.transport.fds import ForeignFd, close_fds
from vfiouser_oob.vm.carriers.vhost_messages import (
    HEADER_SIZE,
    NEED_REPLY,
    PAYLOAD_MAX,
    REPLY,
    REQUESTS,
    VERSION,
    VERSION_MASK,
    VhostHeader,
    VhostRequest,
)
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import Payload, least_size


class VhostWireError(Exception):
    """The stream is broken; the connection is to be closed."""


@dataclass(slots=True)
class VhostMessage:
    """A request.

    Args:
        request: what is asked for.
        payload: its payload.
        needs_reply: the result is waited for.
        fds: its descriptors; whoever keeps one takes it.
    """

    request: VhostRequest
    payload: Payload
    needs_reply: bool
    fds: list[ForeignFd] = field(default_factory=list)


class VhostFramer:
    """Says how many bytes to read next, and makes messages of them."""

    def __init__(self) -> None:
        self._head: VhostHeader | None = None
        self._buffer = bytearray()
        self._fds: list[ForeignFd] = []

    @property
    def bytes_wanted(self) -> int:
        """How many bytes may be read next: more would take the next message's descriptors."""
        return (HEADER_SIZE if self._head is None else self._head.size) - len(self._buffer)

    @property
    def begun(self) -> bool:
        """Whether a part of a message was taken."""
        return self._head is not None or bool(self._buffer)

    def feed(self, data: bytes, fds: list[ForeignFd]) -> VhostMessage | None:
        """Take bytes, at most as many as are wanted, and descriptors.

        Args:
            data: the bytes.
            fds: what came with them; owned from now on.

        Returns:
            A message, if one is whole.

        Raises:
            VhostWireError: this is no message that is understood here.
        """
        self._buffer += data
        self._fds += fds
        if self._head is None and len(self._buffer) == HEADER_SIZE:
            self._head = self._checked(decode(VhostHeader, bytes(self._buffer)))
            self._buffer.clear()
        if self._head is None or len(self._buffer) < self._head.size:
            return None
        head, payload, taken = self._head, bytes(self._buffer), self._fds
        self._head, self._fds = None, []
        self._buffer.clear()
        try:
            return _message(head, payload, taken)
        except VhostWireError:
            close_fds(taken)
            raise

    def close(self) -> None:
        """Close the descriptors of a message that was not whole."""
        close_fds(self._fds)

    def _checked(self, head: VhostHeader) -> VhostHeader:
        if head.request not in VhostRequest._value2member_map_:
            raise VhostWireError(f"request {head.request} is unknown to a companion device")
        if head.flags & VERSION_MASK != VERSION or head.flags & REPLY or head.size > PAYLOAD_MAX:
            raise VhostWireError(
                f"{VhostRequest(head.request).name} has flags {head.flags:#x} and {head.size} bytes of payload"
            )
        return head


def _message(head: VhostHeader, payload: bytes, fds: list[ForeignFd]) -> VhostMessage:
    request = VhostRequest(head.request)
    row = REQUESTS[request]
    if not row.fds_least <= len(fds) <= row.fds_most:
        raise VhostWireError(f"{request.name} came with {len(fds)} descriptors")
    if len(payload) < least_size(row.payload):
        raise VhostWireError(f"{request.name} has {len(payload)} bytes of payload")
    try:
        return VhostMessage(request, decode(row.payload, payload), bool(head.flags & NEED_REPLY), fds)
    except CommandError as error:
        raise VhostWireError(f"{request.name}: {error}") from error


def reply(request: VhostRequest, payload: Payload) -> bytes:
    """Return a reply's bytes.

    Args:
        request: what is answered.
        payload: with what.
    """
    body = encode(payload)
    return encode(VhostHeader(request, VERSION | REPLY, len(body))) + body
