"""Valid streams with hostile numbers: a snapshot is refused with words, or the function that takes it lives on."""

from __future__ import annotations

import copy
from typing import Any

import msgpack
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmebed import machine, make_function
from nvmebed.moving import agent_function, moved_driver, session_of, spare
from vfiouser_oob.devices.model import ResetKind
from vfiouser_soc.nvme import snapshot, snapshot_reader
from vfiouser_soc.nvme.function import NvmeFunction
from vfiouser_soc.nvme.spec import LogPage
from vfiouser_soc.nvme.stores import MemoryStore

CMB = 2 << 20
#: Numbers at and beyond the edges of what fields have room for.
NUMBERS = [
    *(number + d for shift in (0, 8, 12, 15, 16, 31, 32, 63) for d in (-1, 0, 1) if (number := 1 << shift)),
    -1,
    (1 << 64) - 1,
]
CHANGE = st.tuples(st.integers(0, 1 << 16), st.one_of(st.sampled_from(NUMBERS), st.integers(0, (1 << 64) - 1)))
CHANGES = st.lists(CHANGE, min_size=1, max_size=4)


async def busy_snapshot(source: NvmeFunction) -> dict[str, Any]:
    """The snapshot of a function with queues, commands, completions, events, errors and kept writes."""
    async with machine(source, io_queue=False) as m:
        driver = m.driver
        await driver.create_queue(1, 8)
        await driver.create_queue(2, 8)
        for feature, value in ((0x04, 300), (0x05, 7), (0x07, 0x1E001E), (0x08, 0x101), (0x09, 1), (0x0B, 0x1FF)):
            cid = driver.submit(driver.queues[0], 0x09, nsid=1 if feature == 5 else 0, cdw10=feature, cdw11=value)
            while cid not in driver.queues[0].done:
                driver.collect(driver.queues[0])
                await trio.lowlevel.checkpoint()
        driver.submit(driver.queues[0], 0x0C)
        page = driver.alloc(4096)
        m.host.memory.hold(page, 4096)
        for _ in range(3):
            driver.submit(driver.queues[1], 0x02, nsid=1, prp1=page)
        for number in range(9):
            driver.submit(driver.queues[2], 0x80 + number % 2, nsid=1)
            if number == 6:
                await trio.testing.wait_all_tasks_blocked()
                driver.collect(driver.queues[2], acknowledge=False)
        function = agent_function(source, drain_s=0.0)
        session = await session_of(function)
        await session.stop()
        source.region_write(0, 0x0C, b"\1\0\0\0")
        source.region_write(0, 0x1010, b"\2\0\0\0")
        raw: dict[str, Any] = msgpack.unpackb(snapshot.pack(snapshot.capture(source)))
    return raw


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every number, flag and blob of a snapshot, by how to get there."""
    if isinstance(value, dict):
        return [found for key in sorted(value) for found in places(value[key], (*path, key))]
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in places(item, (*path, index))] or [path]
    return [path]


def change(raw: dict[str, Any], path: tuple[Any, ...], number: int) -> None:
    """Put a number where another one was, or over some bytes of a blob."""
    holder: Any = raw
    for step in path[:-1]:
        holder = holder[step]
    old = holder[path[-1]]
    if isinstance(old, bytes) and old:
        at = number % len(old) & ~3
        holder[path[-1]] = old[:at] + (number >> 3 & 0xFFFF_FFFF).to_bytes(4, "little") + old[at + 4 :]
    else:
        holder[path[-1]] = number


SNAPSHOTS: dict[bool, dict[str, Any]] = {}


async def take(polled: bool, changes: list[tuple[int, int]]) -> bool:
    """Load a changed snapshot; returns whether it was taken."""
    if polled not in SNAPSHOTS:
        SNAPSHOTS[polled] = await busy_snapshot(make_function(MemoryStore(1 << 20), polled=polled, cmb_size=CMB))
    raw = copy.deepcopy(SNAPSHOTS[polled])
    spots = places(raw)
    for where, number in changes:
        change(raw, spots[where % len(spots)], number)
    target = make_function(MemoryStore(1 << 20), polled=polled, cmb_size=CMB)
    first = make_function(polled=polled, cmb_size=CMB)
    async with machine(first, io_queue=False) as m, spare(target, m) as host:
        session = await session_of(agent_function(target))
        await session.stop()
        before = snapshot.pack(snapshot.capture(target))
        try:
            parsed = snapshot_reader.parse(msgpack.packb(raw), target)
        except snapshot_reader.BadSnapshot:
            assert before == snapshot.pack(snapshot.capture(target))
            return False
        snapshot.apply(parsed, target)
        snapshot_reader.parse(snapshot.pack(snapshot.capture(target)), target)  # what was taken can be given
        await session.resume()
        driver = moved_driver(m, target, host)
        driver.pci_command(6)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        for number in LogPage:
            assert target.controller.logs.page(number)
        driver.function.region_read(0, 0, 0x4000)
        for doorbell in range(8):
            driver.doorbell(doorbell, 3)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        target.config.reset()
        target.reset(ResetKind.DEVICE)
        driver.pci_command(6)
        driver.enable_msix()
        await driver.enable()
        await driver.create_queue()
        assert bytes(512) == await driver.read_blocks(0, 1)
    return True


@settings(max_examples=200, deadline=None)
@given(polled=st.booleans(), changes=CHANGES)
def test_hostile_numbers(polled: bool, changes: list[tuple[int, int]]) -> None:
    """Any numbers of a snapshot can be replaced by any others."""
    trio.run(take, polled, changes)


async def test_an_unchanged_snapshot_is_taken() -> None:
    """The snapshots that the numbers of are changed are good ones."""
    assert await take(False, [])
    assert await take(True, [])
