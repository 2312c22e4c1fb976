"""What a carrier is to the rest of a VM's migration: what it tells, and what it is told.

A carrier is a peer of one object in QEMU, which stands beside the functions of one VM and is migrated with it. QEMU
asks and waits, with its main loop at a standstill: so there is at most one question at a time, and everybody waits for
its answer.

| question | who is asked | `answer` | `refuse` |
|---|---|---|---|
| `StopAsked` | source, vCPUs stand | the functions stand, what they wrote is marked | the migration fails |
| `SaveAsked` | source, functions may still run | `offer` the state | the migration fails |
| `StateLoaded` | destination, vCPUs stand | the state is loaded, and replayed | the migration fails |
| `GoAsked` | whoever is about to run | the functions run | the guest runs without them |

A source whose migration fails resumes by itself, and says so by the monitor.

What a carrier cannot see it does not ask: the monitor's STOP and RESUME say the same, later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import trio

from vfiouser_oob.transport.peer import Peer

#: A state, as it goes into the stream and comes out of it.
State: TypeAlias = "bytes | bytearray | memoryview"


@dataclass(frozen=True, slots=True)
class QemuAttached:
    """A QEMU has connected its object and is served.

    Args:
        peer: the process, as the kernel knows it.
    """

    peer: Peer


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The vCPUs stand, and the functions have to: a question.

    Args:
        sure: whether a migration is under way; else the guest may have stopped the companion's driver, and only the
            monitor knows whether the VM runs.
    """

    sure: bool = True


@dataclass(frozen=True, slots=True)
class SaveAsked:
    """QEMU collects the state now: a question."""


@dataclass(frozen=True, slots=True)
class StateTaken:
    """QEMU has taken the whole state; from now on the destination may have it."""


@dataclass(frozen=True, slots=True)
class StateLoaded:
    """The whole state has arrived: a question.

    Args:
        state: what was offered at the source.
        free: QEMU's main loop goes on meanwhile, so it answers DMA messages, until `AnswerDue`. Else whatever is sent
            to it is done after the answer, and waiting for it would last for ever.
    """

    state: State
    free: bool = False


@dataclass(frozen=True, slots=True)
class AnswerDue:
    """QEMU's main loop waits for the answer to `StateLoaded` now: it answers no DMA messages any more."""


@dataclass(frozen=True, slots=True)
class GoAsked:
    """The guest is about to run: a question, and the VM does not run before its answer."""


@dataclass(frozen=True, slots=True)
class LogChanged:
    """QEMU wants to be told which pages of guest memory are written, or no longer.

    Args:
        log: where to tell; None when nobody listens any more.
    """

    log: WrittenPagesLog | None


@dataclass(frozen=True, slots=True)
class Lost:
    """QEMU's object has gone, and with it every question that was open.

    Args:
        reason: how it went, for people.
    """

    reason: str


#: Questions, of which one is open at a time.
Question: TypeAlias = StopAsked | SaveAsked | StateLoaded | GoAsked
CarrierEvent: TypeAlias = Question | QemuAttached | StateTaken | AnswerDue | LogChanged | Lost


@dataclass(frozen=True, slots=True)
class MonitorCommand:
    """A command for QEMU's monitor.

    Args:
        execute: its name.
        arguments: its arguments, by QMP's names.
    """

    execute: str
    arguments: dict[str, Any]


class WrittenPagesLog(Protocol):
    """A log of written pages, which QEMU reads while it migrates memory."""

    def mark(self, address: int, length: int) -> None:
        """Tell that guest memory was written; only after it was.

        Args:
            address: guest physical address.
            length: bytes.
        """
        ...


class VmCarrier(Protocol):
    """One VM's carrier, whatever it is in QEMU.

    `run` serves QEMU; `next_event` is what it tells, in order; the other methods answer what was asked. An answer that
    comes when nobody waits any more is dropped, since the `Lost` that says so may not have been read yet.
    """

    @property
    def name(self) -> str:
        """What it is called in configuration and status."""
        ...

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest state that it carries."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve QEMU until cancelled, one QEMU after the other."""
        ...

    async def next_event(self) -> CarrierEvent:
        """Wait for what comes next."""
        ...

    def expect(self, most_bytes: int) -> None:
        """Prepare for a state to arrive: the QEMU that is here, or will come, is a destination.

        Args:
            most_bytes: bytes of the largest state to take.

        Raises:
            ValueError: it is more than the carrier can carry.
        """
        ...

    def offer(self, state: State) -> bool:
        """Answer `SaveAsked` with the state.

        Returns:
            Whether somebody waited for it.

        Raises:
            ValueError: it is larger than the carrier can carry; nothing was answered.
        """
        ...

    async def given(self) -> None:
        """Wait until QEMU has all of the state that was offered, or will not take it."""
        ...

    def answer(self) -> bool:
        """Answer any other question: it is done, QEMU may go on.

        Returns:
            Whether somebody waited for it.
        """
        ...

    def refuse(self, reason: str) -> bool:
        """Answer a question with no: the migration fails.

        Args:
            reason: why, for people; it appears wherever QEMU reports the failure.

        Returns:
            Whether somebody waited for it.
        """
        ...

    def reset(self) -> None:
        """Forget the migration that was under way or prepared, and refuse what is open."""
        ...

    def repair(self) -> tuple[MonitorCommand, ...]:
        """The commands for QEMU's monitor that connect its object anew; none when it cannot be or need not."""
        ...
