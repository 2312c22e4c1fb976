"""The v1 generation over a real socket: the region, its registers, its data section, and DIRTY_PAGES."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from migrationkit import (
    FAST,
    RUNNING,
    STOP_COPY,
    V1_PRE_COPY,
    V1_REGION,
    V1_RESUMING,
    V1_RUNNING,
    V1_STOP_COPY,
    V1_STOPPED,
    V2_CAPABILITIES,
    Vmm,
    bed,
)
from rawclient import DIRTY_PAGES, DMA_UNMAP, GET_INFO, REGION_INFO, REGION_READ, REGION_WRITE, RESET, memfd
from vfiouser_oob.config.schema import Generations

PENDING, OFFSET, SIZE = 8, 16, 24


async def region_info(client: Vmm, argsz: int) -> tuple[bytes, list[int]]:
    """GET_REGION_INFO of the migration region."""
    answer = await client.succeed(REGION_INFO, struct.pack("<IIIIQQ", argsz, 0, V1_REGION, 0, 0, 0))
    return answer.payload, answer.fds


async def test_region(tmp_path: Path) -> None:
    """Region 9 says what it is, brings one descriptor, and is answered by registers of their natural size."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        assert 10 == struct.unpack("<4I", (await src.succeed(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))).payload)[2]
        short, fds = await region_info(src, 32)
        assert (32, []) == (len(short), fds)
        full, fds = await region_info(src, 80)
        assert (80, 0xF, V1_REGION, 32, 4096 + (64 << 10), 0) == struct.unpack_from("<IIIIQQ", full)
        assert (2, 1, 48, 3, 1) == struct.unpack_from("<HHIII", full, 32)
        assert (1, 1, 0, 1, 0, 4096, 64 << 10) == struct.unpack_from("<HHIIIQQ", full, 48)
        assert 1 == len(fds)
        assert V1_RUNNING == await src.v1_state()
        assert 0 == await src.v1_register(PENDING)
        for offset, size in ((0, 2), (0, 3), (0, 8), (8, 4), (32, 4), (4088, 8)):
            assert errno.EINVAL == await src.errno(REGION_READ, struct.pack("<QII", offset, V1_REGION, size))
        assert 0 == await src.read32(V1_REGION, 4)
        await src.write32(V1_REGION, 4, 7)
        for offset in (OFFSET, SIZE):
            assert errno.EINVAL == await src.v1_register_errno(offset)


@pytest.mark.parametrize("start", [V1_PRE_COPY, V1_STOP_COPY])
async def test_migration(tmp_path: Path, start: int) -> None:
    """A state taken from one region and given to another is the same there, whether pre-copy came first or not."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        both.source.device.work(changes=3000)
        await dst.v1_set(V1_RESUMING)
        await src.v1_set(start)
        assert (start == V1_PRE_COPY) == both.source.runs
        if start == V1_PRE_COPY:
            stream = await src.v1_read_stream()
            assert 256 << 10 < len(stream)
            await dst.v1_write_stream(stream)
            both.source.device.work(changes=5000)
            await src.v1_set(V1_STOP_COPY)
        await src.v1_set(V1_STOP_COPY)
        await dst.v1_write_stream(await src.v1_read_stream())
        assert 0 == await src.v1_register(PENDING)
        assert errno.EINVAL == await src.v1_register_errno(OFFSET)
        await src.v1_set(V1_STOPPED)
        await dst.v1_set(V1_RUNNING)
        assert both.migrated()
        assert (False, True) == (both.source.runs, both.destination.runs)
        assert (V1_STOPPED, V1_RUNNING) == (await src.v1_state(), await dst.v1_state())


async def test_through_mapped_memory(tmp_path: Path) -> None:
    """Chunks are in the mapped data section as they are behind trapped accesses, and mapped writes are taken."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        windows = []
        for client in (src, dst):
            _, (fd,) = await region_info(client, 80)
            windows.append(mmap.mmap(fd, 64 << 10, offset=4096))
        await src.v1_set(V1_STOP_COPY)
        await dst.v1_set(V1_RESUMING)
        for number in range(1000):
            if not await src.v1_register(PENDING):
                break
            offset, size = await src.v1_register(OFFSET), await src.v1_register(SIZE)
            chunk = windows[0][:size]
            assert chunk == await src.read(V1_REGION, offset, size)
            assert chunk[:8] == b"".join([await src.read(V1_REGION, offset + i, 1) for i in range(8)])
            if number % 2:
                windows[1][:size] = chunk
            else:
                await dst.write(V1_REGION, await dst.v1_register(OFFSET), chunk)
            await dst.write(V1_REGION, SIZE, struct.pack("<Q", size))
        await dst.v1_set(V1_RUNNING)
        assert both.migrated()
        for window in windows:
            window.close()


async def test_a_chunk_is_acknowledged_by_asking_for_more(tmp_path: Path) -> None:
    """A chunk whose size was never read is shown again, also across the stop; pending bytes stay until the end."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await src.v1_set(V1_PRE_COPY)
        assert 0 < await src.v1_register(PENDING)
        offset = await src.v1_register(OFFSET)
        assert offset == await src.v1_register(OFFSET)
        first = await src.read(V1_REGION, offset, 64 << 10)
        await src.v1_set(V1_STOP_COPY)
        assert 0 < await src.v1_register(PENDING)
        await src.v1_register(OFFSET)
        assert 64 << 10 == await src.v1_register(SIZE)
        assert first == await src.read(V1_REGION, offset, 64 << 10)
        await dst.v1_set(V1_RESUMING)
        await dst.v1_write_stream(first + await src.v1_read_stream())
        await dst.v1_set(V1_RUNNING)
        assert both.migrated()


async def test_transitions(tmp_path: Path) -> None:
    """What v1 allows is done, what it does not is refused with the old state kept; cancelling brings back."""
    allowed = {
        V1_STOPPED: {0, 1, 2, 4},
        V1_RUNNING: {0, 1, 2, 3, 4},
        V1_STOP_COPY: {0, 1, 2},
        V1_PRE_COPY: {0, 1, 2, 3},
        V1_RESUMING: {1, 4},
    }
    async with bed(tmp_path) as both, both.source.vmm() as src:
        for current, targets in allowed.items():
            for target in range(8):
                if current != V1_RUNNING:
                    await src.v1_set(current)
                expected = 0 if target in targets else errno.EINVAL
                assert expected == await src.v1_set_errno(target), (current, target)
                assert (target if target in targets else current) == await src.v1_state()
                await src.succeed(RESET)
                assert V1_RUNNING == await src.v1_state()
                assert both.source.runs
        await src.v1_set(0x80 | V1_PRE_COPY)
        assert 0x80 | V1_PRE_COPY == await src.v1_state()
        await src.v1_set(0x80 | V1_RUNNING)
        assert both.source.device.role is None


async def test_registers_are_not_written(tmp_path: Path) -> None:
    """Read-only registers are refused, as is data in the wrong direction."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.v1_set(V1_PRE_COPY)
        for offset in (PENDING, OFFSET, SIZE):
            assert errno.EINVAL == await src.errno(REGION_WRITE, struct.pack("<QIIQ", offset, V1_REGION, 8, 1))
        assert errno.EINVAL == await src.errno(REGION_WRITE, struct.pack("<QIII", 4096, V1_REGION, 4, 1))


async def test_one_owner(tmp_path: Path) -> None:
    """The generation that leaves RUNNING first migrates; the other reads the state and gets EBUSY for writes."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.v1_set(V1_PRE_COPY)
        assert 6 == await src.state()
        assert errno.EBUSY == await src.set_state_errno(STOP_COPY)
        assert errno.EBUSY == await src.data_read_errno()
        await src.v1_set(V1_RUNNING)
        await src.set_state(STOP_COPY)
        assert V1_STOP_COPY == await src.v1_state()
        assert errno.EBUSY == await src.v1_set_errno(V1_RUNNING)
        assert 0 == await src.v1_register(PENDING)
        await src.set_state(RUNNING)
        await src.v1_set(V1_STOPPED)
        await src.v1_set(V1_RUNNING)


async def test_generations_can_be_chosen(tmp_path: Path) -> None:
    """The configuration can forbid either generation, or both."""
    for generations, v1, v2 in ((Generations.V1, 0, 22), (Generations.V2, 22, 0), (Generations.NONE, 22, 22)):
        directory = tmp_path / generations.value
        os.mkdir(directory)
        async with bed(directory, config=replace(FAST, generations=generations)) as both, both.source.vmm() as src:
            assert v1 == await src.v1_set_errno(V1_RUNNING)
            assert v2 == await src.set_state_errno(RUNNING)
            dirty = await src.command(DIRTY_PAGES, struct.pack("<II", 8, 1))
            assert (errno.ENOTSUP if v1 else 0) == dirty.error


@pytest.mark.parametrize(
    ("generations", "regions"), [(Generations.AUTO, 9), (Generations.BOTH, 10), (Generations.V1, 10)]
)
async def test_clients_that_announce_nothing(tmp_path: Path, generations: Generations, regions: int) -> None:
    """A client without the capability `migration` sees region 9 only where the configuration insists on it."""
    config = replace(FAST, generations=generations)
    async with bed(tmp_path, config=config) as both, both.source.vmm(V2_CAPABILITIES) as src:
        info = struct.unpack("<4I", (await src.succeed(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))).payload)
        assert regions == info[2]
        asked = struct.pack("<IIIIQQ", 80, 0, V1_REGION, 0, 0, 0)
        assert (0 if regions == 10 else errno.EINVAL) == (await src.command(REGION_INFO, asked)).error
        if regions == 10:
            await src.v1_set(V1_STOP_COPY)
            assert await src.v1_read_stream()
            await src.v1_set(V1_RUNNING)
        assert (errno.EINVAL if generations is Generations.V1 else 0) == await src.set_state_errno(RUNNING)


async def test_dirty_pages(tmp_path: Path) -> None:
    """What the agent's function wrote and what the device wrote through the daemon are both reported, once."""
    fd = memfd(1 << 20)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0x100000, 1 << 20, fd)
        await src.succeed(DIRTY_PAGES, struct.pack("<II", 8, 1))
        await src.succeed(DIRTY_PAGES, struct.pack("<II", 8, 1))
        assert set() == await src.v1_dirty(0x100000, 1 << 20)
        both.source.device.work(0x105000, 0x1001)
        await src.enable_bus_master()
        await src.write(0, 0x18, struct.pack("<Q", 0x110FFF))
        await src.write32(0, 0x20, 2)
        await src.write32(0, 0x24, 2)
        while await src.read32(0, 0x28) == 1:
            pass
        assert {5, 6, 16, 17} == await src.v1_dirty(0x100000, 1 << 20)
        assert set() == await src.v1_dirty(0x100000, 1 << 20)
        both.source.device.work(0x103000, 1)
        assert {1} == await src.v1_dirty(0x102000, 0x4000)
        both.source.device.work(0x107000, 1)
        request = struct.pack("<IIQQQQ", 48, 1, 0x100000, 1 << 20, 4096, 32)
        answer = await src.succeed(DMA_UNMAP, request)
        assert request + (1 << 7).to_bytes(32, "little") == answer.payload
        await src.succeed(DIRTY_PAGES, struct.pack("<II", 8, 2))
        assert both.source.device.log is None
    os.close(fd)
