"""Features, log pages and asynchronous events."""

from __future__ import annotations

import struct

import pytest

from nvmebed import CommandFailed, Machine, machine, make_function
from vfiouser_soc.nvme.config import ControllerLimits

ARBITRATION, POWER, TEMPERATURE, RECOVERY, CACHE, QUEUES = 1, 2, 4, 5, 6, 7
COALESCING, VECTOR, ATOMICITY, EVENTS, TIMESTAMP = 8, 9, 0xA, 0xB, 0xE
DEFAULT, SAVED, SUPPORTED = 1, 2, 3
ERROR_LOG, SMART_LOG, FIRMWARE_LOG, CHANGED_LOG, COMMANDS_LOG = 1, 2, 3, 4, 5
EVENT_REQUEST = 0x0C


async def set_failure(m: Machine, feature: int, value: int = 0, *, nsid: int = 0, save: bool = False) -> int:
    """Set a feature, which must fail; returns the status."""
    with pytest.raises(CommandFailed) as caught:
        await m.driver.set_feature(feature, value, nsid=nsid, save=save)
    return caught.value.status


async def get_failure(m: Machine, feature: int, **options: int) -> int:
    """Get a feature, which must fail; returns the status."""
    with pytest.raises(CommandFailed) as caught:
        await m.driver.get_feature(feature, **options)
    return caught.value.status


@pytest.mark.parametrize(
    ("feature", "value", "kept", "nsid"),
    [
        (ARBITRATION, 0xFFFF_FFFF, 0xFFFF_FF07, 0),
        (POWER, 0x60, 0x60, 0),
        (TEMPERATURE, 340, 340, 0),
        (RECOVERY, 0x1234, 0x1234, 1),
        (CACHE, 0, 0, 0),
        (COALESCING, 0x0A05, 0x0A05, 0),
        (ATOMICITY, 1, 1, 0),
        (EVENTS, 0x1FF, 0x1FF, 0),
    ],
)
async def test_set_and_get(feature: int, value: int, kept: int, nsid: int) -> None:
    """A value that was set is current until the next controller reset, and no longer."""
    async with machine() as m:
        default = await m.driver.get_feature(feature, nsid=nsid)
        assert default == await m.driver.get_feature(feature, select=DEFAULT, nsid=nsid)
        assert default != kept
        await m.driver.set_feature(feature, value, nsid=nsid)
        assert kept == await m.driver.get_feature(feature, nsid=nsid)
        assert default == await m.driver.get_feature(feature, select=DEFAULT, nsid=nsid)
        assert default == await m.driver.get_feature(feature, select=SAVED, nsid=nsid)
        await m.driver.disable()
        await m.driver.enable()
        assert default == await m.driver.get_feature(feature, nsid=nsid)


async def test_saved_value_survives_a_reset() -> None:
    """Save makes a value the one after a controller reset; the capability says that it can be saved."""
    async with machine() as m:
        assert 0b101 == await m.driver.get_feature(ARBITRATION, select=SUPPORTED)
        assert 0b100 == await m.driver.get_feature(POWER, select=SUPPORTED)
        assert 0b111 == await m.driver.get_feature(RECOVERY, select=SUPPORTED)
        await m.driver.set_feature(ARBITRATION, 3, save=True)
        await m.driver.set_feature(ARBITRATION, 4)
        assert 4 == await m.driver.get_feature(ARBITRATION)
        assert 3 == await m.driver.get_feature(ARBITRATION, select=SAVED)
        await m.driver.disable()
        await m.driver.enable()
        assert 3 == await m.driver.get_feature(ARBITRATION)


async def test_feature_errors() -> None:
    """Each misuse has its own status."""
    async with machine() as m:
        assert 0x02 == await set_failure(m, 0x7F)
        assert 0x02 == await get_failure(m, 0x7F)
        assert 0x02 == await get_failure(m, ARBITRATION, select=4)
        assert 0x10D == await set_failure(m, POWER, save=True)
        assert 0x10F == await set_failure(m, ARBITRATION, nsid=1)
        assert 0x0B == await set_failure(m, ARBITRATION, nsid=9)
        assert 0x0B == await set_failure(m, RECOVERY, nsid=9)
        assert 0x0B == await get_failure(m, RECOVERY, nsid=0xFFFFFFFF)
        assert 0x02 == await set_failure(m, RECOVERY, 1 << 16, nsid=1)
        assert 0x02 == await set_failure(m, POWER, 1)
        assert 0x02 == await get_failure(m, TEMPERATURE, selector=2 << 16)
        assert 0x02 == await get_failure(m, VECTOR, selector=32)


async def test_number_of_queues() -> None:
    """As many queues are granted as there are; they are the limit, and fixed once one exists."""
    limits = ControllerLimits(io_queues=8, vectors=9)
    async with machine(make_function(limits=limits), io_queue=False) as m:
        assert 0x0007_0007 == await m.driver.get_feature(QUEUES)
        assert 0x02 == await set_failure(m, QUEUES, 0xFFFF)
        assert 0x0007_0002 == await m.driver.set_feature(QUEUES, 0x0020_0002)
        await m.driver.create_queue(3)
        assert 0x0C == await set_failure(m, QUEUES, 0x0001_0001)
        with pytest.raises(CommandFailed) as caught:
            await m.driver.create_queue(4)
        assert 0x101 == caught.value.status
        assert 0x0007_0002 == await m.driver.get_feature(QUEUES)


async def test_interrupt_vector_configuration() -> None:
    """Each vector has its own setting, and the answer names the vector."""
    async with machine() as m:
        await m.driver.set_feature(VECTOR, 1 << 16 | 3)
        assert 1 << 16 | 3 == await m.driver.get_feature(VECTOR, selector=3)
        assert 4 == await m.driver.get_feature(VECTOR, selector=4)


async def test_timestamp_runs_on() -> None:
    """The host's time comes back, increased by what has passed since, marked as set by the host."""
    async with machine() as m:
        page = m.driver.alloc(4096)
        await m.driver.admin(0x0A, prp1=page, cdw10=TIMESTAMP)
        assert bytes(8) == m.host.memory.peek(page, 8)
        m.host.memory.poke(page, (1_700_000_000_000).to_bytes(8, "little"))
        await m.driver.admin(0x09, prp1=page, cdw10=TIMESTAMP)
        await m.driver.admin(0x0A, prp1=page, cdw10=TIMESTAMP)
        data = m.host.memory.peek(page, 8)
        assert 0 <= int.from_bytes(data[:6], "little") - 1_700_000_000_000 < 60_000
        assert 0b010 == data[6]


async def test_smart_log_counts() -> None:
    """Transfers and commands are counted in the units of the specification."""
    async with machine() as m:
        await m.driver.write_blocks(0, bytes(512 * 1001))
        await m.driver.read_blocks(0, 2)
        await m.driver.read_blocks(0, 3)
        log = await m.driver.log_page(SMART_LOG, 512)
        assert (0, 311, 100) == (log[0], int.from_bytes(log[1:3], "little"), log[3])
        counts = [int.from_bytes(log[at : at + 16], "little") for at in (32, 48, 64, 80, 112, 176)]
        assert [1, 2, 2, 1, 1, 0] == counts


async def test_error_log_has_the_newest_first() -> None:
    """Every failed command is in the error log with its queue, id, status and place of the fault."""
    async with machine() as m:
        with pytest.raises(CommandFailed):
            await m.driver.admin(0x7F, cid=0x123)
        with pytest.raises(CommandFailed):
            await m.driver.io(2, nsid=1, prp1=m.driver.alloc(4096), cdw10=0x9999_9999, cid=0x456)
        log = await m.driver.log_page(ERROR_LOG, 64 * 64)
        first, second = (struct.unpack_from("<QHHHHQI", log, at) for at in (0, 64))
        assert (2, 1, 0x456, 0x80, 0x9999_9999, 1) == (*first[:3], first[3] >> 1 & 0x7FF, first[5], first[6])
        assert (1, 0, 0x123, 0x01, 0) == (*second[:3], second[3] >> 1 & 0x7FF, second[4])
        assert bytes(62 * 64) == log[128:]


async def test_firmware_and_commands_logs() -> None:
    """One active firmware slot; supported commands are flagged, and only those."""
    async with machine() as m:
        firmware = await m.driver.log_page(FIRMWARE_LOG, 512)
        assert (1, b"1.0     ") == (firmware[0], firmware[8:16])
        commands = await m.driver.log_page(COMMANDS_LOG, 4096)
        effects = struct.unpack("<1024I", commands)
        assert {0, 1, 2, 4, 5, 6, 8, 9, 10, 12} == {opcode for opcode in range(256) if effects[opcode]}
        assert {0: 1, 1: 3, 2: 1, 5: 1, 8: 3, 9: 3, 12: 1} == {
            opcode: effects[256 + opcode] for opcode in range(256) if effects[256 + opcode]
        }


async def test_log_page_offset_and_errors() -> None:
    """Parts of a page can be read; beyond its end there are zeros, and offsets must make sense."""
    async with machine() as m:
        whole = await m.driver.log_page(FIRMWARE_LOG, 512)
        assert whole[8:24] == await m.driver.log_page(FIRMWARE_LOG, 16, offset=8)
        assert whole[508:] + bytes(8) == await m.driver.log_page(FIRMWARE_LOG, 12, offset=508)
        for number, offset, status in ((0x7F, 0, 0x109), (FIRMWARE_LOG, 2, 0x02), (FIRMWARE_LOG, 516, 0x02)):
            with pytest.raises(CommandFailed) as caught:
                await m.driver.log_page(number, 16, offset=offset)
            assert status == caught.value.status
        with pytest.raises(CommandFailed) as caught:
            await m.driver.admin(2, prp1=m.driver.alloc(4096), cdw10=0xFFFF_0003, cdw11=2)
        assert 0x02 == caught.value.status


async def test_event_for_a_wrong_doorbell() -> None:
    """Doorbells of no queue and impossible values are reported once per reading of the error log."""
    async with machine() as m:
        admin = m.driver.queues[0]
        first, second = (m.driver.submit(admin, EVENT_REQUEST) for _ in range(2))
        m.driver.doorbell(2 * 9, 1)
        assert 0x01_00_00 == await m.driver.wait(admin, first)
        m.driver.doorbell(2, 64)
        await m.driver.identify(1)
        assert second not in admin.done
        await m.driver.log_page(ERROR_LOG, 64, retain=True)
        m.driver.doorbell(2, 64)
        await m.driver.identify(1)
        assert second not in admin.done
        await m.driver.log_page(ERROR_LOG, 64)
        m.driver.doorbell(2, 64)
        assert 0x01_01_00 == await m.driver.wait(admin, second)
        assert bytes(512) == await m.driver.read_blocks(0, 1)  # the queue goes on


@pytest.mark.parametrize("head", [1, 63, 64, 0xFFFF_FFFF])
async def test_impossible_completion_head_is_ignored(head: int) -> None:
    """A host cannot acknowledge what was never completed."""
    async with machine() as m:
        m.driver.doorbell(3, head)
        assert 1 == m.function.controller.state.counters.error_entries
        assert 0 == m.function.controller.state.completion_queues[1].head
        for _ in range(130):
            assert 0 == await m.driver.io(0)


async def test_events_wait_for_requests() -> None:
    """An event that came first is reported with the next request."""
    async with machine() as m:
        m.driver.doorbell(2 * 9, 1)
        assert 0x01_00_00 == await m.driver.admin(EVENT_REQUEST)


async def test_too_many_event_requests() -> None:
    """One more than AERL allows is refused."""
    async with machine() as m:
        admin = m.driver.queues[0]
        for _ in range(4):
            m.driver.submit(admin, EVENT_REQUEST)
        with pytest.raises(CommandFailed) as caught:
            await m.driver.admin(EVENT_REQUEST)
        assert 0x105 == caught.value.status


async def test_temperature_event() -> None:
    """A threshold below the temperature warns in the SMART log and, if asked for, by an event."""
    async with machine() as m:
        await m.driver.set_feature(TEMPERATURE, 300)
        assert 0b10 == (await m.driver.log_page(SMART_LOG, 512))[0]
        await m.driver.set_feature(EVENTS, 0b10)
        await m.driver.set_feature(TEMPERATURE, 301)
        assert 0x02_01_01 == await m.driver.admin(EVENT_REQUEST)
        await m.driver.set_feature(TEMPERATURE, 400)
        assert 0 == (await m.driver.log_page(SMART_LOG, 512))[0]
        await m.driver.set_feature(TEMPERATURE, 400 | 0xF << 16)
        assert 400 == await m.driver.get_feature(TEMPERATURE, selector=1 << 16)


async def test_namespace_change_notice() -> None:
    """A changed namespace is announced if asked for, and listed until the list was read."""
    async with machine() as m:
        m.function.controller.namespace_changed(1)
        await m.driver.set_feature(EVENTS, 0x100)
        m.function.controller.namespace_changed(1)
        assert 0x04_00_02 == await m.driver.admin(EVENT_REQUEST)
        assert 1 == int.from_bytes((await m.driver.log_page(CHANGED_LOG, 4096))[:4], "little")
        assert 0 == int.from_bytes((await m.driver.log_page(CHANGED_LOG, 4096))[:4], "little")


async def test_event_requests_end_with_a_reset() -> None:
    """After a reset no old request is completed."""
    async with machine() as m:
        m.driver.submit(m.driver.queues[0], EVENT_REQUEST)
        await m.driver.identify(1)
        await m.driver.disable()
        await m.driver.enable()
        m.driver.doorbell(2 * 9, 1)
        await m.driver.identify(1)
        assert [] == list(m.function.controller.state.event_requests)
        assert 1 == len(m.function.controller.state.events)
