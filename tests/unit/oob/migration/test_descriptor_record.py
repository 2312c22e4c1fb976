"""The descriptor in a stream: as it was given, and refused on both sides by one rule."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vfiouser_agents.api import Descriptor
from vfiouser_agents.errors import Incompatible, ProtocolError
from vfiouser_agents.rpc.wire import MAX_PAIRS, MAX_TEXT
from vfiouser_oob.migration.descriptor import decode_descriptor, encode_descriptor

FUNCTION = Descriptor("f", 1, "vendor", "model", "nvme", "1.0", 1 << 20, {"queues": "64", "a": "b"})
DOCUMENT = json.loads(encode_descriptor(FUNCTION))


def test_round_trip() -> None:
    """What is read is what was written, in the stream's own form: keys in order, no space."""
    encoded = encode_descriptor(FUNCTION)
    assert FUNCTION == decode_descriptor(encoded)
    assert encoded.startswith(b'{"fingerprint":{"a":"b","queues":"64"},"firmware":"1.0","format_id":"f"')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"firmware": "x" * (MAX_TEXT + 1)}, "descriptor.firmware is text of 65537 characters"),
        ({"fingerprint": dict.fromkeys(map(str, range(MAX_PAIRS + 1)), "")}, "a map of 1025 pairs"),
        ({"state_max": 1 << 64}, "state_max is 18446744073709551616"),
    ],
)
def test_both_sides_refuse_the_same(change: dict[str, object], reason: str) -> None:
    """What a destination would not take is not sent, and says why."""
    with pytest.raises(ProtocolError, match=reason):
        encode_descriptor(replace(FUNCTION, **change))  # type: ignore[arg-type]
    with pytest.raises(Incompatible, match=reason):
        decode_descriptor(json.dumps(DOCUMENT | change).encode())


def test_too_many_bytes_are_not_sent() -> None:
    """Texts that are short enough can be long when they are encoded."""
    with pytest.raises(ProtocolError, match="1048576"):
        encode_descriptor(replace(FUNCTION, model="\N{GRINNING FACE}" * MAX_TEXT, kind="\N{GRINNING FACE}" * MAX_TEXT))


@pytest.mark.parametrize("name", sorted(DOCUMENT))
def test_nothing_may_be_missing(name: str) -> None:
    """A daemon writes every field, so a record without one is none of a daemon."""
    with pytest.raises(Incompatible, match=name):
        decode_descriptor(json.dumps({key: value for key, value in DOCUMENT.items() if key != name}).encode())


@pytest.mark.parametrize("payload", [b"", b"{", b"[" * 100_000, b"[]", b"7", b"\xff"])
def test_no_descriptor(payload: bytes) -> None:
    """Neither JSON nor a map."""
    with pytest.raises(Incompatible, match="descriptor"):
        decode_descriptor(payload)
