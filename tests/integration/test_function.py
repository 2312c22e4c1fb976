"""A function over a real socket: regions, memory, interrupts, and what is left when a client goes.

Every test runs against the model itself and against the same model behind the `vfio-user` backend: a client must not
see the difference.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from rawclient import (
    CONFIG,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    GET_INFO,
    HEADER,
    IRQ_INFO,
    NO_REPLY,
    REGION_INFO,
    REGION_READ,
    REGION_WRITE,
    RESET,
    WRITE_MULTI,
    RawClient,
    attached,
    map_request,
    memfd,
)
from vfiouser_oob.config.schema import DmaMode, FunctionConfig, UpstreamDevice

DMA_DONE, DMA_FAULT = 2, 3


@pytest.fixture(params=["model", "vfio-user"])
def backend(request: pytest.FixtureRequest) -> str:
    """Which backend the client's function has."""
    return str(request.param)


def functions(directory: Path, backend: str, dma: DmaMode = DmaMode.FILES) -> list[FunctionConfig]:
    """The function f0 with this backend; behind `vfio-user` it is the function `up` of the same daemon."""
    if backend == "model":
        return [function(directory, dma=dma)]
    upstream = UpstreamDevice(socket=directory / "up.sock")
    return [function(directory, "up"), function(directory, "f0", upstream, dma=dma)]


async def start_dma(client: RawClient, address: int, count: int, direction: int) -> None:
    """Let the test device transfer."""
    await client.write(0, 0x18, struct.pack("<Q", address))
    await client.write32(0, 0x20, count)
    await client.write32(0, 0x24, direction)


async def dma_outcome(client: RawClient) -> int:
    """Wait for the end of a transfer that needs nothing of us."""
    while (status := await client.read32(0, 0x28)) == 1:
        pass
    return status


async def test_info_regions_and_irqs(tmp_path: Path, backend: str) -> None:
    """A client learns what the function has, and a mappable region brings exactly one descriptor."""
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        info = await client.succeed(GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
        assert (16, 3, 9, 5) == struct.unpack("<4I", info.payload)
        sizes = []
        for index in range(9):
            answer = await client.succeed(REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
            assert 32 == len(answer.payload)
            assert [] == answer.fds
            sizes.append(struct.unpack_from("<Q", answer.payload, 16)[0])
        assert [4096, 1 << 20, 64 << 10, 0, 0, 0, 0, 4096, 0] == sizes
        answer = await client.succeed(REGION_INFO, struct.pack("<IIIIQQ", 256, 0, 2, 0, 0, 0))
        argsz, flags, _, cap_offset, size, offset = struct.unpack_from("<IIIIQQ", answer.payload)
        assert (64, 0xF, 32, 64 << 10, 0) == (argsz, flags, cap_offset, size, offset)
        assert 1 == len(answer.fds)
        with mmap.mmap(answer.fds[0], 32 << 10) as window:
            window[0x100:0x104] = b"abcd"
            assert b"abcd" == await client.read(2, 0x100, 4)
            await client.write(2, 0x7FFC, b"wxyz")
            assert b"wxyz" == window[0x7FFC:0x8000]
        counts = []
        for index in range(5):
            answer = await client.succeed(IRQ_INFO, struct.pack("<4I", 16, 0, index, 0))
            counts.append(struct.unpack("<4I", answer.payload)[3])
        assert [1, 4, 16, 1, 1] == counts


@pytest.mark.parametrize("mode", list(DmaMode))
@pytest.mark.parametrize("with_fd", [True, False])
async def test_dma_reaches_client_memory(tmp_path: Path, backend: str, mode: DmaMode, with_fd: bool) -> None:
    """DMA goes through the client's file, or by messages when there is no file or messages are configured."""
    fd = memfd(1 << 20)
    async with serving(*functions(tmp_path, backend, mode)), attached(tmp_path / "f0.sock") as client:
        await client.enable_bus_master()
        await client.dma_map(0x10000, 0x20000, fd if with_fd else None, offset=0x4000)
        os.pwrite(fd, b"from the guest", 0x4000 + 0x123)
        await start_dma(client, 0x10123, 14, 1)
        if mode is DmaMode.MESSAGES or not with_fd:
            request = await client.receive()
            assert (DMA_READ, struct.pack("<QQ", 0x10123, 14)) == (request.command, request.payload)
            reply = request.payload + b"from the guest"
            await client.send(HEADER.pack(request.msg_id, DMA_READ, 16 + len(reply), 1, 0) + reply)
        assert DMA_DONE == await dma_outcome(client)
        assert b"from the guest" == await client.read(1, 0, 14)
        await client.write(1, 0, b"from the device")
        await start_dma(client, 0x10200, 15, 2)
        if mode is DmaMode.MESSAGES or not with_fd:
            request = await client.receive()
            assert DMA_WRITE == request.command
            assert struct.pack("<QQ", 0x10200, 15) + b"from the device" == request.payload
            await client.send(HEADER.pack(request.msg_id, DMA_WRITE, 32, 1, 0) + request.payload[:16])
            assert DMA_DONE == await dma_outcome(client)
        else:
            assert DMA_DONE == await dma_outcome(client)
            assert b"from the device" == os.pread(fd, 15, 0x4200)
    os.close(fd)


async def test_dma_needs_bus_master_and_a_mapping(tmp_path: Path, backend: str) -> None:
    """Without bus mastering, outside of mappings, and against a mapping's permission, DMA is a fault."""
    fd = memfd(1 << 16)
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.dma_map(0, 0x8000, fd, flags=1)
        await start_dma(client, 0, 16, 1)
        assert DMA_FAULT == await dma_outcome(client)
        await client.enable_bus_master()
        for address, direction, expected in ((0, 1, DMA_DONE), (0x7FF8, 1, DMA_FAULT), (0, 2, DMA_FAULT)):
            await start_dma(client, address, 16, direction)
            assert expected == await dma_outcome(client)
        await client.dma_unmap(0, 0x8000)
        await start_dma(client, 0, 16, 1)
        assert DMA_FAULT == await dma_outcome(client)
    os.close(fd)


async def test_truncated_memory_is_a_fault(tmp_path: Path, backend: str) -> None:
    """A client that truncates its memory under the device gets DMA faults; the daemon and its function go on."""
    fd = memfd(1 << 16)
    async with serving(*functions(tmp_path, backend)):
        async with attached(tmp_path / "f0.sock") as client:
            await client.enable_bus_master()
            await client.dma_map(0, 1 << 16, fd)
            os.ftruncate(fd, 4096)
            for direction in (1, 2):
                await start_dma(client, 0x8000, 4096, direction)
                assert DMA_FAULT == await dma_outcome(client)
            assert 4096 == os.fstat(fd).st_size
        async with attached(tmp_path / "f0.sock") as client:
            assert 0x75666F76 == await client.read32(0, 0)
    os.close(fd)


async def test_interrupts(tmp_path: Path, backend: str) -> None:
    """Edges reach the eventfd of their vector, INTx masks itself until it is unmasked."""
    events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.set_irqs(2, 4, 2, events[:2])
        await client.write32(0, 0x10, 2 << 16 | 5)
        assert 1 == os.eventfd_read(events[1])
        with pytest.raises(BlockingIOError):
            os.eventfd_read(events[0])
        await client.set_irqs(0, 0, 1, events[2:])
        await client.write32(0, 0x14, 1)
        assert 1 == os.eventfd_read(events[2])
        await client.set_irqs(0, 0, 1, flags=0x11)
        assert 1 == os.eventfd_read(events[2])
        await client.write32(0, 0x14, 0)
        await client.set_irqs(0, 0, 1, flags=0x11)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(events[2])
        resample = os.eventfd(0)
        await client.write32(0, 0x14, 1)
        assert 1 == os.eventfd_read(events[2])
        await client.set_irqs(0, 0, 1, [resample], flags=0x14)
        os.eventfd_write(resample, 1)  # KVM unmasks so, when the guest acknowledges the interrupt
        await trio.lowlevel.wait_readable(events[2])
        assert 1 == os.eventfd_read(events[2])
        os.close(resample)
        pipe = os.pipe()
        assert errno.EINVAL == await client.errno(8, struct.pack("<5I", 20, 0x24, 2, 0, 1), pipe[1:])
        for fd in pipe:
            os.close(fd)
    for event in events:
        os.close(event)


async def test_next_client_with_retained_state_finds_registers_only(tmp_path: Path, backend: str) -> None:
    """With `retain_state` registers stay over a disconnect; mappings, eventfds and bus mastering do not."""
    fd = memfd(1 << 16)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    retaining = [replace(each, retain_state=True) for each in functions(tmp_path, backend)]
    async with serving(*retaining) as daemon:
        async with attached(tmp_path / "f0.sock") as client:
            await client.enable_bus_master()
            await client.dma_map(0, 1 << 16, fd)
            await client.set_irqs(2, 0, 1, [event])
            await client.write32(0, 0x04, 0xCAFE)
            await client.write(0, 0x18, struct.pack("<Q", 0x40))
        async with attached(tmp_path / "f0.sock") as client:
            assert 0xCAFE == await client.read32(0, 0x04)
            assert b"\x02\x00" == await client.read(CONFIG, 4, 2)
            await client.dma_map(0, 1 << 16, fd)
            await start_dma(client, 0x40, 16, 2)
            assert DMA_FAULT == await dma_outcome(client)
            await client.write32(0, 0x10, 2 << 16)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(event)
            status = daemon.status()["functions"][-1]
            assert {"count": 1, "bytes": 1 << 16, "files": 1} == status["maps"]
    os.close(fd)
    os.close(event)


async def test_reset_keeps_mappings(tmp_path: Path, backend: str) -> None:
    """DEVICE_RESET brings registers and config space to power-on, and leaves the client's mappings and eventfds."""
    event = os.eventfd(0, os.EFD_NONBLOCK)
    async with serving(*functions(tmp_path, backend)) as daemon, attached(tmp_path / "f0.sock") as client:
        await client.dma_map(0, 4096)
        await client.set_irqs(2, 0, 1, [event])
        await client.enable_bus_master()
        await client.write32(0, 0x04, 1)
        resets = await client.read32(0, 0x38)
        await client.succeed(RESET)
        assert (0, resets + 1) == (await client.read32(0, 0x04), await client.read32(0, 0x38))
        assert b"\0\0" == await client.read(CONFIG, 4, 2)
        assert 1 == daemon.status()["functions"][-1]["maps"]["count"]
        await client.write32(0, 0x10, 2 << 16)
        assert 1 == os.eventfd_read(event)
    os.close(event)


async def test_function_level_reset(tmp_path: Path, backend: str) -> None:
    """The guest's FLR resets the device like DEVICE_RESET does."""
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.write32(0, 0x04, 1)
        resets = await client.read32(0, 0x38)
        config = await client.read(CONFIG, 0, 256)
        offset = config[0x34]
        while config[offset] != 0x10:
            offset = config[offset + 1]
        await client.write(CONFIG, offset + 8, struct.pack("<H", 0x8000))
        assert (0, resets + 1) == (await client.read32(0, 0x04), await client.read32(0, 0x38))


async def test_posted_and_pipelined(tmp_path: Path, backend: str) -> None:
    """NO_REPLY commands are executed in silence, even failing ones, and pipelined commands are answered in order."""
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        burst = b""
        for value in range(100):
            payload = struct.pack("<QIII", 0x04, 0, 4, value)
            burst += client.pack(REGION_WRITE, payload, flags=NO_REPLY)
            burst += client.pack(REGION_WRITE, struct.pack("<QIII", 0x04, 99, 4, 0), flags=NO_REPLY)
            burst += client.pack(REGION_READ, struct.pack("<QII", 0x04, 0, 4), msg_id=7)
        await client.send(burst)
        for value in range(100):
            answer = await client.receive()
            assert (7, REGION_READ, 1) == (answer.msg_id, answer.command, answer.flags)
            assert value == int.from_bytes(answer.payload[16:], "little")


async def test_write_multi(tmp_path: Path, backend: str) -> None:
    """REGION_WRITE_MULTI does its writes in order and says how many it did."""
    async with serving(*functions(tmp_path, backend), reply_budget_s=30.0), attached(tmp_path / "f0.sock") as client:
        writes = [struct.pack("<QII8s", 0x04, 0, 4, struct.pack("<Q", value)) for value in (1, 2, 3)]
        answer = await client.succeed(WRITE_MULTI, struct.pack("<Q", 3) + b"".join(writes))
        assert struct.pack("<Q", 3) == answer.payload
        assert 3 == await client.read32(0, 0x04)
        writes[1] = struct.pack("<QII8s", 1 << 40, 0, 4, bytes(8))
        answer = await client.succeed(WRITE_MULTI, struct.pack("<Q", 3) + b"".join(writes))
        assert struct.pack("<Q", 1) == answer.payload
        assert 1 == await client.read32(0, 0x04)
        writes[1] = writes[2]
        for count in (200, 4096):
            answer = await client.succeed(WRITE_MULTI, struct.pack("<Q", count) + writes[2] * (count - 1) + writes[0])
            assert struct.pack("<Q", count) == answer.payload
            assert 1 == await client.read32(0, 0x04)
        too_many = struct.pack("<Q", 4097) + writes[2] * 4097
        assert errno.EINVAL == await client.errno(WRITE_MULTI, too_many)
        assert 1 == await client.read32(0, 0x04)


async def test_refusals_carry_their_errno(tmp_path: Path, backend: str) -> None:
    """Bad commands get the errno of the reference and the connection goes on."""
    fd = memfd(1 << 16)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    pipe = os.pipe()
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.dma_map(0x1000, 0x2000, fd)
        cases = [
            (REGION_READ, struct.pack("<QII", 0xFFE, 0, 4), (), errno.EINVAL),
            (REGION_READ, struct.pack("<QII", (1 << 64) - 1, 0, 4), (), errno.EINVAL),
            (REGION_READ, struct.pack("<QII", 0, 1, (1 << 20) + 1), (), errno.EINVAL),
            (REGION_READ, struct.pack("<QII", 0, 99, 4), (), errno.EINVAL),
            (REGION_WRITE, struct.pack("<QII", 0, 0, 8) + bytes(4), (), errno.EINVAL),
            (DMA_MAP, map_request(0x2000, 0x1000), (), errno.EEXIST),
            (DMA_MAP, map_request(0x1000, 0x2000, 0x1000), (fd,), errno.EEXIST),
            (DMA_MAP, map_request(0x9000, 0), (), errno.EINVAL),
            (DMA_MAP, map_request((1 << 64) - 0x1000, 0x2000), (), errno.EINVAL),
            (DMA_MAP, map_request(0x9000, 0x1000, flags=0x10), (), errno.EINVAL),
            (DMA_MAP, map_request(0x9000, 0x1000), (pipe[0],), errno.EACCES),
            (DMA_MAP, map_request(0x9000, 0x1000), (read_only,), errno.EACCES),
            (DMA_MAP, map_request(0x9000, 0x20000), (fd,), errno.EINVAL),
            (DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x1000, 0x1000), (), errno.ENOENT),
            (DMA_UNMAP, struct.pack("<IIQQ", 24, 4, 0x1000, 0x2000), (), errno.EINVAL),
            (DMA_UNMAP, struct.pack("<IIQQQQ", 48, 1, 0x1000, 0x2000, 4096, 8), (), errno.EINVAL),
            (DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0x1000, 0), (), errno.EINVAL),
            (14, struct.pack("<II", 8, 1), (), errno.ENOTSUP),
            (16, struct.pack("<II", 16, 0x10001), (), errno.EINVAL),
            (99, bytes(16), (), errno.EINVAL),
            (DMA_READ, bytes(16), (), errno.EINVAL),
        ]
        for command, payload, fds, expected in cases:
            assert expected == await client.errno(command, payload, fds), (command, payload)
        await client.dma_map(0x1000, 0x2000, fd)  # the identical mapping is no error
        await client.succeed(DMA_MAP, map_request(0x8000, 0x1000, flags=1), (read_only,))
        await client.succeed(DMA_UNMAP, struct.pack("<IIQQ", 24, 2, 0, 0))
        assert errno.ENOENT == await client.errno(DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x1000, 0x2000))
    for number in (fd, read_only, *pipe):
        os.close(number)


async def test_device_error_and_bad_access_leave_the_device_alone(tmp_path: Path, backend: str) -> None:
    """A register that fails answers with the device's errno and nothing else."""
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.write32(0, 0x30, errno.EIO)
        assert errno.EIO == await client.errno(REGION_READ, struct.pack("<QII", 0x34, 0, 4))
        await client.write32(0, 0x30, 0)
        assert 0 == await client.read32(0, 0x34)


async def test_register_access_never_waits_for_dma(tmp_path: Path, backend: str) -> None:
    """While the device waits for a DMA reply, every register access is answered; QEMU answers DMA only then."""
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock") as client:
        await client.enable_bus_master()
        await client.dma_map(0, 4096)
        await start_dma(client, 0, 16, 1)
        request = await client.receive()
        with trio.fail_after(2):
            assert 1 == await client.read32(0, 0x28)
            await client.write32(0, 0x04, 5)
            assert 5 == await client.read32(0, 0x04)
        await client.send(HEADER.pack(request.msg_id, DMA_READ, 16, 0x21, errno.ENODEV))
        assert DMA_FAULT == await dma_outcome(client)
        assert errno.ENODEV == await client.read32(0, 0x2C)


async def test_dma_that_is_never_answered_ends_at_the_deadline(tmp_path: Path, backend: str) -> None:
    """A client that does not answer DMA gets a fault, and its late reply is dropped."""
    async with serving(*functions(tmp_path, backend), reply_budget_s=0.2), attached(tmp_path / "f0.sock") as client:
        await client.enable_bus_master()
        await client.dma_map(0, 4096)
        await start_dma(client, 0, 16, 1)
        request = await client.receive()
        assert DMA_FAULT == await dma_outcome(client)
        assert errno.ETIMEDOUT == await client.read32(0, 0x2C)
        late = request.payload + bytes(16)
        await client.send(HEADER.pack(request.msg_id, DMA_READ, 16 + len(late), 1, 0) + late)
        assert 0x75666F76 == await client.read32(0, 0)


async def test_dma_is_split_to_what_the_client_takes(tmp_path: Path, backend: str) -> None:
    """No DMA message carries more than the client's max_data_xfer_size."""
    small = b'{"capabilities":{"max_data_xfer_size":4096}}\0'
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock", small) as client:
        await client.enable_bus_master()
        await client.dma_map(0, 1 << 20)
        await start_dma(client, 0x800, 10000, 1)
        seen = []
        for _ in range(3):
            request = await client.receive()
            address, count = struct.unpack("<QQ", request.payload)
            seen.append((address, count))
            reply = request.payload + bytes([address >> 8 & 0xFF]) * count
            await client.send(HEADER.pack(request.msg_id, DMA_READ, 16 + len(reply), 1, 0) + reply)
        assert [(0x800, 4096), (0x1800, 4096), (0x2800, 1808)] == seen
        assert DMA_DONE == await dma_outcome(client)


async def test_no_dma_message_after_the_reply_to_unmap(tmp_path: Path, backend: str) -> None:
    """A transfer of several messages ends in a fault when the client takes the memory back in the middle of it."""
    small = b'{"capabilities":{"max_data_xfer_size":4096}}\0'
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock", small) as client:
        await client.enable_bus_master()
        await client.dma_map(0, 1 << 20)
        await start_dma(client, 0, 16384, 1)
        request = await client.receive()
        assert DMA_READ == request.command
        await client.dma_unmap(0, 1 << 20)
        reply = request.payload + bytes(4096)
        await client.send(HEADER.pack(request.msg_id, DMA_READ, 16 + len(reply), 1, 0) + reply)
        assert DMA_FAULT == await dma_outcome(client)


async def test_client_that_takes_no_data(tmp_path: Path, backend: str) -> None:
    """max_data_xfer_size 0 is legal: DMA by messages is a fault then, and no message is sent."""
    nothing = b'{"capabilities":{"max_data_xfer_size":0}}\0'
    async with serving(*functions(tmp_path, backend)), attached(tmp_path / "f0.sock", nothing) as client:
        await client.enable_bus_master()
        await client.dma_map(0, 1 << 20)
        for direction in (1, 2):
            await start_dma(client, 0, 16, direction)
            assert DMA_FAULT == await dma_outcome(client)
            assert errno.E2BIG == await client.read32(0, 0x2C)
