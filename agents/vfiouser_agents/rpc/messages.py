"""What is said over an RPC connection, whichever codec writes it down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class Codec(Protocol):
    """Messages to bytes and back; one per connection, since it keeps what is incomplete."""

    def encode(self, message: Message) -> bytes:
        """A message as bytes."""

    def feed(self, data: bytes) -> Iterable[Message]:
        """Take bytes in, and give the messages that are complete.

        Raises:
            ProtocolError: the bytes are no messages, or one is too long; the connection is of no use any more.
        """
