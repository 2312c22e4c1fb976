"""The carriers of a VM, and the one question that QEMU waits for.

A QEMU may have been started with either carrier, or with both. One carries: the one that came last, or that brings a
state. The other is asked as well, and carries nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from vfiouser_oob.vm.carriers.interface import (
    AnswerDue,
    CarrierEvent,
    GoAsked,
    LogChanged,
    Lost,
    MonitorCommand,
    QemuAttached,
    SaveAsked,
    State,
    StateLoaded,
    StopAsked,
    VmCarrier,
    WrittenPagesLog,
)
from vfiouser_oob.vm.record import CarrierKind


@dataclass(slots=True)
class OpenQuestion:
    """What QEMU waits for.

    Args:
        asked: the question.
        due: QEMU does nothing else meanwhile.
    """

    asked: StopAsked | SaveAsked | StateLoaded | GoAsked
    due: bool = True


#: Told of an event of the carrier that carries.
Hear = Callable[[CarrierKind, CarrierEvent], None]


class Carriers:
    """All carriers of a VM.

    Args:
        carriers: by kind; at least one.
        hear: told of what the one that carries tells.
    """

    def __init__(self, carriers: Mapping[CarrierKind, VmCarrier], hear: Hear) -> None:
        self._carriers = carriers
        self._hear = hear
        #: The one that carries.
        self.kind = next(iter(carriers))
        #: Those that QEMU has connected.
        self.attached: set[CarrierKind] = set()
        self._came = trio.Event()
        self.question: OpenQuestion | None = None
        #: Where to tell what the functions write; None if nobody listens.
        self.log: WrittenPagesLog | None = None
        self._expecting = False

    @property
    def kinds(self) -> tuple[CarrierKind, ...]:
        """Which there are."""
        return tuple(self._carriers)

    @property
    def current(self) -> VmCarrier:
        """The one that carries."""
        return self._carriers[self.kind]

    def carry_by(self, kind: CarrierKind) -> None:
        """Let one carry, if there is one of that kind, until another one comes."""
        if kind in self._carriers:
            self.kind = kind

    async def attachment(self) -> None:
        """Wait until QEMU has connected one."""
        await self._came.wait()

    async def run(self, kind: CarrierKind, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve QEMU's end of a carrier until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._carriers[kind].run)
            task_status.started()
            await self._read(kind)

    async def _read(self, kind: CarrierKind) -> None:
        while True:
            self._take(kind, await self._carriers[kind].next_event())

    def _take(self, kind: CarrierKind, event: CarrierEvent) -> None:
        if isinstance(event, QemuAttached):
            self.attached.add(kind)
            self._came.set()
        elif isinstance(event, Lost):
            self.attached.discard(kind)
            self._came = trio.Event()
        if isinstance(event, QemuAttached) or (isinstance(event, StateLoaded) and len(event.state)):
            self.kind = kind
        if kind is not self.kind:
            self._wave_through(kind, event)
            return
        if isinstance(event, Lost):
            self.question = self.log = None
        elif isinstance(event, LogChanged):
            self.log = event.log
        elif isinstance(event, StopAsked | SaveAsked | StateLoaded | GoAsked):
            self.question = OpenQuestion(event, not (isinstance(event, StateLoaded) and event.free))
        elif isinstance(event, AnswerDue) and self.question is not None:
            self.question.due = True
        self._hear(kind, event)

    def _wave_through(self, kind: CarrierKind, event: CarrierEvent) -> None:
        carrier = self._carriers[kind]
        if isinstance(event, SaveAsked):
            carrier.offer(b"")
        elif isinstance(event, StopAsked | StateLoaded | GoAsked):
            carrier.answer()

    # Answers

    def asked(self, *kinds: type) -> bool:
        """Whether one of these questions is open."""
        return self.question is not None and isinstance(self.question.asked, kinds)

    def offer(self, state: State) -> None:
        """Give the state; one that is too large is refused."""
        self.question = None
        try:
            self.current.offer(state)
        except ValueError as error:
            self.current.refuse(str(error))

    async def given(self) -> None:
        """Wait until QEMU has all of the state that was offered, or will not take it."""
        await self.current.given()

    def answer(self) -> None:
        """It is done."""
        self.question = None
        self.current.answer()

    def refuse(self, reason: str) -> None:
        """It is not."""
        self.question = None
        self.current.refuse(reason)

    def expect(self, most_bytes: int) -> None:
        """The QEMU that is here waits for its VM."""
        self._expecting = True
        for carrier in self._carriers.values():
            carrier.expect(min(most_bytes, carrier.most_bytes))

    def expect_no_more(self) -> None:
        """The VM has come, or will not: this is a source from now on.

        While QEMU waits for an answer, nothing is done.
        """
        if self._expecting and self.question is None:
            self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._expecting = False
        self.question = None
        for carrier in self._carriers.values():
            carrier.reset()

    def repair(self) -> tuple[MonitorCommand, ...]:
        """The commands that connect QEMU's end of what it has lost."""
        return tuple(
            command for kind in self._carriers if kind not in self.attached for command in self._carriers[kind].repair()
        )
