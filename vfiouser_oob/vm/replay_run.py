"""A plan of a replay, carried out by the function's own DMA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vfiouser_oob.vm.replay import MemoryWrite, ReadBack, ReplayPlan, checks, through_ecam
from vfiouser_oob.vm.topology import Bdf


class WriteAnswer(Protocol):
    """A write that was sent."""

    async def wait(self) -> None:
        """Wait until it was carried out; raises DmaFault."""


class ClientBus(Protocol):
    """The way to what is on the client's bus, as `server.dma_link.DmaLink` is one."""

    async def bus_read(self, address: int, count: int) -> bytes:
        """Read; raises DmaFault."""

    def bus_write(self, address: int, data: bytes) -> WriteAnswer:
        """Send a write, behind all that were sent before; raises DmaFault."""


class SentReplay:
    """A replay whose writes were sent; made by `send`.

    Args:
        bus: the way to the registers.
        answers: to the writes.
        to_check: what is to be read back.
        closing: what is written after that.
    """

    def __init__(
        self,
        bus: ClientBus | None,
        answers: Sequence[WriteAnswer] = (),
        to_check: Sequence[ReadBack] = (),
        closing: Sequence[MemoryWrite] = (),
    ) -> None:
        self._bus = bus
        self._answers = answers
        self._to_check = to_check
        self._closing = closing

    @classmethod
    def nothing(cls) -> SentReplay:
        """The replay of a function that needs none."""
        return cls(None)

    @classmethod
    def send(cls, bus: ClientBus, plan: ReplayPlan, place: Bdf, ecam: int, *, free: bool) -> SentReplay:
        """Send the writes of a plan.

        What comes last in it may end the way to the registers, so it has to wait for the reading back. A client that
        carries everything out later gets it at once: after that the guest may run. Then nothing is read back that it
        may have closed.

        Args:
            bus: the way to the registers.
            plan: what is written.
            place: where the function is.
            ecam: where ECAM begins.
            free: the client answers now.

        Raises:
            DmaFault: nothing can be sent.
        """
        steps, closing = (through_ecam(part, place, ecam) for part in (plan.steps, plan.closing))
        at_once = [*steps, *(() if free else closing)]
        answers = [bus.bus_write(each.address, each.data) for each in at_once]
        if free:
            return cls(bus, answers, checks(steps), closing)
        return cls(bus, answers, () if closing else checks(steps))

    async def verify(self) -> str:
        """Wait until the writes were carried out, and read them back.

        Returns:
            What is wrong; empty if nothing is.

        Raises:
            DmaFault: the client did not do it.
        """
        for answer in self._answers:
            await answer.wait()
        if self._bus is None:
            return ""
        wrong = []
        for check in self._to_check:
            failure = check.failure(await self._bus.bus_read(check.address, len(check.data)))
            if failure:
                wrong.append(failure)
        if wrong:
            return ", ".join(wrong)
        for answer in [self._bus.bus_write(each.address, each.data) for each in self._closing]:
            await answer.wait()
        return ""
