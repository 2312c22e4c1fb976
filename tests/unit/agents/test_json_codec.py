"""The JSON codec: framing by brackets alone, limits, errors by number."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_agents.errors import (
    ERRORS,
    AgentError,
    Busy,
    Incompatible,
    InvalidArgument,
    NoResources,
    ProtocolError,
    Unsupported,
)
from vfiouser_agents.rpc.json_codec import MAX_DEPTH, MAX_VALUES, JsonCodec
from vfiouser_agents.rpc.messages import Message, Notification, Request, Response
from vfiouser_agents.rpc.wire import from_wire

MESSAGES: list[Message] = [
    Request(0, "a.b", {"text": 'quo"te \\ } ] { [ \\\\" ü', "list": [[1, 2], {"x": None}]}),
    Request(4294967295, "nothing"),
    Response(1, {"data": "{"}),
    Response(2, None),
    Notification("event", {"n": -1.5}),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_messages_split_anywhere(size: int) -> None:
    """Messages arrive whole however they are cut, with or without space between them."""
    codec = JsonCodec()
    data = b" \r\n".join(codec.encode(message) for message in MESSAGES)
    data += b"".join(codec.encode(message) for message in MESSAGES) + b"\n"
    found = [message for at in range(0, len(data), size) for message in codec.feed(data[at : at + size])]
    assert MESSAGES * 2 == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.text(), JSON, min_size=1, max_size=4), max_size=4), st.integers(1, 40))
def test_any_params_split_anywhere(params: list[dict[str, Any]], size: int) -> None:
    """Whatever JSON can say comes through, cut anywhere, also when others escape less than we do."""
    codec = JsonCodec()
    expected = [Request(index, "m", entry) for index, entry in enumerate(params)]
    data = b"".join(
        json.dumps({"id": one.id, "method": one.method, "params": one.params}, ensure_ascii=False).encode(
            errors="surrogatepass"
        )
        for one in expected
    )
    assert expected == [message for at in range(0, len(data), size) for message in codec.feed(data[at : at + size])]


def test_bytes_are_base64() -> None:
    """Bytes are written as base64, and read as such where bytes are wanted."""
    codec = JsonCodec()
    [message] = codec.feed(codec.encode(Request(1, "m", {"data": b"\x00\xff"})))
    assert isinstance(message, Request)
    assert {"data": "AP8="} == message.params
    assert b"\x00\xff" == from_wire(bytes, message.params["data"])


def test_no_params_are_left_out() -> None:
    """SPDK's methods without parameters refuse an empty object."""
    assert b'{"jsonrpc":"2.0","id":1,"method":"m"}' == JsonCodec().encode(Request(1, "m"))


@pytest.mark.parametrize(
    "data",
    [
        b"[1]",
        b"7",
        b"GET / HTTP/1.1\r\n",
        b"\x00" * 40,
        b'{"id": 1}',
        b'{"id": 1, "method": 5}',
        b'{"id": "text", "result": 1}',
        b'{"id": -1, "result": 1}',
        b'{"id": true, "result": 1}',
        b'{"id": 1, "method": "m", "params": [1]}',
        b'{"id": 1, "result": NaN}',
        b'{"id": 1 "result": 1}',
        b'{"id": null, "error": {"code": -32700, "message": "Parse error"}}',
        b'{"id": 1, "result": "\xff"}',
        b'{"id": 1, "result": ' + b"9" * 5000 + b"}",
        b'{"a":' * (MAX_DEPTH + 1),
        b'{"id": 1, "result": [' + b"1," * (MAX_VALUES + 2),
    ],
)
def test_what_is_no_message_ends_the_connection(data: bytes) -> None:
    """Garbage is a ProtocolError as soon as it can be told."""
    with pytest.raises(ProtocolError, match="connection is closed"):
        list(JsonCodec().feed(data))


def test_too_long() -> None:
    """A message above the limit is refused whether it is complete or still coming, and one at the limit is not."""
    whole = b'{"id":1,"result":"' + b"x" * 100 + b'"}'
    assert [Response(1, "x" * 100)] == list(JsonCodec(len(whole)).feed(whole))
    for data in (whole, whole[:-1]):
        with pytest.raises(ProtocolError, match="more than 100 bytes"):
            list(JsonCodec(100).feed(data))


def test_what_json_cannot_carry_is_not_sent() -> None:
    """An object of ours that is no JSON is an error on this side, and nothing goes out."""
    for value in (float("nan"), object()):
        with pytest.raises(ProtocolError, match="not sent"):
            JsonCodec().encode(Request(1, "m", {"x": value}))


@pytest.mark.parametrize("kind", ERRORS.values())
def test_our_errors_come_back(kind: type[AgentError]) -> None:
    """Each of our errors arrives as itself, with everything that belongs to it."""
    error: AgentError = kind("why", vendor_code="0x7")
    if kind is Incompatible:
        error = Incompatible(["a", "b"], vendor_code="0x7")
    if kind is NoResources:
        error = NoResources("why", {"max_state": 5}, vendor_code="0x7")
    codec = JsonCodec()
    [message] = codec.feed(codec.encode(Response(3, error=error)))
    assert isinstance(message, Response)
    assert kind is type(message.error)
    assert (str(error), error.__dict__) == (str(message.error), message.error.__dict__)


@pytest.mark.parametrize(
    ("raw", "kind", "text"),
    [
        ({"code": -16, "message": "busy"}, Busy, "EBUSY"),
        ({"code": -32601, "message": "no"}, Unsupported, "-32601"),
        ({"code": -22, "message": "no"}, InvalidArgument, "EINVAL"),
        ({"code": -9999, "message": "odd"}, AgentError, "-9999"),
        ({"code": "word"}, AgentError, "no message"),
        ("only text", AgentError, "only text"),
        ({"code": -16, "message": "m", "data": {"code": "no-such"}}, AgentError, "m"),
    ],
)
def test_errors_of_others(raw: Any, kind: type[AgentError], text: str) -> None:
    """Errors of peers that do not know ours are told apart by number."""
    [message] = JsonCodec().feed(json.dumps({"id": 3, "error": raw}).encode())
    assert isinstance(message, Response)
    assert kind is type(message.error)
    assert text in str(message.error)
