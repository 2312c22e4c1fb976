"""Serves a function of an agent with the protocol of the 2022 plug-in example, one client at a time, as that does.

What the protocol cannot say, a failure above all, ends as the state ERROR, which GET_STATE shows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio
from xxhash import xxh3_128

from vfiouser_agents.api import Agent, AgentState, Outcome, Phase, Role, Session
from vfiouser_agents.errors import AgentError
from vfiouser_agents.options import OptionError

from .legacy_messages import HEADERS, MAX_CHUNK, VALUE_SIZE, LegacyRequest, V1State

_log = logging.getLogger(__name__)
MIGRATION = "legacy-tcp"
_SHOWN = {
    AgentState.RUNNING: V1State.RUNNING,
    AgentState.QUIESCED: V1State.STOPPED,
    AgentState.STOPPED: V1State.STOPPED,
    AgentState.LOADING: V1State.RESUMING,
    AgentState.LOADED: V1State.RESUMING,
    AgentState.ERROR: V1State.ERROR,
}


async def serve_legacy(
    agent: Agent,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    *,
    byte_order: str = "little",
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the only function of an agent until cancelled.

    Args:
        agent: the agent, entered.
        listeners: where clients come in; one at a time is served, the others wait.
        byte_order: `little` or `big`.
        task_status: told when clients may come.

    Raises:
        OptionError: the agent has not exactly one function.
    """
    names = [function.function_id for function in await agent.functions()]
    if len(names) != 1:
        for listener in listeners:
            await listener.aclose()
        raise OptionError(f"this protocol carries one function; the agent has {', '.join(names) or 'none'}")
    session = await agent.open(names[0])
    device = LegacyDevice(session)
    turn = trio.Lock()

    async def serve(stream: trio.abc.Stream) -> None:
        async with turn:
            try:
                await _Client(device, stream, byte_order).run()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                _log.info("client lost: %s", error)
            finally:
                await trio.aclose_forcefully(stream)

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, list(listeners))
            task_status.started()
    finally:
        # A server that ends takes its claim on the function's migration along.
        with trio.CancelScope(shield=True):
            await session.aclose()


class LegacyDevice:
    """A function as the protocol shows it: a state, bytes to save, bytes to load.

    Args:
        session: the function.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._v1 = V1State.RUNNING
        #: What is still to be saved; a view, since the rest of a large state is not to be copied with each piece.
        self._left = memoryview(b"")
        #: Bytes that were loaded; None before the first, so that a load may still be given up.
        self._loaded: int | None = None
        self._digest = xxh3_128()

    async def state(self) -> V1State:
        """What GET_STATE answers."""
        shown = _SHOWN[(await self._session.status()).state]
        same = shown is V1State.STOPPED and self._v1 in (V1State.SAVING, V1State.STOPPED, V1State.RESUMING)
        same = same or (shown is V1State.RUNNING and bool(self._v1 & V1State.RUNNING))
        return self._v1 if same or self._v1 is V1State.ERROR else shown

    async def set_state(self, value: int) -> None:
        """Do what SET_STATE says; a failure becomes the state ERROR."""
        before = await self.state()
        ways = {
            V1State.STOPPED: self._stop,
            V1State.RUNNING: self._run,
            V1State.SAVING: self._save,
            V1State.SAVING | V1State.RUNNING: self._watch,
            V1State.RESUMING: self._resume,
        }
        way = ways.get(V1State(value)) if value <= V1State.ERROR else None
        try:
            if way is None or before is V1State.ERROR:
                raise AgentError(f"no transition leads from state {before} to {value}")
            await way(before)
            self._v1 = V1State(value)
        except AgentError as error:
            _log.error("cannot set state %d: %s", value, error)
            self._v1 = V1State.ERROR

    async def _begin(self, role: Role) -> None:
        if (await self._session.status()).role not in (None, role):
            await self._session.end(Outcome.CANCELLED)
        await self._session.begin(role, MIGRATION)

    async def _stop(self, before: V1State) -> None:
        if before is V1State.RESUMING and self._loaded is not None:
            await self._session.abort()
        else:
            await self._session.stop()

    async def _run(self, before: V1State) -> None:
        if before is V1State.RESUMING:
            await self._session.load_commit(self._loaded or 0, self._digest.digest())
        await self._session.resume()
        await self._session.end(Outcome.SUCCESS if before is V1State.RESUMING else Outcome.CANCELLED)

    async def _watch(self, before: V1State) -> None:
        await self._begin(Role.SOURCE)

    async def _save(self, before: V1State) -> None:
        await self._begin(Role.SOURCE)
        await self._session.stop()
        found, eof = bytearray(), False
        while not eof:
            chunk = await self._session.save(len(found), MAX_CHUNK, Phase.FINAL)
            found += chunk.data
            eof = chunk.eof
        self._left = memoryview(found)

    async def _resume(self, before: V1State) -> None:
        await self._begin(Role.DESTINATION)
        await self._session.stop()
        self._loaded = None
        self._digest = xxh3_128()

    async def pending(self) -> int:
        """What UPDATE_PENDING answers."""
        return len(self._left) if await self.state() is V1State.SAVING else 0

    def take(self, size: int) -> memoryview:
        """What SAVE_BUFFER answers; short if there is less, which the client must not ask for."""
        piece, self._left = self._left[:size], self._left[size:]
        return piece

    async def load(self, data: bytes) -> None:
        """Take what LOAD_BUFFER brings; a failure becomes the state ERROR."""
        try:
            if self._loaded is None:
                await self._session.load_begin(None)
                self._loaded = 0
            size = self._session.caps.max_chunk
            for begin in range(0, len(data), size):
                await self._session.load(self._loaded, data[begin : begin + size])
                self._loaded += len(data[begin : begin + size])
            self._digest.update(data)
        except AgentError as error:
            _log.error("cannot load the state: %s", error)
            self._v1 = V1State.ERROR


class _Client:
    def __init__(self, device: LegacyDevice, stream: trio.abc.Stream, byte_order: str) -> None:
        self._device = device
        self._stream = stream
        self._header = HEADERS[byte_order]
        self._buffer = bytearray()

    async def run(self) -> None:
        while (raw := await self._read(self._header.size)) is not None:
            request, size, value = self._header.unpack(raw)
            if not await self._answer(request, size, value):
                return

    async def _answer(self, request: int, size: int, value: int) -> bool:
        """Do what was asked; False = the connection is over."""
        match request:
            case LegacyRequest.UPDATE_PENDING:
                await self._reply(await self._device.pending())
            case LegacyRequest.GET_STATE:
                await self._reply(await self._device.state())
            case LegacyRequest.SET_STATE:
                await self._device.set_state(value)
            case LegacyRequest.SAVE_BUFFER if size <= MAX_CHUNK:
                piece = self._device.take(size)
                await self._stream.send_all(piece)
                return len(piece) == size
            case LegacyRequest.LOAD_BUFFER if size <= MAX_CHUNK:
                data = await self._read(size)
                if data is None:
                    return False
                await self._device.load(data)
            case LegacyRequest.FINISH:
                return False
            case _:
                _log.warning("client sent request %d of %d bytes; the connection is closed", request, size)
                return False
        return True

    async def _reply(self, value: int) -> None:
        await self._stream.send_all(self._header.pack(LegacyRequest.MESSAGE_REPLY, VALUE_SIZE, value))

    async def _read(self, size: int) -> bytes | None:
        while len(self._buffer) < size:
            piece = await self._stream.receive_some(256 << 10)
            if not piece:
                return None
            self._buffer += piece
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data
