"""Puts function, host and driver together and runs them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypedDict

import trio

from nvmebed.driver import Driver, Queue
from nvmebed.host import Host
from vfiouser_soc.nvme.assembly import controller_identity, namespace_identity
from vfiouser_soc.nvme.config import ControllerLimits
from vfiouser_soc.nvme.doorbells import PollTimes
from vfiouser_soc.nvme.function import NvmeFunction, NvmeSettings
from vfiouser_soc.nvme.namespace import Namespace
from vfiouser_soc.nvme.stores import BackingStore, MemoryStore

MEMORY_AND_BUS_MASTER = 6


@dataclass
class Machine:
    """One function in a machine of its own."""

    function: NvmeFunction
    host: Host
    driver: Driver

    @property
    def io(self) -> Queue:
        """The first I/O queue pair."""
        return self.driver.queues[1]


class FunctionOptions(TypedDict, total=False):
    """What `make_function` can be told besides the stores."""

    limits: ControllerLimits | None
    polled: bool
    cmb_size: int
    lba_shift: int


def make_function(
    *stores: BackingStore,
    limits: ControllerLimits | None = None,
    polled: bool = False,
    cmb_size: int = 0,
    lba_shift: int = 9,
) -> NvmeFunction:
    """Make a function; without a store it gets 4 MiB of memory."""
    settings = NvmeSettings(
        controller_identity("bed"),
        limits or ControllerLimits(),
        polled_doorbells=polled,
        poll_times=PollTimes(),
        cmb_size=cmb_size,
    )
    namespaces = [
        Namespace(nsid, store, namespace_identity("bed", nsid), lba_shift)
        for nsid, store in enumerate(stores or (MemoryStore(4 << 20),), 1)
    ]
    return NvmeFunction(settings, namespaces)


@asynccontextmanager
async def machine(
    function: NvmeFunction | None = None, *, io_queue: bool = True, msix: bool = True, size: int = 8 << 20
) -> AsyncIterator[Machine]:
    """Run a function with its controller enabled and one I/O queue pair."""
    function = function or make_function()
    host = Host(function, size)
    driver = Driver(function, host)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(function.run)
            function.connected()
            driver.pci_command(MEMORY_AND_BUS_MASTER)
            if msix:
                driver.enable_msix()
            await driver.enable()
            if io_queue:
                await driver.create_queue()
            yield Machine(function, host, driver)
            nursery.cancel_scope.cancel()
    finally:
        function.close()
