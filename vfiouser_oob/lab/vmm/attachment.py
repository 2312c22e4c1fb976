"""A function as a VMM attaches it, without touching it as its guest would: for the destination of a migration."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import trio

from vfiouser_oob.client.client import Client
from vfiouser_oob.client.connecting import ClientOptions
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import IrqIndex, IrqSetFlags, RegionIndex
from vfiouser_protocol.errors import ReplyError

_COMMAND = 0x04
_COMMAND_SIZE = 2
_BAR_REGISTERS = range(0x10, 0x28, 4)
_CONFIG_READ_MAX = 4096


@dataclass(frozen=True, slots=True)
class ConfigState:
    """What a VMM carries of configuration space itself, because it emulates it.

    Args:
        command: the command register.
        bars: the six BAR registers.
        vectors: MSI-X vectors in use; 0 while MSI-X is off.
    """

    command: int
    bars: tuple[int, ...]
    vectors: int


async def save_config(client: Client, vectors: int) -> ConfigState:
    """Read what the destination's VMM has to restore.

    Args:
        client: connected to the source's function.
        vectors: MSI-X vectors that the guest uses.
    """
    head = await client.region_read(RegionIndex.CONFIG, 0, _BAR_REGISTERS.stop)
    command = int.from_bytes(head[_COMMAND : _COMMAND + _COMMAND_SIZE], "little")
    return ConfigState(command, tuple(int.from_bytes(head[at : at + 4], "little") for at in _BAR_REGISTERS), vectors)


class Attachment:
    """A function attached by a VMM; `open` makes one.

    Args:
        client: connected to the function.
        memory: guest memory, mapped for the device.
        bar: BAR 0.
    """

    def __init__(self, client: Client, memory: ClientMemory, bar: MappedRegion) -> None:
        self.client = client
        self.memory = memory
        self._bar: MappedRegion | None = bar
        self._eventfds: list[OwnedFd] = []
        self._leave = trio.Event()
        self._left = trio.Event()

    @classmethod
    async def start(
        cls, nursery: trio.Nursery, path: str | os.PathLike[str], memory: ClientMemory, **options: Any
    ) -> Attachment:
        """Attach a function and hold it until `detach`, in a task of its own.

        Args:
            nursery: where the task runs.
            path: see `open`.
            memory: see `open`.
            options: see `open`.
        """
        attachment: Attachment = await nursery.start(partial(cls._hold, path, memory, **options))
        return attachment

    @classmethod
    async def _hold(
        cls,
        path: str | os.PathLike[str],
        memory: ClientMemory,
        *,
        task_status: trio.TaskStatus[Attachment],
        **options: Any,
    ) -> None:
        attachment: Attachment | None = None
        try:
            async with cls.open(path, memory, **options) as attachment:
                task_status.started(attachment)
                await attachment._leave.wait()
        finally:
            if attachment is not None:
                attachment._left.set()

    async def detach(self) -> None:
        """Let go of what `start` attached: the VMM ends, or gives the function up."""
        self._leave.set()
        await self._left.wait()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | os.PathLike[str],
        memory: ClientMemory,
        *,
        use_mapping: bool = True,
        memory_by_fd: bool = True,
        **options: Unpack[ClientOptions],
    ) -> AsyncIterator[Attachment]:
        """Attach a function in the order in which QEMU does it, and hold it in the block.

        Args:
            path: the daemon's socket.
            memory: guest memory; DMA by message reaches it as well.
            use_mapping: whether BAR 0 is mapped.
            memory_by_fd: whether the device may map guest memory, or has to use messages.
            options: more keyword arguments of `Connection`.
        """
        options = {"dma_server": memory, "serve_dma_when_idle": True, **options}
        async with Client.connect(path, **options) as client:
            await memory.map(client, with_fd=memory_by_fd)
            await client.get_info()
            bar = await MappedRegion.open(client, RegionIndex.BAR0, use_mapping=use_mapping)
            attachment = cls(client, memory, bar)
            try:
                await attachment._realize()
                yield attachment
            finally:
                attachment._close()

    async def _realize(self) -> None:
        """Look at the function and reset it, as a machine does before its guest starts or arrives."""
        config = await self.client.get_region_info(RegionIndex.CONFIG)
        config.close()
        count = min(_CONFIG_READ_MAX, config.description.size)
        await self.client.region_read(RegionIndex.CONFIG, 0, count)
        await self.client.get_irq_info(IrqIndex.MSIX)
        await self._write(_COMMAND, _COMMAND_SIZE, 0)
        await self.client.reset()
        for register in _BAR_REGISTERS:
            await self._write(register, 4, 0)

    async def _write(self, offset: int, width: int, value: int) -> None:
        await self.client.region_write(RegionIndex.CONFIG, offset, value.to_bytes(width, "little"))

    async def restore(self, config: ConfigState) -> None:
        """Restore what the VMM carries itself: BARs and command register by writes to configuration space, and the
        vectors by SET_IRQS. MSI-X's own registers are the function's state.

        Args:
            config: what was saved at the source.
        """
        for register, value in zip(_BAR_REGISTERS, config.bars, strict=True):
            await self._write(register, 4, value)
        await self._write(_COMMAND, _COMMAND_SIZE, config.command)
        if not config.vectors:
            return
        nothing = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
        try:
            await self.client.set_irqs(IrqIndex.INTX, nothing)
        except ReplyError:
            pass  # a function without a pin
        # QEMU lets the device allocate one vector before it assigns any.
        await self.client.set_irqs(IrqIndex.MSIX, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, count=1)
        self._eventfds = [OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in range(config.vectors)]
        await self.client.set_eventfds(IrqIndex.MSIX, self._eventfds)

    def hand_over(self) -> tuple[MappedRegion, list[OwnedFd]]:
        """Give BAR 0 and the vectors to the guest's driver, which owns them from now on."""
        bar, self._bar = self._bar, None
        assert bar is not None, "they were handed over before"
        eventfds, self._eventfds = self._eventfds, []
        return bar, eventfds

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for fd in self._eventfds:
            fd.close()
