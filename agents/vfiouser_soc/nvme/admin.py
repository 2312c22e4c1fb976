"""The admin commands.

Spec: NVMe 1.4, chapter 5.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from vfiouser_soc.nvme.command import SubmissionEntry
from vfiouser_soc.nvme.config import ControllerLimits
from vfiouser_soc.nvme.epoch import DmaPort
from vfiouser_soc.nvme.events import AsyncEvents
from vfiouser_soc.nvme.features import TIMESTAMP_SIZE, Features
from vfiouser_soc.nvme.identify import Identify, IdentifyRequest
from vfiouser_soc.nvme.logs import Logs
from vfiouser_soc.nvme.spec import (
    AdminOpcode,
    EventType,
    FeatureId,
    LogPage,
    NvmeError,
    SmartEvent,
    StatusCode,
)
from vfiouser_soc.nvme.state import CompletionQueue, ControllerState, SubmissionQueue

_PHYSICALLY_CONTIGUOUS = 1 << 0
_INTERRUPTS_ENABLED = 1 << 1
_RETAIN_EVENT = 1 << 15
_NOT_ABORTED = 1


class QueueOwner(Protocol):
    """Who creates and deletes queue engines, and completes commands that wait."""

    def add_completion_queue(self, queue: CompletionQueue) -> None:
        """Begin to serve a completion queue."""
        ...

    def add_submission_queue(self, queue: SubmissionQueue) -> None:
        """Begin to serve a submission queue."""
        ...

    async def remove_submission_queue(self, qid: int) -> None:
        """Finish the commands of a submission queue and forget it."""
        ...

    def remove_completion_queue(self, qid: int) -> None:
        """Forget a completion queue."""
        ...

    def abort(self, sqid: int, cid: int) -> bool:
        """Complete a command that has not begun as aborted; False if there is none."""
        ...

    def entry_sizes_valid(self) -> bool:
        """Whether the host has configured the entry sizes that I/O queues need."""
        ...


class AdminCommands:
    """Executes admin commands.

    Args:
        dma: memory of the epoch.
        state: queues by id.
        owner: of the queue engines.
        limits: sizes of the controller.
        features: for Set and Get Features and the number of queues.
        identify: for Identify.
        logs: for Get Log Page.
        events: for Asynchronous Event Request.
    """

    def __init__(
        self,
        dma: DmaPort,
        state: ControllerState,
        owner: QueueOwner,
        limits: ControllerLimits,
        *,
        features: Features,
        identify: Identify,
        logs: Logs,
        events: AsyncEvents,
    ) -> None:
        self._dma = dma
        self._state = state
        self._owner = owner
        self._limits = limits
        self._features = features
        self._identify = identify
        self._logs = logs
        self._events = events
        self.handlers: dict[int, Callable[[SubmissionEntry], Awaitable[int | None]]] = {
            AdminOpcode.DELETE_SQ: self._delete_sq,
            AdminOpcode.CREATE_SQ: self._create_sq,
            AdminOpcode.GET_LOG_PAGE: self._get_log_page,
            AdminOpcode.DELETE_CQ: self._delete_cq,
            AdminOpcode.CREATE_CQ: self._create_cq,
            AdminOpcode.IDENTIFY: self._identify_command,
            AdminOpcode.ABORT: self._abort,
            AdminOpcode.SET_FEATURES: self._set_features,
            AdminOpcode.GET_FEATURES: self._get_features,
            AdminOpcode.ASYNC_EVENT_REQUEST: self._event_request,
        }

    # Queues

    async def _create_cq(self, command: SubmissionEntry) -> int:
        qid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        vector = command.cdw11 >> 16
        self._check_new_queue(qid, self._features.io_queue_limits[1], qid in self._state.completion_queues)
        self._check_queue_memory(command, size)
        if vector >= self._limits.vectors:
            raise NvmeError(StatusCode.INVALID_VECTOR, f"vector {vector} of {self._limits.vectors}", location=46)
        interrupt = bool(command.cdw11 & _INTERRUPTS_ENABLED)
        self._owner.add_completion_queue(CompletionQueue(qid, command.prp1, size, vector, interrupt))
        return 0

    async def _create_sq(self, command: SubmissionEntry) -> int:
        qid, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        cqid = command.cdw11 >> 16
        self._check_new_queue(qid, self._features.io_queue_limits[0], qid in self._state.submission_queues)
        if not 1 <= cqid <= self._features.io_queue_limits[1]:
            raise NvmeError(StatusCode.INVALID_QUEUE_ID, f"completion queue {cqid}", location=46)
        if cqid not in self._state.completion_queues:
            raise NvmeError(StatusCode.COMPLETION_QUEUE_INVALID, f"completion queue {cqid} does not exist", location=46)
        self._check_queue_memory(command, size)
        priority = command.cdw11 >> 1 & 3
        self._owner.add_submission_queue(SubmissionQueue(qid, command.prp1, size, cqid, priority))
        return 0

    def _check_new_queue(self, qid: int, highest: int, exists: bool) -> None:
        if not 1 <= qid <= highest or exists:
            what = "exists already" if exists else f"; allowed are 1 to {highest}"
            raise NvmeError(StatusCode.INVALID_QUEUE_ID, f"queue {qid} {what}", location=40)

    def _check_queue_memory(self, command: SubmissionEntry, size: int) -> None:
        if not 2 <= size <= self._limits.max_entries or not self._owner.entry_sizes_valid():
            raise NvmeError(
                StatusCode.INVALID_QUEUE_SIZE,
                f"{size} entries; {self._limits.max_entries} are the most",
                location=42,
            )
        if not command.cdw11 & _PHYSICALLY_CONTIGUOUS:
            raise NvmeError(StatusCode.INVALID_FIELD, "queues must be physically contiguous (CAP.CQR)", location=44)
        if command.prp1 & (self._dma.page_size - 1):
            raise NvmeError(StatusCode.INVALID_PRP_OFFSET, f"queue at {command.prp1:#x}", location=24)

    async def _delete_sq(self, command: SubmissionEntry) -> int:
        qid = command.cdw10 & 0xFFFF
        queue = self._state.submission_queues.get(qid)
        if qid == 0 or queue is None or queue.deleting:
            raise NvmeError(StatusCode.INVALID_QUEUE_ID, f"submission queue {qid} does not exist", location=40)
        await self._owner.remove_submission_queue(qid)
        return 0

    async def _delete_cq(self, command: SubmissionEntry) -> int:
        qid = command.cdw10 & 0xFFFF
        if qid == 0 or qid not in self._state.completion_queues:
            raise NvmeError(StatusCode.INVALID_QUEUE_ID, f"completion queue {qid} does not exist", location=40)
        users = [queue.qid for queue in self._live_queues() if queue.cqid == qid]
        if users:
            raise NvmeError(
                StatusCode.INVALID_QUEUE_DELETION,
                f"submission queues {users} use completion queue {qid}",
                location=40,
            )
        self._owner.remove_completion_queue(qid)
        return 0

    def _live_queues(self) -> Iterable[SubmissionQueue]:
        return (queue for queue in self._state.submission_queues.values() if not queue.deleting)

    async def _abort(self, command: SubmissionEntry) -> int:
        sqid, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
        return 0 if self._owner.abort(sqid, cid) else _NOT_ABORTED

    # Information

    async def _identify_command(self, command: SubmissionEntry) -> int:
        request = IdentifyRequest(command.cdw10 & 0xFF, command.nsid, command.cdw10 >> 16)
        await self._dma.to_host(command, self._identify.structure(request))
        return 0

    async def _get_log_page(self, command: SubmissionEntry) -> int:
        number = command.cdw10 & 0xFF
        count = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
        offset = command.cdw12 | command.cdw13 << 32
        page = self._logs.page(number)
        if offset & 3 or offset > len(page):
            raise NvmeError(
                StatusCode.INVALID_FIELD, f"offset {offset} into a log page of {len(page)} bytes", location=48
            )
        if count > self._limits.max_transfer:
            raise NvmeError(StatusCode.INVALID_FIELD, f"{count} bytes of a log page", location=42)
        # Beyond the end of the page the host receives zeros.
        await self._dma.to_host(command, page[offset : offset + count].ljust(count, b"\0"))
        if not command.cdw10 & _RETAIN_EVENT:
            self._logs.was_read(number)
            self._events.log_was_read(LogPage(number))
        return 0

    async def _event_request(self, command: SubmissionEntry) -> None:
        self._events.request(command.cid)

    # Features

    async def _set_features(self, command: SubmissionEntry) -> int:
        result = self._features.set(command)
        feature = command.cdw10 & 0xFF
        if feature == FeatureId.TIMESTAMP:
            self._features.set_timestamp(await self._dma.from_host(command, TIMESTAMP_SIZE))
        elif feature == FeatureId.TEMPERATURE_THRESHOLD and self._features.temperature_event_due():
            self._events.report(EventType.SMART, SmartEvent.TEMPERATURE, LogPage.SMART)
        return result

    async def _get_features(self, command: SubmissionEntry) -> int:
        result = self._features.get(command)
        if command.cdw10 & 0xFF == FeatureId.TIMESTAMP and command.cdw10 >> 8 & 7 == 0:
            await self._dma.to_host(command, self._features.timestamp())
        return result
