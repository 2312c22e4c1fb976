"""A namespace: logical blocks on a backing store."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_soc.nvme.spec import NvmeError, StatusCode
from vfiouser_soc.nvme.stores import BackingStore


@dataclass(frozen=True, slots=True)
class NamespaceIdentity:
    """How a namespace is recognised wherever it is attached.

    Args:
        eui64: 8 bytes.
        nguid: 16 bytes.
        uuid: the UUID of the namespace descriptor list.
    """

    eui64: bytes
    nguid: bytes
    uuid: uuid.UUID


class Namespace:
    """Logical blocks, addressed as the NVM command set does.

    Args:
        nsid: 1 and up.
        store: the bytes; owned from now on.
        identity: unique identifiers.
        lba_shift: log2 of the block size in bytes: 9 or 12.
    """

    def __init__(self, nsid: int, store: BackingStore, identity: NamespaceIdentity, lba_shift: int = 9) -> None:
        self.nsid = nsid
        self.store = store
        self.identity = identity
        self.lba_shift = lba_shift
        self.blocks = store.size >> lba_shift

    def check_range(self, slba: int, count: int) -> None:
        """Refuse blocks outside of the namespace.

        Raises:
            NvmeError: LBA Out of Range.
        """
        if slba + count > self.blocks:
            raise NvmeError(
                StatusCode.LBA_OUT_OF_RANGE,
                f"blocks {slba}+{count} of a namespace of {self.blocks}",
                lba=slba,
            )

    async def read(self, slba: int, count: int) -> bytes:
        """Read blocks that are in range.

        Raises:
            NvmeError: the medium failed.
        """
        try:
            return await self.store.read(slba << self.lba_shift, count << self.lba_shift)
        except OSError as error:
            raise _media_error(error, StatusCode.UNRECOVERED_READ, slba) from error

    async def write(self, slba: int, data: bytes, *, durable: bool) -> None:
        """Write whole blocks that are in range.

        Args:
            slba: first block.
            data: their contents.
            durable: whether to wait for the medium (force unit access).

        Raises:
            NvmeError: the medium failed.
        """
        try:
            await self.store.write(slba << self.lba_shift, data)
            if durable:
                await self.store.flush()
        except OSError as error:
            raise _media_error(error, StatusCode.WRITE_FAULT, slba) from error

    async def zero(self, slba: int, count: int, lane: FunctionQueue, *, durable: bool) -> None:
        """Make blocks that are in range read as zeros, deallocating them.

        Args:
            slba: first block.
            count: how many.
            lane: whose turns are taken.
            durable: whether to wait for the medium.

        Raises:
            NvmeError: the medium failed.
        """
        try:
            for first, blocks in self._pieces(slba, count, self.store.discard_piece):
                await lane.turn()
                await self.store.discard(first << self.lba_shift, blocks << self.lba_shift)
            if durable:
                await self.store.flush()
        except OSError as error:
            raise _media_error(error, StatusCode.WRITE_FAULT, slba) from error

    async def verify(self, slba: int, count: int, lane: FunctionQueue) -> None:
        """Read blocks that are in range without using their contents.

        Args:
            slba: first block.
            count: how many.
            lane: whose turns are taken.

        Raises:
            NvmeError: the medium failed.
        """
        for first, blocks in self._pieces(slba, count, self.store.read_piece):
            await lane.turn()
            await self.read(first, blocks)

    def _pieces(self, slba: int, count: int, size: int) -> Iterator[tuple[int, int]]:
        """Cut a range of blocks where its bytes are multiples of a size, so that whole pages stay whole."""
        step, end = size >> self.lba_shift, slba + count
        while slba < end:
            stop = min(end, (slba // step + 1) * step)
            yield slba, stop - slba
            slba = stop

    async def flush(self) -> None:
        """Make everything written so far durable."""
        try:
            await self.store.flush()
        except OSError as error:
            raise _media_error(error, StatusCode.WRITE_FAULT, 0) from error


def _media_error(error: OSError, status: StatusCode, slba: int) -> NvmeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        status = StatusCode.CAPACITY_EXCEEDED
    return NvmeError(status, f"backing store: {error.strerror or error}", lba=slba)
