"""What a function's agent knows of its writes to guest memory, for a VM that is migrated by its QEMU."""

from __future__ import annotations

from collections.abc import Iterator

from vfiouser_oob.memory.recorder import PAGE_SIZE
from vfiouser_oob.migration.attached_device import AttachedDevice
from vfiouser_oob.migration.dirty import DirtyTracker
from vfiouser_oob.migration.message_time import message_deadline
from vfiouser_protocol.dirty import DirtyLog
from vfiouser_protocol.errors import CommandError

#: Bytes of memory that are asked about at once.
_SPAN = 1 << 30


class AgentReports:
    """The agent's log of dirty pages, begun by `begin`.

    Args:
        device: the function's, as its client has it.
    """

    def __init__(self, device: AttachedDevice) -> None:
        self._device = device

    @classmethod
    async def begin(cls, device: AttachedDevice) -> AgentReports:
        """Have the agent log.

        Args:
            device: the function's.

        Raises:
            CommandError: it does not, or its client does that already.
        """
        await device.dirty.lend(PAGE_SIZE, message_deadline())
        return cls(device)

    @property
    def _dirty(self) -> DirtyTracker:
        if not self._device.dirty.lent:
            raise CommandError("its client has taken over the log of dirty pages")
        return self._device.dirty

    async def collect(self) -> DirtyLog:
        """The pages that were written since it was asked last, or since it was begun."""
        found = DirtyLog(PAGE_SIZE)
        for address, length in list(self._spans()):
            bitmap = await self._dirty.report(address, length, PAGE_SIZE, message_deadline())
            found.mark_bitmap(address, PAGE_SIZE, bytes(bitmap))
        return found

    def _spans(self) -> Iterator[tuple[int, int]]:
        for region in self._device.session.memory.map:
            if region.owner is not None:
                for start in range(region.address, region.end, _SPAN):
                    yield start, min(_SPAN, region.end - start)
