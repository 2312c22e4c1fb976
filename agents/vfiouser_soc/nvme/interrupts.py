"""From completion queues to MSI-X vectors or the INTx pin.

MSI-X is an edge per batch of completions. INTx is a level: asserted while any queue with interrupts enabled
has entries that the host has not acknowledged by its head doorbell, unless the host masked that queue's
vector in INTMS.

QEMU forwards no MSI-X table writes, so an eventfd that was assigned is the enable; the masks in our own
table count only after a client has written them through the region (`MsixTable` knows).

Spec: NVMe 1.4, 7.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vfiouser_protocol.constants import IrqIndex
from vfiouser_soc.nvme.state import CompletionQueue

if TYPE_CHECKING:
    from vfiouser_oob.devices.model import ModelHost
    from vfiouser_protocol.msix import MsixTable
    from vfiouser_protocol.pci import ConfigSpace

#: INTMS and INTMC have a bit for each of the first 32 vectors.
_PIN_VECTORS = 32


class Interrupts:
    """The interrupt side of one controller.

    Args:
        config: tells which kind of interrupt is enabled.
        table: MSI-X table and pending bits.
        queues: returns the completion queues that exist.
    """

    def __init__(self, config: ConfigSpace, table: MsixTable, queues: Callable[[], Iterable[CompletionQueue]]) -> None:
        self._config = config
        self._table = table
        self._queues = queues
        self._host: ModelHost | None = None
        #: Bit per vector, set by INTMS and cleared by INTMC.
        self.mask = 0
        #: The function is suspended: nothing is raised and the pin stays as it is, until `release_hold`.
        self._held = False

    def attach(self, host: ModelHost) -> None:
        """Take the host that delivers interrupts."""
        self._host = host

    def notify(self, queue: CompletionQueue) -> None:
        """Completion entries became visible to the host."""
        if queue.interrupt and self._host is not None:
            self._fire(queue.vector)
        self.update_level()

    def _fire(self, vector: int) -> None:
        assert self._host is not None
        if self._config.msix_function_masked or self._table.masked(vector):
            self._table.set_pending(vector)
        else:
            self._host.trigger(IrqIndex.MSIX, vector)

    def unmasked(self) -> None:
        """A mask may have been lifted: deliver what was held back."""
        if self._host is None or self._held or self._config.msix_function_masked:
            return
        for vector in range(self._table.vectors):
            if self._table.pending(vector) and not self._table.masked(vector):
                self._table.clear_pending(vector)
                self._host.trigger(IrqIndex.MSIX, vector)

    def update_level(self) -> None:
        """Drive the pin after anything that it depends on."""
        self._drive(not self._config.msix_enabled and any(map(self._asserts, self._queues())))

    def _drive(self, asserted: bool) -> None:
        if self._held:
            return
        self._config.set_interrupt_status(asserted)
        if self._host is not None:
            self._host.set_intx(asserted)

    def _asserts(self, queue: CompletionQueue) -> bool:
        if not queue.interrupt or queue.head == queue.tail:
            return False
        return queue.vector >= _PIN_VECTORS or not self.mask >> queue.vector & 1

    def hold(self) -> None:
        """Raise nothing from now on."""
        self._held = True

    def release_hold(self) -> None:
        """Go on, with what was held back first."""
        self._held = False
        self.unmasked()
        self.update_level()

    def reset(self) -> None:
        """Forget the masks and release the pin."""
        self.mask = 0
        self._held = False
        self.release()

    def release(self) -> None:
        """Release the pin."""
        self._drive(False)
