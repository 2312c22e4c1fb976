"""One function from its start to its end, apart from all others: its agent, its device, its migration, its sockets.

    start ──► serve ──► stop accepting, clients turned out ──► drain ──► device stopped, sockets removed, agent left

Whoever has a `Life` runs it as one task, and stops it by its handle: that is the `Life` itself.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack

import trio

from vfiouser_oob.config.schema import FunctionConfig
from vfiouser_oob.migration.pool import AgentLease
from vfiouser_oob.observability import levels
from vfiouser_oob.server.containment import Contained, root_cause
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.unit import RollCall
from vfiouser_oob.transport.listener import Listener

#: Keys of a function that can be changed while it lives; for any other one it ends, and another one begins.
LIVE_KEYS = frozenset({"allow_uids", "log_level"})


class Life:
    """The life of one function; `run` is its whole course.

    Args:
        function: the function.
        agents: its share in an agent that it has to enter; none, or one.
        listeners: where its clients connect.
        connected: clients that are connected already.
        resources: gives back whatever was opened for it.
    """

    def __init__(
        self,
        function: Function,
        agents: list[AgentLease],
        listeners: list[Listener],
        connected: list[socket.socket],
        resources: ExitStack,
    ) -> None:
        self.function = function
        self._agents = agents
        self._listeners = listeners
        self._connected = connected
        self._resources = resources
        self._serving = trio.CancelScope()
        self._started = False
        self._roll_call = RollCall()
        self._left = False
        #: Whether its clients were connected already, have gone, and no other one can come.
        self.exhausted = False
        #: Set when nothing of it is left.
        self.ended = trio.Event()
        for listener in listeners:
            function.address = listener.address

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.name

    @property
    def failure(self) -> str | None:
        """Why the function is of no use any more; None while it is."""
        return self.function.failed

    @property
    def user(self) -> str | None:
        """Its client, in words."""
        return self.function.user

    def drain(self) -> None:
        """Take no new client."""
        self.function.drain()

    def reopen(self) -> None:
        """Take clients again."""
        self.function.reopen()

    async def vacated(self) -> None:
        """Wait until it has no client."""
        await self.function.vacated()

    def adopt(self, config: FunctionConfig) -> None:
        """Go on with a configuration that differs in `LIVE_KEYS`."""
        self.function.allow_uids = config.allow_uids
        levels.choose(config.name, config.log_level)
        self.function.level_changed()

    async def run(
        self, exhausted: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Live. What goes wrong after the start ends this function, and nothing else.

        Args:
            exhausted: called when nobody can connect any more.
            task_status: told when clients can connect.
        """
        try:
            with Contained() as outcome:
                async with AsyncExitStack() as entered:
                    for lease in self._agents:
                        await entered.enter_async_context(lease)
                    await self._live(exhausted, task_status)
            if outcome.error is not None:
                error = outcome.taken()
                if not self._started:
                    raise error
                self.function.out_of_service(f"its life ended: {root_cause(error)}", error)
        finally:
            if self.function.estate is not None and not self._left:
                self.function.estate.abolish()
            self.close()
            self.function.retire()
            self.ended.set()

    async def _live(self, exhausted: Callable[[], None], task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.function.run_device)
            nursery.start_soon(self.function.run_migration)
            nursery.start_soon(self._roll_call.run)
            with self._serving:
                await self._serve(exhausted, task_status)
            await self._drain()
            nursery.cancel_scope.cancel()

    async def prove(self) -> str | None:
        """Answer from its own tasks.

        Returns:
            What hangs; None if nothing does.
        """
        if self._serving.cancel_called:  # it ends, and that has a time of its own
            return None
        if self._started:
            await self._roll_call.answered()
        return self.function.overdue()

    def condemn(self, reason: str) -> None:
        """Take the function out of service; its client gets EIO."""
        self.function.condemn(reason)

    async def _serve(self, exhausted: Callable[[], None], task_status: trio.TaskStatus[None]) -> None:
        function = self.function
        async with trio.open_nursery() as clients:
            for heir in function.heirs():
                await clients.start(function.serve_heir, heir)
            for listener in self._listeners:
                clients.start_soon(function.serve, listener)
            if self._connected:
                clients.start_soon(self._serve_connected, exhausted)
            if function.migration is not None:
                await function.migration.ready()
            for listener in self._listeners:
                function.log.info("listening", socket=listener.address, device=function.backend.summary)
            self._started = True
            task_status.started()
            await trio.sleep_forever()

    async def _serve_connected(self, exhausted: Callable[[], None]) -> None:
        async with trio.open_nursery() as clients:
            for sock in self._connected:
                clients.start_soon(self.function.serve_connected, sock)
        if not self._listeners:
            self.exhausted = True
            exhausted()

    async def _drain(self) -> None:
        """Give a function that stands still for a migration that ends with it the time to go on."""
        if self.function.migration is not None and not self._left:  # else another daemon goes on with it
            with trio.CancelScope(shield=True), trio.move_on_after(self.function.context.reply_budget_s):
                await self.function.migration.settle()

    async def leave(self) -> None:
        """Leave the client to the daemon after this one, if that is possible; `stop` then does not turn it out."""
        if not self.ended.is_set() and self.function.estate is not None and self.function.estate.usable:
            await self.function.leave()
            self._left = True
            for listener in self._listeners:
                listener.leave()

    def stop(self) -> None:
        """Turn the clients out and end; `ended` says when that is done. A second call does nothing."""
        self._serving.cancel()

    def close(self) -> None:
        """Give back what was opened for it; for a life that does not run."""
        levels.choose(self.name, None)
        for lease in self._agents:
            lease.release()
        self._resources.close()
