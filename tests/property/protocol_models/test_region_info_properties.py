"""Region information: what is rendered is what is read, and no reply can do worse than be refused."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_protocol.constants import RegionFlags
from vfiouser_protocol.errors import RemoteProtocolError
from vfiouser_protocol.regions import RegionSpec, SparseArea, parse_region_info, region_info_reply

U32 = st.integers(0, 2**32 - 1)


@st.composite
def specs(draw: st.DrawFn) -> RegionSpec:
    """Any region whose areas lie inside it."""
    size = draw(st.integers(0, 1 << 40))
    areas = []
    for _ in range(draw(st.integers(0, 5)) if size else 0):
        offset = draw(st.integers(0, size - 1))
        areas.append(SparseArea(offset, draw(st.integers(1, size - offset))))
    return RegionSpec(
        index=draw(U32),
        size=size,
        flags=draw(st.integers(0, 3)),
        areas=tuple(areas),
        offset=draw(st.integers(0, 2**63 - 1 - size)),
        type=draw(st.none() | st.tuples(U32, U32)),
        msix_mappable=draw(st.booleans()),
        mappable=draw(st.booleans()),
    )


@given(spec=specs(), argsz=st.integers(32, 256))
@settings(deadline=None)
def test_client_that_retries_learns_everything(spec: RegionSpec, argsz: int) -> None:
    """Whatever argsz a client starts with: at most two requests, no reply over argsz, one descriptor, all
    facts."""
    payload, attach = region_info_reply(spec, argsz)
    assert len(payload) <= argsz
    first = parse_region_info(payload)
    if not first.complete:
        assert not attach
        assert not first.flags & RegionFlags.CAPS
        payload, attach = region_info_reply(spec, first.argsz)
        assert len(payload) == first.argsz
    description = parse_region_info(payload)
    assert description.complete
    mapped = spec.mappable and spec.size > 0
    assert mapped == attach == bool(description.flags & RegionFlags.MMAP)
    assert (spec.index, spec.size, spec.offset) == (description.index, description.size, description.offset)
    assert spec.flags == description.flags & 3
    assert spec.type == description.type
    whole = (SparseArea(0, spec.size),)
    assert ((spec.areas or whole) if mapped else ()) == description.mappable_areas
    assert (mapped and spec.msix_mappable) == description.msix_mappable


@given(payload=st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_is_read_or_refused(payload: bytes) -> None:
    """Random bytes give a description or RemoteProtocolError, nothing else."""
    check_hostile(payload)


@given(
    spec=specs(),
    changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 300),
)
@settings(deadline=None)
def test_damaged_reply_is_read_or_refused(spec: RegionSpec, changes: list[tuple[int, int]], cut: int) -> None:
    """A real reply with bytes changed and its end cut off never yields an area outside the region."""
    payload = bytearray(region_info_reply(spec, 1 << 20)[0])
    for position, value in changes:
        payload[position % len(payload)] = value
    check_hostile(bytes(payload[: max(cut, 32)]))


@given(
    size=st.integers(0, 0x10000),
    cap_offset=st.integers(0, 20).map(lambda n: 8 * n),
    words=st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 20).map(lambda n: 8 * n), st.integers(0, 3)), max_size=12
    ),
)
@settings(deadline=None)
def test_any_chain_ends(size: int, cap_offset: int, words: list[tuple[int, int, int]]) -> None:
    """Capabilities that point anywhere, backwards and at themselves too, are read or refused in finite time."""
    chain = b"".join(struct.pack("<HHIII", cap, 1, following, count, 0) for cap, following, count in words)
    check_hostile(struct.pack("<IIIIQQ", 32 + len(chain), 0xF, 0, cap_offset, size, 0) + chain)


def check_hostile(payload: bytes) -> None:
    """Parse; if it is believed, what it says must be usable."""
    try:
        description = parse_region_info(payload)
    except RemoteProtocolError:
        return
    for area in description.mappable_areas:
        assert area.size > 0
        assert area.offset + area.size <= description.size
    assert len(description.unknown) <= len(payload) // 8
