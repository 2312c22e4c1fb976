"""IrqSet against a naive model made of dictionaries, under random requests and interrupts."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vfiouser_protocol.constants import IrqIndex
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.irq import INTX, IrqDescription, IrqSet
from vfiouser_protocol.messages import SetIrqs

COUNTS = (1, 0, 3, 1, 1)
DATA = {1: "none", 2: "bool", 4: "eventfd"}
ACTION = {8: "mask", 16: "unmask", 32: "trigger"}

Vector = tuple[int, int]


def naive_valid(request: SetIrqs, nfds: int) -> bool:
    """The rules as one paragraph, without their order."""
    data, action = DATA.get(request.flags & 7), ACTION.get(request.flags & 56)
    if request.argsz < 20 or data is None or action is None or request.index >= len(COUNTS):
        return False
    if request.count == 0:
        return request.start == 0 and data == "none" and action == "trigger" and nfds == 0
    if request.start + request.count > COUNTS[request.index]:
        return False
    if request.index >= IrqIndex.ERR and action != "trigger":
        return False
    if data == "bool" and len(request.data) != request.count:
        return False
    return nfds in ((0, request.count) if data == "eventfd" else (0,))


class NaiveIrqs:
    """Facts about vectors, kept in sets and dictionaries."""

    def __init__(self) -> None:
        self.fds: dict[Vector, str] = {}
        self.extra: dict[tuple[int, int, str], str] = {}
        self.masked: set[Vector] = set()
        self.pending: set[Vector] = set()
        self.used: set[int] = set()
        self.level = False

    def fire(self, vector: Vector) -> str | None:
        """Deliver one interrupt if the vector can take it, otherwise remember it."""
        fd = self.fds.get(vector)
        if fd is None or vector in self.masked:
            if vector[0] in self.used:
                self.pending.add(vector)
            return None
        if vector[0] == IrqIndex.INTX:
            self.masked.add(vector)
        return fd

    def due(self, vector: Vector) -> list[str]:
        """What is delivered now that something about the vector changed."""
        waiting = vector in self.pending or (vector[0] == IrqIndex.INTX and self.level)
        if not waiting or vector not in self.fds or vector in self.masked:
            return []
        self.pending.discard(vector)
        fd = self.fire(vector)
        return [fd] if fd else []

    def apply(self, request: SetIrqs, fds: list[str]) -> tuple[list[str], list[str]]:
        """(dropped, signal) of a valid request."""
        dropped: list[str] = []
        signal: list[str] = []
        data, action = DATA[request.flags & 7], ACTION[request.flags & 56]
        index = request.index
        vectors = [(index, v) for v in range(request.start, request.start + request.count)]
        if request.count == 0:
            dropped += [fd for key, fd in self.fds.items() if key[0] == index]
            dropped += [fd for key, fd in self.extra.items() if key[0] == index]
            self.fds = {key: fd for key, fd in self.fds.items() if key[0] != index}
            self.extra = {key: fd for key, fd in self.extra.items() if key[0] != index}
            self.masked = {key for key in self.masked if key[0] != index}
        elif data == "eventfd" and action == "trigger":
            self.used.add(index)
            for i, vector in enumerate(vectors):
                if vector in self.fds:
                    dropped.append(self.fds.pop(vector))
                if fds:
                    self.fds[vector] = fds[i]
                    signal += self.due(vector)
        elif data == "eventfd":
            for i, (_, number) in enumerate(vectors):
                if (index, number, action) in self.extra:
                    dropped.append(self.extra.pop((index, number, action)))
                if fds:
                    self.extra[index, number, action] = fds[i]
        else:
            chosen = vectors if data == "none" else [v for v, b in zip(vectors, request.data, strict=True) if b]
            for vector in chosen:
                if action == "trigger":
                    signal += [self.fds[vector]] if vector in self.fds else []
                elif action == "mask":
                    self.masked.add(vector)
                else:
                    self.masked.discard(vector)
                    signal += self.due(vector)
        return dropped, signal


class IrqSetMachine(RuleBasedStateMachine):
    """Runs both models side by side; every handle is a new string, so that mix-ups show."""

    def __init__(self) -> None:
        super().__init__()
        self.irqs = IrqSet([INTX] + [IrqDescription(count) for count in COUNTS[1:]])
        self.naive = NaiveIrqs()
        self.serial = 0
        self.open: set[str] = set()

    @rule(data=st.data())
    def plausible_request(self, data: st.DataObject) -> None:
        """A request that is usually valid."""
        index = data.draw(st.sampled_from([0, 2, 2, 3]))
        start = data.draw(st.integers(0, COUNTS[index] - 1))
        count = data.draw(st.integers(1, COUNTS[index] - start))
        flags = data.draw(st.sampled_from([0x21, 0x22, 0x24, 0x24, 0x24, 0x09, 0x0A, 0x0C, 0x11, 0x12, 0x14]))
        payload = data.draw(st.binary(min_size=count, max_size=count)) if flags & 2 else b""
        self.send(SetIrqs(20, flags, index, start, count, payload), count if flags & 4 else 0)

    @rule(
        argsz=st.sampled_from([20, 20, 20, 19, 24]),
        flags=st.integers(0, 0x7F),
        index=st.integers(0, 6),
        start=st.integers(0, 5) | st.just(0xFFFFFFFF),
        count=st.integers(0, 5) | st.just(0xFFFFFFFF),
        payload=st.binary(max_size=5),
        nfds=st.integers(0, 5),
    )
    def any_request(
        self, argsz: int, flags: int, index: int, start: int, count: int, payload: bytes, nfds: int
    ) -> None:
        """A request out of thin air."""
        self.send(SetIrqs(argsz, flags, index, start, count, payload), nfds)

    @rule(index=st.sampled_from([0, 2]), flags=st.sampled_from([0x09, 0x11]), times=st.integers(1, 2))
    def mask_everything(self, index: int, flags: int, times: int) -> None:
        """MASK or UNMASK of a whole index, perhaps twice: what was delivered must not come again."""
        for _ in range(times):
            self.send(SetIrqs(20, flags, index, 0, COUNTS[index], b""), 0)

    @rule(index=st.sampled_from([0, 1, 2, 3, 4]))
    def disable_all(self, index: int) -> None:
        """TRIGGER with NONE and a count of 0."""
        self.send(SetIrqs(20, 0x21, index, 0, 0, b""), 0)

    def send(self, request: SetIrqs, nfds: int) -> None:
        """Apply to both; dropped and signalled handles must agree."""
        fds = [f"fd{self.serial + i}" for i in range(nfds)]
        self.serial += nfds
        refused = False
        try:
            effect = self.irqs.apply(request, fds)
        except CommandError:
            refused = True
        assert refused is not naive_valid(request, nfds)
        if refused:
            return
        dropped, signal = self.naive.apply(request, fds)
        assert sorted(dropped) == sorted(effect.dropped)
        assert signal == effect.signal
        self.open |= set(fds)
        self.open -= set(dropped)

    @rule(data=st.data())
    def trigger(self, data: st.DataObject) -> None:
        """The device raises an edge."""
        index = data.draw(st.sampled_from([0, 2, 3]))
        vector = data.draw(st.integers(0, COUNTS[index] - 1))
        assert self.naive.fire((index, vector)) == self.irqs.trigger(index, vector)

    @rule(asserted=st.booleans())
    def level(self, asserted: bool) -> None:
        """The device drives INTx."""
        rising = asserted and not self.naive.level
        self.naive.level = asserted
        expected = self.naive.due((0, 0)) if rising else []
        assert (expected[0] if expected else None) == self.irqs.set_level(asserted)

    @rule(index=st.sampled_from([0, 2]))
    def discard(self, index: int) -> None:
        """Latches of one index are thrown away."""
        self.naive.pending = {key for key in self.naive.pending if key[0] != index}
        self.irqs.discard_pending(index)

    @rule()
    def clear(self) -> None:
        """The client goes; every handle comes back."""
        assert self.open == set(self.irqs.clear())
        level = self.naive.level
        self.naive = NaiveIrqs()
        self.naive.level = level
        self.open = set()

    @invariant()
    def same_state(self) -> None:
        """Handles, masks and latches agree for every vector; no handle is lost."""
        for index, count in enumerate(COUNTS):
            for vector in range(count):
                key = (index, vector)
                assert self.naive.fds.get(key) == self.irqs.handle(index, vector)
                assert (key in self.naive.masked) == self.irqs.masked(index, vector)
                assert self.naive.extra.get((*key, "mask")) == self.irqs.mask_handle(index, vector)
                assert self.naive.extra.get((*key, "unmask")) == self.irqs.unmask_handle(index, vector)
            expected = sorted(v for i, v in self.naive.pending if i == index)
            assert expected == self.irqs.pending_vectors(index)
        assert self.open == {*self.naive.fds.values(), *self.naive.extra.values()}


IrqSetMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIrqSetAgainstNaive = IrqSetMachine.TestCase
