"""A session whose operations are carried out elsewhere, by one method that takes any of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ParamSpec, TypeVar

from .api import Chunk, Descriptor, DirtyReport, Estimate, Outcome, Phase, Range, Role, Session, Status
from .operations import Op, Operation

P = ParamSpec("P")
T = TypeVar("T")


class RelaySession(Session):
    """Hands each operation to `operate`; derived classes do the more that one of them needs.

    `Session` describes the arguments, the results and the errors of every operation. `was_reset` is not an operation
    here: the process that has the device has seen its reset.
    """

    @abstractmethod
    async def operate(self, op: Op[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Carry out an operation.

        Args:
            op: which.
            args: its arguments.
            kwargs: its arguments.

        Returns:
            Its result.
        """

    async def describe(self) -> Descriptor:
        """Ask the other side what the function is."""
        return await self.operate(Operation.DESCRIBE)

    async def check(self, descriptor: Descriptor) -> None:
        """Have the other side compare a descriptor with its own."""
        await self.operate(Operation.CHECK, descriptor)

    async def begin(self, role: Role, migration_id: str) -> None:
        """Begin a migration there, or take it over."""
        await self.operate(Operation.BEGIN, role, migration_id)

    async def status(self) -> Status:
        """Ask the other side where the function is."""
        return await self.operate(Operation.STATUS)

    async def quiesce(self) -> None:
        """Have it start no DMA any more."""
        await self.operate(Operation.QUIESCE)

    async def stop(self) -> None:
        """Have it hold still."""
        await self.operate(Operation.STOP)

    async def resume(self) -> None:
        """Have it run."""
        await self.operate(Operation.RESUME)

    async def estimate(self) -> Estimate:
        """Ask the other side how much there is to save."""
        return await self.operate(Operation.ESTIMATE)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Get the next piece from the other side."""
        return await self.operate(Operation.SAVE, offset, limit, phase)

    async def load_begin(self, total: int | None) -> None:
        """Have it get ready for a state."""
        await self.operate(Operation.LOAD_BEGIN, total)

    async def load(self, offset: int, data: bytes) -> None:
        """Hand a piece to the other side."""
        await self.operate(Operation.LOAD, offset, data)

    async def load_commit(self, total: int, digest: bytes) -> None:
        """Have the state verified and applied there."""
        await self.operate(Operation.LOAD_COMMIT, total, digest)

    async def abort(self) -> None:
        """Have its buffers dropped."""
        await self.operate(Operation.ABORT)

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Have it log, with pages of the size that the other side chooses."""
        return await self.operate(Operation.DIRTY_START, ranges, page_size)

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Get what the other side has logged."""
        return await self.operate(Operation.DIRTY_REPORT, iova, length)

    async def dirty_stop(self) -> None:
        """Have its log dropped."""
        await self.operate(Operation.DIRTY_STOP)

    async def reset(self) -> None:
        """Have it reset."""
        await self.operate(Operation.RESET)

    async def end(self, outcome: Outcome) -> None:
        """Have the migration ended there."""
        await self.operate(Operation.END, outcome)
