"""What is said over an RPC connection, whichever codec writes it down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from vfiouser_agents.errors import AgentError

#: Bytes of the longest message that we take, unless said otherwise.
DEFAULT_MAX_MESSAGE = 16 << 20
#: Ids are 32 bits wide.
ID_LIMIT = 1 << 32


@dataclass(frozen=True, slots=True)
class Request:
    """A call that wants an answer."""

    id: int
    method: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """The answer: a result, or an error."""

    id: int
    result: Any = None
    error: AgentError | None = None


@dataclass(frozen=True, slots=True)
class Notification:
    """A call that wants no answer."""

    method: str
    params: dict[str, Any] = field(default_factory=dict)


Message = Request | Response | Notification
Buffer: TypeAlias = "bytes | bytearray | memoryview"


class Codec(Protocol):
    """Messages to bytes and back; one per connection, since it keeps what is incomplete."""

    def encode(self, message: Message) -> bytes:
        """A message as bytes."""

    def encode_apart(self, message: Message) -> Sequence[Buffer]:
        """A message as buffers that follow each other; what is large stays where it is, and must not change."""
        return (self.encode(message),)

    def feed(self, data: bytes) -> Iterable[Message]:
        """Take bytes in, and give the messages that are complete.

        Raises:
            ProtocolError: the bytes are no messages, or one is too long; the connection is of no use any more.
        """

    def room(self) -> memoryview | None:
        """Where the next bytes belong, if that is known: read there, say how many to `filled`, and do not `feed` them.

        None wherever any number of bytes may be fed.
        """
        return None

    def filled(self, count: int) -> Iterable[Message]:
        """Take the first bytes of `room` as fed; otherwise like `feed`.

        Args:
            count: how many.
        """
        return ()
