"""All state of a controller, in plain data classes.

Rule 1: whatever decides how the controller behaves next is here, never only in a task's stack: tasks can be
cancelled at any await and be started again from this. Rule 2: nothing here refers to a task, a file or a
connection, so it can be written down and rebuilt in another process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from vfiouser_soc.nvme.command import Completion, SubmissionEntry

#: Entries that the error log keeps (ELPE + 1).
ERROR_LOG_ENTRIES = 64


@dataclass(slots=True)
class SubmissionQueue:
    """A submission queue as created by the host; entries from head to tail are not fetched yet."""

    qid: int
    base: int
    size: int
    cqid: int
    priority: int = 0
    head: int = 0
    tail: int = 0
    #: Fetched and neither completed nor parked as an asynchronous event request, by command id.
    inflight: dict[int, SubmissionEntry] = field(default_factory=dict)
    #: Fetched and not begun, oldest first.
    fetched: deque[SubmissionEntry] = field(default_factory=deque)
    #: Begun and not ended, by a serial number, oldest first.
    executing: dict[int, SubmissionEntry] = field(default_factory=dict)
    #: The host asked for its deletion, which waits for the commands in execution.
    deleting: bool = False

    @property
    def waiting(self) -> int:
        """Entries submitted and not fetched."""
        return (self.tail - self.head) % self.size


@dataclass(slots=True)
class CompletionQueue:
    """A completion queue; entries from head to tail are written and not consumed yet."""

    qid: int
    base: int
    size: int
    vector: int
    interrupt: bool
    head: int = 0
    tail: int = 0
    phase: int = 1
    #: Finished commands whose entries are not written yet (no room, or the write is under way).
    pending: deque[Completion] = field(default_factory=deque)
    #: Entries of `pending` that are being written: the host may consume them before the write is confirmed
    #: to us.
    writing: int = 0

    @property
    def room(self) -> int:
        """Entries that may be written without overtaking the host."""
        return (self.head - self.tail - 1) % self.size

    @property
    def unconsumed(self) -> int:
        """Entries written (or being written) and not acknowledged by the host."""
        return (self.tail - self.head) % self.size + self.writing


class ErrorEntry(NamedTuple):
    """One entry of the error information log (NVMe 1.4, 5.14.1.1)."""

    number: int
    sqid: int
    cid: int
    status: int
    location: int
    lba: int
    nsid: int


class AsyncEvent(NamedTuple):
    """An event to report by completing an asynchronous event request."""

    type: int
    info: int
    log_page: int

    @property
    def result(self) -> int:
        """Dword 0 of the completion."""
        return self.type | self.info << 8 | self.log_page << 16


@dataclass(slots=True)
class Counters:
    """What the SMART log counts over the life of the controller."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_commands: int = 0
    write_commands: int = 0
    media_errors: int = 0
    error_entries: int = 0
    power_cycles: int = 1
    unsafe_shutdowns: int = 0


@dataclass(slots=True)
class FeatureValues:
    """Features by (feature, selector, namespace); what is in neither map has its default."""

    current: dict[tuple[int, int, int], int] = field(default_factory=dict)
    saved: dict[tuple[int, int, int], int] = field(default_factory=dict)
    #: Milliseconds set by the host, our clock at that time; None after a reset.
    timestamp: tuple[int, float] | None = None


@dataclass(slots=True)
class ControllerState:
    """Everything that one controller remembers, apart from its registers, MSI-X table and shared memory."""

    # Whoever adds a field here adds it to `snapshot`.

    submission_queues: dict[int, SubmissionQueue] = field(default_factory=dict)
    completion_queues: dict[int, CompletionQueue] = field(default_factory=dict)
    features: FeatureValues = field(default_factory=FeatureValues)
    #: Command ids of asynchronous event requests that wait for an event, oldest first.
    event_requests: deque[int] = field(default_factory=deque)
    events: deque[AsyncEvent] = field(default_factory=deque)
    #: Event types that were reported and whose log page was not read since.
    masked_events: set[int] = field(default_factory=set)
    changed_namespaces: set[int] = field(default_factory=set)
    errors: deque[ErrorEntry] = field(default_factory=lambda: deque(maxlen=ERROR_LOG_ENTRIES))
    counters: Counters = field(default_factory=Counters)
    #: The client that owned the queues went away: nothing is processed until the next controller reset.
    frozen: bool = False
    #: Shutdown was asked for: nothing more is fetched until the next controller reset.
    shut_down: bool = False

    def carry_over(self) -> None:
        """Make every command that was fetched and not completed one that was not begun.

        For commands whose tasks were cancelled: they are executed again from their beginning, which the host does not
        notice, since it leaves their data alone until they are completed.
        """
        for queue in self.submission_queues.values():
            queue.fetched = deque((*queue.executing.values(), *queue.fetched))
            queue.executing.clear()
            queue.deleting = False
            queue.inflight.clear()
            for command in queue.fetched:
                queue.inflight.setdefault(command.cid, command)
        lost = [queue.qid for queue in self.submission_queues.values() if queue.cqid not in self.completion_queues]
        for qid in lost:  # its deletion was under way, and the host did not wait for it
            del self.submission_queues[qid]

    def take(self, other: ControllerState) -> None:
        """Become what another one is; parts that others refer to stay the same objects."""
        self.features.current = other.features.current
        self.features.saved = other.features.saved
        for entry in fields(self):
            if entry.name != "features":
                setattr(self, entry.name, getattr(other, entry.name))

    def drop_queues(self) -> None:
        """Forget queues and requests, as any controller reset does; features return to their saved values."""
        self.submission_queues.clear()
        self.completion_queues.clear()
        self.features.current.clear()
        self.event_requests.clear()
        self.events.clear()
        self.masked_events.clear()
        self.frozen = False
        self.shut_down = False
