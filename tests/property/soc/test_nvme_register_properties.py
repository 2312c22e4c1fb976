"""The controller's registers against a reference: whatever a host writes, in whatever order, CSTS is what it has to be.

The reference knows nothing of tasks and queues. It is NVMe 1.4, 3.1.5, 3.1.6 and 7.6, in twenty lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from nvmebed import Machine, Queue, machine
from vfiouser_oob.devices.model import ResetKind

CC, CSTS, AQA, ASQ, ACQ = 0x14, 0x1C, 0x24, 0x28, 0x30
ENTRY_SIZES = 6 << 16 | 4 << 20
RDY, CFS, COMPLETE = 1, 2, 2 << 2
ENTRIES = 16
CQ_OFFSET = 0x4000


@dataclass
class Reference:
    """What the registers have to show once the controller has come to rest."""

    cc: int = 0
    aqa: int = 0
    asq: int = 0
    acq: int = 0
    csts: int = 0

    def write_cc(self, value: int) -> None:
        """EN and SHN count one after the other, EN first; MPS and CSS are fixed while EN stays set."""
        was, now = self.cc & 1, value & 1
        notified = bool(self.cc >> 14 & 3)
        if was and now:
            value = value & ~0x7F0 | self.cc & 0x7F0
        elif now:
            self.csts = RDY if self._possible(value) else CFS
        elif was:
            self.csts = 0
            notified = False
        self.cc = value
        if value >> 14 & 3 and not notified:
            self.csts |= COMPLETE

    def _possible(self, cc: int) -> bool:
        page = 4096 << (cc >> 7 & 15)
        aligned = not (self.asq | self.acq) % page
        return page <= 1 << 16 and not cc >> 4 & 7 and self.aqa & 0xFFF > 0 and self.aqa >> 16 > 0 and aligned

    @property
    def works(self) -> bool:
        """Whether it executes commands."""
        return self.csts == RDY


CONTROL = st.builds(
    lambda en, shn, mps, css: ENTRY_SIZES | en | shn << 14 | mps << 7 | css << 4,
    st.integers(0, 1),
    st.sampled_from([0, 0, 1, 2]),
    st.sampled_from([0, 0, 0, 1, 5]),
    st.sampled_from([0, 0, 0, 1]),
)
STEPS = st.one_of(
    st.tuples(st.just("cc"), CONTROL),
    st.tuples(st.just("cc"), CONTROL),
    st.tuples(st.just("aqa"), st.sampled_from([0, (ENTRIES - 1) * 0x10001, (ENTRIES - 1) * 0x10001])),
    st.tuples(st.just("queues"), st.sampled_from([0x100000, 0x101000, 0x110000])),
    st.tuples(st.just("reset"), st.sampled_from([ResetKind.DEVICE, ResetKind.FUNCTION_LEVEL])),
    st.tuples(st.just("rest"), st.just(0)),
    st.tuples(st.just("rest"), st.just(0)),
)


def rest(m: Machine, reference: Reference, queue: Queue | None) -> None:
    """Compare at rest; a controller that has to work executes a command, any other one executes none."""
    assert m.driver.read32(CSTS) == reference.csts
    assert m.driver.read32(CC) == reference.cc
    assert m.driver.read32(AQA) == reference.aqa
    assert (m.driver.read64(ASQ), m.driver.read64(ACQ)) == (reference.asq, reference.acq)
    if queue is not None:
        m.driver.queues[0] = queue
        m.driver.submit(queue, 0x06, prp1=0x140000, cdw10=1)


async def play(steps: list[tuple[str, int]]) -> None:
    """Do the steps on both sides."""
    async with machine(io_queue=False) as m:
        driver = m.driver
        await driver.disable()
        driver.write32(CC, 0)
        reference = Reference(0, driver.read32(AQA), driver.read64(ASQ), driver.read64(ACQ))
        queue: Queue | None = None
        for what, value in [*steps, ("rest", 0)]:
            enabled = reference.cc & 1
            if what == "cc":
                if value & 1 and not enabled:
                    await trio.testing.wait_all_tasks_blocked()  # a host waits for RDY to fall before it enables
                    queue = None
                    if reference.asq:
                        queue = Queue(0, ENTRIES, reference.asq, reference.acq)
                        m.host.memory.poke(reference.acq, bytes(16 * ENTRIES))
                elif not value & 1:
                    queue = None
                reference.write_cc(value)
                driver.write32(CC, value)
            elif what == "reset":
                m.function.reset(ResetKind(value))
                reference, queue = Reference(), None
            elif what == "rest":
                await trio.testing.wait_all_tasks_blocked()
                rest(m, reference, queue)
                if queue is not None:
                    await trio.testing.wait_all_tasks_blocked()
                    assert driver.collect(queue) == reference.works
                    queue.done.clear()
            elif not enabled:  # a host must not touch them otherwise
                if what == "aqa":
                    reference.aqa = value
                    driver.write32(AQA, value)
                else:
                    reference.asq, reference.acq = value, value + CQ_OFFSET
                    driver.write64(ASQ, reference.asq)
                    driver.write64(ACQ, reference.acq)


@given(st.lists(STEPS, max_size=14))
def test_registers_follow_the_reference(steps: list[tuple[str, int]]) -> None:
    """Any sequence of writes, resets and pauses."""
    trio.run(play, steps)
