"""Negotiation with anything that a peer may write into VERSION."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from vfiouser_protocol.capabilities import (
    MigrationCapability,
    TwinSocket,
    VersionCapabilities,
    accept_reply,
    encode_version,
    negotiate,
    parse_version_reply,
    parse_version_request,
)
from vfiouser_protocol.errors import StreamError

T = TypeVar("T")

MINIMUM = len(b'\0\0\0\0{"capabilities":{}}\0')

# A small alphabet with a surrogate in it; the whole of Unicode only takes time.
texts = st.text("ab\0é\ud800", max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)
numbers = st.integers(0, 1 << 64) | anything
wild = st.fixed_dictionaries(
    {},
    optional={
        "max_msg_fds": st.integers(0, 1025) | anything,
        "max_data_xfer_size": numbers,
        "max_dma_maps": numbers,
        "pgsizes": numbers,
        "write_multiple": st.booleans() | anything,
        "twin_socket": st.fixed_dictionaries(
            {}, optional={"supported": st.booleans(), "fd_index": st.integers(0, 3) | anything}
        ),
        "migration": st.fixed_dictionaries(
            {}, optional={"pgsize": st.sampled_from([0, 4096, 65536, 3000]), "max_bitmap_size": numbers}
        ),
        "unknown": anything,
    },
)

migrations = st.none() | st.builds(
    MigrationCapability, st.sampled_from([0, 4096, 8192, 1 << 20]), st.integers(0, 1 << 40)
)
capabilities = st.builds(
    VersionCapabilities,
    st.integers(0, 1024),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
    st.none() | st.builds(TwinSocket, st.booleans(), st.none()),
    migrations,
)


def parsed(parse: Callable[[bytes], T], payload: bytes) -> T | None:
    """What a parser makes of a payload, None if it ends the connection."""
    try:
        return parse(payload)
    except StreamError:
        return None


@given(st.binary(max_size=80), st.booleans())
def test_bytes(payload: bytes, with_nul: bool) -> None:
    """Proves that no bytes make a parser raise anything but StreamError."""
    payload = bytes(4) + payload + (b"\0" if with_nul else b"")
    for parse in (parse_version_request, parse_version_reply):
        parsed(parse, payload)


@given(wild, st.integers(0, 0xFFFF), capabilities, st.booleans())
def test_answers(members: dict[str, object], minor: int, offer: VersionCapabilities, grant_twin: bool) -> None:
    """Proves, for every request, the rules of the answer: fitting, a subset, typed, a smaller minor."""
    text = json.dumps({"capabilities": members}).encode()
    payload = b"\0\0" + minor.to_bytes(2, "little") + text + b"\0"
    request = parsed(parse_version_request, payload)
    if request is None:
        return
    agreed = negotiate(request, offer, request_payload_size=len(payload), grant_twin=grant_twin)
    assert len(agreed.reply_payload) <= max(len(payload), MINIMUM)
    assert agreed.minor <= min(minor, 2)
    answered = json.loads(agreed.reply_payload[4:-1])["capabilities"]
    assert set(answered) <= set(members)
    assert all(type(value) in (int, bool, dict) for value in answered.values())
    assert agreed.twin == ("twin_socket" in answered)
    assert agreed.write_multiple == ("write_multiple" in answered)
    assert not agreed.twin or grant_twin


@given(capabilities, capabilities, st.booleans())
def test_both_sides_agree(proposal: VersionCapabilities, offer: VersionCapabilities, grant_twin: bool) -> None:
    """Proves that server and client make the same agreement of the same two messages."""
    payload = encode_version(proposal)
    request = parse_version_request(payload)
    server = negotiate(request, offer, request_payload_size=len(payload), grant_twin=grant_twin)
    client = accept_reply(request, server.reply_payload, int(server.twin))
    shared = ("minor", "twin", "write_multiple", "migration_pgsize")
    assert [getattr(server, name) for name in shared] == [getattr(client, name) for name in shared]
    assert server.client.max_data_xfer_size <= proposal.max_data_xfer_size


@given(capabilities)
def test_encode_and_parse(announced: VersionCapabilities) -> None:
    """Proves that what is announced is what the peer reads."""
    assert parse_version_request(encode_version(announced)).capabilities == announced
