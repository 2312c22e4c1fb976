"""How a command is begun: by its handler at once, or, where a migration may hold guest writes back, when it may be."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import trio

from vfiouser_oob.server.containment import Contained
from vfiouser_oob.server.context import FunctionContext
from vfiouser_oob.server.device_link import DeviceLink
from vfiouser_oob.server.handlers import READY, Handler, Result
from vfiouser_oob.server.holding import WriteHold
from vfiouser_protocol.constants import Command
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.header import NO_REPLY
from vfiouser_protocol.session import CommandReceived, MessageRefused

if TYPE_CHECKING:
    from vfiouser_oob.migration.port import MigrationPort

#: What is left of a command's time when it is too late to begin it: so many seconds, or this part of all of it.
_GUARD_S = 0.05
_GUARD_PART = 0.05


class Executor:
    """Begins the commands of a function that cannot migrate: nothing is held back.

    Args:
        handlers: by command number.
        link: knows whether the device is lost.
        context: the function's.
    """

    def __init__(self, handlers: Mapping[int, Handler], link: DeviceLink, context: FunctionContext) -> None:
        self._handlers = handlers
        self._link = link
        self._context = context
        self._budget_s = context.reply_budget_s

    def begin(self, event: CommandReceived) -> Result:
        """Begin a command.

        Returns:
            Its answer, or what waits for it.

        Raises:
            CommandError: it is refused.
        """
        _, header, payload, fds, _ = event
        if self._link.lost is not None and header.command not in self._link.served:
            raise CommandError(f"the device is lost ({self._link.lost})", errno.EIO)
        return self._handlers[header.command](payload, fds, header.flags & NO_REPLY != 0)

    def require_time(self, event: CommandReceived, deadline: float) -> None:
        """Refuse to begin what could not be answered any more: the client would read a failure of what was done.

        Args:
            event: the command.
            deadline: by trio's clock, when it has to be answered.

        Raises:
            CommandError: ETIMEDOUT; it was not begun.
        """
        if event.header.no_reply or deadline - trio.current_time() >= min(_GUARD_S, self._budget_s * _GUARD_PART):
            return
        name = Command(event.header.command).name
        raise CommandError(f"{name} waited {self._budget_s:g} s for its turn and did not start", errno.ETIMEDOUT)

    # What the dispatcher tells

    def queued(self, event: CommandReceived | MessageRefused) -> None:
        """A command queues behind another one."""

    def unqueued(self, event: CommandReceived | MessageRefused) -> None:
        """It was served."""

    async def run(self) -> None:
        """Do what has to be done beside the commands, until cancelled."""


class HoldingExecutor(Executor):
    """Begins the commands of a function that may stand still for a migration.

    Args:
        handlers: by command number.
        link: knows whether the device is lost.
        context: the function's.
        port: the client's way into the migration.
    """

    def __init__(
        self, handlers: Mapping[int, Handler], link: DeviceLink, context: FunctionContext, port: MigrationPort
    ) -> None:
        super().__init__(handlers, link, context)
        own_region = -1 if port.v1 is None else port.v1.index
        self.hold = WriteHold(port.runner, port.held, own_region, self._carry_out_posted, context.log)

    def begin(self, event: CommandReceived) -> Result:
        """Begin a command, or hold it back."""
        hold = self.hold
        if hold.closed:
            held = hold.take(event, partial(self._carry_out, event))
            if held is not None:
                return held
        return super().begin(event)

    async def _carry_out(self, event: CommandReceived) -> bytes:
        """Do an access that was held back; its reply is the payload."""
        self.require_time(event, trio.current_effective_deadline())
        result = super().begin(event)
        if not isinstance(result, READY):
            result = await result
        assert isinstance(result, bytes)
        return result

    async def _carry_out_posted(self, event: CommandReceived) -> None:
        """Do a write that was held back, and that nobody waits for."""
        with Contained() as outcome, trio.move_on_after(self._budget_s):
            await self._carry_out(event)
        if outcome.error is not None:
            self._context.note_failed(event, outcome.taken())

    def queued(self, event: CommandReceived | MessageRefused) -> None:
        """A command queues behind another one; held accesses may have to give way to it."""
        self.hold.queued(event)

    def unqueued(self, event: CommandReceived | MessageRefused) -> None:
        """It was served."""
        self.hold.unqueued(event)

    async def run(self) -> None:
        """Let go what is held back, whenever it may."""
        await self.hold.run()
