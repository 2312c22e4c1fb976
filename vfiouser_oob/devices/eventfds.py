"""Interrupts of a device that raises them itself: the rules of `vfiouser_protocol.irq`, applied to real eventfds."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import trio

from vfiouser_oob.devices.signalling import Signaller, make_signaller, read_counter
from vfiouser_oob.transport.fds import OwnedFd, take_fds
from vfiouser_oob.transport.reaper import Account
from vfiouser_oob.transport.worker import Worker
from vfiouser_protocol.constants import IrqIndex, IrqSetFlags
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import IrqSet
from vfiouser_protocol.messages import SetIrqs

_ACTIONS = IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER
_HANDLES: Mapping[int, Callable[[IrqSet, int, int], Any]] = MappingProxyType(
    {
        IrqSetFlags.ACTION_TRIGGER: IrqSet.handle,
        IrqSetFlags.ACTION_MASK: IrqSet.mask_handle,
        IrqSetFlags.ACTION_UNMASK: IrqSet.unmask_handle,
    }
)
#: What an eventfd may be for.
IRQ_ACTIONS = tuple(_HANDLES)


class Eventfds:
    """The eventfds of one function.

    Args:
        irqs: the rules and the state; handles are `OwnedFd`.
        signaller: how they are written to; None: the best way that this machine permits.
    """

    def __init__(self, irqs: IrqSet, signaller: Signaller | None = None) -> None:
        self._irqs = self.state = irqs
        account = Account("interrupts")
        self._signaller = signaller or make_signaller(account)
        self._reader = Worker(account)
        self._nursery: trio.Nursery | None = None
        #: Given before anything could be followed.
        self._unwatched: list[tuple[int, int, int, OwnedFd]] = []
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
        if effect.watch:
            for position, handle in enumerate(handles):
                self._watch(request.index, request.start + position, request.flags & _ACTIONS, handle)

    def handle(self, index: int, vector: int, action: int) -> OwnedFd | None:
        """The eventfd of a vector, or None.

        Args:
            index: IRQ index.
            vector: which of its vectors.
            action: which of IrqSetFlags' actions it is for.
        """
        handle: OwnedFd | None = _HANDLES[action](self._irqs, index, vector)
        return handle

    def restore(self, index: int, vector: int, action: int, handle: OwnedFd) -> None:
        """Take over an eventfd that a client has given to another process.

        Args:
            index: IRQ index.
            vector: which of its vectors.
            action: which of IrqSetFlags' actions it is for.
            handle: the eventfd; taken.
        """
        own = handle.take()
        if not self._irqs.restore_handle(index, vector, action, own):
            own.close()
        elif action != IrqSetFlags.ACTION_TRIGGER:
            self._watch(index, vector, action, own)

    def _watch(self, index: int, vector: int, action: int, handle: OwnedFd) -> None:
        if self._nursery is None:
            self._unwatched.append((index, vector, action, handle))
        else:
            self._nursery.start_soon(self._follow, index, vector, action, handle)

    async def watch(self) -> None:
        """Follow the eventfds by which a client masks and unmasks (KVM's INTx resampling), until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for each in self._unwatched:
                nursery.start_soon(self._follow, *each)
            self._unwatched.clear()
            await trio.sleep_forever()

    async def _follow(self, index: int, vector: int, action: int, handle: OwnedFd) -> None:
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
            if action & IrqSetFlags.ACTION_MASK:
                self._irqs.mask(index, vector)
            elif (waiting := self._irqs.unmask(index, vector)) is not None:
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
