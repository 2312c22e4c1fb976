"""What a function behind another vfio-user server is made of, beside its session."""

from __future__ import annotations

from vfiouser_oob.client.client import ClientIoFds
from vfiouser_oob.devices.base import IoFds
from vfiouser_protocol.constants import Command
from vfiouser_protocol.rules import io_fd_numbers

#: Commands that are begun once more by the process after this one: what the upstream server has got is known.
REPEATABLE = frozenset(
    {
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_SET_IRQS,
        Command.REGION_READ,
        Command.REGION_WRITE,
        Command.REGION_WRITE_MULTI,
        Command.DEVICE_RESET,
    }
)


def shown(found: ClientIoFds, most: int) -> IoFds:
    """What a client is shown, which may not take as many descriptors: without one, an access is a message.

    Args:
        found: what the upstream server says.
        most: descriptors that the client takes.
    """
    entries = [entry for entry in found.reply.entries if all(number < most for number in io_fd_numbers(entry))]
    used = max((number + 1 for entry in entries for number in io_fd_numbers(entry)), default=0)
    return IoFds(entries, found.fds[:used])
