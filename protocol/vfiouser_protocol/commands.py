"""The command table: who may send what and when, how short a request may be, and which descriptors go with
it.

`session` is the only reader that acts on it; the reference page of messages is printed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from vfiouser_protocol import messages as m
from vfiouser_protocol.constants import Command
from vfiouser_protocol.fields import least_size
from vfiouser_protocol.limits import ACCEPTED_MSG_FDS


class ConnectionEnd(Enum):
    """Which end of the connection; a server's peer is a client and the other way round."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def peer(self) -> ConnectionEnd:
        """The other end."""
        return ConnectionEnd.SERVER if self is ConnectionEnd.CLIENT else ConnectionEnd.CLIENT


class ConnectionPhase(Enum):
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
        min_payload: bytes that a request must have at least, by its layout; the codec judges the rest.
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
    sender: ConnectionEnd
    phase: ConnectionPhase
    min_payload: int
    request_fds: int
    reply_fds: int
    no_reply: bool
    needs: str | None
    request: type[m.Payload]
    reply: type[m.Payload]


def _row(
    command: Command,
    sender: ConnectionEnd,
    request: type[m.Payload],
    reply: type[m.Payload] = m.Empty,
    *,
    phase: ConnectionPhase = ConnectionPhase.READY,
    request_fds: int = 0,
    reply_fds: int = 0,
    no_reply: bool = True,
    needs: str | None = None,
) -> tuple[int, CommandSpec]:
    least = least_size(request)
    return int(command), CommandSpec(
        command, sender, phase, least, request_fds, reply_fds, no_reply, needs, request, reply
    )


_C, _S = ConnectionEnd.CLIENT, ConnectionEnd.SERVER

#: Spec: vfio-user, "Commands" and the sections of each; the descriptor columns are those of "Message format".
COMMANDS: Mapping[int, CommandSpec] = MappingProxyType(
    dict(
        [
            _row(
                Command.VERSION,
                _C,
                m.Version,
                m.Version,
                phase=ConnectionPhase.NEGOTIATING,
                reply_fds=1,
                no_reply=False,
            ),
            _row(Command.DMA_MAP, _C, m.DmaMap, request_fds=1),
            _row(Command.DMA_UNMAP, _C, m.DmaUnmap, m.DmaUnmap),
            _row(Command.DEVICE_GET_INFO, _C, m.DeviceInfo, m.DeviceInfo),
            _row(Command.DEVICE_GET_REGION_INFO, _C, m.RegionInfo, m.RegionInfo, reply_fds=1),
            _row(Command.DEVICE_GET_REGION_IO_FDS, _C, m.RegionIoFds, m.RegionIoFds, reply_fds=ACCEPTED_MSG_FDS),
            _row(Command.DEVICE_GET_IRQ_INFO, _C, m.IrqInfo, m.IrqInfo),
            _row(Command.DEVICE_SET_IRQS, _C, m.SetIrqs, request_fds=ACCEPTED_MSG_FDS),
            _row(Command.REGION_READ, _C, m.RegionRead, m.RegionReadReply),
            _row(Command.REGION_WRITE, _C, m.RegionWrite, m.RegionWriteReply),
            _row(Command.DMA_READ, _S, m.DmaRead, m.DmaReadReply),
            _row(Command.DMA_WRITE, _S, m.DmaWrite, m.DmaWriteReply),
            _row(Command.DEVICE_RESET, _C, m.Empty),
            # The reply is empty unless a bitmap was asked for.
            _row(Command.DIRTY_PAGES, _C, m.DirtyPages, m.DirtyPages),
            _row(Command.REGION_WRITE_MULTI, _C, m.RegionWriteMulti, m.RegionWriteMultiReply, needs="write_multiple"),
            _row(Command.DEVICE_FEATURE, _C, m.DeviceFeature, m.DeviceFeature),
            _row(Command.MIG_DATA_READ, _C, m.MigDataRead, m.MigDataReadReply),
            _row(Command.MIG_DATA_WRITE, _C, m.MigDataWrite),
        ]
    )
)
