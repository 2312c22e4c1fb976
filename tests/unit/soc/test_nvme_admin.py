"""Admin commands: identify, queues, abort, and every way to get them wrong."""

from __future__ import annotations

import struct
import uuid

import pytest

from nvmebed import CommandFailed, Machine, machine, make_function
from vfiouser_soc.nvme.config import ControllerLimits
from vfiouser_soc.nvme.stores import MemoryStore

IDENTIFY, CREATE_SQ, CREATE_CQ, DELETE_SQ, DELETE_CQ, ABORT = 6, 1, 5, 0, 4, 8
LIMITS = ControllerLimits(io_queues=4, max_entries=64, vectors=5)


async def failure(m: Machine, opcode: int, **fields: int) -> int:
    """Execute a command that must fail; returns its status."""
    with pytest.raises(CommandFailed) as caught:
        await m.driver.admin(opcode, **fields)
    return caught.value.status


async def test_identify_controller() -> None:
    """The fields that a driver and nvme-cli look at."""
    async with machine(make_function(limits=LIMITS)) as m:
        data = await m.driver.identify(1)
        assert (0x1234, 0x1234) == struct.unpack_from("<HH", data, 0)
        assert b"bed".ljust(20) == data[4:24]
        assert data[24:64].startswith(b"vfiouser-oob simulated NVMe ")
        assert 7 == data[77]  # MDTS: 512 KiB
        assert 0x10400 == int.from_bytes(data[80:84], "little")
        assert 1 == data[111]  # an I/O controller
        assert (0x66, 0x44) == (data[512], data[513])
        assert 1 == int.from_bytes(data[516:520], "little")
        assert 0xDD == int.from_bytes(data[520:522], "little")
        assert 1 == data[525] & 1
        nqn = data[768:1024].rstrip(b"\0").decode()
        assert nqn.startswith("nqn.2014-08.org.nvmexpress:uuid:")
        uuid.UUID(nqn[-36:])
        assert 4 << 20 == int.from_bytes(data[280:296], "little")


@pytest.mark.parametrize("shift", [9, 12])
async def test_identify_namespace(shift: int) -> None:
    """Size in blocks of the configured size, and unique identifiers."""
    async with machine(make_function(lba_shift=shift)) as m:
        data = await m.driver.identify(0, nsid=1)
        assert [(4 << 20) >> shift] * 3 == list(struct.unpack_from("<3Q", data))
        assert 0 == data[25]  # one format
        assert shift << 16 == int.from_bytes(data[128:132], "little")
        assert bytes(16) != data[104:120]
        assert bytes(8) != data[120:128]
        assert data == await m.driver.identify(0x11, nsid=1)


async def test_namespace_lists_and_descriptors() -> None:
    """Lists are of the ids above the one given; descriptors carry EUI-64, NGUID and UUID."""
    function = make_function(MemoryStore(1 << 20), MemoryStore(2 << 20))
    async with machine(function) as m:
        for cns in (0x02, 0x10):
            lists = [await m.driver.identify(cns, nsid=nsid) for nsid in (0, 1, 2)]
            assert [(1, 2, 0), (2, 0, 0), (0, 0, 0)] == [struct.unpack_from("<3I", data) for data in lists]
        namespace = await m.driver.identify(0, nsid=2)
        found = {}
        data = await m.driver.identify(3, nsid=2)
        at = 0
        while data[at]:
            found[data[at]] = data[at + 4 : at + 4 + data[at + 1]]
            at += 4 + data[at + 1]
        assert {1: namespace[120:128], 2: namespace[104:120]} == {1: found[1], 2: found[2]}
        assert 16 == len(found[3])
        other = await m.driver.identify(3, nsid=1)
        assert other[:at] != data[:at]


async def test_controller_lists() -> None:
    """The subsystem has one controller."""
    async with machine() as m:
        assert (1, 1) == struct.unpack_from("<HH", await m.driver.identify(0x13))
        assert (1, 1) == struct.unpack_from("<HH", await m.driver.identify(0x12, nsid=1))
        assert (0, 0) == struct.unpack_from("<HH", await m.driver.identify(0x13, cntid=2))


@pytest.mark.parametrize(
    ("cns", "nsid", "status"),
    [
        (0x00, 0, 0x0B),
        (0x00, 2, 0x0B),
        (0x00, 0xFFFFFFFF, 0x0B),
        (0x02, 0xFFFFFFFE, 0x0B),
        (0x02, 0xFFFFFFFF, 0x0B),
        (0x03, 2, 0x0B),
        (0x12, 7, 0x0B),
        (0x06, 0, 0x02),
        (0xFF, 0, 0x02),
    ],
)
async def test_identify_errors(cns: int, nsid: int, status: int) -> None:
    """Wrong namespaces and unknown structures have their own status."""
    async with machine() as m:
        assert status == await failure(m, IDENTIFY, nsid=nsid, prp1=m.driver.alloc(4096), cdw10=cns)


async def test_identify_over_two_pages() -> None:
    """A structure may start inside of a page and end in another."""
    async with machine() as m:
        first, second = m.driver.alloc(4096), m.driver.alloc(8192) + 4096
        whole = await m.driver.identify(1)
        await m.driver.admin(IDENTIFY, prp1=first + 1024, prp2=second, cdw10=1)
        assert whole == m.host.memory.peek(first + 1024, 3072) + m.host.memory.peek(second, 1024)


async def test_unknown_opcode_and_flags() -> None:
    """Unknown opcodes, fused commands and SGLs are refused for good."""
    async with machine() as m:
        with pytest.raises(CommandFailed) as caught:
            await m.driver.admin(0x7F)
        assert (0x01, True) == (caught.value.status, caught.value.do_not_retry)
        for flags in (0x01, 0x02, 0x40, 0x80):
            assert 0x02 == await failure(m, IDENTIFY, prp1=m.driver.alloc(4096), cdw10=1, flags=flags)


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "prp_offset", "status"),
    [
        (0x001F_0000, 3, 0, 0x101),  # queue 0
        (0x001F_0001, 3, 0, 0x101),  # exists
        (0x001F_0005, 3, 0, 0x101),  # beyond the limit
        (0x001F_FFFF, 3, 0, 0x101),
        (0x0000_0002, 3, 0, 0x102),  # one entry
        (0x0040_0002, 3, 0, 0x102),  # more than MQES
        (0x001F_0002, 0x0005_0003, 0, 0x108),  # vector
        (0x001F_0002, 2, 0, 0x002),  # not contiguous
        (0x001F_0002, 3, 64, 0x013),  # not page aligned
    ],
)
async def test_create_completion_queue_errors(cdw10: int, cdw11: int, prp_offset: int, status: int) -> None:
    """Each field is checked, and a refused queue does not exist."""
    async with machine(make_function(limits=LIMITS)) as m:
        address = m.driver.alloc(4096) + prp_offset
        assert status == await failure(m, CREATE_CQ, prp1=address, cdw10=cdw10, cdw11=cdw11)
        assert 2 == len(m.function.controller.state.completion_queues)


@pytest.mark.parametrize(
    ("cdw10", "cdw11", "prp_offset", "status"),
    [
        (0x001F_0000, 0x0001_0001, 0, 0x101),
        (0x001F_0001, 0x0001_0001, 0, 0x101),
        (0x001F_0005, 0x0001_0001, 0, 0x101),
        (0x0000_0002, 0x0001_0001, 0, 0x102),
        (0x0040_0002, 0x0001_0001, 0, 0x102),
        (0x001F_0002, 0x0002_0001, 0, 0x100),  # no such completion queue
        (0x001F_0002, 0x0000_0001, 0, 0x101),  # the admin completion queue
        (0x001F_0002, 0x0005_0001, 0, 0x101),  # beyond the limit
        (0x001F_0002, 0x0001_0000, 0, 0x002),
        (0x001F_0002, 0x0001_0001, 512, 0x013),
    ],
)
async def test_create_submission_queue_errors(cdw10: int, cdw11: int, prp_offset: int, status: int) -> None:
    """Each field is checked, and a refused queue does not exist."""
    async with machine(make_function(limits=LIMITS)) as m:
        address = m.driver.alloc(4096) + prp_offset
        assert status == await failure(m, CREATE_SQ, prp1=address, cdw10=cdw10, cdw11=cdw11)
        assert 2 == len(m.function.controller.state.submission_queues)


async def test_queue_entry_sizes_must_be_configured() -> None:
    """I/O queues need CC.IOSQES and CC.IOCQES."""
    async with machine(io_queue=False) as m:
        m.driver.write32(0x14, 0x1)
        address = m.driver.alloc(4096)
        assert 0x102 == await failure(m, CREATE_CQ, prp1=address, cdw10=0x1F0001, cdw11=3)


async def test_delete_queues() -> None:
    """Queues are deleted in order only, and can be created again with new memory."""
    async with machine() as m:
        assert 0x10C == await failure(m, DELETE_CQ, cdw10=1)
        assert 0x101 == await failure(m, DELETE_SQ, cdw10=2)
        assert 0x101 == await failure(m, DELETE_SQ, cdw10=0)
        assert 0x101 == await failure(m, DELETE_CQ, cdw10=0)
        await m.driver.admin(DELETE_SQ, cdw10=1)
        assert 0x101 == await failure(m, DELETE_SQ, cdw10=1)
        await m.driver.admin(DELETE_CQ, cdw10=1)
        assert 0x101 == await failure(m, DELETE_CQ, cdw10=1)
        await m.driver.create_queue()
        assert bytes(512) == await m.driver.read_blocks(0, 1)


async def test_two_submission_queues_share_a_completion_queue() -> None:
    """Completions name the queue that their command came from."""
    async with machine() as m:
        driver = m.driver
        sq = driver.alloc(4096)
        await driver.admin(CREATE_SQ, prp1=sq, cdw10=0x1F0002, cdw11=0x0001_0001)
        m.host.memory.poke(sq, struct.pack("<BBHI56x", 0, 0, 77, 1))
        driver.doorbell(4, 1)
        while (entry := driver.completion_entry(m.io))[14] & 1 != m.io.phase:
            await m.host.interrupt()
        assert (0, 0, 1, 2, 77, 1) == struct.unpack("<IIHHHH", entry)


async def test_abort() -> None:
    """What has not begun is aborted; what runs, or is not there, is not."""
    async with machine() as m:
        driver = m.driver
        assert 1 == await driver.admin(ABORT, cdw10=5 << 16 | 1)
        assert 1 == await driver.admin(ABORT, cdw10=5 << 16 | 3)
        buffer = driver.alloc(4096)
        gate = m.host.memory.hold(buffer, 4096)
        running = driver.submit(m.io, 2, nsid=1, prp1=buffer)
        assert 1 == await driver.admin(ABORT, cdw10=running << 16 | 1)
        gate.set()
        await driver.wait(m.io, running)


async def test_abort_of_an_event_request() -> None:
    """A waiting event request is completed with Abort Requested."""
    async with machine() as m:
        admin = m.driver.queues[0]
        request = m.driver.submit(admin, 0x0C)
        assert 0 == await m.driver.admin(ABORT, cdw10=request << 16)
        with pytest.raises(CommandFailed) as caught:
            await m.driver.wait(admin, request)
        assert (0x07, False) == (caught.value.status, caught.value.do_not_retry)


async def test_command_id_in_use() -> None:
    """A second command with the id of one that is under way is refused; the first is not disturbed."""
    async with machine() as m:
        driver = m.driver
        buffer = driver.alloc(4096)
        gate = m.host.memory.hold(buffer, 4096)
        driver.submit(m.io, 2, nsid=1, prp1=buffer, cid=9)
        for _ in range(2):
            driver.submit(m.io, 0, nsid=1, cid=9)
            with pytest.raises(CommandFailed) as caught:
                await driver.wait(m.io, 9)
            assert 0x03 == caught.value.status
        gate.set()
        assert 0 == await driver.wait(m.io, 9)
