"""Random commands against a reference that is a bytearray."""

from __future__ import annotations

import random

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmebed import CommandFailed, Machine, machine, make_function
from vfiouser_oob.devices.model import ResetKind
from vfiouser_soc.nvme.stores import MemoryStore

BLOCKS = 256

operations = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "trim", "compare", "reset"]),
        st.integers(0, BLOCKS + 4),
        st.integers(1, 64),
        st.integers(0, 1023).map(lambda number: number * 4),
        st.integers(0, 255),
    ),
    max_size=25,
)


async def apply(m: Machine, reference: bytearray, operation: tuple[str, int, int, int, int]) -> None:
    """Do one operation on both and compare."""
    name, slba, count, offset, seed = operation
    driver = m.driver
    start, size = slba * 512, count * 512
    driver._next = 0x20_0000  # buffers are used again for every operation
    fits = slba + count <= BLOCKS
    outcome = 0
    try:
        if name == "read":
            assert reference[start : start + size] == await driver.read_blocks(slba, count, offset=offset)
        elif name == "write":
            data = random.Random(seed).randbytes(size)
            await driver.write_blocks(slba, data, offset=offset)
            reference[start : start + size] = data
        elif name == "zero":
            await driver.io(8, cdw10=slba, cdw12=count - 1)
            reference[start : start + size] = bytes(size)
        elif name == "trim":
            page = driver.alloc(4096)
            m.host.memory.poke(page, bytes(4) + count.to_bytes(4, "little") + slba.to_bytes(8, "little"))
            await driver.io(9, prp1=page, cdw11=4)
            reference[start : start + size] = bytes(size)
        elif name == "compare":
            prp1, prp2, pieces = driver.prps(size, offset)
            driver.scatter(pieces, bytes(reference[start : start + size]).ljust(size, b"\0"))
            await driver.io(5, prp1=prp1, prp2=prp2, cdw10=slba, cdw12=count - 1)
        else:
            driver._next = 0x10_0000
            await driver.disable()
            await driver.enable()
            await driver.create_queue()
            return
    except CommandFailed as error:
        outcome = error.status
    assert (0 if fits else 0x80) == outcome


@settings(max_examples=40, deadline=None)
@given(operations, st.booleans())
def test_random_commands_match_a_bytearray(steps: list[tuple[str, int, int, int, int]], yields: bool) -> None:
    """Whatever is done in whatever order, the namespace holds what a bytearray would; resets lose nothing."""

    async def run() -> None:
        async with machine(make_function(MemoryStore(BLOCKS * 512))) as m:
            m.host.memory.yields = yields
            reference = bytearray(BLOCKS * 512)
            for step in steps:
                await apply(m, reference, step)
            for slba in range(0, BLOCKS, 64):
                await apply(m, reference, ("read", slba, 64, 0, 0))

    trio.run(run)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 0x3FF8), st.binary(min_size=1, max_size=16)), max_size=40),
    st.binary(max_size=256),
)
def test_any_register_writes_leave_a_controller_that_can_be_reset(
    writes: list[tuple[int, bytes]], garbage: bytes
) -> None:
    """Nonsense in registers, doorbells, MSI-X table and queues never ends the model; a reset helps."""

    async def run() -> None:
        async with machine() as m:
            m.host.memory.poke(m.io.sq, garbage)
            m.host.memory.poke(m.driver.queues[0].sq, garbage)
            for offset, data in writes:
                m.function.region_write(0, offset, data[: 0x4000 - offset])
                await trio.lowlevel.checkpoint()
            m.function.config.reset()
            m.function.reset(ResetKind.DEVICE)
            m.driver.pci_command(6)
            m.driver.enable_msix()
            m.driver._next = 0x40_0000
            await m.driver.enable()
            await m.driver.create_queue()
            assert 512 == len(await m.driver.read_blocks(0, 1))

    trio.run(run)
