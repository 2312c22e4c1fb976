"""A gRPC server that knows nothing of ours but the .proto: each call does what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from vfiouser_agents.adapters.grpc_messages import MESSAGES, METHODS, SERVICE

Call = Callable[[Any, grpc.ServicerContext], Any]


class BareServer:
    """A server with one function, `f0`.

    Args:
        calls: what a call does, by its name in the .proto; the others answer with as little as possible.
    """

    def __init__(self, calls: dict[str, Call]) -> None:
        self.calls = calls
        self.ended = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        table: dict[str, Any] = {}
        for row in METHODS.values():
            name = row.path.rpartition("/")[2]
            wire = {
                "request_deserializer": MESSAGES[row.request].FromString,
                "response_serializer": MESSAGES[row.response].SerializeToString,
            }
            if name == "Connect":
                table[name] = grpc.unary_stream_rpc_method_handler(self._connect, **wire)
            else:
                table[name] = grpc.unary_unary_rpc_method_handler(self._answer(name, row.response), **wire)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, table)])

    def start(self) -> str:
        """Serve; gives the address."""
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return f"tcp://127.0.0.1:{port}"

    def stop(self) -> None:
        """End everything."""
        self.ended.set()
        self._server.stop(None).wait()

    def _answer(self, name: str, response: str) -> Call:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            found = self.calls[name](request, context) if name in self.calls else None
            if found is None and name == "Open":
                return MESSAGES["OpenResponse"](session=1, capabilities=MESSAGES["Capabilities"]())
            if found is None and name == "Status":
                return MESSAGES["StatusResponse"](state=1)
            return MESSAGES[response]() if found is None else found

        return answer

    def _connect(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if "Connect" in self.calls:
            yield self.calls["Connect"](request, context)
        else:
            info = MESSAGES["AgentInfo"](vendor="v", product="p", protocol=request.protocol, protocol_version=1)
            greeting = MESSAGES["Greeting"](connection=b"c", info=info)
            yield MESSAGES["ConnectResponse"](greeting=greeting)
        context.add_callback(self.ended.set)
        self.ended.wait()
