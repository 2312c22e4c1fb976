"""The client's typed commands: what they send, how they split it, and what they believe of the answer."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from fakeserver import OFFER, Answer, Handler, connected
from vfiouser_oob.client.errors import BadReply
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import (
    Command,
    DeviceState,
    DmaMapFlags,
    DmaUnmapFlags,
    Feature,
    FeatureFlags,
    IrqIndex,
    IrqSetFlags,
    RegionFlags,
)
from vfiouser_protocol.errors import LocalProtocolError
from vfiouser_protocol.messages import (
    DeviceFeature,
    DeviceInfo,
    DirtyPages,
    DmaMap,
    DmaUnmap,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
    IoFdEntry,
    IrqInfo,
    LoggingRange,
    MigDataRead,
    MigDataReadReply,
    MigDataWrite,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteMulti,
    RegionWriteMultiReply,
    RegionWriteReply,
    SetIrqs,
)
from vfiouser_protocol.regions import RegionSpec, SparseArea, region_info_reply
from vfiouser_protocol.session import CommandReceived


def always(payload: bytes) -> Handler:
    """A handler that always gives the same answer."""
    return lambda _: Answer(payload)


async def test_get_info() -> None:
    """GET_INFO is decoded."""
    handlers: dict[int, Handler] = {Command.DEVICE_GET_INFO: always(encode(DeviceInfo(16, 3, 9, 5)))}
    async with connected(handlers=handlers) as (client, server):
        assert DeviceInfo(16, 3, 9, 5) == await client.get_info()
        assert DeviceInfo(16) == decode(DeviceInfo, server.received[0].payload)


async def test_short_reply_is_a_bad_reply() -> None:
    """A reply without its fixed part is the server's fault, said so, and not fatal."""
    async with connected(handlers={Command.DEVICE_GET_INFO: always(bytes(8))}) as (client, _):
        with pytest.raises(BadReply, match="GET_INFO"):
            await client.get_info()
        await client.reset()


def region_handler(spec: RegionSpec, fd: int) -> Handler:
    """A handler that describes a region by the protocol's own rules."""

    def answer(event: CommandReceived) -> Answer:
        payload, attach = region_info_reply(spec, decode(RegionInfo, event.payload).argsz)
        return Answer(payload, [fd] if attach else [])

    return answer


@pytest.mark.parametrize(("areas", "questions"), [(2, 1), (200, 2)])
async def test_region_info_is_asked_again_when_it_does_not_fit(areas: int, questions: int) -> None:
    """Many sparse areas need a second question with the argsz of the first answer; the descriptor comes
    along.
    """
    memory = os.memfd_create("region")
    sparse = tuple(SparseArea(number * 8192, 4096) for number in range(areas))
    spec = RegionSpec(0, 1 << 22, areas=sparse, mappable=True)
    async with connected(handlers={Command.DEVICE_GET_REGION_INFO: region_handler(spec, memory)}) as pair:
        client, server = pair
        region = await client.get_region_info(0)
        assert questions == len(server.received)
        assert sparse == region.description.mappable_areas
        assert RegionFlags.MMAP & region.description.flags
        assert region.fd is not None
        assert os.fstat(memory).st_ino == os.fstat(region.fd.fileno()).st_ino
        region.close()
    os.close(memory)


async def test_lying_region_info_is_a_bad_reply() -> None:
    """A capability chain that leaves the payload is refused, and the descriptor that came with it closed."""
    payload = struct.pack("<IIIIQQ", 48, 0xF, 0, 44, 4096, 0) + bytes(16)
    memory = os.memfd_create("region")
    handlers: dict[int, Handler] = {Command.DEVICE_GET_REGION_INFO: lambda _: Answer(payload, [memory])}
    async with connected(handlers=handlers) as (client, _):
        with pytest.raises(BadReply, match="region 0"):
            await client.get_region_info(0)
    os.close(memory)


async def test_region_io_fds() -> None:
    """Sub-regions come with their descriptors, de-duplicated by index."""
    entries = (IoFdEntry(0x1000, 4, 0, 0), IoFdEntry(0x1008, 4, 1, 0), IoFdEntry(0x1010, 4, 0, 0))
    payload = encode(RegionIoFds(16 + 3 * 40, 0, 2, 3, entries))
    fds = [os.eventfd(0), os.eventfd(0)]
    handlers: dict[int, Handler] = {Command.DEVICE_GET_REGION_IO_FDS: lambda _: Answer(payload, fds)}
    async with connected(handlers=handlers) as (client, _):
        found = await client.get_region_io_fds(2)
        assert entries == found.reply.entries
        os.eventfd_write(found.fds[1].fileno(), 7)
        assert 7 == os.eventfd_read(fds[1])
        found.close()
    for fd in fds:
        os.close(fd)


async def test_get_irq_info() -> None:
    """GET_IRQ_INFO is decoded."""
    async with connected(handlers={Command.DEVICE_GET_IRQ_INFO: always(encode(IrqInfo(16, 9, 2, 33)))}) as pair:
        assert IrqInfo(16, 9, 2, 33) == await pair[0].get_irq_info(IrqIndex.MSIX)


@pytest.mark.parametrize(("limit", "sizes"), [(0, [1] * 5), (2, [2, 2, 1]), (8, [5])])
async def test_eventfds_are_split_by_what_the_server_takes(limit: int, sizes: list[int]) -> None:
    """No message carries more descriptors than the server announced, and each goes to its own vector."""
    fds = [os.eventfd(number) for number in range(5)]
    seen: list[tuple[int, int]] = []

    def note(event: CommandReceived) -> Answer:
        request = decode(SetIrqs, event.payload)
        assert request.count == len(event.fds)
        assert IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER == request.flags
        seen.extend((request.start + offset, os.eventfd_read(fd.fileno())) for offset, fd in enumerate(event.fds))
        return Answer()

    # Vector n has an eventfd with count n + 1.
    for fd in fds:
        os.eventfd_write(fd, 1)
    offer = OFFER._replace(max_msg_fds=limit)
    async with connected(offer=offer, handlers={Command.DEVICE_SET_IRQS: note}) as (client, server):
        await client.set_eventfds(IrqIndex.MSIX, [LentFd(fd) for fd in fds], start=3)
        assert sizes == [decode(SetIrqs, event.payload).count for event in server.received]
    assert [(3 + number, number + 1) for number in range(5)] == seen
    for fd in fds:
        os.close(fd)


async def test_irqs_without_descriptors() -> None:
    """De-assigning, BOOL data and switching off an index are one message each."""
    async with connected() as (client, server):
        trigger = IrqSetFlags.ACTION_TRIGGER
        await client.set_irqs(IrqIndex.MSIX, IrqSetFlags.DATA_EVENTFD | trigger, 4, 20)
        await client.set_irqs(IrqIndex.MSI, IrqSetFlags.DATA_BOOL | trigger, 1, data=b"\1\0\1")
        await client.disable_irqs(IrqIndex.INTX)
        assert [
            SetIrqs(20, 0x24, 2, 4, 20),
            SetIrqs(23, 0x22, 1, 1, 3, b"\1\0\1"),
            SetIrqs(20, 0x21, 0, 0, 0),
        ] == [decode(SetIrqs, event.payload) for event in server.received]
        with pytest.raises(LocalProtocolError):
            await client.set_irqs(IrqIndex.MSI, 0x24, 0, 3, fds=[LentFd(0)])


async def test_region_access_is_split_by_the_servers_limit() -> None:
    """Accesses larger than `max_data_xfer_size` become several commands that cover them without a gap."""
    async with connected(offer=OFFER._replace(max_data_xfer_size=1000)) as (client, server):
        data = os.urandom(2500)
        await client.region_write(1, 100, data)
        await client.region_write(1, 4000, data, posted=True)
        assert data == await client.region_read(1, 100, 2500)
        assert data == await client.region_read(1, 4000, 2500)
        reads = [event for event in server.received if event.header.command == Command.REGION_READ]
        assert [1000, 1000, 500] * 2 == [decode(RegionRead, event.payload).count for event in reads]


async def test_short_reads_are_continued() -> None:
    """A server may legally return less than was asked for; the rest is asked for again."""

    def stingy(event: CommandReceived) -> Answer:
        offset, region, count = decode(RegionRead, event.payload)
        data = bytes(server.memory[offset : offset + min(count, 3)])
        return Answer(encode(RegionReadReply(offset, region, len(data), data)))

    async with connected(handlers={Command.REGION_READ: stingy}) as (client, server):
        server.memory[:16] = bytes(range(16))
        assert bytes(range(4, 12)) == await client.region_read(0, 4, 8)
        now = client.region_read_now(0, 4, 8)
        assert bytes(range(4, 12)) == (now if isinstance(now, bytes) else await now)


@pytest.mark.parametrize(
    "reply",
    [
        RegionReadReply(8, 0, 4, bytes(4)),
        RegionReadReply(0, 1, 4, bytes(4)),
        RegionReadReply(0, 0, 8, bytes(8)),
        RegionReadReply(0, 0, 0, b""),
    ],
)
async def test_answer_to_another_question_is_a_bad_reply(reply: RegionReadReply) -> None:
    """Data of another place or of impossible length is never taken for what was asked."""
    async with connected(handlers={Command.REGION_READ: always(encode(reply))}) as (client, _):
        with pytest.raises(BadReply) as caught:
            await client.region_read(0, 0, 4)
        assert errno.EIO == caught.value.errno


async def test_write_confirmations() -> None:
    """A bare header confirms a write as well; a wrong count does not."""
    async with connected(handlers={Command.REGION_WRITE: always(b"")}) as (client, server):
        await client.region_write(0, 0, b"data")
        server.handlers[Command.REGION_WRITE] = always(encode(RegionWriteReply(0, 0, 2)))
        with pytest.raises(BadReply):
            await client.region_write(0, 0, b"data")


async def test_empty_read() -> None:
    """libvfio-user answers a read of nothing without any payload."""
    async with connected(handlers={Command.REGION_READ: always(b"")}) as (client, _):
        assert b"" == await client.region_read(0, 0, 0)


async def test_region_write_multi() -> None:
    """Batched writes work when both sides announced them, and are refused here when not."""
    writes = [RegionWrite(0, 0, 4, b"abcd"), RegionWrite(8, 0, 1, b"x")]
    handlers: dict[int, Handler] = {Command.REGION_WRITE_MULTI: always(encode(RegionWriteMultiReply(2)))}
    async with connected(handlers=handlers) as (client, server):
        assert 2 == await client.region_write_multi(writes)
        assert 2 == await client.region_write_multi(writes, posted=True)
        await client.reset()
        assert tuple(writes) == decode(RegionWriteMulti, server.received[1].payload).writes
        assert [False, True] == [event.header.no_reply for event in server.received[:2]]
    async with connected(offer=OFFER._replace(write_multiple=False)) as (client, _):
        with pytest.raises(LocalProtocolError, match="not negotiated"):
            await client.region_write_multi(writes)


async def test_dma_map_and_unmap() -> None:
    """Maps carry their file, unmaps their exact range, and bursts may be sent before any answer."""
    memory = os.memfd_create("memory")
    inodes: list[list[int]] = []

    def note(event: CommandReceived) -> Answer:
        inodes.append([os.fstat(fd.fileno()).st_ino for fd in event.fds])
        return Answer()

    unmapped = always(encode(DmaUnmap(24, 0, 0, 0)))
    async with connected(handlers={Command.DMA_MAP: note, Command.DMA_UNMAP: unmapped}) as (client, server):
        await client.dma_map(0x1000, 0x2000, fd=LentFd(memory), offset=0x3000)
        await client.dma_map(0x8000, 0x1000, flags=DmaMapFlags.READ)
        for call in [client.submit_dma_unmap(0x1000, 0x2000), client.submit_dma_unmap(0x8000, 0x1000)]:
            await call.wait()
        await client.dma_unmap_all()
        received = [event.payload for event in server.received]
        assert DmaMap(32, 3, 0x3000, 0x1000, 0x2000) == decode(DmaMap, received[0])
        assert DmaMap(32, 1, 0, 0x8000, 0x1000) == decode(DmaMap, received[1])
        assert DmaUnmap(24, 0, 0x1000, 0x2000) == decode(DmaUnmap, received[2])._replace(bitmap=b"")
        assert DmaUnmapFlags.ALL == decode(DmaUnmap, received[4]).flags
    assert [[os.fstat(memory).st_ino], []] == inodes
    os.close(memory)


@pytest.mark.parametrize("padding", [0, 56])
async def test_migration_data_is_cut_by_its_size(padding: int) -> None:
    """libvfio-user pads its answer to what was asked for; only `size` bytes are data."""
    payload = encode(MigDataReadReply(8 + 8, 8, b"01234567")) + bytes(padding)
    async with connected(handlers={Command.MIG_DATA_READ: always(payload)}) as (client, server):
        assert b"01234567" == await client.mig_data_read(64)
        assert MigDataRead(72, 64) == decode(MigDataRead, server.received[0].payload)


async def test_more_migration_data_than_asked_for_is_a_bad_reply() -> None:
    """A server cannot make us take more than we asked for."""
    payload = encode(MigDataReadReply(8 + 8, 8, b"01234567"))
    async with connected(handlers={Command.MIG_DATA_READ: always(payload)}) as (client, _):
        with pytest.raises(BadReply):
            await client.mig_data_read(4)


async def test_migration_data_is_written_in_parts() -> None:
    """A chunk larger than the server's limit is sent in order, in parts."""
    async with connected(offer=OFFER._replace(max_data_xfer_size=4)) as (client, server):
        await client.mig_data_write(b"0123456789")
        parts = [decode(MigDataWrite, event.payload).data for event in server.received]
        assert [b"0123", b"4567", b"89"] == parts


async def test_features() -> None:
    """GET, SET and PROBE of each feature have the flags, argsz and data that the kernel's structures
    prescribe.
    """
    replies = {
        Feature.MIGRATION: encode(FeatureMigration(5)),
        Feature.MIG_DEVICE_STATE: encode(FeatureDeviceState(DeviceState.STOP)),
        Feature.DMA_LOGGING_START: encode(FeatureLoggingStart(8192, (LoggingRange(0, 65536),))),
        Feature.DMA_LOGGING_STOP: b"",
        Feature.DMA_LOGGING_REPORT: encode(FeatureLoggingReport(0, 65536, 4096, bytes(range(8)))),
    }

    def answer(event: CommandReceived) -> Answer:
        request = decode(DeviceFeature, event.payload)
        data = b"" if request.probe else replies[Feature(request.index)]
        return Answer(encode(DeviceFeature(8 + len(data), request.flags, data)))

    async with connected(handlers={Command.DEVICE_FEATURE: answer}) as (client, server):
        assert 5 == await client.get_migration_flags()
        assert DeviceState.STOP == await client.get_device_state()
        await client.set_device_state(DeviceState.STOP)
        assert 8192 == await client.start_dma_logging(4096, [LoggingRange(0, 65536)])
        assert bytes(range(8)) == await client.report_dma_logging(0, 65536, 4096)
        await client.stop_dma_logging()
        await client.probe_feature(Feature.MIGRATION, FeatureFlags.GET)
        sent = [decode(DeviceFeature, event.payload)[:2] for event in server.received]
    assert [
        (16, 0x10001),
        (16, 0x10002),
        (16, 0x20002),
        (8 + 16 + 16, 0x20006),
        (8 + 24 + 8, 0x10008),
        (8, 0x20007),
        (8, 0x50001),
    ] == sent


async def test_dirty_pages_of_the_v1_generation() -> None:
    """The bitmap of a range is sized in whole 64-bit words, and a bitmap of another size is refused."""
    bitmap = bytes(range(16))
    reply = encode(DirtyPages(56, 4, 0x1000, 65 * 4096, 4096, 16, bitmap))
    async with connected(handlers={Command.DIRTY_PAGES: always(reply)}) as (client, server):
        await client.start_dirty_pages()
        assert bitmap == await client.dirty_pages(0x1000, 65 * 4096, 4096)
        await client.stop_dirty_pages()
        with pytest.raises(BadReply):
            await client.dirty_pages(0x1000, 64 * 4096, 4096)
        requests = [decode(DirtyPages, event.payload) for event in server.received]
        assert [1, 4, 2] == [request.flags for request in requests[:3]]
        assert (56, 16) == (requests[1].argsz, requests[1].bitmap_size)


async def test_unmap_with_dirty_bitmap() -> None:
    """The v1 generation's DMA_UNMAP returns what the device wrote."""
    reply = encode(DmaUnmap(48, 1, 0, 3 * 4096, 4096, 8, b"\5" + bytes(7)))
    async with connected(handlers={Command.DMA_UNMAP: always(reply)}) as (client, server):
        assert b"\5" + bytes(7) == await client.dma_unmap_dirty(0, 3 * 4096, 4096)
        assert DmaUnmap(48, 1, 0, 3 * 4096, 4096, 8, b"") == decode(DmaUnmap, server.received[0].payload)
