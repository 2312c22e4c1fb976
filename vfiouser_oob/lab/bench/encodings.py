"""What the encoding of each adapter costs by itself: a piece of state written and read, without a socket in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from importlib import import_module

from vfiouser_agents.adapters.jsonrpc import MAX_CHUNK as JSON_CHUNK
from vfiouser_agents.adapters.msgpack_rpc import DEFAULT_CHUNK
from vfiouser_agents.api import Chunk
from vfiouser_agents.operations import Operation
from vfiouser_agents.rpc.carrier import HEAD_SIZE
from vfiouser_agents.rpc.json_codec import JsonCodec
from vfiouser_agents.rpc.messages import Codec, Message, Response
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.rpc.wire import from_wire, to_wire

#: Bytes that are measured at once at least: a small piece takes less than the clock can tell.
_LEAST = 4 << 20


def encoding_rates(protocols: tuple[str, ...], rounds: int) -> Mapping[str, float]:
    """Measure the processor's time for an answer to `save`: made on the agent's side, and read on the adapter's.

    Args:
        protocols: their names; one without an encoding (`legacy-tcp` sends state as it is) is left out.
        rounds: how often; the best counts.

    Returns:
        MB/s by protocol.
    """
    return {name: _rate(*_WAYS[name](), rounds) for name in protocols if name in _WAYS}


def _rate(carry: Callable[[bytes], Chunk], size: int, rounds: int) -> float:
    piece, times = random.Random(1).randbytes(size), max(1, _LEAST // size)
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(times):
            carry(piece)
        best = min(best, time.process_time() - began)
    return size * times / max(best, 1e-9) / 1e6


def _by_codec(codec: Codec, size: int) -> tuple[Callable[[bytes], Chunk], int]:
    def carry(piece: bytes) -> Chunk:
        sent = b"".join(codec.encode_apart(Response(1, to_wire(Chunk(piece)))))
        (answer,) = _received(codec, sent)
        assert isinstance(answer, Response)
        chunk: Chunk = from_wire(Chunk, answer.result)
        return chunk

    return carry, size


def _received(codec: Codec, data: bytes) -> list[Message]:
    """The messages in bytes that come as they come from a socket."""
    messages: list[Message] = []
    at = 0
    while at < len(data):
        room = codec.room()
        if room is None:
            messages += codec.feed(data[at : at + HEAD_SIZE])
            at += HEAD_SIZE
        else:
            count = min(len(room), len(data) - at)
            room[:count] = data[at : at + count]
            messages += codec.filled(count)
            at += count
    return messages


def _by_protobuf() -> tuple[Callable[[bytes], Chunk], int]:
    grpc = import_module("vfiouser_agents.adapters.grpc_messages")
    name = grpc.METHODS[Operation.SAVE.wire].response

    def carry(piece: bytes) -> Chunk:
        sent = grpc.pack(name, to_wire(Chunk(piece))).SerializeToString()
        chunk: Chunk = from_wire(Chunk, grpc.unpack(name, grpc.MESSAGES[name].FromString(sent)))
        return chunk

    return carry, import_module("vfiouser_agents.adapters.grpc_agent").GrpcAgent.default_chunk


_WAYS: Mapping[str, Callable[[], tuple[Callable[[bytes], Chunk], int]]] = {
    "msgpack-rpc": lambda: _by_codec(MsgpackCodec(), DEFAULT_CHUNK),
    "jsonrpc": lambda: _by_codec(JsonCodec(), JSON_CHUNK),
    "grpc": _by_protobuf,
}
