"""In which layout a client speaks DMA_READ and DMA_WRITE: learned from its replies, once."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from vfiouser_protocol.codec import decode
from vfiouser_protocol.dma_layout import READ_REPLIES, DmaLayout, ReadReply, fitting, probes
from vfiouser_protocol.errors import DmaFault, VfioUserError

#: Reads client memory by one DMA_READ: an address, bytes; the payload of the reply. Raises DmaFault.
RawRead = Callable[[int, int], Awaitable[bytes]]
#: Bytes before the data of a specified reply.
_HEAD = 16
#: Bytes that are read where the first thing to be done is a write.
_LOOK = 64
#: Faults after which nothing more is to be expected of the client.
_FINAL = frozenset({errno.ETIMEDOUT, errno.ENODEV, errno.EPROTO})


class DmaDialect:
    """The layout of one client.

    A client whose memory holds nothing but zeros so far is spoken to as the specification says; nothing can be
    misread meanwhile.

    Args:
        read: asks the client.
        learned: told once, when the layout is known.
    """

    def __init__(self, read: RawRead, learned: Callable[[DmaLayout], object]) -> None:
        self._read = read
        self._learned = learned
        #: None: not known yet.
        self.layout: DmaLayout | None = None
        self._learning = trio.Lock()

    @property
    def spoken(self) -> DmaLayout:
        """How a message is laid out now."""
        return self.layout or DmaLayout.SPECIFIED

    async def decode_read(self, address: int, count: int, payload: bytes, again: RawRead | None = None) -> ReadReply:
        """Take a reply to DMA_READ apart; the first ones tell which layout it is.

        Args:
            address: what was asked for, and `count`.
            payload: behind the reply's header.
            again: how to read more of what this is a part of; None: as memory is read.

        Raises:
            DmaFault: it has neither layout, or another than the client's others.
        """
        if self.layout is None:
            await self._learn(address, count, payload, again or self._read)
        if not self._fits(payload, count):
            raise DmaFault(
                f"the client answered DMA_READ {address:#x}+{count:#x} with {len(payload)} bytes that are not a "
                f"reply of the {self.spoken.value} layout",
                errno.EPROTO,
            )
        try:
            return decode(READ_REPLIES[self.spoken], payload)
        except VfioUserError as error:
            raise DmaFault(f"the client's reply makes no sense: {error}", errno.EPROTO) from error

    def _fits(self, payload: bytes, count: int) -> bool:
        if self.layout is DmaLayout.SPECIFIED:  # of which the decoder checks the rest; the way of every device's reads
            return len(payload) == _HEAD + count
        return self.spoken in fitting(payload, count)

    async def _learn(self, address: int, count: int, payload: bytes, read: RawRead) -> None:
        """Find out what a reply proves, and read more where it fits both layouts."""
        if self._decided(payload, count):
            return
        async with self._learning:
            for place in probes(payload, count) if len(fitting(payload, count)) > 1 else ():
                if self.layout is not None:
                    return
                more = await read(address + place.offset, place.size)
                if self._decided(more, place.size):
                    return

    def _decided(self, payload: bytes, count: int) -> bool:
        fits = fitting(payload, count)
        if self.layout is None and len(fits) == 1:
            self.settle(*fits)
        return self.layout is not None

    def settle(self, layout: DmaLayout) -> None:
        """Take a layout as the client's from now on.

        Args:
            layout: which.
        """
        self.layout = layout
        self._learned(layout)

    async def look(self, address: int, count: int) -> bool:
        """Learn the layout from memory that is to be written, before or after that.

        A client that refuses to have it read is spoken to as the specification says.

        Args:
            address: where, and `count` bytes.

        Returns:
            Whether it could be read.

        Raises:
            DmaFault: the client does not answer, has gone, or answers nonsense.
        """
        size = min(count, _LOOK)
        try:
            await self.decode_read(address, size, await self._read(address, size))
        except DmaFault as error:
            if error.errno in _FINAL:
                raise
            return False
        return True
