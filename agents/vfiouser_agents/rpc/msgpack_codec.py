"""msgpack-RPC: arrays in msgpack, one after the other, with nothing between them.

    request       [0, id, method, [params]]
    response      [1, id, error or nil, result or nil]
    notification  [2, method, [params]]

`params` is always a map, the only element of its array, so that parameters can be added. An error is a map with `code`,
`message` and, where there is more to say, `vendor_code`, `reasons`, `limits`.

Spec: msgpack-rpc/msgpack-rpc, spec.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from vfiouser_agents.errors import ProtocolError

from .errormap import error_from_map, error_to_map
from .messages import DEFAULT_MAX_MESSAGE, ID_LIMIT, Message, Notification, Request, Response

_REQUEST, _RESPONSE, _NOTIFICATION = 0, 1, 2
#: The parser makes room for an array when it reads its length, and nests arrays a thousand deep.
MAX_ARRAY = 2048
MAX_MAP = 1024
MAX_STRING = 64 << 10
#: Values in one message: small ones are many times larger in memory than on the wire.
MAX_VALUES = 64 << 10


class MsgpackCodec:
    """The codec of one connection.

    Args:
        max_message: bytes that a message from the peer may have.
    """

    def __init__(self, max_message: int = DEFAULT_MAX_MESSAGE) -> None:
        self._max_message = max_message
        # Kept, so that its buffer need not grow anew for each piece of state.
        self._packer = msgpack.Packer(use_bin_type=True)
        self._fed = 0
        self._taken = 0
        self._values = 0
        self._unpacker = msgpack.Unpacker(
            raw=False,
            strict_map_key=True,
            list_hook=self._count,
            object_hook=self._count,
            # One read may bring the end of a message and a part of the next.
            max_buffer_size=2 * max_message + (1 << 20),
            max_bin_len=max_message,
            max_str_len=MAX_STRING,
            max_array_len=MAX_ARRAY,
            max_map_len=MAX_MAP,
            max_ext_len=0,
        )

    def _count(self, container: Any) -> Any:
        self._values += len(container)
        if self._values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values in one message")
        return container

    def encode(self, message: Message) -> bytes:
        """A message as bytes.

        Raises:
            ProtocolError: it holds what msgpack cannot carry.
        """
        match message:
            case Request(id=id_, method=method, params=params):
                parts: list[Any] = [_REQUEST, id_, method, [params]]
            case Response(id=id_, result=result, error=error):
                parts = [_RESPONSE, id_, None if error is None else error_to_map(error), result]
            case Notification(method=method, params=params):
                parts = [_NOTIFICATION, method, [params]]
        try:
            return self._packer.pack(parts)
        except (ValueError, TypeError, OverflowError) as error:
            # What it had written before is still in its buffer.
            self._packer = msgpack.Packer(use_bin_type=True)
            raise ProtocolError(f"message cannot be written as msgpack: {error}; it was not sent") from error

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take bytes in, and give the messages that are complete.

        Raises:
            ProtocolError: not msgpack, not RPC, or above a limit.
        """
        self._fed += len(data)
        try:
            self._unpacker.feed(data)
            while True:
                try:
                    value = self._unpacker.unpack()
                except msgpack.OutOfData:
                    break
                self._taken = self._unpacker.tell()
                self._values = 0
                yield _message(value)
        # All errors of the parser are ValueErrors but two.
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise ProtocolError(f"peer sent what is no message: {_reason(error)}; the connection is closed") from error
        if self._fed - self._taken > self._max_message:
            raise ProtocolError(f"peer sent a message of more than {self._max_message} bytes; the connection is closed")


def _reason(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def _message(value: Any) -> Message:
    if isinstance(value, list) and value and type(value[0]) is int:
        match value:
            case [0, int(id_), str(method), list(params)] if _is_id(id_):
                return Request(id_, method, _named(params))
            case [1, int(id_), error, result] if _is_id(id_):
                return Response(id_, result) if error is None else Response(id_, error=error_from_map(error))
            case [2, str(method), list(params)]:
                return Notification(method, _named(params))
    shape = f"an array of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
    raise ValueError(f"{shape} that is no request, response or notification")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < ID_LIMIT


def _named(params: list[Any]) -> dict[str, Any]:
    if not params:
        return {}
    if len(params) != 1 or not isinstance(params[0], dict) or not all(type(key) is str for key in params[0]):
        raise ValueError("params must be an array with one map with text as keys")
    return params[0]
