"""A guest with serial ports on its way from one function to another, step by step or as a VMM does it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvfio.serial import SerialMachine
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.vmm.attachment import Attachment
from vfiouser_oob.lab.vmm.live import LiveMigration, LiveOptions, LiveProgress, MigrationPhase
from vfiouser_oob.lab.vmm.side import Generation, MigrationSide
from vfiouser_oob.lab.vmm.voyage import SideOptions, open_side
from vfiouser_protocol.constants import DeviceState

MIB = 1 << 20
IOVA = 0x4000_0000
#: So small that the state of a serial port takes several.
CHUNK = 64


async def state(connected: Client) -> DeviceState:
    """The state of the v2 generation."""
    return DeviceState(await connected.get_device_state())


class Pair:
    """A guest at the source, and a destination that waits for it."""

    def __init__(
        self, place: Attachment, target: Attachment, source: MigrationSide, destination: MigrationSide
    ) -> None:
        self.place = place
        self.target = target
        self.source = source
        self.destination = destination
        self.machine = SerialMachine(place.client)

    async def migrate(self, *, precopy: bool = True) -> LiveProgress:
        """Migrate as QEMU does it, and find everything again at the destination."""
        self.place.memory.view(IOVA, 4096)[:] = os.urandom(4096)
        live = LiveMigration(
            self.machine,
            self.source,
            self.destination,
            self.place.memory,
            self.target,
            options=LiveOptions(precopy=precopy, compare=True),
        )
        progress = await live.run()
        assert MigrationPhase.DONE is progress.phase
        assert progress.memory_equal
        assert precopy == ("pre-copy" in progress.state_bytes), progress.state_bytes
        await self.machine.verify()
        print(f"state={progress.state_bytes} rounds={progress.rounds} dirty={progress.dirty_by_device}")
        return progress

    async def carry(self) -> None:
        """Load one piece."""
        portion = await self.source.read()
        assert portion.data
        await self.destination.load(portion.data)

    async def abandon(self) -> None:
        """End what was being loaded: v2 has a way of its own, which the client falls back from to a reset."""
        if self.destination.generation is Generation.V2:
            await self.destination.cancel()
        else:
            await self.target.client.reset()
        assert DeviceState.RUNNING is await state(self.target.client)

    async def stream(self) -> bytes:
        """Stop the source, take its whole state, and let it go on."""
        await self.source.save_setup()
        await self.source.stop()
        stream = bytearray()
        while not (portion := await self.source.read()).last:
            stream += portion.data
        await self.source.cancel()
        return bytes(stream)


@asynccontextmanager
async def pair(here: Path, there: Path, generation: Generation) -> AsyncIterator[Pair]:
    """Attach both; the guest at the source has filled its ports, and those of the destination hold something else."""
    options = SideOptions(chunk_size=CHUNK)
    with ClientMemory(2 * MIB, IOVA) as memory, ClientMemory(2 * MIB, IOVA) as other:
        async with Attachment.open(here, memory) as place, Attachment.open(there, other) as target:
            source = await open_side(generation, place.client, options)
            destination = await open_side(generation, target.client, options)
            try:
                both = Pair(place, target, source, destination)
                await both.machine.fill()
                await SerialMachine(target.client, 0x11).fill()
                yield both
            finally:
                source.close()
                destination.close()
