"""I/O that goes on while the VM under it moves, and that notices everything that gets lost or is done twice."""

from __future__ import annotations

import random
from dataclasses import dataclass

import trio

from vfiouser_oob.lab.nvme.driver import NvmeDriver

#: An I/O command that takes longer was lost.
IO_TIMEOUT_S = 30.0
#: Slots of one writer.
_SLOTS = 64


@dataclass(slots=True)
class WorkloadCounts:
    """What was done.

    Args:
        writes: write commands that were completed.
        reads: read commands that were completed.
        bytes_verified: bytes that were read back equal.
        mismatches: reads that brought something else than what was written last.
    """

    writes: int = 0
    reads: int = 0
    bytes_verified: int = 0
    mismatches: int = 0


class Workload:
    """Writers that each have a part of the disk: they write a new version of it again and again, and read it back.

    Every version has its own bytes, so that a write that is lost, or done again after a later one, shows.

    Args:
        driver: the driver, wherever it is.
        seed: what the bytes depend on.
        writers: how many, and so the most commands in flight.
        transfer: bytes of each command.
        pause_s: seconds that a writer rests between a read and its next write.
    """

    def __init__(
        self, driver: NvmeDriver, seed: str, *, writers: int = 8, transfer: int = 64 << 10, pause_s: float = 0.0
    ) -> None:
        self._driver = driver
        self._pause_s = pause_s
        self._seed = seed
        block = driver.namespace.block_size
        self._writers = min(writers, driver.namespace.blocks)
        self._blocks = max(1, min(transfer // block, driver.namespace.blocks // self._writers))
        self._transfer = self._blocks * block
        # Each writer goes through its own slots in turn.
        self._slots = min(driver.namespace.blocks // self._blocks // self._writers, _SLOTS)
        self._versions: dict[int, int] = {}
        self._stopping = False
        self._finished = trio.Event()
        self._wrote = trio.Event()
        self.counts = WorkloadCounts()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write and read until `finish`.

        Raises:
            TooSlowError: a command was not completed in time: it is lost.
            NvmeError: a command failed, or was completed twice.
        """
        async with trio.open_nursery() as nursery:
            for writer in range(self._writers):
                nursery.start_soon(self._write, writer)
            task_status.started()
        self._finished.set()

    async def finish(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self._stopping = True
        await self._finished.wait()

    async def _write(self, writer: int) -> None:
        turn = 0
        while not self._stopping:
            lba = (writer * self._slots + turn % self._slots) * self._blocks
            version = self._versions.get(lba, 0) + 1
            with trio.fail_after(IO_TIMEOUT_S):
                await self._driver.write(lba, self._data(lba, version))
            self._versions[lba] = version
            self.counts.writes += 1
            self._wrote.set()
            await self._check(lba)
            await trio.sleep(self._pause_s)
            turn += 1

    async def _check(self, lba: int) -> None:
        with trio.fail_after(IO_TIMEOUT_S):
            data = await self._driver.read(lba, self._blocks)
        self.counts.reads += 1
        if data == self._data(lba, self._versions[lba]):
            self.counts.bytes_verified += len(data)
        else:
            self.counts.mismatches += 1

    async def next_write(self) -> None:
        """Wait until one more write was completed."""
        self._wrote = trio.Event()
        await self._wrote.wait()

    async def verify(self) -> None:
        """Read everything that was written, once more; `counts` says what came of it."""
        for lba in sorted(self._versions):
            await self._check(lba)

    def _data(self, lba: int, version: int) -> bytes:
        # A short random prefix repeated costs less than random bytes, and differs as surely.
        unit = random.Random(f"{self._seed}:{lba}:{version}").randbytes(256)
        return unit * (self._transfer // len(unit))
