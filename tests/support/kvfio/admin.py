"""The admin queue of an NVMe controller behind our client, with every step in the hands of the test."""

from __future__ import annotations

import struct

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.nvme.layout import ACQ, AQA, ASQ, CAP, CC, CC_ENABLE, CC_ENTRY_SIZES, CSTS, DOORBELLS, SQE
from vfiouser_protocol.constants import RegionIndex

ENTRIES = 8
IDENTIFY = 6
COMMAND = 4
MEMORY_AND_BUS_MASTER = 6
WAIT_S = 10.0
_COMPLETION_STATUS = struct.Struct("<H")


class AdminQueue:
    """A queue pair in client memory that is mapped for the device already.

    Args:
        client: connected to the function.
        memory: the client's memory.
        bar: BAR 0.
    """

    def __init__(self, client: Client, memory: ClientMemory, bar: MappedRegion) -> None:
        self.client = client
        self.memory = memory
        self.bar = bar
        self._submissions = memory.allocate(4096)
        self._completions = memory.allocate(4096)
        self.data = memory.allocate(4096)
        self._tail = self._head = 0
        self._stride = 4

    async def enable(self, *, intx: bool = False) -> None:
        """Switch memory, bus mastering and the controller on."""
        command = MEMORY_AND_BUS_MASTER | (0 if intx else 0x400)
        await self.client.region_write(RegionIndex.CONFIG, COMMAND, command.to_bytes(2, "little"))
        await self.bar.write(CC, 4, 0)
        await self.wait(CSTS, 1, 0)
        for page in (self._submissions, self._completions, self.data):
            with self.memory.view(page, 4096) as view:
                view[:] = bytes(4096)
        self._tail = self._head = 0
        self._stride = 4 << (await self.bar.read(CAP, 8) >> 32 & 0xF)
        await self.bar.write(AQA, 4, (ENTRIES - 1) << 16 | (ENTRIES - 1))
        await self.bar.write(ASQ, 8, self._submissions)
        await self.bar.write(ACQ, 8, self._completions)
        await self.bar.write(CC, 4, CC_ENTRY_SIZES | CC_ENABLE)
        await self.wait(CSTS, 1, 1)

    async def wait(self, register: int, mask: int, value: int) -> None:
        """Wait until a register's bits are so."""
        with trio.fail_after(WAIT_S):
            while await self.bar.read(register, 4) & mask != value:
                await trio.sleep(0.001)

    async def submit(self) -> None:
        """Ask for the controller's identity, and do not wait."""
        entry = SQE.pack(IDENTIFY, 0, self._tail, 0, 0, 0, self.data, 0, 1, 0, 0, 0, 0, 0)
        with self.memory.view(self._submissions + self._tail * SQE.size, SQE.size) as view:
            view[:] = entry
        self._tail = (self._tail + 1) % ENTRIES
        await self.bar.write(DOORBELLS, 4, self._tail)

    async def reap(self, *, seconds: float = WAIT_S) -> bytes:
        """Wait for the completion and return what was identified.

        Raises:
            trio.TooSlowError: there was none.
        """
        assert 0 == await self.status(seconds=seconds), "IDENTIFY failed"
        with self.memory.view(self.data, 4096) as view:
            return bytes(view)

    async def status(self, *, seconds: float = WAIT_S) -> int:
        """Wait for the completion and return its status field; 0 is success.

        Raises:
            trio.TooSlowError: there was none.
        """
        entry = self._completions + self._head * 16 + 14
        with trio.fail_after(seconds):
            while not self.memory.unpack(_COMPLETION_STATUS, entry)[0] & 1:
                await trio.sleep(0.001)
        status: int = self.memory.unpack(_COMPLETION_STATUS, entry)[0] >> 1
        self.memory.pack(_COMPLETION_STATUS, entry, 0)
        self._head += 1
        assert self._head < ENTRIES, "enable again before the queue wraps"
        await self.bar.write(DOORBELLS + self._stride, 4, self._head)
        return status

    async def identify(self) -> bytes:
        """Return the controller's identity."""
        await self.submit()
        return await self.reap()
