"""Interrupts of a device that raises them itself: the rules of `vfiouser_protocol.irq`, applied to real eventfds."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial

import trio

from vfiouser_oob.devices.signalling import Signaller, make_signaller, read_counter
from vfiouser_oob.transport.fds import OwnedFd, take_fds
from vfiouser_oob.transport.reaper import Account
from vfiouser_oob.transport.worker import Worker
from vfiouser_protocol.constants import IrqIndex, IrqSetFlags
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import IrqSet
from vfiouser_protocol.messages import SetIrqs


class Eventfds:
    """The eventfds of one function.

    Args:
        irqs: the rules and the state; handles are `OwnedFd`.
        signaller: how they are written to; None: the best way that this machine permits.
    """

    def __init__(self, irqs: IrqSet, signaller: Signaller | None = None) -> None:
        self._irqs = irqs
        account = Account("interrupts")
        self._signaller = signaller or make_signaller(account)
        self._reader = Worker(account)
        self._nursery: trio.Nursery | None = None
        #: Interrupts delivered, for `status`.
        self.delivered = 0

    def set_irqs(self, request: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        """Apply a DEVICE_SET_IRQS.

        Args:
            request: the decoded command.
            fds: its descriptors; they are taken when the request is carried out.

        Raises:
            CommandError: the request breaks a rule; nothing has changed.
        """
        self._irqs.check(request, len(fds))
        for fd in fds:
            _check_eventfd(fd)
        handles = take_fds(fds)
        effect = self._irqs.apply(request, handles)
        for handle in effect.signal:
            self._signal(handle)
        for handle in effect.dropped:
            _drop(handle)
        if effect.watch and self._nursery is not None:
            for position, handle in enumerate(handles):
                self._nursery.start_soon(self._follow, request, request.start + position, handle)

    async def watch(self) -> None:
        """Follow the eventfds by which a client masks and unmasks (KVM's INTx resampling), until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    async def _follow(self, request: SetIrqs, vector: int, handle: OwnedFd) -> None:
        while True:
            try:
                await trio.lowlevel.wait_readable(handle.fileno())
                read_counter(handle)
            except BlockingIOError:
                continue
            except OSError:  # a kernel before 5.8: it may wait, so a thread does it
                if not await self._read_in_thread(handle):
                    return
            except (trio.ClosedResourceError, ValueError):  # replaced, or the client has gone
                return
            if request.flags & IrqSetFlags.ACTION_MASK:
                self._irqs.mask(request.index, vector)
            elif (waiting := self._irqs.unmask(request.index, vector)) is not None:
                self._signal(waiting)

    async def _read_in_thread(self, handle: OwnedFd) -> bool:
        """Read a counter, however long that takes; returns whether it was read."""
        try:
            copy = handle.duplicate()
            await self._reader.run(partial(os.eventfd_read, copy.fileno()), copy.close)
        except (OSError, ValueError):  # too many wait already, or it is none that can be read
            return False
        return True

    def forget_latched(self, index: IrqIndex) -> None:
        """Forget interrupts that wait for an eventfd: the guest has switched this kind off."""
        self._irqs.discard_pending(index)

    def trigger(self, index: IrqIndex, vector: int) -> None:
        """Raise an edge on a vector; without an eventfd it is dropped."""
        handle = self._irqs.trigger(index, vector)
        if handle is not None:
            self._signal(handle)

    def set_level(self, asserted: bool) -> None:
        """Drive the INTx line."""
        handle = self._irqs.set_level(asserted)
        if handle is not None:
            self._signal(handle)

    def _signal(self, handle: OwnedFd) -> None:
        self.delivered += 1
        self._signaller.signal(handle)

    def summary(self) -> dict[str, int]:
        """How many vectors of each index have an eventfd."""
        return {index.name: assigned for index in IrqIndex if (assigned := self._irqs.assigned(index))}

    def clear(self) -> None:
        """Drop every eventfd."""
        self._signaller.forget()
        for handle in self._irqs.clear():
            _drop(handle)


def _drop(handle: OwnedFd) -> None:
    """Close an eventfd that a task may be waiting for."""
    trio.lowlevel.notify_closing(handle.fileno())
    handle.close()


def _check_eventfd(fd: OwnedFd) -> None:
    if os.readlink(f"/proc/self/fd/{fd.fileno()}") != "anon_inode:[eventfd]":
        raise CommandError("SET_IRQS came with a descriptor that is not an eventfd", errno.EINVAL)
