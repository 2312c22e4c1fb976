"""D-Bus messages: out of a stream and into it, of the few forms that are spoken here.

`jeepney` does the marshalling. It is given nothing that a peer chose freely: a signature is looked up, not followed
(one of an empty structure would be read for ever), and lengths are checked before anything is kept.

Spec: D-Bus, "Message Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jeepney.low_level import (
    Endianness,
    Header,
    HeaderFields,
    Message,
    MessageFlag,
    MessageType,
    endian_map,
    parse_signature,
    simple_types,
)

#: Bytes of a header's fields: names and a path are all that is in them.
FIELDS_MAX = 8 << 10
_FIXED = 16
_PROTOCOL = 1
_ORDERS = MappingProxyType({ord("l"): "<", ord("B"): ">"})
#: The type of each header field.
_FIELD_TYPES: Mapping[int, str] = MappingProxyType(dict(enumerate("osssussgu", 1)))
#: Bodies that are read; others are left alone, and their call is refused.
SIGNATURES = frozenset({"", "s", "ss", "su", "ay"})
#: What reading bytes that are none of D-Bus can raise.
_MISFITS = (struct.error, ValueError, LookupError, AssertionError, TypeError)


class DbusWireError(Exception):
    """The stream is broken; the connection is to be closed."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method call.

    Args:
        serial: its number, for the reply.
        destination: the bus name that it is for.
        interface: the interface, empty if it does not say.
        member: the method.
        signature: of the arguments.
        arguments: the arguments; empty where the signature is none of `SIGNATURES`.
        wants_reply: whether a reply is waited for.
    """

    serial: int
    destination: str
    interface: str
    member: str
    signature: str
    arguments: tuple[Any, ...]
    wants_reply: bool


class CallReader:
    """Cuts a stream into messages and returns the calls; other messages say nothing here.

    Args:
        body_max: bytes of the largest body.
    """

    def __init__(self, body_max: int) -> None:
        self._body_max = body_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Call]:
        """Take bytes.

        Yields:
            The calls that are whole now.

        Raises:
            DbusWireError: this is no D-Bus, or too much of it.
        """
        self._buffer += data
        while (size := self._message_size()) is not None and len(self._buffer) >= size:
            message = bytes(memoryview(self._buffer)[:size])
            del self._buffer[:size]
            call = _call_in(message)
            if call is not None:
                yield call

    @property
    def missing(self) -> int:
        """Bytes that the message on its way still lacks; 0 if that is not known."""
        size = self._message_size()
        return 0 if size is None else size - len(self._buffer)

    @property
    def begun(self) -> bool:
        """Whether a part of a message is here."""
        return bool(self._buffer)

    def _message_size(self) -> int | None:
        if len(self._buffer) < _FIXED:
            return None
        order = _ORDERS.get(self._buffer[0])
        if order is None or self._buffer[3] != _PROTOCOL:
            raise DbusWireError("the peer sent something that is not a D-Bus message")
        body, serial, fields = struct.unpack_from(f"{order}III", self._buffer, 4)
        if body > self._body_max or fields > FIELDS_MAX or not serial:
            allowed = f"allowed are {FIELDS_MAX} and {self._body_max}"
            raise DbusWireError(f"a message has {fields} bytes of header fields and {body} of body; {allowed}")
        return _fields_end(fields) + int(body)


def _fields_end(fields: int) -> int:
    return _FIXED + fields + -fields % 8


def _call_in(message: bytes) -> Call | None:
    try:
        order = endian_map[message[:1]]
        _, kind, flags, _, _, serial, length = struct.unpack_from(f"{_ORDERS[message[0]]}BBBBIII", message)
        if kind != MessageType.method_call.value:
            return None
        fields = _fields_in(message, _FIXED + length, order)
        signature = fields.get(HeaderFields.signature, "")
        arguments: tuple[Any, ...] = ()
        if signature and signature in SIGNATURES:
            arguments, end = parse_signature(list(f"({signature})")).parse_data(message, _fields_end(length), order)
            if end != len(message):
                raise ValueError("the body has another length than its arguments")
        return Call(
            serial,
            fields.get(HeaderFields.destination, ""),
            fields.get(HeaderFields.interface, ""),
            fields[HeaderFields.member],
            signature,
            arguments,
            not flags & MessageFlag.no_reply_expected,
        )
    except _MISFITS as error:
        raise DbusWireError(f"a message of {len(message)} bytes cannot be read ({type(error).__name__})") from error


def _fields_in(message: bytes, end: int, order: Endianness) -> dict[int, Any]:
    fields: dict[int, Any] = {}
    position = _FIXED
    while position < end:
        position += -position % 8
        code, position = simple_types["y"].parse_data(message, position, order)
        form, position = simple_types["g"].parse_data(message, position, order)
        # Fields that are not known are to be ignored, but only a type that is known tells how long they are.
        if form not in ("o", "s", "u", "g") or _FIELD_TYPES.get(code, form) != form:
            raise ValueError(f"header field {code} is a {form!r}")
        fields[code], position = simple_types[form].parse_data(message, position, order)
    if position != end:
        raise ValueError("the header has another length than its fields")
    return fields


class ReplyWriter:
    """Makes replies, with numbers of their own."""

    def __init__(self) -> None:
        self._serial = 0

    def reply(self, call: Call, sender: str, signature: str = "", *values: Any) -> bytes:
        """Return a reply.

        Args:
            call: what is answered.
            sender: the bus name that answers.
            signature: of the values.
            values: what is returned.
        """
        return self._message(MessageType.method_return, call, sender, {}, signature, values)

    def error(self, call: Call, sender: str, name: str, text: str) -> bytes:
        """Return an error.

        Args:
            call: what is answered.
            sender: the bus name that answers.
            name: the error's name.
            text: for people.
        """
        return self._message(MessageType.error, call, sender, {HeaderFields.error_name: name}, "s", (text,))

    def _message(
        self,
        kind: MessageType,
        call: Call,
        sender: str,
        fields: dict[HeaderFields, Any],
        signature: str,
        values: tuple[Any, ...],
    ) -> bytes:
        self._serial += 1
        fields |= {HeaderFields.reply_serial: call.serial, HeaderFields.sender: sender}
        if signature:
            fields[HeaderFields.signature] = signature
        header = Header(Endianness.little, kind, MessageFlag.no_reply_expected, _PROTOCOL, -1, self._serial, fields)
        message: bytes = Message(header, values).serialise()
        return message
