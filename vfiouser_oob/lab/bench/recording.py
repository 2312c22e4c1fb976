"""What it costs that a function's writes to guest memory are recorded, as those of functions of a VM always are."""

from __future__ import annotations

import os
import random
import time

import trio

from vfiouser_oob.lab.bench.results import Budget, Result, Samples
from vfiouser_oob.memory.guest import GuestMemory
from vfiouser_oob.memory.recorder import PAGE_SIZE, SentWrite, WriteRecorder
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import DmaMapFlags
from vfiouser_protocol.errors import DmaFault
from vfiouser_protocol.messages import DmaMap

_BUDGET = Budget(1.1)
_PAGES = 1 << 14
_MAP_SIZE = 32


class _Silent:
    """A client that is asked nothing."""

    async def dma_read(self, address: int, count: int) -> bytes:
        """Refuse."""
        raise DmaFault("no messages")

    async def dma_write(self, address: int, data: bytes) -> None:
        """Refuse."""
        raise DmaFault("no messages")

    def bus_write(self, address: int, data: bytes) -> SentWrite:
        """Refuse."""
        raise DmaFault("no messages")


async def measure_recording(rounds: int, writes: int) -> list[Result]:
    """Time writes of a page by a model, with and without a record of them, in alternating rounds.

    Args:
        rounds: how many.
        writes: per round and way.
    """
    memory = GuestMemory(_Silent(), 1, by_message=False, check_files=True)
    file = OwnedFd(os.memfd_create("bench"))
    try:
        os.ftruncate(file.fileno(), _PAGES * PAGE_SIZE)
        flags = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
        memory.add(DmaMap(_MAP_SIZE, flags, 0, 0, _PAGES * PAGE_SIZE), [file], memory.examine([file]))
        await _round(memory, _PAGES)
        plain, recorded = Samples(), Samples()
        for _ in range(rounds):
            for samples, recorder in ((plain, None), (recorded, WriteRecorder())):
                memory.recorder = recorder
                samples.add(await _round(memory, writes))
    finally:
        memory.close()
        file.close()
    return [
        Result(
            "a model writes 4 KiB of guest memory, recorded",
            recorded.percentile_us(50),
            "us",
            plain.percentile_us(50),
            "not recorded",
            _BUDGET,
            recorded.details(),
        )
    ]


async def _round(memory: GuestMemory, writes: int) -> list[int]:
    """Write pages in an order that no cache likes; returns nanoseconds of each."""
    data, chance, now = bytes(PAGE_SIZE), random.Random(1), time.perf_counter_ns
    times = []
    for _ in range(writes):
        address = chance.randrange(_PAGES) * PAGE_SIZE
        start = now()
        await memory.write(address, data)
        times.append(now() - start)
    await trio.lowlevel.checkpoint()
    return times
