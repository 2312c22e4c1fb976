"""msgpack-RPC: arrays in msgpack, one after the other, with nothing between them.

    request       [0, id, method, [params]]
    response      [1, id, error or nil, result or nil]
    notification  [2, method, [params]]

`params` is always a map, the only element of its array, so that parameters can be added. An error is a map with `code`,
`message` and, where there is more to say, `vendor_code`, `reasons`, `limits`.

Spec: msgpack-rpc/msgpack-rpc, spec.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack

from vfiouser_agents.causes import words_of
from vfiouser_agents.errors import ProtocolError
from vfiouser_protocol.buffers import BufferPool

from .errormap import error_from_map, error_to_map
from .messages import DEFAULT_MAX_MESSAGE, ID_LIMIT, Buffer, Codec, Message, Notification, Request, Response
from .msgpack_bulk import HEAD, find_bulk, holds_large, pack_apart

_REQUEST, _RESPONSE, _NOTIFICATION = 0, 1, 2
#: The parser makes room for an array when it reads its length, and nests arrays a thousand deep.
MAX_ARRAY = 2048
MAX_MAP = 1024
MAX_STRING = 64 << 10
#: Values in one message: small ones are many times larger in memory than on the wire.
MAX_VALUES = 64 << 10


class MsgpackCodec(Codec):
    """The codec of one connection.

    A message that carries a large binary, such as a piece of state, is not put together: the binary is read to where it
    stays, and the parser is given a token in its place.

    Args:
        max_message: bytes that a message from the peer may have.
    """

    def __init__(self, max_message: int = DEFAULT_MAX_MESSAGE) -> None:
        self._max_message = max_message
        # Kept, so that its buffer need not grow anew for each message.
        self._packer = msgpack.Packer(use_bin_type=True)
        self._pool = BufferPool()
        # Nobody else knows it, so nobody can send it.
        self._token = os.urandom(16)
        self._filling: _Filling | None = None
        self._open: _Filling | None = None
        #: What came of an incomplete message; None if it is known to hold nothing large.
        self._begun: bytes | None = b""
        self._values = _ValueCount()
        self._start_parser()

    def _start_parser(self) -> None:
        self._fed = 0
        self._taken = 0
        self._unpacker = msgpack.Unpacker(
            raw=False,
            strict_map_key=True,
            # Of another object: a parser that knew this one would keep both, with what was read, until the garbage
            # collector comes.
            list_hook=self._values.add,
            object_hook=self._values.add,
            # One read may bring the end of a message and a part of the next.
            max_buffer_size=2 * self._max_message + (1 << 20),
            max_bin_len=self._max_message,
            max_str_len=MAX_STRING,
            max_array_len=MAX_ARRAY,
            max_map_len=MAX_MAP,
            max_ext_len=0,
        )

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
        return self._pack(parts)

    def _pack(self, value: Any) -> bytes:
        try:
            return self._packer.pack(value)
        except (ValueError, TypeError, OverflowError) as error:
            # What it had written before is still in its buffer.
            self._packer = msgpack.Packer(use_bin_type=True)
            raise ProtocolError(f"message cannot be written as msgpack: {error}; it was not sent") from error

    def encode_apart(self, message: Message) -> Sequence[Buffer]:
        """A message as buffers that follow each other; what is large stays where it is, and must not change.

        Raises:
            ProtocolError: it holds what msgpack cannot carry.
        """
        match message:
            case Request(id=id_, method=method, params=values) if holds_large(values):
                return pack_apart(self._pack, (b"\x94\x00", self._pack(id_), self._pack(method), b"\x91"), values)
            case Response(id=id_, result=values, error=None) if holds_large(values):
                return pack_apart(self._pack, (b"\x94\x01", self._pack(id_), b"\xc0"), values)
        return (self.encode(message),)

    def room(self) -> memoryview | None:
        """Where the next bytes belong, while a large binary is coming in."""
        filling = self._filling
        return None if filling is None else filling.memory[filling.have :]

    def filled(self, count: int) -> Iterator[Message]:
        """Take the first bytes of `room` as fed.

        Raises:
            ProtocolError: as for `feed`.
        """
        assert self._filling is not None
        self._filling.have += count
        return self.feed(b"")

    def feed(self, data: Buffer) -> Iterator[Message]:
        """Take bytes in, and give the messages that are complete.

        Raises:
            ProtocolError: not msgpack, not RPC, or above a limit.
        """
        try:
            while True:
                if self._filling is not None:
                    data = self._filling.take(data)
                    if self._filling.missing:
                        return
                    self._close_binary(self._filling)
                yield from self._parse(data)
                rest = self._find_binary(data)
                if rest is None:
                    break
                data = rest
        # All errors of the parser are ValueErrors but two.
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise ProtocolError(
                f"peer sent something that is not a message: {_reason(error)}; the connection is closed"
            ) from error
        large = 0 if self._open is None else self._open.size
        self._check_size(self._fed - self._taken + large)

    def _check_size(self, size: int) -> None:
        if size > self._max_message:
            raise ProtocolError(f"peer sent a message of more than {self._max_message} bytes; the connection is closed")

    def _parse(self, data: Buffer) -> Iterator[Message]:
        self._fed += len(data)
        self._unpacker.feed(data)
        while True:
            try:
                value = self._unpacker.unpack()
            except msgpack.OutOfData:
                return
            self._taken = self._unpacker.tell()
            self._values.count = 0
            self._begun = b""
            filled, self._open = self._open, None
            if filled is not None:
                _put_back(value, filled, self._token)
            elif len(self._pool):
                # No state is flowing, or not only; so nothing is held for it while nothing happens.
                self._pool.drop()
            yield _message(value)

    def _find_binary(self, data: Buffer) -> memoryview | None:
        """Look for a large binary in an incomplete message; if there is one, return its beginning, which has come."""
        incomplete = self._fed - self._taken
        if not incomplete or self._begun is None or self._open is not None:
            return None
        new = memoryview(data)[max(0, len(data) - incomplete) :]
        come = self._begun + bytes(new[:HEAD])
        try:
            bulk = find_bulk(come[:HEAD])
        except ValueError:
            self._begun = None
            return None
        if bulk is None:
            self._begun = come if len(come) < HEAD else None
            return None
        self._check_size(bulk.data + bulk.size)
        self._filling = _Filling(come[: bulk.start], bulk.key, self._pool.take(bulk.size))
        return new[bulk.data - len(self._begun) :]

    def _close_binary(self, filling: _Filling) -> None:
        """A large binary is there: let the parser go on behind it."""
        self._filling, self._open = None, filling
        self._start_parser()
        lead = filling.lead + b"\xc4" + bytes([len(self._token)]) + self._token
        self._fed = len(lead)
        self._unpacker.feed(lead)


class _ValueCount:
    """Counts the values of one message while it is parsed."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, container: Any) -> Any:
        """Count what is in a list or a map.

        Raises:
            ValueError: there are too many.
        """
        self.count += len(container)
        if self.count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values in one message")
        return container


class _Filling:
    """A large binary on its way to where it stays.

    Args:
        lead: the message in front of it.
        key: under which it is found.
        memory: where it goes.
    """

    def __init__(self, lead: bytes, key: str, memory: memoryview) -> None:
        self.lead = lead
        self.key = key
        self.memory = memory
        self.have = 0

    @property
    def size(self) -> int:
        return len(self.memory)

    @property
    def missing(self) -> int:
        return len(self.memory) - self.have

    def take(self, data: Buffer) -> memoryview:
        """Take what belongs to it; returns the rest."""
        view = memoryview(data)
        count = min(len(view), self.missing)
        self.memory[self.have : self.have + count] = view[:count]
        self.have += count
        return view[count:]


def _put_back(value: Any, filled: _Filling, token: bytes) -> None:
    """Put a large binary where its token is, unless another value of the same key came behind it."""
    values = value[3][0] if value[0] == _REQUEST else value[3]
    if values[filled.key] == token:
        values[filled.key] = filled.memory.toreadonly()


def _reason(error: Exception) -> str:
    return words_of(error)[:200]


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
    raise ValueError(f"{shape} that is not a request, response or notification")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < ID_LIMIT


def _named(params: list[Any]) -> dict[str, Any]:
    if not params:
        return {}
    if len(params) != 1 or not isinstance(params[0], dict) or not all(type(key) is str for key in params[0]):
        raise ValueError("params must be an array with one map with text as keys")
    return params[0]
