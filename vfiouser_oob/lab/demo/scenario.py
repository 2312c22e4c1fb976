"""What the demonstration does with one function, and what it finds."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.demo.progress import Progress
from vfiouser_oob.lab.nvme.driver import NvmeDriver

#: Guest memory of the demonstration's "VM".
_MEMORY_SIZE = 32 << 20
_MEMORY_BASE = 0x1_0000_0000
#: Transfers of this size, so many at a time.
_TRANSFER = 128 << 10
_IN_FLIGHT = 8
_IO_QUEUES = 2
#: Blocks read again after the reset.
_SAMPLES = 16
#: A demonstration that makes no progress for so long has failed.
_STEP_TIMEOUT_S = 60.0


@dataclass
class FunctionReport:
    """What was found out about one function.

    Args:
        name: the function's name.
        model: the controller's model and serial number.
        pci: vendor and device id, class.
        bars: size of each BAR by index.
        mapped_bytes: how much of BAR 0 is mapped into the driver.
        size: bytes of the namespace.
        written: bytes written.
        verified: bytes that were read back equal.
        write_mb_s: throughput of the writes in MB/s.
        read_mb_s: throughput of the reads in MB/s.
        sha256_written: digest of what was written.
        sha256_read: digest of what was read.
        interrupts: interrupts of each vector.
        trapped: register accesses that were messages.
        direct: register accesses that were loads and stores.
        survived_reset: whether the data was still right after DEVICE_RESET.
        ok: whether everything was as it should be.
        error: what was not.
    """

    name: str
    model: str = ""
    pci: str = ""
    bars: dict[int, int] = field(default_factory=dict)
    mapped_bytes: int = 0
    size: int = 0
    written: int = 0
    verified: int = 0
    write_mb_s: float = 0.0
    read_mb_s: float = 0.0
    sha256_written: str = ""
    sha256_read: str = ""
    interrupts: list[int] = field(default_factory=list)
    trapped: int = 0
    direct: int = 0
    survived_reset: bool = False
    ok: bool = False
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


class Pattern:
    """Data that no mistake can produce by chance: every chunk has its own seeded bytes.

    Args:
        seed: what the bytes depend on, together with the function's name and the chunk's place.
        name: the function's name.
        size: bytes in all.
        block_size: bytes of a logical block.
    """

    def __init__(self, seed: int, name: str, size: int, block_size: int) -> None:
        self._seed = f"{seed}:{name}"
        self._size = size
        self._block_size = block_size

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Block address and number of blocks of each chunk."""
        for start in range(0, self._size, _TRANSFER):
            length = min(_TRANSFER, self._size - start)
            yield start // self._block_size, length // self._block_size

    def data(self, lba: int, blocks: int) -> bytes:
        """The bytes of one chunk."""
        return random.Random(f"{self._seed}:{lba}").randbytes(blocks * self._block_size)


async def exercise(name: str, socket_path: Path, seed: int, progress: Progress) -> FunctionReport:
    """Drive one function from first contact to verified data.

    Args:
        name: the function's name.
        socket_path: where the daemon serves it.
        seed: seed of the pattern.
        progress: takes one line per step.

    Returns:
        What was found; `ok` tells whether all of it is right.

    Raises:
        VfioUserError: the function, the daemon or the simulator failed.
        OSError: nobody serves the socket.
        TooSlowError: nothing happened for a minute.
    """
    report = FunctionReport(name)
    with ClientMemory(_MEMORY_SIZE, _MEMORY_BASE) as memory:
        async with Client.connect(socket_path, dma_server=memory, serve_dma_when_idle=True) as client:
            await memory.map(client)
            async with NvmeDriver.open(client, memory, io_queues=_IO_QUEUES) as nvme:
                _introduce(report, nvme, progress)
                pattern = Pattern(seed, name, nvme.namespace.size, nvme.namespace.block_size)
                await _write_all(report, nvme, pattern, progress)
                await _read_all(report, nvme, pattern, progress)
                _count(report, nvme)
            await client.reset()
            progress(f"{name}: device reset; binding the driver again")
    # The second driver starts in fresh memory, as a rebooted guest would.
    with ClientMemory(_MEMORY_SIZE, _MEMORY_BASE) as memory:
        async with Client.connect(socket_path, dma_server=memory, serve_dma_when_idle=True) as client:
            await memory.map(client)
            async with NvmeDriver.open(client, memory, io_queues=_IO_QUEUES) as nvme:
                report.survived_reset = await _sample(nvme, pattern)
                _count(report, nvme)
    _judge(report)
    return report


def _introduce(report: FunctionReport, nvme: NvmeDriver, progress: Progress) -> None:
    function, namespace = nvme.function, nvme.namespace
    report.model = f"{nvme.controller.model} ({nvme.controller.serial})"
    report.pci = f"{function.vendor_id:04x}:{function.device_id:04x} class {function.class_code:06x}"
    report.bars = {bar.index: bar.size for bar in function.bars}
    report.mapped_bytes = nvme.bar.mapped_bytes
    report.size = namespace.size
    bars = ", ".join(f"BAR{index} {size >> 10} KiB" for index, size in report.bars.items())
    progress(f"{report.name}: PCI {report.pci}; {bars}; {report.mapped_bytes} bytes mapped")
    blocks = f"{namespace.blocks} blocks of {namespace.block_size} bytes"
    progress(f"{report.name}: {report.model}, namespace of {blocks}")


async def _write_all(report: FunctionReport, nvme: NvmeDriver, pattern: Pattern, progress: Progress) -> None:
    digest = hashlib.sha256()
    started = time.perf_counter()

    async def write(lba: int, data: bytes) -> None:
        with trio.fail_after(_STEP_TIMEOUT_S):
            await nvme.write(lba, data)

    for batch in _batches(pattern):
        async with trio.open_nursery() as nursery:
            for lba, blocks in batch:
                data = pattern.data(lba, blocks)
                digest.update(data)
                report.written += len(data)
                nursery.start_soon(write, lba, data)
    await nvme.flush()
    report.sha256_written = digest.hexdigest()
    report.write_mb_s = report.written / (time.perf_counter() - started) / 1e6
    progress(f"{report.name}: {report.written >> 20} MiB written, {report.write_mb_s:.0f} MB/s")


async def _read_all(report: FunctionReport, nvme: NvmeDriver, pattern: Pattern, progress: Progress) -> None:
    digest = hashlib.sha256()
    started = time.perf_counter()
    found: dict[int, bytes] = {}

    async def read(lba: int, blocks: int) -> None:
        with trio.fail_after(_STEP_TIMEOUT_S):
            found[lba] = await nvme.read(lba, blocks)

    for batch in _batches(pattern):
        async with trio.open_nursery() as nursery:
            for lba, blocks in batch:
                nursery.start_soon(read, lba, blocks)
        for lba, blocks in batch:
            data = found.pop(lba)
            digest.update(data)
            if data == pattern.data(lba, blocks):
                report.verified += len(data)
    report.sha256_read = digest.hexdigest()
    report.read_mb_s = report.size / (time.perf_counter() - started) / 1e6
    progress(f"{report.name}: {report.verified >> 20} MiB read back equal, {report.read_mb_s:.0f} MB/s")


def _batches(pattern: Pattern) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for chunk in pattern.chunks():
        batch.append(chunk)
        if len(batch) == _IN_FLIGHT:
            yield batch
            batch = []
    if batch:
        yield batch


async def _sample(nvme: NvmeDriver, pattern: Pattern) -> bool:
    chunks = list(pattern.chunks())
    step = max(1, len(chunks) // _SAMPLES)
    for lba, blocks in chunks[::step]:
        with trio.fail_after(_STEP_TIMEOUT_S):
            if await nvme.read(lba, blocks) != pattern.data(lba, blocks):
                return False
    return True


def _count(report: FunctionReport, nvme: NvmeDriver) -> None:
    counts = report.interrupts or [0] * len(nvme.interrupts)
    report.interrupts = [before + now for before, now in zip(counts, nvme.interrupts, strict=True)]
    report.trapped += nvme.bar.trapped
    report.direct += nvme.bar.direct


def _judge(report: FunctionReport) -> None:
    """Say the first thing that is wrong, if anything is."""
    checks = (
        (report.written == report.size, f"{report.written} of {report.size} bytes were written"),
        (report.verified == report.size, f"{report.size - report.verified} bytes differ from what was written"),
        (report.sha256_read == report.sha256_written, "the digests of written and read data differ"),
        (all(report.interrupts), f"a vector never fired: {report.interrupts}"),
        (report.survived_reset, "the data is wrong after a reset"),
    )
    report.error = next((text for good, text in checks if not good), None)
    report.ok = report.error is None
