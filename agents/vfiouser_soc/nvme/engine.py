"""All queues of one epoch: routes doorbells, executes commands, completes them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from vfiouser_oob.transport.turns import FunctionQueue
from vfiouser_protocol.errors import DmaFault
from vfiouser_soc.nvme.command import Completion, SubmissionEntry
from vfiouser_soc.nvme.epoch import DmaPort, Epoch
from vfiouser_soc.nvme.queues import CompletionEngine, SubmissionEngine
from vfiouser_soc.nvme.spec import ErrorEvent, NvmeError, StatusCode, status_field
from vfiouser_soc.nvme.state import CompletionQueue, ControllerState, SubmissionQueue

_log = logging.getLogger(__name__)

Handlers = Mapping[int, Callable[[SubmissionEntry], Awaitable[int | None]]]
#: Enters an error into the log: status field, submission queue, command, what was wrong.
ErrorSink = Callable[[int, SubmissionQueue, SubmissionEntry, NvmeError | None], None]


class QueueEngine:
    """The queues while the controller is enabled once.

    Args:
        state: which queues exist.
        epoch: where tasks run.
        dma: memory of the epoch.
        lane: the function's turns.
        notify: called after completion entries became visible.
        fatal: called with a reason when queue memory cannot be reached.
        failed: enters a failed command into the error log.
        clear_doorbell: zeroes a doorbell by its number.
        entry_sizes_valid: whether the host has configured the entry sizes that I/O queues need.
    """

    def __init__(
        self,
        state: ControllerState,
        epoch: Epoch,
        dma: DmaPort,
        lane: FunctionQueue,
        *,
        notify: Callable[[CompletionQueue], None],
        fatal: Callable[[str], None],
        failed: ErrorSink,
        clear_doorbell: Callable[[int], None],
        entry_sizes_valid: Callable[[], bool],
    ) -> None:
        self.epoch = epoch
        self.dma = dma
        self._lane = lane
        self._state = state
        self._notify = notify
        self._fatal = fatal
        self._failed = failed
        self._clear_doorbell = clear_doorbell
        self.entry_sizes_valid = entry_sizes_valid
        self._submission: dict[int, SubmissionEngine] = {}
        self._completion: dict[int, CompletionEngine] = {}
        self._admin: Handlers = {}
        self._io: Handlers = {}
        self._withdraw_event_request: Callable[[int], bool] = lambda cid: False
        self._closed = False

    def use(self, admin: Handlers, io: Handlers, withdraw_event_request: Callable[[int], bool]) -> None:
        """Take the command handlers, which need this engine in turn.

        Args:
            admin: handlers by opcode.
            io: handlers by opcode.
            withdraw_event_request: takes back an asynchronous event request by command id.
        """
        self._admin, self._io = admin, io
        self._withdraw_event_request = withdraw_event_request

    @property
    def is_busy(self) -> bool:
        """Whether any command is under way."""
        return any(engine.is_busy for engine in self._submission.values())

    # Queues come and go

    def add_completion_queue(self, queue: CompletionQueue) -> None:
        """Begin to serve a completion queue."""
        self._state.completion_queues[queue.qid] = queue
        self._serve_completion(queue)
        self._clear_doorbell(2 * queue.qid + 1)

    def _serve_completion(self, queue: CompletionQueue) -> None:
        self._completion[queue.qid] = CompletionEngine(
            queue, self.epoch, self.dma, self._lane, self._notify, self._fatal
        )

    def add_submission_queue(self, queue: SubmissionQueue) -> None:
        """Begin to serve a submission queue."""
        self._state.submission_queues[queue.qid] = queue
        self._serve_submission(queue)
        self._clear_doorbell(2 * queue.qid)

    def _serve_submission(self, queue: SubmissionQueue) -> None:
        completions = self._completion[queue.cqid]
        engine = SubmissionEngine(queue, completions, self.epoch, self.dma, self._lane, self._execute, self._fatal)
        self._submission[queue.qid] = completions.sources[queue.qid] = engine
        if self._closed:
            engine.close()

    def serve_existing(self) -> None:
        """Go on with the queues that the state holds."""
        for completion in self._state.completion_queues.values():
            self._serve_completion(completion)
        for submission in self._state.submission_queues.values():
            self._serve_submission(submission)

    async def remove_submission_queue(self, qid: int) -> None:
        """Finish the commands of a submission queue and forget it."""
        # A doorbell or a second deletion meanwhile finds nothing. The queue itself goes last: if this is cancelled and
        # begins anew after a migration, it is still there to be deleted.
        engine = self._submission.pop(qid)
        engine.queue.deleting = True
        await engine.stop()
        del self._state.submission_queues[qid]
        engine.completions.sources.pop(qid, None)
        engine.completions.forget(qid)

    def remove_completion_queue(self, qid: int) -> None:
        """Forget a completion queue and what it did not deliver."""
        del self._state.completion_queues[qid]
        engine = self._completion.pop(qid)
        engine.queue.pending.clear()

    async def quiesce(self) -> None:
        """Fetch nothing more, and wait for every command that has begun."""
        for engine in list(self._submission.values()):
            await engine.stop()

    def halt(self) -> None:
        """Fetch and begin nothing more; what has not begun is dropped."""
        for engine in self._submission.values():
            engine.halt()

    def close(self) -> None:
        """Fetch nothing more; what was fetched is executed and completed."""
        self._closed = True
        for engine in self._submission.values():
            engine.close()

    def reopen(self) -> None:
        """Take `close` back."""
        self._closed = False
        for engine in self._submission.values():
            engine.reopen()

    async def drain(self) -> None:
        """After `close`, wait until every command is executed and every completion entry that fits is written."""
        for submission in list(self._submission.values()):
            await submission.drain()
        for completion in list(self._completion.values()):
            await completion.drain()

    # Doorbells

    def kick(self) -> None:
        """Look for work in every queue."""
        for submission in self._submission.values():
            submission.kick()
        for completion in self._completion.values():
            completion.kick()

    def ring(self, number: int, value: int) -> ErrorEvent | None:
        """Take a doorbell.

        Args:
            number: 2 × queue id, plus 1 for a completion queue; -1 for a write that hit no doorbell.
            value: new tail or head.

        Returns:
            What was wrong with it; it is then ignored.
        """
        qid, is_head = divmod(number, 2)
        return self._ring_head(qid, value) if is_head else self._ring_tail(qid, value)

    def _ring_tail(self, qid: int, value: int) -> ErrorEvent | None:
        engine = self._submission.get(qid)
        if engine is None:
            return ErrorEvent.INVALID_DOORBELL_REGISTER
        if value >= engine.queue.size:
            return ErrorEvent.INVALID_DOORBELL_VALUE
        engine.queue.tail = value
        engine.kick()
        return None

    def _ring_head(self, qid: int, value: int) -> ErrorEvent | None:
        engine = self._completion.get(qid)
        if engine is None:
            return ErrorEvent.INVALID_DOORBELL_REGISTER
        queue = engine.queue
        if value >= queue.size or (value - queue.head) % queue.size > queue.unconsumed:
            return ErrorEvent.INVALID_DOORBELL_VALUE
        queue.head = value
        engine.kick()
        return None

    # Commands

    def complete(self, sqid: int, cid: int, status: int, result: int = 0) -> None:
        """Hand a finished command to its completion queue."""
        queue = self._state.submission_queues.get(sqid)
        if queue is not None:
            self._post(queue, Completion(sqid, cid, status, result))

    def _post(self, queue: SubmissionQueue, completion: Completion) -> None:
        engine = self._completion.get(queue.cqid)
        if engine is not None:
            engine.post(completion)

    def abort(self, sqid: int, cid: int) -> bool:
        """Complete a command that has not begun as aborted.

        Returns:
            False if there is none, or it has begun.
        """
        engine = self._submission.get(sqid)
        if engine is None:
            return False
        if not engine.take_back(cid) and not (sqid == 0 and self._withdraw_event_request(cid)):
            return False
        engine.queue.inflight.pop(cid, None)
        self.complete(sqid, cid, status_field(StatusCode.ABORT_REQUESTED))
        return True

    async def _execute(self, queue: SubmissionQueue, command: SubmissionEntry) -> None:
        status = 0
        result: int | None = 0
        conflict = queue.inflight.get(command.cid) is not command
        try:
            result = await self._dispatch(queue, command, conflict)
        except NvmeError as error:
            status = error.field
            self._failed(status, queue, command, error)
            _log.debug("queue %d command %d opcode %#04x: %s", queue.qid, command.cid, command.opcode, error)
        except DmaFault as error:
            status = status_field(StatusCode.DATA_TRANSFER_ERROR)
            self._failed(status, queue, command, None)
            _log.debug("queue %d command %d opcode %#04x: %s", queue.qid, command.cid, command.opcode, error)
        # The host may reuse the id as soon as it sees the completion, which can be before we know that it
        # was written.
        if not conflict:
            queue.inflight.pop(command.cid, None)
        if result is not None:
            self._post(queue, Completion(queue.qid, command.cid, status, result))

    async def _dispatch(self, queue: SubmissionQueue, command: SubmissionEntry, conflict: bool) -> int | None:
        if conflict:
            raise NvmeError(StatusCode.COMMAND_ID_CONFLICT, f"command id {command.cid} is in use", location=2)
        if command.flags:
            raise NvmeError(StatusCode.INVALID_FIELD, "fused operations and SGLs are not supported", location=1)
        handler = (self._io if queue.qid else self._admin).get(command.opcode)
        if handler is None:
            raise NvmeError(StatusCode.INVALID_OPCODE, f"opcode {command.opcode:#04x}", location=0)
        return await handler(command)
