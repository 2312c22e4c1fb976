"""The command table: who may send what and when, how short a request may be, and which descriptors go with
it.

`session` is the only reader that acts on it; the manual's command list is printed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from vfiouser_protocol.constants import Command
from vfiouser_protocol.limits import ACCEPTED_MSG_FDS
from vfiouser_protocol.messages import PAYLOADS, Payload


class Role(Enum):
    """Which end of the connection; a server's peer is a client and the other way round."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def peer(self) -> Role:
        """The other end."""
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


class Phase(Enum):
    """Where a connection stands."""

    #: Only VERSION may be sent, once, by the client.
    NEGOTIATING = "negotiating"
    #: Everything else may be sent.
    READY = "ready"
    #: Nothing may be sent or taken any more.
    CLOSED = "closed"


class CommandSpec(NamedTuple):
    """One row of the table.

    Args:
        command: the number.
        sender: who sends the command; the other end replies.
        phase: the one phase in which it is legal.
        min_payload: bytes that a request must have at least; more is judged by the codec.
        request_fds: most file descriptors that a request keeps; surplus ones are closed, except where every
            number
            is the model's business (SET_IRQS, whose count of descriptors is part of its meaning).
        reply_fds: most file descriptors that a reply keeps.
        no_reply: whether NO_REPLY is obeyed. VERSION is always answered, as libvfio-user does: nobody could
            go on
            without the answer.
        needs: name of a boolean capability that both sides must have announced, or None.
        request: payload class of the request.
        reply: payload class of the success reply.
    """

    command: Command
    sender: Role
    phase: Phase
    min_payload: int
    request_fds: int
    reply_fds: int
    no_reply: bool
    needs: str | None
    request: type[Payload]
    reply: type[Payload]


def _row(
    command: Command,
    sender: Role,
    min_payload: int,
    *,
    phase: Phase = Phase.READY,
    request_fds: int = 0,
    reply_fds: int = 0,
    no_reply: bool = True,
    needs: str | None = None,
) -> tuple[int, CommandSpec]:
    request, reply = PAYLOADS[command]
    spec = CommandSpec(command, sender, phase, min_payload, request_fds, reply_fds, no_reply, needs, request, reply)
    return int(command), spec


_C, _S = Role.CLIENT, Role.SERVER

#: Spec: vfio-user, "Commands" and the sections of each; the descriptor columns are those of "Message format".
COMMANDS: Mapping[int, CommandSpec] = MappingProxyType(
    dict(
        [
            _row(Command.VERSION, _C, 4, phase=Phase.NEGOTIATING, reply_fds=1, no_reply=False),
            _row(Command.DMA_MAP, _C, 32, request_fds=1),
            _row(Command.DMA_UNMAP, _C, 24),
            _row(Command.DEVICE_GET_INFO, _C, 16),
            _row(Command.DEVICE_GET_REGION_INFO, _C, 32, reply_fds=1),
            _row(Command.DEVICE_GET_REGION_IO_FDS, _C, 16, reply_fds=ACCEPTED_MSG_FDS),
            _row(Command.DEVICE_GET_IRQ_INFO, _C, 16),
            _row(Command.DEVICE_SET_IRQS, _C, 20, request_fds=ACCEPTED_MSG_FDS),
            _row(Command.REGION_READ, _C, 16),
            _row(Command.REGION_WRITE, _C, 16),
            _row(Command.DMA_READ, _S, 16),
            _row(Command.DMA_WRITE, _S, 16),
            _row(Command.DEVICE_RESET, _C, 0),
            _row(Command.DIRTY_PAGES, _C, 8),
            _row(Command.REGION_WRITE_MULTI, _C, 8, needs="write_multiple"),
            _row(Command.DEVICE_FEATURE, _C, 8),
            _row(Command.MIG_DATA_READ, _C, 8),
            _row(Command.MIG_DATA_WRITE, _C, 8),
        ]
    )
)
