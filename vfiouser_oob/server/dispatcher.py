"""The order of one client's commands: what is answered at once, what waits, and what queues behind it.

A command that the device answers at once is answered right there, without a task switch; that is how a trapped register
access is served. A command whose answer has to be waited for stays at the head of the queue, and from then on every
later command queues behind it, because clients rely on replies in order. The reader goes on reading meanwhile: replies
to our own DMA commands must get through, and so must the end of the stream.

    reader ──► take ──► answered at once ─────────────────► socket
                 │
                 └────► queue ──► run (waits for the head) ──► socket

The queue is data: which commands there are, until when each has to be answered, and whether the head was begun. What
waits for the head is only its execution.
"""

from __future__ import annotations

import errno
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import NamedTuple

import trio

from vfiouser_oob.server.channel import Channel
from vfiouser_oob.server.containment import Contained
from vfiouser_oob.server.context import FunctionContext
from vfiouser_oob.server.executor import Executor
from vfiouser_oob.server.handlers import READY, ReplyWithFds, Result
from vfiouser_oob.transport.fds import close_fds
from vfiouser_oob.transport.pieces import Pieces
from vfiouser_oob.transport.quota import refusal_of
from vfiouser_oob.transport.turns import SLICE_S, FunctionQueue
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.session import CommandReceived, MessageRefused, ProtocolSession

#: Commands and bytes that may queue behind one that waits; beyond that we stop reading, and the client's socket fills.
MAX_QUEUED = 16384
MAX_QUEUED_BYTES = 64 << 20


class Queued(NamedTuple):
    """A command that waits for its result or for its turn; or a refusal whose reply has its place in the order.

    Args:
        event: the command, or what the session refused.
        deadline: by trio's clock, when it has to be answered.
        refusal: why the command is not begun when its turn comes; None if it is.
    """

    event: CommandReceived | MessageRefused
    deadline: float
    refusal: CommandError | None = None


class Dispatcher:
    """Answers the commands of one attached client, in order. `run` has to run while it is used.

    Args:
        session: the protocol state of the connection.
        channel: the main socket.
        executor: begins commands.
        context: the function's.
        lane: its place in the queue for the event loop.
        begin: begins a command; None: the executor does.
    """

    def __init__(
        self,
        session: ProtocolSession,
        channel: Channel,
        executor: Executor,
        context: FunctionContext,
        lane: FunctionQueue,
        begin: Callable[[CommandReceived], Result] | None = None,
    ) -> None:
        self._session = session
        self._channel = channel
        self._executor = executor
        self._begin = executor.begin if begin is None else begin
        #: Where answers wait while the client does not read them.
        self._stream = channel.stream
        self._context = context
        self._counts = context.counts
        self._record = context.timings.record
        self._account = context.account
        self._budget_s = context.reply_budget_s
        self._lane = lane
        self._queue: deque[Queued] = deque()
        self._queued_bytes = 0
        self._resting = False
        #: The head's answer, if the head was begun and is being waited for.
        self._begun: Awaitable[bytes | ReplyWithFds | Pieces] | None = None
        self._filled = trio.lowlevel.ParkingLot()
        self._progress = trio.lowlevel.ParkingLot()

    # What there is

    @property
    def queue(self) -> Sequence[Queued]:
        """The commands that are not answered, oldest first."""
        return tuple(self._queue)

    @property
    def head_deadline(self) -> float:
        """Until when the oldest of them has to be answered, by trio's clock; infinity if there is none."""
        return self._queue[0].deadline if self._queue else math.inf

    @property
    def head_begun(self) -> bool:
        """Whether the oldest of them was begun, so that it must not be begun again."""
        return self._begun is not None

    @property
    def full(self) -> bool:
        """Whether no more commands should be read for now."""
        return len(self._queue) > MAX_QUEUED or self._queued_bytes > MAX_QUEUED_BYTES

    async def not_full(self) -> None:
        """Wait until more commands may be read."""
        while self.full:
            await self._progress.park()

    async def all_answered(self) -> None:
        """Wait until the queue is empty."""
        while self._queue:
            await self._progress.park()

    @property
    def _rests(self) -> bool:
        return self._resting and self._begun is None

    async def come_to_rest(self) -> None:
        """Begin nothing more, and wait until what was begun is answered."""
        self._resting = True
        while self._begun is not None:
            await self._progress.park()

    # What the reader gives

    def take(self, event: CommandReceived) -> None:
        """Answer a command, now if that can be done at once, else in its turn."""
        began = time.perf_counter_ns()
        command = event.header.command
        self._counts[command] += 1
        if event.surplus_fds:
            close_fds(event.surplus_fds)
        refusal = refusal_of(self._account, event.fds) if event.fds else None
        if self._queue or self._stream.blocked or self._resting:
            self._enqueue(event, refusal)
            return
        with Contained() as outcome:
            if refusal is not None:
                raise refusal
            result = self._begin(event)
            if isinstance(result, READY):
                self._answer(event, result)
            else:
                self._begun = result
                self._enqueue(event, None)
                return
        if event.fds:
            close_fds(event.fds)
        if outcome.error is not None:
            self._answer_error(event, outcome.taken())
        self._record(command, time.perf_counter_ns() - began)

    def refuse(self, event: MessageRefused) -> None:
        """Answer a message that the session refused, in its turn; the connection goes on."""
        if self._queue:
            self._enqueue(event, None)
        else:
            self._answer_refused(event)

    def restore(self, queue: Iterable[Queued]) -> None:
        """Take over commands that another dispatcher was given and has not begun.

        Args:
            queue: what its `queue` was.
        """
        for queued in queue:
            self._append(queued)

    def _enqueue(self, event: CommandReceived | MessageRefused, refusal: CommandError | None) -> None:
        self._append(Queued(event, trio.current_time() + self._budget_s, refusal))

    def _append(self, queued: Queued) -> None:
        self._executor.queued(queued.event)
        self._queue.append(queued)
        if isinstance(queued.event, CommandReceived):
            self._queued_bytes += len(queued.event.payload)
        self._filled.unpark_all()

    # Serving the queue

    async def run(self) -> None:
        """Answer in order what has to be waited for, and what queued up behind it, until cancelled."""
        while True:
            while not self._queue or self._rests:
                await self._filled.park()
            began = time.monotonic()
            while self._queue and not self._rests:
                await self._serve_head(self._queue[0])
                if time.monotonic() - began > SLICE_S:  # what is carried out at once never waits by itself
                    await self._lane.rest()
                    began = time.monotonic()

    async def _serve_head(self, queued: Queued) -> None:
        event = queued.event
        if self._stream.blocked:
            await self._stream.flushed()
        if isinstance(event, MessageRefused):
            self._answer_refused(event)
        else:
            await self._finish(event, queued)
            self._queued_bytes -= len(event.payload)
        self._queue.popleft()
        self._executor.unqueued(event)
        self._progress.unpark_all()

    async def _finish(self, event: CommandReceived, queued: Queued) -> None:
        with Contained() as outcome:
            if queued.refusal is not None:
                raise queued.refusal
            result: Result
            if self._begun is not None:
                result = self._begun
            else:
                self._executor.require_time(event, queued.deadline)
                result = self._begin(event)
            if not isinstance(result, READY):
                self._begun = result
                result = await self._in_time(event, result, queued.deadline)
            assert isinstance(result, READY)
            self._answer(event, result)
        self._begun = None
        if event.fds:
            close_fds(event.fds)
        if outcome.error is not None:
            self._answer_error(event, outcome.taken())
        waited_s = trio.current_time() - queued.deadline + self._budget_s
        self._record(event.header.command, int(max(waited_s, 0) * 1e9))

    async def _in_time(
        self, event: CommandReceived, answer: Awaitable[bytes | ReplyWithFds | Pieces], deadline: float
    ) -> bytes | ReplyWithFds | Pieces:
        with trio.move_on_at(deadline) as scope:
            result = await answer
        if scope.cancelled_caught:
            raise CommandError(
                f"{Command(event.header.command).name} took longer than {self._budget_s:g} s", errno.ETIMEDOUT
            )
        return result

    # Answering

    def _answer(self, event: CommandReceived, result: bytes | ReplyWithFds | Pieces) -> None:
        if isinstance(result, bytes):
            self._channel.answer(self._session.reply(event.header, result))
        elif isinstance(result, Pieces):
            self._channel.send_pieces(self._session.reply_head(event.header, result.size), result)
        else:
            self._channel.answer(self._session.reply(event.header, result.payload), result.fds)

    def _answer_error(self, event: CommandReceived, error: Exception) -> None:
        self._channel.answer(self._session.error_reply(event.header, self._context.note_failed(event, error)))

    def _answer_refused(self, event: MessageRefused) -> None:
        note_refusal(event, self._context)
        self._channel.answer(event.reply or b"")

    def close(self) -> None:
        """Drop what is not answered: the client has gone."""
        if isinstance(self._begun, Coroutine):
            self._begun.close()
        self._begun = None
        for queued in self._queue:
            # Whatever a handler took is no longer among them.
            close_fds(queued.event.fds)
        self._queue.clear()


def note_refusal(event: MessageRefused, context: FunctionContext) -> None:
    """Close what came with a message that the session refused, and say why it was.

    Args:
        event: the refusal.
        context: the function's.
    """
    close_fds(event.fds)
    context.noise.warning("message refused", client=context.client, reason=event.reason)
    context.note_error(event.reason)
