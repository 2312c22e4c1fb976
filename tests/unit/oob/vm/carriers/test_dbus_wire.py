"""D-Bus messages out of hostile hands: each is read, or refused with one kind of error, and never costs much."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jeepney import DBusAddress, new_method_call, new_signal
from jeepney.low_level import Endianness, Message, MessageFlag

from vfiouser_oob.vm.carriers.dbus_wire import FIELDS_MAX, Call, CallReader, DbusWireError

BODY_MAX = 4096
ADDRESS = DBusAddress("/a", bus_name="b.c", interface="d.e")


def call(signature: str = "", *arguments: object, member: str = "M") -> Message:
    """A call as a client makes it."""
    return new_method_call(ADDRESS, member, signature, arguments)


def calls_in(data: bytes) -> list[Call]:
    """What a stream is read as."""
    return list(CallReader(BODY_MAX).feed(data))


@pytest.mark.parametrize("order", list(Endianness))
@pytest.mark.parametrize(
    ("signature", "arguments"),
    [("", ()), ("s", ("text",)), ("ss", ("a", "bc")), ("su", ("a", 7)), ("ay", (b"bytes",))],
)
@pytest.mark.parametrize("step", [1, 16, 1000])
def test_calls_are_read(signature: str, arguments: tuple[object, ...], order: Endianness, step: int) -> None:
    """However they are cut, in either byte order, one behind the other."""
    message = call(signature, *arguments)
    message.header.endianness = order
    data = message.serialise(serial=5) + message.serialise(serial=6)
    reader = CallReader(BODY_MAX)
    found = [each for at in range(0, len(data), step) for each in reader.feed(data[at : at + step])]
    assert found == [Call(serial, "b.c", "d.e", "M", signature, arguments, True) for serial in (5, 6)]


def test_what_is_no_call_is_passed_over() -> None:
    """Signals say nothing here, and a call that wants no reply says so."""
    silent = call()
    silent.header.flags = MessageFlag.no_reply_expected
    signal = new_signal(ADDRESS, "S", "ai", ([1],))
    assert [each.wants_reply for each in calls_in(signal.serialise(serial=1) + silent.serialise(serial=2))] == [False]


def test_a_body_of_an_unknown_form_is_left_alone() -> None:
    """A signature is looked up, not followed: an array of empty structures would be read for ever."""
    message = bytearray(call("ay", bytes(8)).serialise(serial=1))
    at = message.index(b"\x02ay\0")
    message[at : at + 4] = b"\x02a(\0"
    assert [each.arguments for each in calls_in(bytes(message))] == [()]


def header(body: int = 0, fields: bytes = b"", serial: int = 1, version: int = 1) -> bytes:
    """A header by hand."""
    start = struct.pack("<cBBBIII", b"l", 1, 0, version, body, serial, len(fields))
    return start + fields + bytes(-len(fields) % 8)


@pytest.mark.parametrize(
    "data",
    [
        bytes(16),
        header(version=2),
        header(serial=0),
        header(body=BODY_MAX + 1),
        header(fields=bytes(FIELDS_MAX + 1))[:16],
        header(),  # no member
        header(fields=b"\x03\x02a(\0"),
        header(fields=b"\x03\x02a()\0\0\0\xff\0\0\0"),  # a field whose type is an array of empty structures
        header(fields=b"\x03\x01s\0\xff\xff\xff\xff"),
        header(fields=b"\x03\x01s\0\x01\0\0\0\xff\0\0\0"),  # not UTF-8
        header(fields=b"\x09\x01s\0\x01\0\0\0a\0\0\0"),  # a number that is a text
        header(body=4, fields=b"\x03\x01s\0\x01\0\0\0M\0\0\0\0\0\0\0\x08\x01g\0\x01s\0") + bytes(4),
    ],
)
def test_what_is_no_dbus_breaks_the_stream(data: bytes) -> None:
    """One kind of error, before anything is kept."""
    with pytest.raises(DbusWireError):
        calls_in(data)


@given(st.binary(max_size=200), st.integers(0, 60), st.binary(max_size=8))
def test_garbage_never_raises_anything_else(noise: bytes, at: int, patch: bytes) -> None:
    """Neither noise nor a message with a few bytes changed."""
    message = bytearray(call("s", "text").serialise(serial=1))
    message[at : at + len(patch)] = patch
    for data in (noise, bytes(message), header(fields=noise)):
        try:
            calls_in(data)
        except DbusWireError:
            pass


def test_missing_tells_how_much_of_a_large_message_is_to_come() -> None:
    """So that it is read in large pieces."""
    data = call("ay", bytes(1000)).serialise(serial=1)
    reader = CallReader(BODY_MAX)
    assert reader.missing == 0
    assert list(reader.feed(data[:100])) == []
    assert reader.missing == len(data) - 100
