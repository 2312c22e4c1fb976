"""A small NVMe driver over a vfio-user client: what a guest's driver does, for demo, benchmarks and tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.nvme.layout import (
    ACQ,
    AQA,
    ASQ,
    CAP,
    CC,
    CC_ENABLE,
    CC_ENTRY_SIZES,
    CC_SHUTDOWN_MASK,
    CC_SHUTDOWN_NORMAL,
    CSTS,
    CSTS_FATAL,
    CSTS_READY,
    CSTS_SHUTDOWN_COMPLETE,
    CSTS_SHUTDOWN_MASK,
    FEATURE_NUMBER_OF_QUEUES,
    PAGE_SIZE,
    QUEUE_CONTIGUOUS,
    QUEUE_INTERRUPTS,
    AdminOpcode,
    ControllerCapabilities,
    DriverError,
    IdentifyController,
    IdentifyNamespace,
    IdentifyWhat,
    IoOpcode,
)
from vfiouser_oob.lab.nvme.pci_function import PciFunction
from vfiouser_oob.lab.nvme.processors import Processors
from vfiouser_oob.lab.nvme.queue import NvmeCommand, PagePool, QueuePair, list_pages
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import IrqIndex

_ADMIN_ENTRIES = 32
#: The class code of an NVMe I/O controller.
_CLASS_NVME = 0x010802
_LOG_SMART = 2
_SMART_SIZE = 512
_READ_COMMANDS, _WRITE_COMMANDS = 64, 80
_ALL_NAMESPACES = 0xFFFF_FFFF
#: How often a driver looks at CSTS; there is no interrupt for it.
_POLL_S = 0.001
_SHUTDOWN_TIMEOUT_S = 5.0


class NvmeDriver:
    """A driver bound to an NVMe function; `open` makes one.

    Args:
        client: connected to the function.
        memory: guest memory that is mapped for the device already.
        function: the function, probed.
        bar: BAR 0.
    """

    def __init__(self, client: Client, memory: ClientMemory, function: PciFunction, bar: MappedRegion) -> None:
        self._client = client
        self._memory = memory
        self.function = function
        self.bar = bar
        self._eventfds: list[OwnedFd] = []
        self._queues: list[QueuePair] = []
        self._next_queue = 0
        self._nursery: trio.Nursery | None = None
        self._serving: trio.CancelScope | None = None
        self._served = trio.Event()
        #: What executes this driver; to be stopped before it is moved.
        self.processors = Processors()
        #: How often each vector fired.
        self.interrupts: list[int] = []
        self.capabilities = ControllerCapabilities(0, 0.0, 0, 0)
        self.controller = IdentifyController("", "", "", 0, 0)
        self.namespace = IdentifyNamespace(0, 0, 0)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        client: Client,
        memory: ClientMemory,
        *,
        io_queues: int = 1,
        queue_entries: int = 64,
        pool_pages: int = 512,
        use_mapping: bool = True,
    ) -> AsyncIterator[NvmeDriver]:
        """Bind to the function, use it in the block, shut it down.

        Args:
            client: connected to the function.
            memory: guest memory that is mapped for the device already.
            io_queues: pairs of I/O queues, each with a vector of its own.
            queue_entries: entries of an I/O queue.
            pool_pages: pages for transfers that are under way at the same time.
            use_mapping: False: send a message for every register access.

        Raises:
            NvmeError: this is no usable NVMe controller.
            ReplyError: the server refused something.
            ServerGone: the device has gone.
        """
        function = await PciFunction.probe(client)
        if function.class_code != _CLASS_NVME:
            raise DriverError(
                f"the function has class {function.class_code:#08x}, an NVMe controller {_CLASS_NVME:#08x}"
            )
        bar = await MappedRegion.open(client, 0, use_mapping=use_mapping)
        driver = cls(client, memory, function, bar)
        try:
            async with background_nursery() as nursery:
                driver._nursery = nursery
                await driver._start(io_queues, queue_entries, pool_pages)
                yield driver
                await driver._stop()
        finally:
            driver.bar.close()
            for fd in driver._eventfds:
                fd.close()

    # Start and stop

    async def _start(self, io_queues: int, queue_entries: int, pool_pages: int) -> None:
        await self.function.enable()
        await self._enable_vectors(1 + io_queues)
        self.capabilities = ControllerCapabilities.parse(await self.bar.read(CAP, 8))
        if self.capabilities.min_page_size > PAGE_SIZE:
            raise DriverError(f"the controller needs pages of {self.capabilities.min_page_size} bytes")
        await self._disable()
        admin = self._make_queue(0, min(_ADMIN_ENTRIES, self.capabilities.max_entries))
        await self._serve()
        await self.bar.write(AQA, 4, (admin.entries - 1) << 16 | admin.entries - 1)
        await self.bar.write(ASQ, 8, admin.sq_address)
        await self.bar.write(ACQ, 8, admin.cq_address)
        await self.bar.write(CC, 4, CC_ENTRY_SIZES | CC_ENABLE)
        await self._wait_status(CSTS_READY, CSTS_READY)
        self._pool = PagePool(self._memory, pool_pages)
        await self._identify()
        await self._create_io_queues(io_queues, min(queue_entries, self.capabilities.max_entries))

    async def _enable_vectors(self, wanted: int) -> None:
        available = (await self._client.get_irq_info(IrqIndex.MSIX)).count
        if available < wanted:
            raise DriverError(f"the function has {available} MSI-X vectors, {wanted} are needed")
        self._eventfds = [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in range(wanted)]
        self.interrupts = [0] * wanted
        await self.function.enable_msix()
        await self._client.set_eventfds(IrqIndex.MSIX, self._eventfds)

    def _make_queue(self, queue_id: int, entries: int) -> QueuePair:
        queue = QueuePair(self._memory, self.bar, queue_id, entries, self.capabilities.doorbell_stride, self.processors)
        self._queues.append(queue)
        return queue

    async def _disable(self) -> None:
        await self.bar.write(CC, 4, 0)
        await self._wait_status(CSTS_READY, 0)

    async def _wait_status(self, mask: int, wanted: int, timeout_s: float | None = None) -> None:
        limit = timeout_s if timeout_s is not None else max(self.capabilities.timeout_s, 1.0)
        with trio.move_on_after(limit):
            while True:
                status = await self.bar.read(CSTS, 4)
                if status & CSTS_FATAL:
                    raise DriverError(f"the controller reports a fatal status ({status:#x})")
                if status & mask == wanted:
                    return
                await trio.sleep(_POLL_S)
        raise DriverError(f"the controller did not reach status {wanted:#x} of {mask:#x} within {limit:g} s")

    async def _identify(self) -> None:
        data = await self.identify(IdentifyWhat.CONTROLLER)
        self.controller = IdentifyController.parse(data, self.capabilities.min_page_size)
        active = await self.identify(IdentifyWhat.ACTIVE_NAMESPACES)
        nsid = int.from_bytes(active[:4], "little")
        if not nsid:
            raise DriverError("the controller has no active namespace")
        self.namespace = IdentifyNamespace.parse(nsid, await self.identify(IdentifyWhat.NAMESPACE, nsid))

    async def _create_io_queues(self, count: int, entries: int) -> None:
        wanted = (count - 1) << 16 | count - 1
        granted = await self.admin(AdminOpcode.SET_FEATURES, dwords=(FEATURE_NUMBER_OF_QUEUES, wanted))
        allowed = min(granted & 0xFFFF, granted >> 16) + 1
        if allowed < count:
            raise DriverError(f"the controller allows {allowed} I/O queues, {count} are needed")
        for queue_id in range(1, count + 1):
            queue = self._make_queue(queue_id, entries)
            size_and_id = (entries - 1) << 16 | queue_id
            flags = queue_id << 16 | QUEUE_INTERRUPTS | QUEUE_CONTIGUOUS
            await self.admin(AdminOpcode.CREATE_CQ, prp1=queue.cq_address, dwords=(size_and_id, flags))
            flags = queue_id << 16 | QUEUE_CONTIGUOUS
            await self.admin(AdminOpcode.CREATE_SQ, prp1=queue.sq_address, dwords=(size_and_id, flags))

    async def _stop(self) -> None:
        """Leave the controller as an orderly driver does."""
        for queue in self._queues[1:]:
            await self.admin(AdminOpcode.DELETE_SQ, dwords=(queue.queue_id,))
            await self.admin(AdminOpcode.DELETE_CQ, dwords=(queue.queue_id,))
        control = await self.bar.read(CC, 4)
        await self.bar.write(CC, 4, control & ~CC_SHUTDOWN_MASK | CC_SHUTDOWN_NORMAL)
        await self._wait_status(CSTS_SHUTDOWN_MASK, CSTS_SHUTDOWN_COMPLETE, _SHUTDOWN_TIMEOUT_S)
        await self._disable()
        await self._client.disable_irqs(IrqIndex.MSIX)
        await self.function.enable_msix(False)
        await self.function.disable()

    async def _serve(self) -> None:
        assert self._nursery is not None
        await self._nursery.start(self._attend)

    async def _attend(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the interrupts of the function that we are attached to, until we are moved."""
        self._served = trio.Event()
        with trio.CancelScope() as self._serving:
            async with trio.open_nursery() as nursery:
                for vector in range(len(self._eventfds)):
                    nursery.start_soon(self._serve_vector, vector)
                nursery.start_soon(self._watch_device)
                task_status.started()
        self._served.set()

    async def _serve_vector(self, vector: int) -> None:
        fd = self._eventfds[vector].fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            try:
                async with self.processors.running:
                    await self._take_interrupt(vector)
            except ServerGone:
                return  # whoever waits for a command learns it as well

    async def _take_interrupt(self, vector: int) -> None:
        self.interrupts[vector] += os.eventfd_read(self._eventfds[vector].fileno())
        # Vector and queue have the same number.
        if vector < len(self._queues):
            await self._queues[vector].process()

    # Moving to another machine

    @property
    def client(self) -> Client:
        """The client whose function is driven now."""
        return self._client

    @property
    def memory(self) -> ClientMemory:
        """The memory that is used now."""
        return self._memory

    @property
    def vectors(self) -> int:
        """How many interrupt vectors are in use."""
        return len(self._eventfds)

    @property
    def outstanding(self) -> int:
        """How many commands wait for their completion."""
        return sum(queue.outstanding for queue in self._queues)

    @property
    def positions(self) -> list[tuple[int, int, int]]:
        """Submission tail, completion head and phase bit of each queue."""
        return [queue.position for queue in self._queues]

    async def move(self, client: Client, memory: ClientMemory, bar: MappedRegion, eventfds: list[OwnedFd]) -> None:
        """Find another function behind the same registers; the processors have to be stopped, and go on when this is
        done.

        Queues, phase bits and outstanding commands stay what they are. An interrupt that came before the stop and was
        not taken yet is taken after the move, as a VM carries those that are pending.

        Args:
            client: connected to the other function.
            memory: guest memory there, with the contents of ours.
            bar: BAR 0 there; owned from now on.
            eventfds: the vectors there; owned from now on.
        """
        assert self._serving is not None
        self._serving.cancel()
        await self._served.wait()
        for old, new in zip(self._eventfds, eventfds, strict=True):
            # What is pending here is pending there.
            pending = _drain(old)
            if pending:
                os.eventfd_write(new.fileno(), pending)
            old.close()
        self._eventfds = eventfds
        bar.trapped += self.bar.trapped
        bar.direct += self.bar.direct
        self.bar.close()
        self._client, self._memory, self.bar = client, memory, bar
        self.function.move(client)
        for queue in self._queues:
            queue.move(memory, bar)
        self._pool.move(memory)
        await self._serve()
        self.processors.go()

    async def _watch_device(self) -> None:
        # No interrupt will end a command of a device that has gone.
        reason = await self._client.wait_gone()
        for queue in self._queues:
            queue.fail(reason)

    # Commands

    async def admin(self, opcode: int, *, nsid: int = 0, prp1: int = 0, dwords: tuple[int, ...] = ()) -> int:
        """Execute an admin command; returns dword 0 of its completion."""
        return await self._queues[0].execute(NvmeCommand(opcode, nsid, prp1, 0, dwords))

    async def identify(self, what: int, nsid: int = 0) -> bytes:
        """Return the 4096 bytes of IDENTIFY."""
        async with self._pool.take(1) as pages:
            await self.admin(AdminOpcode.IDENTIFY, nsid=nsid, prp1=pages[0], dwords=(what,))
            return self._pool.collect(pages, PAGE_SIZE)

    @property
    def max_transfer(self) -> int:
        """Bytes of the largest transfer: the controller's limit, 16 MiB if it has none."""
        return self.controller.max_transfer or 16 << 20

    async def read(self, lba: int, blocks: int) -> bytes:
        """Read logical blocks from the first namespace.

        Args:
            lba: first block.
            blocks: how many, at most `max_transfer` bytes.
        """
        size = blocks * self.namespace.block_size
        async with self._transfer(size) as (pages, prp1, prp2):
            await self._io(IoOpcode.READ, lba, blocks, prp1, prp2)
            return self._pool.collect(pages, size)

    async def write(self, lba: int, data: bytes | memoryview) -> None:
        """Write whole logical blocks to the first namespace.

        Args:
            lba: first block.
            data: a multiple of the block size, at most `max_transfer` bytes.
        """
        blocks, rest = divmod(len(data), self.namespace.block_size)
        if rest or not blocks:
            raise DriverError(f"{len(data)} bytes are not whole blocks of {self.namespace.block_size} bytes")
        async with self._transfer(len(data)) as (pages, prp1, prp2):
            async with self.processors.running:
                self._pool.fill(pages, data)
            await self._io(IoOpcode.WRITE, lba, blocks, prp1, prp2)

    async def counted_commands(self) -> tuple[int, int]:
        """Ask the controller how many read and how many write commands it has executed in its life."""
        async with self._pool.take(1) as pages:
            dwords = ((_SMART_SIZE // 4 - 1) << 16 | _LOG_SMART,)
            await self.admin(AdminOpcode.GET_LOG_PAGE, nsid=_ALL_NAMESPACES, prp1=pages[0], dwords=dwords)
            log = self._pool.collect(pages, _SMART_SIZE)
        reads, writes = (int.from_bytes(log[at : at + 16], "little") for at in (_READ_COMMANDS, _WRITE_COMMANDS))
        return reads, writes

    async def flush(self) -> None:
        """Make everything that was written durable."""
        await self._pick_queue().execute(NvmeCommand(IoOpcode.FLUSH, self.namespace.nsid))

    async def _io(self, opcode: int, lba: int, blocks: int, prp1: int, prp2: int) -> None:
        dwords = (lba & 0xFFFF_FFFF, lba >> 32, blocks - 1)
        command = NvmeCommand(opcode, self.namespace.nsid, prp1, prp2, dwords)
        await self._pick_queue().execute(command)

    def _pick_queue(self) -> QueuePair:
        count = len(self._queues) - 1
        self._next_queue = self._next_queue % count + 1
        return self._queues[self._next_queue]

    @asynccontextmanager
    async def _transfer(self, size: int) -> AsyncIterator[tuple[list[int], int, int]]:
        data_pages = -(-size // PAGE_SIZE)
        async with self._pool.take(data_pages + list_pages(data_pages)) as pages:
            data, lists = pages[:data_pages], pages[data_pages:]
            async with self.processors.running:
                prps = self._pool.describe(data, lists)
            yield (data, *prps)


def _drain(eventfd: OwnedFd) -> int:
    """Read and clear the count of an eventfd that does not block."""
    try:
        return os.eventfd_read(eventfd.fileno())
    except BlockingIOError:
        return 0
