"""Types of the interface to plain data and back, whatever they hold; and msgpack however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_agents.errors import ERRORS, AgentError, Busy, Incompatible, NoResources, ProtocolError
from vfiouser_agents.rpc.errormap import error_from_map, error_to_map
from vfiouser_agents.rpc.messages import Message, Notification, Request, Response
from vfiouser_agents.rpc.msgpack_codec import MsgpackCodec
from vfiouser_agents.rpc.wire import WireError, from_wire, to_wire
from vfiouser_agents.values import (
    AgentInfo,
    Capabilities,
    Chunk,
    Descriptor,
    DirtyReport,
    Estimate,
    Event,
    FunctionInfo,
    Range,
    Status,
)

U64 = st.integers(0, (1 << 64) - 1)
TYPES = (AgentInfo, Capabilities, Chunk, Descriptor, DirtyReport, Estimate, Event, FunctionInfo, Status)
st.register_type_strategy(int, U64)
PLAIN = st.recursive(
    st.none() | st.booleans() | U64 | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.one_of(
    st.builds(Request, st.integers(0, 2**32 - 1), st.text(max_size=20), st.dictionaries(st.text(max_size=8), PLAIN)),
    st.builds(Response, st.integers(0, 2**32 - 1), PLAIN),
    st.builds(Notification, st.text(max_size=20), st.dictionaries(st.text(max_size=8), PLAIN)),
)


@settings(deadline=None)  # the first example of a type builds its strategy
@given(st.data(), st.sampled_from(TYPES))
def test_every_type_comes_back(data: st.DataObject, kind: Any) -> None:
    """A value of any type is the same after it was plain data."""
    value = data.draw(st.from_type(kind))
    assert value == from_wire(kind, to_wire(value))


@given(st.sampled_from(TYPES), PLAIN)
def test_anything_else_is_refused_cleanly(kind: Any, value: Any) -> None:
    """Plain data of any shape is either a value of the type or a WireError."""
    try:
        found = from_wire(kind, value)
    except WireError:
        return
    assert isinstance(found, kind)


def test_growth() -> None:
    """Keys that are not known are ignored, and those that are missing have their defaults."""
    assert Estimate(5) == from_wire(Estimate, {"stop_copy_bytes": 5, "of_the_future": [1]})
    with pytest.raises(WireError, match="value has no 'stop_copy_bytes'"):
        from_wire(Estimate, {})


def test_state_is_not_in_errors() -> None:
    """An error about bytes names their number, never the bytes."""
    with pytest.raises(WireError, match="data is 6 bytes") as caught:
        from_wire(str, b"secret", "data")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("hint", "value"), [(int, True), (bool, 1), (int, 1 << 64), (int, -1), (Range, [1, 2, 3])])
def test_types_are_strict(hint: Any, value: Any) -> None:
    """A bool is no number, and a number has 64 bits."""
    with pytest.raises(WireError):
        from_wire(hint, value)


@given(st.lists(MESSAGES, max_size=5), st.integers(1, 50))
def test_messages_come_back_however_they_are_cut(messages: list[Message], size: int) -> None:
    """Messages are the same, whatever pieces their bytes come in."""
    codec = MsgpackCodec()
    data = b"".join(codec.encode(message) for message in messages)
    found = [message for at in range(0, len(data), size) for message in codec.feed(data[at : at + size])]
    assert messages == found


@given(st.binary(max_size=200))
def test_noise_is_refused_cleanly(data: bytes) -> None:
    """Any bytes are messages, incomplete, or a ProtocolError; nothing else is raised."""
    try:
        found = list(MsgpackCodec().feed(data))
    except ProtocolError:
        return
    assert all(isinstance(message, Message) for message in found)


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_comes_back(code: str) -> None:
    """An error is of the same class after the wire, with its message and its extras."""
    kind = ERRORS[code]
    sent = kind(["a", "b"], "m") if kind is Incompatible else kind("m", vendor_code="0x2A")
    got = error_from_map(error_to_map(sent))
    assert (type(sent), "m", sent.vendor_code) == (type(got), got.message, got.vendor_code)
    if isinstance(got, Incompatible):
        assert ("a", "b") == got.reasons


def test_extras_of_errors() -> None:
    """Limits survive; flags follow from the class."""
    error = error_from_map(error_to_map(NoResources("m", {"max_state": 5})))
    assert isinstance(error, NoResources)
    assert {"max_state": 5} == error.limits
    assert (True, False) == (Busy("m").retryable, Busy("m").fatal)
    assert "m (vendor code 7)" == str(AgentError("m", vendor_code="7"))


def test_a_message_that_msgpack_cannot_carry() -> None:
    """It is refused on this side, and the connection need not end."""
    with pytest.raises(ProtocolError, match="was not sent"):
        MsgpackCodec().encode(Request(1, "m", {"x": object()}))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Status, {"state": "running", "detail": "x" * (65 << 10)}),
        (
            Descriptor,
            {**to_wire(Descriptor("f", 1, "", "", "", "", 0)), "fingerprint": {str(n): "" for n in range(2000)}},
        ),
        (Descriptor, {**to_wire(Descriptor("f", 1, "", "", "", "", 0)), "fingerprint": {"a": "x" * (9 << 20)}}),
        (DirtyReport, {"ranges": [[0, 4096]] * ((1 << 20) + 1)}),
    ],
    ids=["text", "pairs", "text of a map", "list"],
)
def test_sizes_are_bounded(kind: type, value: Any) -> None:
    """What an agent says of a function is no place to keep a lot in."""
    with pytest.raises(WireError, match="allowed are"):
        from_wire(kind, value)
