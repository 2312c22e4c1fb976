"""What a VM's migration asks of each of its functions, and of QEMU's monitor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vfiouser_oob.transport.peer import Peer
from vfiouser_oob.vm.bundle import FunctionState
from vfiouser_oob.vm.carriers.interface import WrittenPagesLog
from vfiouser_oob.vm.counterpart import FunctionOffer
from vfiouser_oob.vm.monitor import ANSWER_S, Found
from vfiouser_oob.vm.preflight import FunctionFacts
from vfiouser_oob.vm.qmp import QmpEvent, QmpGreeting


class FunctionTrouble(Exception):
    """A function does not do its part; the text says why."""


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


class MovableFunction(Protocol):
    """One function of a VM.

    The methods that wait may be cancelled; what they began may then have been half done. Where one fails it raises a
    `FunctionTrouble` or a `VfioUserError`, and may be called again.
    """

    @property
    def name(self) -> str:
        """Its name, which is its id in QEMU."""

    def facts(self) -> FunctionFacts:
        """What is known of it, for the judgement whether it can migrate."""

    async def offer(self, deadline: float) -> FunctionOffer:
        """What this host says of it to another one; asks its agent.

        Args:
            deadline: when to give up, as trio's clock has it.
        """

    async def watch(self, *, coming: bool) -> None:
        """Know at any time what it writes, until cancelled.

        Args:
            coming: its VM is yet to come, so that it writes nothing.
        """

    async def arm(self, monitor: VmMonitor, began: float | None) -> None:
        """Keep what it writes and what QEMU keeps of it, until it is disarmed.

        Args:
            monitor: its QEMU's.
            began: when the migration began, in seconds since 1970; None if that is not known.
        """

    async def disarm(self) -> None:
        """Go on as before the migration."""

    def use_log(self, log: WrittenPagesLog | None) -> None:
        """Tell what it writes to QEMU's log, or to none any more."""

    def hold(self) -> None:
        """The vCPUs stand: QEMU may answer nothing any more."""

    async def stop(self) -> None:
        """Have it stand."""

    async def save(self) -> FunctionState:
        """The state of the function, which stands."""

    def handed(self) -> None:
        """The state has been handed over: it comes back only when it is resumed, or reset."""

    async def load(self, state: FunctionState) -> None:
        """Take a state, and stand."""

    def replay(self, state: FunctionState, *, sent: bool = False) -> Replaying:
        """Send what brings QEMU to what it had of the function at the source; nothing is waited for.

        Args:
            state: what was loaded; of its own state nothing is needed.
            sent: it was sent before, and the VM may run, so it is only read back.
        """

    async def resume(self) -> None:
        """Have it run."""

    async def bar(self, reason: str) -> None:
        """Never let it run for this client, and have the guest find out.

        Args:
            reason: for people.
        """


class Replaying(Protocol):
    """A replay that was sent."""

    async def finish(self, may_write: Callable[[], bool]) -> None:
        """Wait until it is carried out, and judge what is read back; raises FunctionTrouble if that is wrong.

        Args:
            may_write: whether the VM does not run yet.
        """
