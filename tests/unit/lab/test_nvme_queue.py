"""The NVMe driver's queues and PRP lists, against a few lines of device that follow the specification."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fakeserver import Answer, FakeServer, connected
from vfiouser_oob.client.client import ClientRegion
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.nvme.layout import CQE, DOORBELLS, PRP_ENTRY, SQE, DriverError
from vfiouser_oob.lab.nvme.queue import NvmeCommand, PagePool, QueuePair, list_pages
from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.messages import RegionWrite
from vfiouser_protocol.regions import RegionDescription
from vfiouser_protocol.session import CommandReceived


def pages_of(memory: ClientMemory, prp1: int, prp2: int, count: int) -> list[int]:
    """Follow PRPs as a controller does."""
    if count <= 2:
        return [prp1, prp2][:count]
    pages, entry = [prp1], prp2
    while len(pages) < count:
        (value,) = memory.unpack(PRP_ENTRY, entry)
        last_in_list = entry % PAGE_SIZE == PAGE_SIZE - 8
        if last_in_list and len(pages) < count - 1:
            entry = value
        else:
            pages.append(value)
            entry += 8
    return pages


@given(st.integers(1, 1700))
def test_prp_lists_name_every_page_in_order(count: int) -> None:
    """Whatever the size of a transfer, a controller that follows its PRPs finds exactly its pages."""
    total = count + list_pages(count)
    with ClientMemory(total * PAGE_SIZE, base=1 << 32) as memory:
        pool = PagePool(memory, total)
        pages = [memory.base + number * PAGE_SIZE for number in reversed(range(total))]
        data, lists = pages[:count], pages[count:]
        prp1, prp2 = pool.describe(data, lists)
        assert data == pages_of(memory, prp1, prp2, count)


async def test_pool_waits_for_pages() -> None:
    """A transfer that finds too few pages waits for those of another, and errors of a command give them back."""
    with ClientMemory(4 * PAGE_SIZE) as memory:
        pool = PagePool(memory, 4)
        order: list[str] = []

        async def second() -> None:
            async with pool.take(3):
                order.append("second")

        async with trio.open_nursery() as nursery, pool.take(3):
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            order.append("first")
        with pytest.raises(DriverError):
            async with pool.take(4):
                raise DriverError("refused by the device", 2)
        async with pool.take(4):
            order.append("third")
        with pytest.raises(MemoryError):
            async with pool.take(5):
                pytest.fail("there are only four")
    assert ["first", "second", "third"] == order


class Device:
    """Executes what is in the submission queue when its doorbell rings: dword 0 of the completion is dword 10 + 1."""

    def __init__(self, memory: ClientMemory, queue: QueuePair, stride: int) -> None:
        self.memory = memory
        self.queue = queue
        self.stride = stride
        self.sq_head = 0
        self.cq_tail = 0
        self.phase = 1
        self.heads: list[int] = []

    def write(self, event: CommandReceived, server: FakeServer) -> Answer:
        """Take a doorbell write."""
        request = decode(RegionWrite, event.payload)
        number, rest = divmod(request.offset - DOORBELLS, self.stride)
        assert 0 == rest
        assert self.queue.queue_id == number // 2
        value = int.from_bytes(request.data, "little")
        if number % 2:
            self.heads.append(value)
        else:
            self.execute(value)
        return server.region_write(event)

    def execute(self, tail: int) -> None:
        """Complete every new command; opcode 0xff fails with status 0x102."""
        while self.sq_head != tail:
            fields = self.memory.unpack(SQE, self.queue.sq_address + 64 * self.sq_head)
            self.sq_head = (self.sq_head + 1) % self.queue.entries
            opcode, command_id, dword10 = fields[0], fields[2], fields[8]
            status = (0x102 << 1 if opcode == 0xFF else 0) | self.phase
            entry = self.queue.cq_address + 16 * self.cq_tail
            self.memory.pack(CQE, entry, dword10 + 1, 0, self.sq_head, 0, command_id, status)
            self.cq_tail += 1
            if self.cq_tail == self.queue.entries:
                self.cq_tail = 0
                self.phase ^= 1


async def test_queues_wrap_around() -> None:
    """Many more commands than entries, several at a time: each gets its own result, across every wrap."""
    with ClientMemory(1 << 20) as memory:
        async with connected() as (client, server):
            region = ClientRegion(RegionDescription(0, 0x4000, 3, 0, 32), None)
            queue = QueuePair(memory, MappedRegion(client, region), 3, 4, 8)
            device = Device(memory, queue, 8)
            server.handlers[Command.REGION_WRITE] = lambda event: device.write(event, server)
            results: dict[int, int] = {}

            async def execute(number: int) -> None:
                results[number] = await queue.execute(NvmeCommand(2, dwords=(number,)))

            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(execute, number)
                while len(results) < 50:
                    await trio.testing.wait_all_tasks_blocked()
                    await queue.process()
            assert {number: number + 1 for number in range(50)} == results
            assert 50 == queue.completed
            assert 50 % 4 == device.heads[-1]


async def test_status_of_a_command_is_raised() -> None:
    """An error status fails that command only."""
    with ClientMemory(1 << 20) as memory:
        async with connected() as (client, server):
            region = ClientRegion(RegionDescription(0, 0x4000, 3, 0, 32), None)
            queue = QueuePair(memory, MappedRegion(client, region), 1, 4, 4)
            device = Device(memory, queue, 4)
            server.handlers[Command.REGION_WRITE] = lambda event: device.write(event, server)

            async def process() -> None:
                while not await queue.process():
                    await trio.testing.wait_all_tasks_blocked()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(process)
                with pytest.raises(DriverError) as caught:
                    await queue.execute(NvmeCommand(0xFF))
            assert 0x102 == caught.value.status


async def test_device_that_goes_ends_the_wait() -> None:
    """No interrupt will come any more, so the commands under way fail, and later ones at once."""
    with ClientMemory(1 << 20) as memory:
        async with connected() as (client, _):
            region = ClientRegion(RegionDescription(0, 0x4000, 3, 0, 32), None)
            queue = QueuePair(memory, MappedRegion(client, region), 1, 4, 4)
            async with trio.open_nursery() as nursery:

                async def execute() -> None:
                    with pytest.raises(ServerGone, match="test"):
                        await queue.execute(NvmeCommand(2))

                nursery.start_soon(execute)
                await trio.testing.wait_all_tasks_blocked()
                queue.fail("test")
            await execute()
