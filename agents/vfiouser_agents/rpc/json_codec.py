"""JSON-RPC 2.0 as SPDK speaks it: JSON objects, one after the other, with nothing between them.

    request       {"jsonrpc": "2.0", "id": 1, "method": "...", "params": {...}}
    response      {"jsonrpc": "2.0", "id": 1, "result": ...} or {..., "error": {"code": -22, "message": "..."}}
    notification  a request without id

Bytes are base64. Our own errors carry in `data` what msgpack-RPC carries in the error itself (`code`, `vendor_code`,
`reasons`, `limits`); those of others are told apart by number: the ones of JSON-RPC, -1 for "not in this state", and
negative errnos.

Spec: JSON-RPC 2.0; SPDK doc/jsonrpc.md and lib/jsonrpc for framing, limits and error numbers.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import msgspec

from vfiouser_agents.causes import words_of
from vfiouser_agents.errors import (
    AgentError,
    AuthError,
    Busy,
    ConnectError,
    CorruptState,
    DeadlineExceeded,
    DeviceFailed,
    Incompatible,
    InvalidArgument,
    InvalidState,
    NoResources,
    NotFound,
    ProtocolError,
    TransportLost,
    Unsupported,
)

from .errormap import error_from_map, error_to_map
from .messages import DEFAULT_MAX_MESSAGE, ID_LIMIT, Codec, Message, Notification, Request, Response

#: Objects and arrays inside each other.
MAX_DEPTH = 32
#: Values in one message, counted by their separators: small ones are many times larger in memory than on the wire.
MAX_VALUES = 64 << 10
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603

#: What a number stands for, whoever sends it.
BY_NUMBER: Mapping[int, type[AgentError]] = {
    PARSE_ERROR: ProtocolError,
    INVALID_REQUEST: ProtocolError,
    METHOD_NOT_FOUND: Unsupported,
    INVALID_PARAMS: InvalidArgument,
    INTERNAL_ERROR: AgentError,
    -1: InvalidState,  # SPDK's "method may not be called in this state", which is also -EPERM
    -errno.ENOENT: NotFound,
    -errno.ENODEV: NotFound,
    -errno.ENXIO: NotFound,
    -errno.EINVAL: InvalidArgument,
    -errno.EBUSY: Busy,
    -errno.EAGAIN: Busy,
    -errno.EALREADY: InvalidState,
    -errno.ENOSYS: Unsupported,
    -errno.EOPNOTSUPP: Unsupported,
    -errno.ENOMEM: NoResources,
    -errno.ENOSPC: NoResources,
    -errno.ETIMEDOUT: DeadlineExceeded,
    -errno.EACCES: AuthError,
    -errno.EILSEQ: CorruptState,
    -errno.EBADMSG: CorruptState,
}
#: What we send; whatever is missing is sent as an internal error, and told apart by `data`.
_NUMBERS: Mapping[type[AgentError], int] = {
    ConnectError: -errno.ENOTCONN,
    AuthError: -errno.EACCES,
    TransportLost: -errno.EIO,
    DeadlineExceeded: -errno.ETIMEDOUT,
    Busy: -errno.EBUSY,
    Unsupported: METHOD_NOT_FOUND,
    NotFound: -errno.ENODEV,
    InvalidArgument: INVALID_PARAMS,
    InvalidState: -1,
    Incompatible: -errno.EINVAL,
    CorruptState: -errno.EILSEQ,
    NoResources: -errno.ENOSPC,
    DeviceFailed: -errno.EIO,
    ProtocolError: INVALID_REQUEST,
}


#: Writes bytes as base64, in the pass in which it writes the rest.
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder()


class ObjectScanner:
    """Finds where one JSON object ends and the next begins, without looking at any byte twice.

    Args:
        max_message: bytes that one object may have.
    """

    _OUTSIDE = re.compile(rb'["{}\[\],]')
    _SPACE = b" \t\r\n"
    _SPACES = frozenset(bytes((byte,)) for byte in _SPACE)

    def __init__(self, max_message: int) -> None:
        self._max_message = max_message
        self._buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._values = 0
        self._in_string = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes in, and give the objects that are complete.

        Raises:
            ValueError: something else than objects, or one above a limit.
        """
        self._buffer += data
        while (end := self._end()) is not None:
            with memoryview(self._buffer) as whole:
                found = bytes(whole[:end])
            del self._buffer[:end]
            self._at = self._values = 0
            if len(found) > self._max_message:
                break
            yield found
        else:
            if len(self._buffer) <= self._max_message:
                return
        raise ValueError(f"an object of more than {self._max_message} bytes")

    def _end(self) -> int | None:
        if self._depth == 0 and not self._begins():
            return None
        while True:
            if self._in_string:
                if not self._leave_string():
                    return None
                continue
            match = self._OUTSIDE.search(self._buffer, self._at)
            if match is None:
                self._at = len(self._buffer)
                return None
            self._at = match.end()
            self._count(match[0])
            if self._depth == 0 and not self._in_string:
                return self._at

    def _begins(self) -> bool:
        if bytes(self._buffer[:1]) in self._SPACES:
            skipped = len(self._buffer) - len(self._buffer.lstrip(self._SPACE))
            del self._buffer[:skipped]
        if self._buffer and self._buffer[:1] != b"{":
            raise ValueError("something that is not a JSON object")
        return bool(self._buffer)

    def _leave_string(self) -> bool:
        # Almost all of a message is one string without a backslash; finding one byte is ten times as fast as a pattern.
        quote = self._buffer.find(b'"', self._at)
        while True:
            end = quote if quote >= 0 else len(self._buffer)
            slash = self._buffer.find(b"\\", self._at, end)
            if slash < 0:
                self._at = end if quote < 0 else end + 1
                self._in_string = quote < 0
                return not self._in_string
            if slash + 1 == len(self._buffer):
                self._at = slash  # what is escaped has not arrived
                return False
            self._at = slash + 2
            if slash + 1 == quote:
                quote = self._buffer.find(b'"', self._at)

    def _count(self, mark: bytes) -> None:
        if mark == b'"':
            self._in_string = True
        elif mark == b",":
            self._values += 1
            if self._values > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} values in one object")
        else:
            self._depth += 1 if mark in b"{[" else -1
            if self._depth > MAX_DEPTH:
                raise ValueError(f"objects nested more than {MAX_DEPTH} deep")


class JsonCodec(Codec):
    """The codec of one connection.

    Args:
        max_message: bytes that a message from the peer may have.
    """

    def __init__(self, max_message: int = DEFAULT_MAX_MESSAGE) -> None:
        self._scanner = ObjectScanner(max_message)

    def encode(self, message: Message) -> bytes:
        """A message as bytes.

        Raises:
            ProtocolError: it holds what JSON cannot carry.
        """
        parts: dict[str, Any] = {"jsonrpc": "2.0"}
        match message:
            case Request(id=id_, method=method, params=params):
                parts |= {"id": id_, "method": method}
            case Response(id=id_, result=result, error=None):
                parts |= {"id": id_, "result": result}
                params = {}
            case Response(id=id_, error=error):
                parts |= {"id": id_, "error": _error_object(error)}
                params = {}
            case Notification(method=method, params=params):
                parts["method"] = method
        # SPDK takes `params: {}` for some methods as an error, and its absence never.
        if params:
            parts["params"] = params
        try:
            _require_finite(parts)
            return _ENCODER.encode(parts)
        except (ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise ProtocolError(f"message cannot be written as JSON: {error}; it was not sent") from error

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take bytes in, and give the messages that are complete.

        Raises:
            ProtocolError: not JSON, not RPC, or above a limit.
        """
        try:
            for text in self._scanner.feed(data):
                yield _message(_DECODER.decode(text))
        except (ValueError, RecursionError, msgspec.MsgspecError) as error:
            reason = words_of(error)[:200]
            raise ProtocolError(
                f"peer sent something that is not a message: {reason}; the connection is closed"
            ) from error


def _require_finite(value: Any) -> None:
    """Refuse what the encoder would write as null."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not JSON")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _require_finite(item)


def _message(value: dict[str, Any]) -> Message:
    id_, method = value.get("id"), value.get("method")
    if isinstance(method, str):
        params = value.get("params", {})
        if not isinstance(params, dict):
            raise ValueError("params must be an object")
        if id_ is None:
            return Notification(method, params)
        if _is_id(id_):
            return Request(id_, method, params)
    elif "error" in value and value["error"] is not None:
        error = error_from_object(value["error"])
        if _is_id(id_):
            return Response(id_, error=error)
        if id_ is None:
            # A peer that could not read our message does not know its id.
            raise ValueError(f"an error that answers no call: {error}")
    elif "result" in value and _is_id(id_):
        return Response(id_, value["result"])
    raise ValueError("an object that is not a request, response or notification")


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < ID_LIMIT


def _error_object(error: AgentError | None) -> dict[str, Any]:
    assert error is not None
    data = error_to_map(error)
    message = data.pop("message")
    return {"code": _NUMBERS.get(type(error), INTERNAL_ERROR), "message": message, "data": data}


def error_from_object(value: Any) -> AgentError:
    """An error as it came.

    Args:
        value: the `error` of a response.
    """
    if not isinstance(value, Mapping):
        return AgentError(f"the agent failed: {str(value)[:500]}")
    number, data = value.get("code"), value.get("data")
    message = str(value.get("message") or "no message")[:4096]
    if isinstance(data, Mapping) and isinstance(data.get("code"), str):
        return error_from_map({**data, "message": message})
    if type(number) is not int:
        return AgentError(message)
    kind = BY_NUMBER.get(number, AgentError)
    if number < 0 and -number in errno.errorcode:
        name = errno.errorcode[-number]
        return kind(message, vendor_code=f"{number} ({name}, {os.strerror(-number)})")
    return kind(message, vendor_code=str(number))
