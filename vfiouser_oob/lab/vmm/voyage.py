"""A VM with an NVMe driver that is moved from function to function, as often as one likes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.lab.vmm.attachment import Attachment
from vfiouser_oob.lab.vmm.live import LiveMigration, LiveOptions, LiveProgress, Observer
from vfiouser_oob.lab.vmm.nvme_machine import NvmeMachine
from vfiouser_oob.lab.vmm.qemu_v2 import QemuV2Habits, QemuV2Side
from vfiouser_oob.lab.vmm.side import Generation, MigrationSide
from vfiouser_oob.lab.vmm.v1 import V1Side
from vfiouser_oob.lab.vmm.v2 import DEFAULT_CHUNK, V2Side

_BASE = 0x1_0000_0000


@dataclass(frozen=True, slots=True, kw_only=True)
class SideOptions:
    """How one VMM uses a function's migration interface.

    Args:
        use_mapping: v1: whether the data section is mapped.
        natural: v1: whether accesses that are not mapped are made in pieces of at most 8 bytes.
        chunk_size: bytes of state at once; None: 1 MiB for v2, what fits for v1.
        qemu: v2: as QEMU's client with migration does it; None: as we do.
    """

    use_mapping: bool = True
    natural: bool = False
    chunk_size: int | None = None
    qemu: QemuV2Habits | None = None


async def open_side(
    generation: Generation, client: Client, options: SideOptions | None = None, memory: ClientMemory | None = None
) -> MigrationSide:
    """Open a function's migration interface.

    Args:
        generation: which one.
        client: connected to the function.
        options: how it is used.
        memory: guest memory that is mapped for it.

    Raises:
        MigrationFailed: there is none.
    """
    chosen = options or SideOptions()
    if generation is Generation.V2 and chosen.qemu is not None:
        return QemuV2Side(client, chosen.qemu, memory=memory)
    if generation is Generation.V2:
        return V2Side(client, chunk_size=chosen.chunk_size or DEFAULT_CHUNK)
    return await V1Side.open(
        client, use_mapping=chosen.use_mapping, chunk_size=chosen.chunk_size, natural=chosen.natural
    )


class Voyage:
    """The VM on its way; `open` makes one.

    Args:
        nursery: where the attachments are held.
        place: where the VM is.
        driver: what runs in it.
    """

    def __init__(self, nursery: trio.Nursery, place: Attachment, driver: NvmeDriver) -> None:
        self._nursery = nursery
        self._place = place
        self.driver = driver
        self._machine = NvmeMachine(driver)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | os.PathLike[str], *, memory_size: int = 16 << 20, io_queues: int = 2, pool_pages: int = 512
    ) -> AsyncIterator[Voyage]:
        """Start a VM at a function and let its driver bind to it; wherever it is in the end, it shuts down there.

        Args:
            path: the socket of the first function.
            memory_size: bytes of guest memory.
            io_queues: pairs of I/O queues.
            pool_pages: pages for transfers under way.
        """
        async with background_nursery() as nursery:
            memory = ClientMemory(memory_size, _BASE)
            place: Attachment | None = None
            try:
                place = await Attachment.start(nursery, path, memory)
                async with NvmeDriver.open(place.client, memory, io_queues=io_queues, pool_pages=pool_pages) as driver:
                    voyage = cls(nursery, place, driver)
                    try:
                        yield voyage
                    finally:
                        place = voyage._place
            finally:
                if place is not None:
                    with trio.CancelScope(shield=True):
                        await place.detach()
                    memory = place.memory
                memory.close()

    async def migrate(
        self,
        path: str | os.PathLike[str],
        generation: Generation,
        *,
        options: LiveOptions | None = None,
        observe: Observer | None = None,
        here: SideOptions | None = None,
        there: SideOptions | None = None,
    ) -> LiveProgress:
        """Migrate the VM to another function; if that fails, it stays where it is.

        Args:
            path: the socket of the destination's function.
            generation: of the interface that is used on both sides.
            options: how it is done.
            observe: told of every step.
            here: how the source's interface is used.
            there: how the destination's interface is used.
        """
        source, memory = self._place, ClientMemory(self._place.memory.size, _BASE)
        target: Attachment | None = None
        sides: list[MigrationSide] = []
        try:
            target = await Attachment.start(self._nursery, path, memory)
            for place, chosen in ((source, here), (target, there)):
                sides.append(await open_side(generation, place.client, chosen, place.memory))
            first, second = sides
            migration = LiveMigration(
                self._machine, first, second, source.memory, target, options=options, observe=observe
            )
            progress = await migration.run()
            self._place = target
        finally:
            for side in sides:
                side.close()
            left, unused = (source, source.memory) if self._place is target else (target, memory)
            if left is not None:
                with trio.CancelScope(shield=True):
                    await left.detach()
            unused.close()
        return progress
