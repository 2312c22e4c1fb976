"""Every payload survives encoding, and the derived codecs say what the construct declarations say."""

from __future__ import annotations

from struct import error as struct_error

import pytest
from construct import ConstructError
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_protocol import messages as m
from vfiouser_protocol.codec import PAYLOADS, TWINS, decode, describe, encode
from vfiouser_protocol.codec_declared import build_declared, parse_declared
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import Payload
from vfiouser_protocol.header import HEADER_LAYOUT, Header, pack_header, unpack_header
from vfiouser_protocol.messages_dma import NarrowDmaReadReply, NarrowDmaWrite
from wire_strategies import MESSAGES, any_message, u16, u32

MISFITS = (ConstructError, struct_error, ValueError, OverflowError)
DERIVED = sorted(TWINS, key=lambda cls: cls.__name__)


def declared_or_refused(cls: type[Payload], payload: bytes) -> Payload | None:
    """What the declaration makes of a payload, None if it refuses it."""
    try:
        return parse_declared(cls, payload)
    except MISFITS:
        return None


def decoded_or_refused(cls: type[Payload], payload: bytes) -> Payload | None:
    """What the codec makes of a payload, None if it refuses it."""
    try:
        return decode(cls, payload)
    except CommandError:
        return None


def test_every_class_has_a_strategy() -> None:
    """Proves that the properties below leave no payload out."""
    assert set(MESSAGES) == PAYLOADS


def test_only_odd_layouts_are_left_to_construct() -> None:
    """Proves that nothing is left out but entries whose form depends on two fields, and data with zeros behind them."""
    assert {m.RegionIoFds, NarrowDmaReadReply, NarrowDmaWrite} == PAYLOADS - set(TWINS)


@given(any_message)
def test_decode_undoes_encode(message: Payload) -> None:
    """Proves the round trip for every payload class."""
    assert message == decode(type(message), encode(message))


@given(any_message)
def test_derived_codecs_build_what_is_declared(message: Payload) -> None:
    """Proves that the derived encoders write the declared bytes."""
    assert build_declared(message) == encode(message)


@given(any_message, st.data())
def test_derived_codecs_parse_what_is_declared(message: Payload, data: st.DataObject) -> None:
    """Proves that derived decoders read and refuse what the declaration does, truncated and extended."""
    payload = encode(message)
    cut = data.draw(st.integers(0, len(payload)))
    for candidate in (payload[:cut], payload + data.draw(st.binary(max_size=24))):
        cls = type(message)
        assert declared_or_refused(cls, candidate) == decoded_or_refused(cls, candidate)


@pytest.mark.parametrize("cls", DERIVED, ids=lambda cls: cls.__name__)
@given(payload=st.binary(max_size=120))
def test_derived_codecs_agree_on_garbage(cls: type[Payload], payload: bytes) -> None:
    """Proves that derived decoders and declarations agree on random bytes."""
    assert declared_or_refused(cls, payload) == decoded_or_refused(cls, payload)


@given(st.sampled_from(sorted(MESSAGES, key=lambda cls: cls.__name__)), st.binary(max_size=120))
def test_garbage_is_refused_or_read(cls: type[Payload], payload: bytes) -> None:
    """Proves that no payload makes `decode` raise anything but CommandError."""
    message = decoded_or_refused(cls, payload)
    assert message is None or isinstance(message, cls)


@given(u16, u16, u32, u32, u32)
def test_header_twin(msg_id: int, command: int, size: int, flags: int, error: int) -> None:
    """Proves that the packed header is the declared one, both ways."""
    header = Header(msg_id, command, size, flags, error)
    packed = pack_header(*header)
    assert HEADER_LAYOUT.build(header._asdict()) == packed
    assert header == unpack_header(packed)


@given(u16, st.integers(0, 20), u32, u32, st.binary(max_size=80), st.integers(0, 3))
def test_describe_takes_everything(
    msg_id: int, command: int, flags: int, error: int, payload: bytes, nfds: int
) -> None:
    """Proves that the debug line is one printable line for whatever a peer sends."""
    line = describe(Header(msg_id, command, 16 + len(payload), flags, error), payload, nfds, "<")
    assert "\n" not in line
    assert line.startswith("< ")
    line.encode("utf-8")
