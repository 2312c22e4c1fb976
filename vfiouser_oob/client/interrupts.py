"""The commands about interrupts, as methods."""

from __future__ import annotations

from collections.abc import Sequence

from vfiouser_oob.client.calls import PendingCall
from vfiouser_oob.client.connection import Connection
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.client.replies import decode_reply
from vfiouser_oob.transport.fds import HasFileno
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import Command, IrqSetFlags
from vfiouser_protocol.errors import LocalProtocolError
from vfiouser_protocol.limits import ACCEPTED_MSG_FDS, MAX_IRQ_VECTORS
from vfiouser_protocol.messages import IrqInfo, SetIrqs

_IRQ_INFO_SIZE = 16
_SET_IRQS_SIZE = 20


class InterruptCommands(Connection):
    """A connection that can describe and configure interrupts."""

    async def get_irq_info(self, index: int) -> IrqInfo:
        """Ask for the number of vectors of an IRQ index and what it can do.

        Args:
            index: IRQ index.

        Raises:
            BadReply: the answer is malformed, about another index, or claims more vectors than PCI has.
        """
        return await self.take_irq_info(self.submit_irq_info(index), index)

    def submit_irq_info(self, index: int) -> PendingCall:
        """Ask for an IRQ index without waiting; `take_irq_info` takes the answer."""
        return self.submit(Command.DEVICE_GET_IRQ_INFO, encode(IrqInfo(_IRQ_INFO_SIZE, 0, index)))

    async def take_irq_info(self, call: PendingCall, index: int) -> IrqInfo:
        """Wait for what `submit_irq_info` asked for; otherwise like `get_irq_info`.

        Args:
            call: the question.
            index: which IRQ index it is about.

        Returns:
            The description.

        Raises:
            BadReply: the server's description makes no sense.
        """
        info = decode_reply(IrqInfo, Command.DEVICE_GET_IRQ_INFO, await call.wait())
        if info.count and info.index != index:
            raise BadReply(f"the server answered about IRQ index {info.index} when asked for {index}")
        if info.count > MAX_IRQ_VECTORS:
            raise BadReply(f"the server claims {info.count} vectors of IRQ index {index}, of at most {MAX_IRQ_VECTORS}")
        return info

    async def set_irqs(
        self,
        index: int,
        flags: int,
        start: int = 0,
        count: int | None = None,
        *,
        fds: Sequence[HasFileno] = (),
        data: bytes = b"",
    ) -> None:
        """Configure interrupts. More descriptors than the server takes per message are split over several
        commands.

        Args:
            index: IRQ index.
            flags: `IrqSetFlags`, one DATA and one ACTION bit.
            start: first vector.
            count: number of vectors; None: as many as there are descriptors or bytes of data.
            fds: with DATA_EVENTFD one per vector, or none to de-assign; they stay the caller's.
            data: with DATA_BOOL one byte per vector.

        Raises:
            LocalProtocolError: `count` and the number of descriptors differ.
        """
        if count is None:
            count = len(fds) or len(data)
        if fds and len(fds) != count:
            raise LocalProtocolError(f"SET_IRQS of {count} vectors with {len(fds)} descriptors")
        # The kernel carries no more in one message, whatever the server says that it takes.
        step = min(max(1, self.capabilities.max_msg_fds), ACCEPTED_MSG_FDS) if fds else max(1, count)
        for done in range(0, max(1, count), step):
            part = min(step, count - done)
            request = SetIrqs(_SET_IRQS_SIZE + len(data), int(flags), index, start + done, part, data)
            await self.request(Command.DEVICE_SET_IRQS, encode(request), fds[done : done + part])

    async def set_eventfds(self, index: int, fds: Sequence[HasFileno], start: int = 0) -> None:
        """Assign one eventfd per vector from `start` on; they stay the caller's.

        Args:
            index: IRQ index.
            fds: eventfds, one per vector.
            start: first vector.
        """
        await self.set_irqs(index, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, start, fds=fds)

    async def disable_irqs(self, index: int) -> None:
        """Switch a whole IRQ index off.

        Args:
            index: IRQ index.
        """
        await self.set_irqs(index, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER)
