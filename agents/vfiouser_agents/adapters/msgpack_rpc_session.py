"""A session of the reference protocol, as its client sees it; it ends with its connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import trio

from vfiouser_agents.answers import check_chunk, check_report
from vfiouser_agents.api import (
    Capabilities,
    Chunk,
    DirtyReport,
    Event,
    EventKind,
    Outcome,
    Phase,
    Range,
    Role,
)
from vfiouser_agents.delivery import preparing, sending
from vfiouser_agents.errors import AgentError, InvalidArgument, ProtocolError, TransportLost, Unsupported
from vfiouser_agents.events import EventFeed
from vfiouser_agents.limits import check_capabilities, check_page_size
from vfiouser_agents.operations import Op, Operation
from vfiouser_agents.relay import RelaySession
from vfiouser_agents.rpc.methods import CLOSE, OPEN, WATCH
from vfiouser_agents.rpc.wire import WireError, from_wire, to_wire

if TYPE_CHECKING:
    from .msgpack_rpc import Link, MsgpackRpcAgent

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class _Opened:
    """The answer to `session.open`."""

    session: int
    capabilities: Capabilities


class RpcSession(RelaySession):
    """A session for a function behind an `MsgpackRpcAgent`; `MsgpackRpcAgent.open` makes it.

    Args:
        agent: whose connection is used.
        function_id: the function's name.
    """

    takes_views = True

    def __init__(self, agent: MsgpackRpcAgent, function_id: str) -> None:
        self._agent = agent
        self._function_id = function_id
        self._caps = Capabilities()
        self._number = 0
        self._link: Link | None = None
        #: A migration was begun and not ended.
        self.migrating = False
        self._page_size = 4096
        self._watchers = 0
        self.feed = EventFeed()

    @property
    def function_id(self) -> str:
        """The function's name."""
        return self._function_id

    @property
    def caps(self) -> Capabilities:
        """What can be done with it, as the agent said when the session was opened."""
        return self._caps

    def is_number(self, link: Link, number: object) -> bool:
        """It is the session that the agent knows by this number on this connection."""
        return self._link is link and self._number == number

    def on_loss(self, link: Link, reason: str) -> None:
        """Its connection is gone, and it with that."""
        if self._link is link:
            self.migrating = False
            self.feed.put(Event(EventKind.CONNECTION_LOST, reason))

    async def open(self, link: Link) -> None:
        """Open it at the agent.

        Args:
            link: the connection that it belongs to from now on.

        Raises:
            AgentError: the agent does not open it, or what it says of it cannot be.
        """

        def close_late(raw: Any) -> None:
            if isinstance(raw, dict):
                self._agent.background(partial(link.call, CLOSE, {"session": raw.get("session")}))

        raw = await link.call(OPEN, {"function": self._function_id}, close_late)
        opened: _Opened = parse(_Opened, raw, OPEN)
        most = self._agent.largest_chunk(link.info.max_message)
        self._caps = replace(opened.capabilities, max_chunk=min(opened.capabilities.max_chunk, most))
        try:
            check_capabilities(self._caps)
        except ProtocolError:
            close_late(raw)
            raise
        self._number, self._link = opened.session, link

    def _attached(self) -> Link:
        """The connection on which it is open."""
        if self._link is None or not self._link.usable:
            raise TransportLost(
                f"the connection of this session for function {self._function_id} is lost; another session is needed"
            )
        return self._link

    async def _watch_at(self, link: Link) -> None:
        try:
            await link.call(WATCH, {"session": self._number, "on": True})
        except Unsupported:
            pass  # what this side sees of the connection is reported all the same

    async def _send(self, link: Link, op: Op[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        given = dict(zip(op.arguments, args, strict=False)) | kwargs
        named = {name: to_wire(value) for name, value in given.items()}
        raw = await link.call(op.wire, {"session": self._number, **named})
        if op.result_key and isinstance(raw, dict):
            raw = raw.get(op.result_key)
        return cast("T", None if op.result is None else parse(op.result, raw, op.wire))

    async def operate(self, op: Op[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the agent.

        Raises:
            TransportLost: the session's connection is gone; nothing was sent if it was so before.
        """
        preparing()
        link = self._attached()
        sending()
        return await self._send(link, op, *args, **kwargs)

    async def begin(self, role: Role, migration_id: str) -> None:
        """Begin, or take over what an earlier session has begun; from now on the agent is asked whether it is there."""
        await self.operate(Operation.BEGIN, role, migration_id)
        self.migrating = True
        self._attached().wake.set()

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Ask the agent.

        Raises:
            ProtocolError: it gave more than was asked for, or nothing for no reason.
        """
        limit = min(limit, self._caps.max_chunk)
        return check_chunk(await self.operate(Operation.SAVE, offset, limit, phase), limit, phase)

    async def load(self, offset: int, data: bytes) -> None:
        """Send the agent a piece."""
        if len(data) > self._caps.max_chunk:
            raise InvalidArgument(f"load of {len(data)} bytes; at most {self._caps.max_chunk} at once; not sent")
        await self.operate(Operation.LOAD, offset, data)

    async def dirty_start(self, ranges: Sequence[Range], page_size: int) -> int:
        """Tell the agent.

        Raises:
            ProtocolError: it chose a page size that is none.
        """
        chosen = await self.operate(Operation.DIRTY_START, ranges, page_size)
        check_page_size(chosen)
        self._page_size = chosen
        return chosen

    async def dirty_report(self, iova: int, length: int) -> DirtyReport:
        """Ask the agent.

        Raises:
            ProtocolError: the report does not cover the range.
        """
        report = await self.operate(Operation.DIRTY_REPORT, iova, length)
        return check_report(report, iova, length, self._page_size)

    async def reset(self) -> None:
        """Tell the agent; a migration is over with it."""
        await self.operate(Operation.RESET)
        self.migrating = False

    async def end(self, outcome: Outcome) -> None:
        """Tell the agent."""
        await self.operate(Operation.END, outcome)
        self.migrating = False

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[Event]]:
        """Events of the agent, and those of its connection."""
        self._watchers += 1
        try:
            async with self.feed.watch() as events:
                if self._watchers == 1:
                    await self._watch_at(self._attached())
                yield events
        finally:
            self._watchers -= 1
            if not self._watchers and self._link is not None and self._link.usable:
                off = {"session": self._number, "on": False}
                self._agent.background(partial(self._link.call, WATCH, off))

    async def aclose(self) -> None:
        """Close it at the agent, if there is a connection."""
        if self in self._agent.sessions:
            self._agent.sessions.remove(self)
        link, self._link = self._link, None
        if link is None or not link.usable:
            await trio.lowlevel.checkpoint()
            return
        try:
            await link.call(CLOSE, {"session": self._number})
        except AgentError:
            pass  # the connection is gone, and the session with it


def parse(hint: Any, raw: Any, method: str) -> Any:
    """A result as a value of the interface.

    Args:
        hint: its type.
        raw: what came.
        method: whose result it is.

    Raises:
        ProtocolError: it is something else.
    """
    try:
        return from_wire(hint, raw, "result")
    except WireError as error:
        raise ProtocolError(f"the agent's answer to {method} cannot be used: {error}") from None
