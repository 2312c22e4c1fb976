"""SET_IRQS to the kernel: the client's eventfds go straight to it, and nothing is relayed.

On an index with NORESIZE the kernel refuses to enable more vectors than the first SET_IRQS did. A client may have to
split its eventfds over several commands, so for such an index copies are kept, and a command that reaches further
enables the whole index anew.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from vfiouser_oob.devices.kernel_vfio.device import VfioDevice
from vfiouser_oob.persist.successor.notes import DeviceNotes
from vfiouser_oob.persist.successor.things import LineThing
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import IrqIndex, IrqInfoFlags, IrqSetFlags
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import IrqDescription, IrqOperation, IrqSet
from vfiouser_protocol.messages import SetIrqs

_FLAGS = 0x3F
_ASSIGN = int(IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER)
#: Without their one eventfd these are off, and the kernel refuses to switch them off once more.
_SINGLE = frozenset({IrqIndex.ERR, IrqIndex.REQ})
_HINTS: Mapping[int, str] = {
    errno.ENOTTY: "this kernel cannot mask or unmask these interrupts",
    errno.EBADF: "a descriptor is not an eventfd",
    errno.ENOSPC: "the machine has too few interrupt vectors left",
    errno.EINVAL: "another kind of interrupt is on, or a descriptor is not an eventfd",
}


KeptEventfds: TypeAlias = Sequence[tuple[tuple[int, int], OwnedFd]]


class KernelIrqs:
    """The interrupts of one client.

    Args:
        device: the open device.
        descriptions: one per IRQ index.
    """

    def __init__(self, device: VfioDevice, descriptions: Sequence[IrqDescription]) -> None:
        self._device = device
        self._flags = [description.flags for description in descriptions]
        self._rules = IrqSet(descriptions)
        #: Indices that the kernel has on; it refuses to switch off one that is not.
        self._active: set[int] = set()
        #: Another process may have done what is asked for already.
        self.again = False
        #: Copies of eventfds of NORESIZE indices, by index and vector, and how many vectors the kernel enabled.
        self._kept: dict[int, dict[int, OwnedFd]] = {}
        self._enabled: dict[int, int] = {}

    def restore(self, assigned: Mapping[int, bytes], lines: Sequence[LineThing], fds: KeptEventfds) -> None:
        """Know of what a client has set with another process; the kernel has it still.

        Args:
            assigned: vectors with eventfds by index, one byte each.
            lines: indices that are on are active.
            fds: copies of eventfds of NORESIZE indices, by index and vector; taken.
        """
        for index, vectors in assigned.items():
            self._rules.restore(index, [True if vector else None for vector in vectors])
        self._active = {line.index for line in lines if line.active}
        for (index, vector), fd in fds:
            self._kept.setdefault(index, {})[vector] = fd.take()
            self._enabled[index] = max(self._enabled.get(index, 0), vector + 1)

    def note(self, notes: DeviceNotes, index: int, vectors: range) -> None:
        """Take down what an index has, and the copies that were made.

        Args:
            notes: where.
            index: which.
            vectors: those of it that may have changed.
        """
        count = self._rules.descriptions[index].count
        notes.assigned(index, bytes(self._rules.handle(index, vector) is not None for vector in range(count)))
        notes.line(LineThing(index, index in self._active, b"", b""))
        if self._flags[index] & IrqInfoFlags.NORESIZE:
            kept = self._kept.get(index, {})
            for vector in vectors:
                notes.eventfd(index, vector, int(IrqSetFlags.ACTION_TRIGGER), kept.get(vector))

    def _off(self, index: int) -> None:
        try:
            self._device.disable_irqs(index)
        except OSError as error:
            if not self.again or error.errno != errno.EINVAL:
                raise

    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        """Carry out a SET_IRQS.

        Args:
            request: the decoded command.
            fds: its descriptors; copies are made of those that are kept.

        Raises:
            CommandError: our rules or the kernel refuse it.
        """
        operation = self._rules.check(request, len(fds))
        if self.again and operation is IrqOperation.LOOPBACK:
            raise CommandError("a daemon that has ended raised interrupts; that is not done twice", errno.EIO)
        try:
            _CARRY_OUT.get(operation, KernelIrqs._pass_on)(self, request, fds)
        except OSError as error:
            number = error.errno or errno.EIO
            hint = f" ({_HINTS[number]})" if number in _HINTS else ""
            raise CommandError(
                f"the kernel refused SET_IRQS index {request.index} start {request.start} count {request.count} "
                f"flags {request.flags:#x}: {error.strerror}{hint}",
                number,
            ) from error
        self._rules.apply(request, [True] * len(fds))

    def _pass_on(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        self._device.set_irqs(request.flags & _FLAGS, request.index, request.start, request.count, request.data)

    def _disable(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        if request.index in self._active:
            self._off(request.index)
            self._forget(request.index)

    def _assign(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        index, start = request.index, request.start
        if self._flags[index] & IrqInfoFlags.NORESIZE:
            self._assign_without_resize(index, start, fds)
        else:
            self._device.set_eventfds(_ASSIGN, index, start, _numbers(fds))
        self._active.add(index)

    def _assign_without_resize(self, index: int, start: int, fds: Sequence[OwnedFd]) -> None:
        kept = self._kept.setdefault(index, {})
        enabled = self._enabled.get(index, 0)
        end = start + len(fds)
        if end <= enabled:
            self._device.set_eventfds(_ASSIGN, index, start, _numbers(fds))
        else:
            wanted = kept | dict(enumerate(fds, start))
            if enabled:
                self._off(index)
                self._active.discard(index)
                self._enabled[index] = 0
            try:
                self._enable(index, end, wanted)
            except OSError:
                if enabled:
                    self._enable(index, enabled, kept)
                raise
        for vector, fd in enumerate(fds, start):
            self._drop(index, vector)
            kept[vector] = fd.duplicate()

    def _enable(self, index: int, count: int, fds: Mapping[int, OwnedFd]) -> None:
        numbers = [fds[vector].fileno() if vector in fds else -1 for vector in range(count)]
        self._device.set_eventfds(_ASSIGN, index, 0, numbers)
        self._enabled[index] = count
        self._active.add(index)

    def _deassign(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        if request.index not in self._active:
            return
        self._device.set_eventfds(request.flags & _FLAGS, request.index, request.start, [-1] * request.count)
        for vector in range(request.start, request.start + request.count):
            self._drop(request.index, vector)
        if request.index in _SINGLE:
            self._forget(request.index)

    def _set_virqfd(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        """Mask and unmask eventfds, which the kernel waits for itself."""
        numbers = _numbers(fds) or [-1] * request.count
        self._device.set_eventfds(request.flags & _FLAGS, request.index, request.start, numbers)

    def _drop(self, index: int, vector: int) -> None:
        fd = self._kept.get(index, {}).pop(vector, None)
        if fd is not None:
            fd.close()

    def _forget(self, index: int) -> None:
        for fd in self._kept.pop(index, {}).values():
            fd.close()
        self._enabled.pop(index, None)
        self._active.discard(index)

    @property
    def active(self) -> list[int]:
        """Indices that are on."""
        return sorted(self._active)

    def summary(self) -> dict[str, int]:
        """Vectors with an eventfd, by name of the index."""
        return {index.name: assigned for index in IrqIndex if (assigned := self._rules.assigned(index))}

    def close(self) -> None:
        """Close the copies; switching the interrupts off is the device's shutdown."""
        for index in tuple(self._kept):
            self._forget(index)


def _numbers(fds: Sequence[OwnedFd]) -> list[int]:
    return [fd.fileno() for fd in fds]


_CARRY_OUT: Mapping[IrqOperation, Callable[[KernelIrqs, SetIrqs, Sequence[OwnedFd]], None]] = {
    IrqOperation.DISABLE: KernelIrqs._disable,
    IrqOperation.ASSIGN: KernelIrqs._assign,
    IrqOperation.DEASSIGN: KernelIrqs._deassign,
    IrqOperation.ASSIGN_MASK: KernelIrqs._set_virqfd,
    IrqOperation.ASSIGN_UNMASK: KernelIrqs._set_virqfd,
    IrqOperation.DEASSIGN_MASK: KernelIrqs._set_virqfd,
    IrqOperation.DEASSIGN_UNMASK: KernelIrqs._set_virqfd,
}
