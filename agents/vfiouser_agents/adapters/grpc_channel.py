"""One gRPC channel as a connection of the reference protocol: its stream of Connect is what the connection is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import trio

from vfiouser_agents.errors import AgentError, AuthError, ConnectError, ProtocolError, TransportLost
from vfiouser_agents.rpc.core import Handler
from vfiouser_agents.rpc.messages import DEFAULT_MAX_MESSAGE
from vfiouser_agents.rpc.methods import EVENT, HELLO

from .grpc_messages import MESSAGES, METHODS, GrpcMethod, pack, unpack
from .grpc_status import from_status

#: Seconds that a call's deadline at the server lies behind ours, so that ours is what the caller sees.
_GRACE = 1.0


class GrpcConnection:
    """A connection; of use while `run` runs. Implements `rpc.core.AgentConnection`.

    Args:
        channel: to the agent.
        handler: takes the events.
        limiter: threads that wait for answers.
    """

    def __init__(self, channel: grpc.Channel, handler: Handler, limiter: trio.CapacityLimiter) -> None:
        self._channel = channel
        self._handler = handler
        self._limiter = limiter
        self._token = trio.lowlevel.current_trio_token()
        self._id = b""
        self._greeting: dict[str, Any] | None = None
        self._greeted = trio.Event()
        self._hello, self._wanted = dict[str, Any](), trio.Event()
        self._ended = trio.Event()
        self._calls = 0
        self.max_outgoing = DEFAULT_MAX_MESSAGE
        self.lost: AgentError | None = None
        self.received = 0

    @property
    def unanswered(self) -> int:
        """Calls that are not answered yet; a call that is given up is ended at the server, too."""
        return self._calls

    def close(self, reason: AgentError) -> None:
        """End it from our side."""
        if self.lost is None:
            self.lost = reason
        self._ended.set()

    async def run(self) -> None:
        """Keep the stream until it ends, or until it is closed from our side."""
        stream: Any = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_ended, nursery.cancel_scope)
                await self._wanted.wait()
                method = METHODS[HELLO]
                stream = self._channel.unary_stream(
                    method.path,
                    request_serializer=MESSAGES[method.request].SerializeToString,
                    response_deserializer=MESSAGES[method.response].FromString,
                )(pack(method.request, self._hello))
                # A thread of its own, since it lasts as long as the connection.
                threading.Thread(target=self._listen, args=(stream,), name="grpc events", daemon=True).start()
                await trio.sleep_forever()
        finally:
            if self.lost is None:
                self.lost = TransportLost("the connection was closed")
            self._greeted.set()
            if stream is not None:
                stream.cancel()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._channel.close)

    async def _until_ended(self, scope: trio.CancelScope) -> None:
        await self._ended.wait()
        scope.cancel()

    def _listen(self, stream: Any) -> None:
        try:
            for response in stream:
                self._in_trio(self._take, unpack("ConnectResponse", response))
            reason: AgentError = TransportLost("the agent ended the connection")
        except grpc.RpcError as error:
            reason = from_status(error)
        except ProtocolError as error:
            reason = error
        self._in_trio(self.close, reason)

    def _in_trio(self, work: Callable[[Any], None], value: Any) -> None:
        try:
            self._token.run_sync_soon(work, value)
        except trio.RunFinishedError:
            pass  # nobody is left who would want to know

    def _take(self, response: dict[str, Any]) -> None:
        self.received += 1
        if not self._greeted.is_set():
            greeting = response.get("greeting", {})
            self._id, self._greeting = greeting.get("connection", b""), greeting.get("info")
            self._greeted.set()
        elif "event" in response:
            self._handler.notification(EVENT, response["event"])

    async def call(self, method: str, params: dict[str, Any], on_late: Callable[[Any], None] | None = None) -> Any:
        """Call the agent; the caller's deadline and its being cancelled are the agent's, too.

        Args:
            method: its name in the reference protocol.
            params: its parameters.
            on_late: not used: a call that is cancelled has no late result.

        Raises:
            AgentError: as the agent answered.
        """
        if method == HELLO:
            return await self._say_hello(params)
        if self.lost is not None:
            raise type(self.lost)(self.lost.message)
        row = METHODS[method]
        try:
            request = pack(row.request, {**params, "connection": self._id})
        except (ValueError, TypeError, KeyError) as error:
            raise ProtocolError(f"{method} cannot be written as {row.request}: {error}; it was not sent") from error
        if request.ByteSize() > self.max_outgoing:
            size, most = request.ByteSize(), self.max_outgoing
            raise ProtocolError(f"message of {size} bytes; the peer takes {most}; it was not sent")
        self._calls += 1
        try:
            return unpack(row.response, await self._answer(row, request))
        finally:
            self._calls -= 1

    async def _answer(self, row: GrpcMethod, request: Any) -> Any:
        left = trio.current_effective_deadline() - trio.current_time()
        stub = self._channel.unary_unary(
            row.path,
            request_serializer=MESSAGES[row.request].SerializeToString,
            response_deserializer=MESSAGES[row.response].FromString,
        )
        try:
            future = stub.future(request, timeout=None if left == float("inf") else max(left, 0.0) + _GRACE)
        except ValueError:
            raise TransportLost("the connection was closed") from None
        answered = False
        try:
            result = await trio.to_thread.run_sync(future.result, abandon_on_cancel=True, limiter=self._limiter)
            answered = True
        except grpc.RpcError as error:
            answered = True
            raise self._failed(error) from None
        except grpc.FutureCancelledError:
            raise TransportLost("the connection was closed") from None
        finally:
            if not answered:
                future.cancel()  # which ends the thread, and tells the agent
        self.received += 1
        return result

    def _failed(self, error: grpc.RpcError) -> AgentError:
        found = from_status(error)
        if isinstance(found, TransportLost | AuthError):
            self.close(found)
        else:
            self.received += 1
        return found

    async def _say_hello(self, params: dict[str, Any]) -> Any:
        self._hello = params
        self._wanted.set()
        await self._greeted.wait()
        if self._greeting is None:
            reason = self.lost or ProtocolError("the agent's first message on Connect is not a greeting")
            raise ConnectError(reason.message) if isinstance(reason, TransportLost) else reason
        return self._greeting


__all__ = ["GrpcConnection"]
