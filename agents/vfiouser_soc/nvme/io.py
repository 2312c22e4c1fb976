"""The NVM commands.

Spec: NVMe 1.4, chapter 6.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping

from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_soc.nvme.command import SubmissionEntry
from vfiouser_soc.nvme.config import ControllerLimits
from vfiouser_soc.nvme.epoch import DmaPort
from vfiouser_soc.nvme.features import Features
from vfiouser_soc.nvme.namespace import Namespace
from vfiouser_soc.nvme.room import DataRoom
from vfiouser_soc.nvme.spec import BROADCAST_NSID, FeatureId, IoOpcode, NvmeError, StatusCode
from vfiouser_soc.nvme.state import Counters

Handler = Callable[[SubmissionEntry], Awaitable[int | None]]

_FUA = 1 << 30
_DSM_DEALLOCATE = 1 << 2
_DSM_RANGE = struct.Struct("<IIQ")


class IoCommands:
    """Executes NVM commands.

    Args:
        dma: memory of the epoch.
        lane: the function's turns, for commands that are longer than one transfer.
        namespaces: active namespaces by id.
        limits: for the largest transfer.
        features: for the volatile write cache.
        counters: for the SMART log.
    """

    def __init__(
        self,
        dma: DmaPort,
        lane: FunctionQueue,
        namespaces: Mapping[int, Namespace],
        limits: ControllerLimits,
        features: Features,
        counters: Counters,
    ) -> None:
        self._dma = dma
        self._lane = lane
        self._namespaces = namespaces
        self._last_nsid = max(namespaces, default=0)
        self._max_transfer = limits.max_transfer
        self._features = features
        self._counters = counters
        self._data = DataRoom()
        self.handlers: dict[int, Handler] = {
            IoOpcode.FLUSH: self._flush,
            IoOpcode.WRITE: self._write,
            IoOpcode.READ: self._read,
            IoOpcode.COMPARE: self._compare,
            IoOpcode.WRITE_ZEROES: self._write_zeroes,
            IoOpcode.DATASET_MANAGEMENT: self._dataset_management,
            IoOpcode.VERIFY: self._verify,
        }

    def _namespace(self, nsid: int) -> Namespace:
        namespace = self._namespaces.get(nsid)
        if namespace is None:
            # A valid id of a namespace that is not active is another error than an id beyond the last one.
            status = StatusCode.INVALID_FIELD if 1 <= nsid <= self._last_nsid else StatusCode.INVALID_NAMESPACE
            raise NvmeError(status, f"namespace {nsid:#x} is not active", location=4)
        return namespace

    def _blocks(self, command: SubmissionEntry) -> tuple[Namespace, int, int]:
        """Check the namespace and the blocks of a command."""
        namespace = self._namespace(command.nsid)
        slba, count = command.slba, command.block_count
        namespace.check_range(slba, count)
        return namespace, slba, count

    def _length(self, namespace: Namespace, count: int) -> int:
        length = count << namespace.lba_shift
        if length > self._max_transfer:
            raise NvmeError(StatusCode.INVALID_FIELD, f"{length} bytes; {self._max_transfer} is the most", location=48)
        return length

    def _durable(self, command: SubmissionEntry) -> bool:
        return bool(command.cdw12 & _FUA) or not self._features.value(FeatureId.VOLATILE_WRITE_CACHE)

    async def _read(self, command: SubmissionEntry) -> int:
        namespace, slba, count = self._blocks(command)
        length = self._length(namespace, count)
        segments = await self._dma.segments(command, length)
        async with self._data.of(length):
            await self._dma.deliver(segments, await namespace.read(slba, count))
        self._counters.bytes_read += length
        self._counters.read_commands += 1
        return 0

    async def _write(self, command: SubmissionEntry) -> int:
        namespace, slba, count = self._blocks(command)
        length = self._length(namespace, count)
        async with self._data.of(length):
            data = await self._dma.from_host(command, length)
            await namespace.write(slba, data, durable=self._durable(command))
        self._counters.bytes_written += length
        self._counters.write_commands += 1
        return 0

    async def _compare(self, command: SubmissionEntry) -> int:
        namespace, slba, count = self._blocks(command)
        length = self._length(namespace, count)
        async with self._data.of(2 * length):
            data = await self._dma.from_host(command, length)
            same = data == await namespace.read(slba, count)
        self._counters.read_commands += 1
        if not same:
            raise NvmeError(StatusCode.COMPARE_FAILURE, f"blocks {slba}+{count} differ", lba=slba)
        return 0

    async def _write_zeroes(self, command: SubmissionEntry) -> int:
        namespace, slba, count = self._blocks(command)
        await namespace.zero(slba, count, self._lane, durable=self._durable(command))
        return 0

    async def _verify(self, command: SubmissionEntry) -> int:
        namespace, slba, count = self._blocks(command)
        await namespace.verify(slba, count, self._lane)
        return 0

    async def _flush(self, command: SubmissionEntry) -> int:
        if command.nsid == BROADCAST_NSID:
            for namespace in self._namespaces.values():
                await namespace.flush()
        else:
            await self._namespace(command.nsid).flush()
        return 0

    async def _dataset_management(self, command: SubmissionEntry) -> int:
        namespace = self._namespace(command.nsid)
        count = (command.cdw10 & 0xFF) + 1
        data = await self._dma.from_host(command, count * _DSM_RANGE.size)
        ranges = [(slba, blocks) for _, blocks, slba in _DSM_RANGE.iter_unpack(data)]
        for slba, blocks in ranges:
            namespace.check_range(slba, blocks)
        if command.cdw11 & _DSM_DEALLOCATE:
            for slba, blocks in _merged(ranges):
                await namespace.zero(slba, blocks, self._lane, durable=False)
        return 0


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that overlap or touch, so that no block is deallocated twice; empty ones are left out."""
    merged: list[tuple[int, int]] = []
    for start, count in sorted(ranges):
        if not count:
            continue
        first, length = merged[-1] if merged else (0, -1)
        if start <= first + length:
            merged[-1] = first, max(length, start + count - first)
        else:
            merged.append((start, count))
    return merged
