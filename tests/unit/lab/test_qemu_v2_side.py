"""QEMU's client with migration against a scripted function: what it asks in which order, and what ends it."""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakeserver import Answer, connected
from scriptedfunction import ScriptedFunction
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.vmm.qemu_v2 import QemuV2Habits, QemuV2Side
from vfiouser_oob.lab.vmm.side import MigrationFailed, MigrationLost
from vfiouser_protocol.constants import DeviceState, MigrationFlags
from vfiouser_protocol.errors import ReplyError
from vfiouser_protocol.session import CommandReceived

_SET_STATE = 0x20002
ALL = MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY | MigrationFlags.P2P


class WithoutDescriptors(ScriptedFunction):
    """Says -1 for data_fd."""

    def feature(self, event: CommandReceived) -> Answer:
        """DEVICE_FEATURE."""
        answer = super().feature(event)
        if struct.unpack_from("<I", event.payload, 4)[0] == _SET_STATE:
            answer.payload = answer.payload[:12] + b"\xff" * 4
        return answer


@asynccontextmanager
async def side_of(function: ScriptedFunction, habits: QemuV2Habits | None = None) -> AsyncIterator[QemuV2Side]:
    """The client's view of the function."""
    try:
        async with connected() as (client, server):
            function.serve(server)
            yield QemuV2Side(client, habits)
    finally:
        function.close()


async def test_order_of_a_save() -> None:
    """Two checks, the size, PRE_COPY; a piece and a size per round; the stop, the size, pieces to the end, STOP."""
    function = WithoutDescriptors([b"early"], [b"late"])
    async with side_of(function) as side:
        assert await side.save_setup()
        assert (b"early", True) == await side.read()
        await side.stop()
        assert (b"late", False) == await side.read()
        assert (b"", True) == await side.read()
        await side.save_cleanup()
        await side.stop_logging()
    size = "GET MIG_DATA_SIZE"
    expected = ["GET MIGRATION", "PROBE DMA_LOGGING_START", size, "→ PRE_COPY", size, "read 5", "→ STOP_COPY", size]
    assert [*expected, "read 4", "read 0", "→ STOP"] == [step.split(" of ")[0] for step in function.steps]


@pytest.mark.parametrize("begin", [DeviceState.RUNNING, DeviceState.PRE_COPY])
async def test_p2p_before_each_change(begin: DeviceState) -> None:
    """A VM of several functions goes through the P2P states, with and without pre-copy, when it stops and goes on."""
    function = WithoutDescriptors(flags=ALL)
    async with side_of(function, QemuV2Habits(several=True)) as side:
        if begin is DeviceState.PRE_COPY:
            await side.save_setup()
        function.steps.clear()
        await side.stop()
        await side.cancel()
    there = {
        DeviceState.RUNNING: ["→ RUNNING_P2P", "→ STOP", "→ STOP_COPY"],
        DeviceState.PRE_COPY: ["→ PRE_COPY_P2P", "→ STOP_COPY"],
    }[begin]
    states = [step for step in function.steps if step.startswith("→")]
    assert [*there, "→ STOP", "→ RUNNING_P2P", "→ RUNNING"] == states


async def test_a_descriptor_ends_it() -> None:
    """A data_fd other than -1 is taken for a descriptor, and the next SET is not even sent."""
    function = ScriptedFunction()
    async with side_of(function) as side:
        await side.vm_runs(False)
        with pytest.raises(MigrationFailed, match="a data_fd came with the last state"):
            await side.vm_runs(True)
    assert ["→ STOP"] == function.steps


async def test_without_a_size_it_never_ends() -> None:
    """Where MIG_DATA_SIZE is refused, 100 GiB are assumed."""
    function = WithoutDescriptors([b"x"], fails={"GET MIG_DATA_SIZE": errno.EINVAL})
    async with side_of(function) as side:
        await side.save_setup()
        with pytest.raises(MigrationFailed, match="100 GiB"):
            await side.read()


async def test_a_refused_state_is_followed_by_a_reset() -> None:
    """The function is reset; where that fails as well, the VM is lost."""
    function = WithoutDescriptors(fails={"→ STOP": errno.EIO})
    async with side_of(function) as side:
        with pytest.raises(ReplyError):
            await side.vm_runs(False)
        assert ["→ STOP", "reset"] == function.steps
        function.fails["reset"] = errno.EIO
        with pytest.raises(MigrationLost, match="the VM is aborted"):
            await side.vm_runs(False)


class FirstPageDirty(WithoutDescriptors):
    """Says of each range that its first page was written."""

    def feature(self, event: CommandReceived) -> Answer:
        """DEVICE_FEATURE."""
        iova, length, page_size = struct.unpack_from("<QQQ", event.payload.ljust(32, b"\0"), 8)
        self.dirty = b"\1".ljust(-(-length // page_size // 64) * 8, b"\0") if page_size else b""
        self.steps.append(f"{iova >> 12:#x}+{length >> 12:#x}")
        return super().feature(event)


async def test_dirty_pages_of_odd_ranges() -> None:
    """The bits of all ranges come together at their places, wherever those begin inside a byte."""
    function = FirstPageDirty()
    memory = ClientMemory(0x180 << 12, 1 << 20)
    async with side_of(function) as side:
        found = int.from_bytes(await side.dirty(memory), "little")
    memory.close()
    assert {0, 0xC3, 0xE8, 0xF0, 0x100} == {bit for bit in range(0x180) if found >> bit & 1}
    ranges = [step for step in function.steps if "+" in step]
    assert ["0x100+0xc3", "0x1c3+0x25", "0x1e8+0x8", "0x1f0+0x10", "0x200+0x80"] == ranges


async def test_a_short_report_is_noticed() -> None:
    """A bitmap of another size than the range's is no report."""
    function = WithoutDescriptors(dirty=bytes(7))
    memory = ClientMemory(0x40 << 12)
    async with side_of(function) as side:
        with pytest.raises(MigrationFailed, match="7 bytes of bitmap, not 8"):
            await side.dirty(memory)
    memory.close()
