"""A JSON-RPC server as SPDK has it: bare objects, errors by number, requests of 256 KiB at most."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
MAX_REQUEST = 256 << 10


class RpcFault(Exception):
    """An error that is sent to the client."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class SpdkServer:
    """Answers methods by a table.

    Args:
        methods: what there is.
    """

    def __init__(self, methods: dict[str, Handler]) -> None:
        self.methods = methods
        #: How an answer is cut into pieces on its way; whole unless a test says otherwise.
        self.cut: Callable[[bytes], list[bytes]] = lambda data: [data]
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.streams: list[trio.abc.Stream] = []

    async def serve(
        self, path: str, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen at a path until cancelled."""
        listening = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await listening.bind(path)
        listening.listen(8)
        await trio.serve_listeners(self._serve, [trio.SocketListener(listening)], task_status=task_status)

    async def _serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        self.streams.append(stream)
        lock = trio.Lock()
        buffer, decoder = "", json.JSONDecoder()
        try:
            async with trio.open_nursery() as nursery, stream:
                async for data in stream:
                    buffer += bytes(data).decode("ascii")
                    while buffer:
                        try:
                            request, end = decoder.raw_decode(buffer)
                        except ValueError:
                            assert len(buffer) <= MAX_REQUEST, "SPDK would close the connection"
                            break
                        assert end <= MAX_REQUEST, "SPDK would close the connection"
                        buffer = buffer[end:].lstrip()
                        nursery.start_soon(partial(self._answer, request, stream, lock))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _answer(self, request: dict[str, Any], stream: trio.abc.Stream, lock: trio.Lock) -> None:
        self.requests.append(request)
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": request["id"]}
        try:
            handler = self.methods.get(request["method"])
            if handler is None:
                raise RpcFault(-32601, "Method not found")
            reply["result"] = await handler(request.get("params", {}))
        except RpcFault as fault:
            reply["error"] = {"code": fault.code, "message": str(fault)}
        async with lock:
            for piece in self.cut(json.dumps(reply).encode()):
                await stream.send_all(piece)


def params_of(params: dict[str, Any], *names: str) -> list[Any]:
    """Exactly these parameters, as SPDK's decoders want it."""
    if set(params) != set(names):
        raise RpcFault(-32602, "Invalid parameters")
    return [params[name] for name in names]
