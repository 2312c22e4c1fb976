"""Guest memory and mapped regions of the client: allocation, access by memory and by message."""

from __future__ import annotations

import os
import struct

import pytest

from fakeserver import Answer, Handler, connected
from openfds import open_fds
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_protocol.codec import decode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import DmaFault, LocalProtocolError
from vfiouser_protocol.messages import DmaMap, RegionInfo
from vfiouser_protocol.regions import RegionSpec, SparseArea, region_info_reply
from vfiouser_protocol.session import CommandReceived


def test_allocations_are_aligned_and_do_not_overlap() -> None:
    """Every allocation has its own pages at the alignment that was asked for, until the memory is used up."""
    with ClientMemory(64 * PAGE_SIZE, base=0x40001000) as memory:
        taken: set[int] = set()
        for size, align in ((1, PAGE_SIZE), (PAGE_SIZE + 1, PAGE_SIZE), (100, 1 << 16), (3 * PAGE_SIZE, 1 << 14)):
            address = memory.allocate(size, align)
            assert 0 == address % align
            pages = set(range(address, address + size, PAGE_SIZE))
            assert not taken & pages
            taken |= pages
        with pytest.raises(MemoryError):
            memory.allocate(64 * PAGE_SIZE)


def test_access_outside_is_a_fault() -> None:
    """No view reaches beyond the memory, in either direction."""
    with ClientMemory(PAGE_SIZE, base=0x1000) as memory:
        for address, count in ((0xFFF, 1), (0x1FFF, 2), (0x2000, 1), (0x1000, -1)):
            with pytest.raises(DmaFault):
                memory.view(address, count)


async def test_memory_is_mapped_with_its_file() -> None:
    """The device gets the very file, or nothing when it shall use messages."""
    seen: list[bytes] = []

    def note(event: CommandReceived) -> Answer:
        seen.extend(os.pread(fd.fileno(), 4, 0x10) for fd in event.fds)
        return Answer()

    with ClientMemory(PAGE_SIZE, base=0x1000) as memory:
        memory.pack(struct.Struct("<I"), 0x1010, 0x11223344)
        async with connected(handlers={Command.DMA_MAP: note}) as (client, server):
            await memory.map(client)
            await memory.map(client, with_fd=False, flags=1)
            maps = [decode(DmaMap, event.payload) for event in server.received]
    assert [DmaMap(32, 3, 0, 0x1000, PAGE_SIZE), DmaMap(32, 1, 0, 0x1000, PAGE_SIZE)] == maps
    assert [b"\x44\x33\x22\x11"] == seen


AREAS = (SparseArea(0x1000, 0x1000), SparseArea(0x3000, 0x2000))


def region_handler(spec: RegionSpec, fd: int) -> Handler:
    """A handler that describes a region by the protocol's own rules."""

    def answer(event: CommandReceived) -> Answer:
        payload, attach = region_info_reply(spec, decode(RegionInfo, event.payload).argsz)
        return Answer(payload, [fd] if attach else [])

    return answer


async def test_registers_are_reached_by_memory_or_by_message() -> None:
    """Inside mapped areas every width is a load or store at the file's offset; elsewhere it is a message."""
    before = open_fds()
    memory = os.memfd_create("region")
    os.ftruncate(memory, 0x10000)
    spec = RegionSpec(0, 0x5000, areas=AREAS, offset=0x8000, mappable=True)
    async with connected(handlers={Command.DEVICE_GET_REGION_INFO: region_handler(spec, memory)}) as pair:
        client, server = pair
        with await MappedRegion.open(client, 0) as region:
            assert 0x3000 == region.mapped_bytes
            for width in (1, 2, 4, 8):
                value = int.from_bytes(os.urandom(width), "little")
                for offset in (0x1000, 0x2000 - width, 0x4000):
                    await region.write(offset, width, value)
                    assert value == await region.read(offset, width)
                    assert value == int.from_bytes(os.pread(memory, width, 0x8000 + offset), "little")
                await region.write(0x800, width, value)
                assert value == await region.read(0x800, width)
                assert value == int.from_bytes(server.memory[0x800 : 0x800 + width], "little")
            assert (8, 24) == (region.trapped, region.direct)
            with region.view(0x3000, 0x2000) as view:
                assert 0x2000 == len(view)
            for offset, width in ((0x1002, 4), (0x1000, 3)):
                with pytest.raises(LocalProtocolError):
                    await region.read(offset, width)
            with pytest.raises(LocalProtocolError):
                region.view(0x2000, 16)
    os.close(memory)
    assert before.keys() == open_fds().keys()


async def test_region_without_mapping_is_all_messages() -> None:
    """Told not to map, nothing is mapped and everything works the same."""
    memory = os.memfd_create("region")
    os.ftruncate(memory, 0x10000)
    spec = RegionSpec(0, 0x2000, mappable=True)
    async with connected(handlers={Command.DEVICE_GET_REGION_INFO: region_handler(spec, memory)}) as pair:
        with await MappedRegion.open(pair[0], 0, use_mapping=False) as region:
            await region.write(0x1000, 4, 0xCAFE)
            assert 0xCAFE == await region.read(0x1000, 4)
            assert (0, 2) == (region.direct, region.trapped)
    assert bytes(4) == os.pread(memory, 4, 0x1000)
    os.close(memory)
