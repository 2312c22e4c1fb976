"""What a VM's migration asks of each of its functions, and of QEMU's monitor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import trio

from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.vm.bundle import FunctionState, Whereabouts
from vfiouser_oob.vm.carriers.interface import WrittenPagesLog
from vfiouser_oob.vm.monitor import ANSWER_S, Found
from vfiouser_oob.vm.preflight import FunctionFacts
from vfiouser_oob.vm.qmp import QmpEvent, QmpGreeting


class VmMonitor(Protocol):
    """The monitor of a QEMU that was greeted and asked, as `monitor.Monitor` is."""

    peer: Peer | None
    greeting: QmpGreeting
    found: Found

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float = ANSWER_S
    ) -> Any:
        """Have a command carried out; raises MonitorError."""

    async def hmp(self, line: str, *, seconds: float = ANSWER_S) -> str:
        """Have a line of the human monitor carried out; raises MonitorError."""

    async def next_event(self) -> QmpEvent:
        """Wait for the next event; raises GoneError."""

    def pending_events(self) -> list[QmpEvent]:
        """Take the events that are here already."""


class Replaying(Protocol):
    """A replay whose writes were sent."""

    async def verify(self) -> str:
        """Wait until they were carried out, and read them back; returns what is wrong, empty if nothing is."""


class MovableFunction(Protocol):
    """One function of a VM.

    The methods that wait may be cancelled; what they began may then have been half done. Where one fails it raises a
    `VfioUserError`, and may be called again.
    """

    @property
    def name(self) -> str:
        """Its name, which is its id in QEMU."""

    def facts(self) -> FunctionFacts:
        """What is known of it, for the judgement whether it can migrate."""

    async def record(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Record what it writes, until cancelled; what was recorded is then forgotten.

        Args:
            task_status: told when it is recorded.
        """

    async def stop(self, log: WrittenPagesLog | None) -> None:
        """Have it stand.

        Args:
            log: where to tell what it has written since it is recorded; without one that goes into its state.
        """

    async def save(self, whereabouts: Whereabouts | None) -> FunctionState:
        """The state of the function, which stands."""

    def handed(self) -> None:
        """The state has been handed over: it comes back only when it is resumed, or reset."""

    async def load(self, state: FunctionState) -> None:
        """Take a state, and stand."""

    def replay(self, state: FunctionState, *, free: bool) -> Replaying:
        """Send what brings QEMU to what it had of the function at the source; nothing is waited for.

        Args:
            state: what was loaded.
            free: QEMU answers now; else it carries everything out later.
        """

    async def resume(self) -> None:
        """Have it run."""

    async def bar(self, reason: str) -> None:
        """Never let it run for this client, and have the guest find out.

        Args:
            reason: for people.
        """
