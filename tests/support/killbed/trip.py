"""A VM on its way from one host to the other, that can be held in each phase."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path

import trio

from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.lab.vmm.attachment import Attachment
from vfiouser_oob.lab.vmm.side import Generation, MigrationSide
from vfiouser_oob.lab.vmm.voyage import SideOptions, open_side

_MEMORY_BASE, _MEMORY_SIZE = 0x1_0000_0000, 2 << 20
_CHUNK = 64 << 10
_DATA = bytes(range(256)) * 16


class Phase(Enum):
    """Where a migration is held."""

    #: The function runs at the source and is being copied.
    PRE_COPY = "pre-copy"
    #: It is stopped, and the client has a part of its state.
    STOP_COPY = "stop-copy"
    #: The client has all of its state, and the destination a part of it.
    LOADING = "loading"
    #: The destination has all of it and was not told to run yet.
    LOADED = "loaded"

    @property
    def handed(self) -> bool:
        """Whether the source has handed its trailer over: somebody may run its state elsewhere."""
        return self in (Phase.LOADING, Phase.LOADED)


class Trip:
    """The VMM; `open` makes one.

    Args:
        driver: of the guest, at the source.
        place: where it is.
        source: the migration interface there.
        target: where it is to go.
        destination: the migration interface there.
    """

    def __init__(
        self,
        driver: NvmeDriver,
        place: Attachment,
        source: MigrationSide,
        target: Attachment,
        destination: MigrationSide,
    ) -> None:
        self._driver = driver
        self.place = place
        self.source = source
        self.target = target
        self.destination = destination

    @classmethod
    @asynccontextmanager
    async def open(cls, here: Path, there: Path, generation: Generation) -> AsyncIterator[Trip]:
        """Attach both functions, with a driver at the source; they are let go as a VMM does that exits, unasked."""
        options = SideOptions(chunk_size=_CHUNK)
        with (
            ClientMemory(_MEMORY_SIZE, _MEMORY_BASE) as memory,
            ClientMemory(_MEMORY_SIZE, _MEMORY_BASE) as other,
            trio.CancelScope() as leaving,
        ):
            async with (
                Attachment.open(here, memory) as place,
                NvmeDriver.open(place.client, memory, pool_pages=64) as driver,
                Attachment.open(there, other) as target,
            ):
                await driver.write(0, _DATA)
                source = await open_side(generation, place.client, options)
                destination = await open_side(generation, target.client, options)
                try:
                    yield cls(driver, place, source, target, destination)
                finally:
                    source.close()
                    destination.close()
                leaving.cancel()
                await trio.sleep_forever()

    async def go(self, phase: Phase) -> None:
        """Migrate as far as the phase."""
        await self.destination.load_setup()
        assert await self.source.save_setup()
        await self._carry()
        if phase is Phase.PRE_COPY:
            return
        await self.source.stop()
        await self._carry()
        if phase is Phase.STOP_COPY:
            return
        rest = []
        while not (portion := await self.source.read()).last:
            rest.append(portion.data)
        await self.source.save_cleanup()
        assert 1 < len(rest)
        for data in rest if phase is Phase.LOADED else rest[: len(rest) // 2]:
            await self.destination.load(data)

    async def _carry(self) -> None:
        portion = await self.source.read()
        assert portion.data
        assert not portion.last
        await self.destination.load(portion.data)

    async def verify_io(self) -> None:
        """The guest's driver at the source goes on with the queues that it has."""
        assert _DATA == await self._driver.read(0, len(_DATA) // 512)
        await self._driver.write(8, _DATA)
        assert _DATA == await self._driver.read(8, len(_DATA) // 512)
