"""Interrupts of one function: what SET_IRQS may ask for, and where a device's interrupt goes.

`IrqSet` never touches an eventfd. A handle is whatever the caller keeps for one (a descriptor's owner); the
methods say which handles to write and which to close. Two rules decide everything:

* Each IRQ index has its own arrays: setting up MSI-X leaves the INTx eventfd alone.
* An assigned eventfd *is* the enable. QEMU forwards no MSI-X table writes; masking a vector in the guest
  sends nothing, and unmasking one assigns its eventfd again. An interrupt that finds a vector masked or, once
  the index is in use, without an eventfd is latched and delivered when that changes: late and once is right,
  lost is not.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from .constants import IrqIndex, IrqInfoFlags, IrqSetFlags
from .errors import CommandError, LocalProtocolError
from .messages import SetIrqs

_DATA_BITS = int(IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD)
_ACTION_BITS = int(IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER)
_SINGLE_BITS = frozenset(1 << bit for bit in range(6))
_DISABLE = int(IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER)
#: Fixed part of the SET_IRQS payload, in bytes; an argsz below it is refused.
_FIXED_SIZE = 20
_UNMASKABLE = frozenset({IrqIndex.ERR, IrqIndex.REQ})


class IrqDescription(NamedTuple):
    """What DEVICE_GET_IRQ_INFO says about one IRQ index.

    Args:
        count: number of vectors; 0 if the function has no such interrupt.
        flags: `IrqInfoFlags`.
    """

    count: int  # type: ignore[assignment]
    flags: int = int(IrqInfoFlags.EVENTFD)


#: INTx with level semantics: it masks itself when it fires and needs UNMASK for the next.
INTX = IrqDescription(1, int(IrqInfoFlags.EVENTFD | IrqInfoFlags.MASKABLE | IrqInfoFlags.AUTOMASKED))
#: An index without vectors.
NO_IRQ = IrqDescription(0)


class IrqOperation(Enum):
    """What one SET_IRQS asks for: the rows of its DATA x ACTION table."""

    #: All eventfds of the index go, masks and latches with them.
    DISABLE = "disable"
    #: The selected vectors' eventfds are written, whatever their mask says.
    LOOPBACK = "loopback"
    #: Vector start + i gets handle i.
    ASSIGN = "assign"
    #: The vectors lose their eventfds.
    DEASSIGN = "de-assign"
    MASK = "mask"
    UNMASK = "unmask"
    #: Vector start + i gets handle i as the eventfd that the client writes to mask (unmask) it.
    ASSIGN_MASK = "assign mask eventfd"
    ASSIGN_UNMASK = "assign unmask eventfd"
    DEASSIGN_MASK = "de-assign mask eventfd"
    DEASSIGN_UNMASK = "de-assign unmask eventfd"


_NONE, _BOOL, _EVENTFD = (
    int(flag) for flag in (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
)
_MASK, _UNMASK, _TRIGGER = (
    int(flag) for flag in (IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK, IrqSetFlags.ACTION_TRIGGER)
)
#: (DATA | ACTION, descriptors came with it) to operation; DISABLE is LOOPBACK with a count of 0.
_OPERATIONS: dict[tuple[int, bool], IrqOperation] = {
    (_NONE | _TRIGGER, False): IrqOperation.LOOPBACK,
    (_BOOL | _TRIGGER, False): IrqOperation.LOOPBACK,
    (_EVENTFD | _TRIGGER, True): IrqOperation.ASSIGN,
    (_EVENTFD | _TRIGGER, False): IrqOperation.DEASSIGN,
    (_NONE | _MASK, False): IrqOperation.MASK,
    (_BOOL | _MASK, False): IrqOperation.MASK,
    (_EVENTFD | _MASK, True): IrqOperation.ASSIGN_MASK,
    (_EVENTFD | _MASK, False): IrqOperation.DEASSIGN_MASK,
    (_NONE | _UNMASK, False): IrqOperation.UNMASK,
    (_BOOL | _UNMASK, False): IrqOperation.UNMASK,
    (_EVENTFD | _UNMASK, True): IrqOperation.ASSIGN_UNMASK,
    (_EVENTFD | _UNMASK, False): IrqOperation.DEASSIGN_UNMASK,
}


class IrqEffect(NamedTuple):
    """What the caller has to do after one SET_IRQS.

    Args:
        dropped: handles that are used no more, to be closed.
        signal: handles to write 1 to, now.
        watch: mask and unmask eventfds that have been stored: the client writes them where it could also have
            sent MASK or UNMASK. A caller that can wait for them calls `mask` or `unmask` when one is written.
    """

    dropped: list[Any]
    signal: list[Any]
    watch: list[Any]


class LineState(NamedTuple):
    """What one IRQ index remembers beside its eventfds.

    Args:
        active: eventfds were given for it, so that a vector without one latches.
        masked: one byte per vector.
        pending: one byte per vector: an interrupt is latched.
    """

    active: bool
    masked: bytes
    pending: bytes


class _Line:
    """The state of one IRQ index; every list has one entry per vector."""

    __slots__ = (
        "active",
        "automasked",
        "count",
        "handles",
        "mask_handles",
        "masked",
        "pending",
        "unmask_handles",
    )

    def __init__(self, description: IrqDescription) -> None:
        self.count = description.count
        self.automasked = bool(description.flags & IrqInfoFlags.AUTOMASKED)
        self.handles: list[Any] = [None] * self.count
        self.mask_handles: dict[int, Any] = {}
        self.unmask_handles: dict[int, Any] = {}
        self.masked = bytearray(self.count)
        self.pending = bytearray(self.count)
        # True from the first EVENTFD request on: only then is a missing eventfd a reason to latch.
        self.active = False

    def forget(self) -> None:
        """Unmask everything and drop what is latched."""
        self.masked = bytearray(self.count)
        self.pending = bytearray(self.count)
        self.active = False

    def take_handles(self) -> list[Any]:
        """Every handle of the index; none is left behind."""
        handles = [handle for handle in self.handles if handle is not None]
        handles += self.mask_handles.values()
        handles += self.unmask_handles.values()
        self.handles = [None] * self.count
        self.mask_handles = {}
        self.unmask_handles = {}
        return handles


class IrqSet:
    """The interrupts of one function and one client.

    Args:
        descriptions: one per IRQ index, in the order of `IrqIndex`.
    """

    __slots__ = ("_intx_level", "_lines", "descriptions")

    def __init__(self, descriptions: Sequence[IrqDescription]) -> None:
        self.descriptions = tuple(descriptions)
        self._lines = [_Line(description) for description in descriptions]
        self._intx_level = False

    def check(self, request: SetIrqs, nfds: int) -> IrqOperation:
        """Say what a SET_IRQS asks for, or refuse it; nothing changes.

        Args:
            request: the decoded command.
            nfds: how many descriptors came with it.

        Returns:
            The row of the DATA x ACTION table that applies.

        Raises:
            CommandError: EINVAL, with the first rule that it breaks.

        Spec: SET_IRQS; the rules and their order are libvfio-user's, except that disable-all is accepted on
            an index without vectors, as in the kernel. Flag bits above the six known ones are ignored.
        """
        lines = self._lines
        count = lines[request.index].count if request.index < len(lines) else 0
        for broken, reason in _RULES:
            if broken(request, nfds, count, len(lines)):
                raise CommandError(
                    f"SET_IRQS index {request.index} start {request.start} count {request.count} flags "
                    f"{request.flags:#x} with {nfds} descriptors: {reason}; nothing changed",
                    errno.EINVAL,
                )
        if not request.count:
            return IrqOperation.DISABLE
        return _OPERATIONS[request.flags & (_DATA_BITS | _ACTION_BITS), nfds > 0]

    def apply(self, request: SetIrqs, handles: Sequence[Any]) -> IrqEffect:
        """Carry out a SET_IRQS.

        Args:
            request: the decoded command.
            handles: one for each descriptor that came with it, in order; kept from here on, unless it is
                refused.

        Returns:
            Handles to close, to signal and to watch.

        Raises:
            CommandError: as `check`; nothing has changed and the handles are still the caller's.
        """
        operation = self.check(request, len(handles))
        effect = IrqEffect([], [], [])
        _APPLY[operation](self, request, handles, effect)
        return effect

    def trigger(self, index: int, vector: int) -> Any | None:
        """Raise an interrupt (an edge).

        Args:
            index: `IrqIndex`.
            vector: vector of that index.

        Returns:
            The handle to write 1 to now; None if the vector is masked or has no eventfd (it is latched then,
            if the client uses this index at all).

        Raises:
            LocalProtocolError: the function has no such vector.
        """
        try:
            if vector < 0:
                raise IndexError
            line = self._lines[index]
            handle = line.handles[vector]
        except IndexError:
            raise LocalProtocolError(f"IRQ index {index} has no vector {vector}; not raised") from None
        if handle is None or line.masked[vector]:
            if line.active:
                line.pending[vector] = 1
            return None
        if line.automasked:
            line.masked[vector] = 1
        return handle

    def set_level(self, asserted: bool) -> Any | None:
        """Drive the INTx line.

        Args:
            asserted: True while the device wants attention.

        Returns:
            The handle to write 1 to now, or None. An asserted line fires once, then again after each UNMASK
            for as long as it stays asserted.
        """
        rising = asserted and not self._intx_level
        self._intx_level = asserted
        line = self._lines[IrqIndex.INTX]
        if not rising or not line.count:
            return None
        # Without automask there is no UNMASK to ask again at, so a rising edge is all there is: latch it like
        # one.
        return self._deliver(IrqIndex.INTX, 0) if line.automasked else self.trigger(IrqIndex.INTX, 0)

    def mask(self, index: int, vector: int) -> None:
        """Mask `vector` of `index`, as MASK does."""
        self._lines[index].masked[vector] = 1

    def unmask(self, index: int, vector: int) -> Any | None:
        """Unmask `vector` of `index`, as UNMASK does; return the handle to write 1 to if an interrupt was waiting."""
        self._lines[index].masked[vector] = 0
        return self._deliver(index, vector)

    def handle(self, index: int, vector: int) -> Any | None:
        """The handle assigned to `vector` of `index`, or None."""
        return self._lines[index].handles[vector]

    def mask_handle(self, index: int, vector: int) -> Any | None:
        """The eventfd that the client writes to mask `vector` of `index`, or None."""
        return self._lines[index].mask_handles.get(vector)

    def unmask_handle(self, index: int, vector: int) -> Any | None:
        """The eventfd that the client writes to unmask `vector` of `index`, or None."""
        return self._lines[index].unmask_handles.get(vector)

    def masked(self, index: int, vector: int) -> bool:
        """True if `vector` of `index` is masked, by the client or by itself when it fired."""
        return bool(self._lines[index].masked[vector])

    def pending(self, index: int, vector: int) -> bool:
        """True if an interrupt waits for `vector` of `index` to be unmasked or to get an eventfd."""
        return bool(self._lines[index].pending[vector]) or self._level_waits(index)

    def pending_vectors(self, index: int) -> list[int]:
        """Vectors of an index with a latched interrupt: what its pending bits show."""
        return [vector for vector, bit in enumerate(self._lines[index].pending) if bit]

    def restore(self, index: int, handles: Sequence[Any]) -> None:
        """Take over the eventfds of an index that were assigned to another process.

        Args:
            index: `IrqIndex`.
            handles: one per vector; None where there is none.
        """
        line = self._lines[index]
        if len(handles) == line.count:
            line.handles = list(handles)
            line.active = True

    def line(self, index: int) -> LineState:
        """What an index remembers beside its eventfds."""
        line = self._lines[index]
        return LineState(line.active, bytes(line.masked), bytes(line.pending))

    def restore_line(self, index: int, state: LineState) -> None:
        """Take over the `state` that `line` gave for `index` in another process, if it has as many vectors."""
        line = self._lines[index]
        if len(state.masked) == len(state.pending) == line.count:
            line.active, line.masked, line.pending = state.active, bytearray(state.masked), bytearray(state.pending)

    def restore_handle(self, index: int, vector: int, action: int, handle: Any) -> bool:
        """Take over one eventfd that was assigned to another process.

        Args:
            index: `IrqIndex`.
            vector: which of its vectors.
            action: `IrqSetFlags.ACTION_TRIGGER`, `ACTION_MASK` or `ACTION_UNMASK`.
            handle: the eventfd; kept from here on.

        Returns:
            Whether there is such a vector; the handle is still the caller's if not.
        """
        if index >= len(self._lines) or not 0 <= vector < self._lines[index].count:
            return False
        line = self._lines[index]
        line.active = True
        if action == _TRIGGER:
            line.handles[vector] = handle
        else:
            (line.mask_handles if action == _MASK else line.unmask_handles)[vector] = handle
        return True

    def restore_level(self, asserted: bool) -> None:
        """Take over the level of the INTx line as another process left it; the client knows it."""
        self._intx_level = asserted

    def assigned(self, index: int) -> int:
        """How many vectors of an index have an eventfd."""
        line = self._lines[index]
        return line.count - line.handles.count(None)

    def discard_pending(self, index: int) -> None:
        """Forget latched interrupts of an index, as when the guest clears its enable bit in config space."""
        line = self._lines[index]
        line.pending = bytearray(line.count)

    def clear(self) -> list[Any]:
        """Forget the client: no eventfds, masks or latches are left. The INTx level is the device's and
        stays.

        Returns:
            Every handle, to be closed.
        """
        handles: list[Any] = []
        for line in self._lines:
            handles += line.take_handles()
            line.forget()
        return handles

    def _level_waits(self, index: int) -> bool:
        # A line without automask has fired on its edge and has nothing to repeat.
        return index == IrqIndex.INTX and self._intx_level and self._lines[index].automasked

    def _deliver(self, index: int, vector: int) -> Any | None:
        line = self._lines[index]
        handle = line.handles[vector]
        if handle is None or line.masked[vector]:
            return None
        if not line.pending[vector] and not self._level_waits(index):
            return None
        line.pending[vector] = 0
        if line.automasked:
            line.masked[vector] = 1
        return handle

    def _disable(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        line = self._lines[request.index]
        effect.dropped.extend(line.take_handles())
        line.masked = bytearray(line.count)
        # Latches stay: QEMU disables and assigns anew each time the guest brings one more MSI-X vector to
        # life, and what fires in between must arrive.

    def _loopback(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        line = self._lines[request.index]
        found = (line.handles[vector] for vector in _selected(request))
        effect.signal.extend(handle for handle in found if handle is not None)

    def _assign(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        line = self._lines[request.index]
        line.active = True
        for vector, handle in enumerate(handles, request.start):
            old = line.handles[vector]
            if old is not None:
                effect.dropped.append(old)
            line.handles[vector] = handle
            due = self._deliver(request.index, vector)
            if due is not None:
                effect.signal.append(due)

    def _deassign(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        line = self._lines[request.index]
        line.active = True
        for vector in range(request.start, request.start + request.count):
            if line.handles[vector] is not None:
                effect.dropped.append(line.handles[vector])
                line.handles[vector] = None

    def _mask(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        for vector in _selected(request):
            self.mask(request.index, vector)

    def _unmask(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        for vector in _selected(request):
            due = self.unmask(request.index, vector)
            if due is not None:
                effect.signal.append(due)

    def _assign_mask(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        _store(self._lines[request.index].mask_handles, request, handles, effect)

    def _assign_unmask(self, request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
        _store(self._lines[request.index].unmask_handles, request, handles, effect)


def _selected(request: SetIrqs) -> list[int]:
    """The vectors that a NONE or BOOL request names."""
    vectors = range(request.start, request.start + request.count)
    if request.flags & _BOOL:
        return [vector for vector, byte in zip(vectors, request.data, strict=True) if byte]
    return list(vectors)


def _store(stored: dict[int, Any], request: SetIrqs, handles: Sequence[Any], effect: IrqEffect) -> None:
    for vector in range(request.start, request.start + request.count):
        old = stored.pop(vector, None)
        if old is not None:
            effect.dropped.append(old)
    stored.update(enumerate(handles, request.start))
    effect.watch.extend(handles)


_Rule = Callable[[SetIrqs, int, int, int], bool]
#: What makes a request invalid: (request, descriptors, vectors of the index, indices) and the reason to
#: report. The first that applies counts; later rules may rely on the earlier ones.
_RULES: tuple[tuple[_Rule, str], ...] = (
    (lambda r, n, c, i: r.argsz < _FIXED_SIZE, "argsz must be at least 20"),
    (lambda r, n, c, i: bool(r.flags & _BOOL) and len(r.data) != r.count, "BOOL needs one byte per vector"),
    (lambda r, n, c, i: r.index >= i, "there is no such IRQ index"),
    (lambda r, n, c, i: r.flags & _ACTION_BITS not in _SINGLE_BITS, "exactly one ACTION bit is needed"),
    (lambda r, n, c, i: r.flags & _DATA_BITS not in _SINGLE_BITS, "exactly one DATA bit is needed"),
    (lambda r, n, c, i: r.start >= c and not _is_disable(r), "start is not a vector of this index"),
    (lambda r, n, c, i: r.start + r.count > c and not _is_disable(r), "the index has fewer vectors"),
    (lambda r, n, c, i: r.index in _UNMASKABLE and not r.flags & _TRIGGER, "ERR and REQ cannot be masked"),
    (lambda r, n, c, i: r.index in _UNMASKABLE and r.count > 1, "ERR and REQ have one vector"),
    (lambda r, n, c, i: not r.count and r.start != 0, "a count of 0 needs start 0"),
    (lambda r, n, c, i: not r.count and not _is_disable(r), "a count of 0 is for TRIGGER with NONE"),
    (lambda r, n, c, i: n > 0 and not r.flags & _EVENTFD, "only EVENTFD takes descriptors"),
    (lambda r, n, c, i: n not in (0, r.count), "there must be as many descriptors as vectors, or none"),
)


def _is_disable(request: SetIrqs) -> bool:
    return not request.count and not request.start and request.flags & (_DATA_BITS | _ACTION_BITS) == _DISABLE


_APPLY: dict[IrqOperation, Callable[[IrqSet, SetIrqs, Sequence[Any], IrqEffect], None]] = {
    IrqOperation.DISABLE: IrqSet._disable,
    IrqOperation.LOOPBACK: IrqSet._loopback,
    IrqOperation.ASSIGN: IrqSet._assign,
    IrqOperation.DEASSIGN: IrqSet._deassign,
    IrqOperation.MASK: IrqSet._mask,
    IrqOperation.UNMASK: IrqSet._unmask,
    IrqOperation.ASSIGN_MASK: IrqSet._assign_mask,
    IrqOperation.ASSIGN_UNMASK: IrqSet._assign_unmask,
    IrqOperation.DEASSIGN_MASK: IrqSet._assign_mask,
    IrqOperation.DEASSIGN_UNMASK: IrqSet._assign_unmask,
}
