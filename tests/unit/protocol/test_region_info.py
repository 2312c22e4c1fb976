"""Region information: what we render, and what we believe of a server's reply."""

from __future__ import annotations

import errno
import struct

import pytest

from vfiouser_protocol.constants import RegionFlags
from vfiouser_protocol.errors import CommandError, RemoteProtocolError
from vfiouser_protocol.regions import RegionSpec, RegionType, SparseArea, parse_region_info, region_info_reply

R, W, MMAP, CAPS = 1, 2, 4, 8
TWO_AREAS = RegionSpec(2, 0x4000, areas=(SparseArea(0x1000, 0x1000), SparseArea(0x2000, 0x1000)), mappable=True)
MIGRATION = RegionSpec(9, 0x10000, type=(3, 1), areas=(SparseArea(0x1000, 0xF000),), mappable=True)


def fixed(payload: bytes) -> tuple[int, ...]:
    """argsz, flags, index, cap_offset, size, offset."""
    return struct.unpack_from("<IIIIQQ", payload)


def reply(chain: bytes, *, flags: int = R | W | MMAP | CAPS, cap: int = 32, size: int = 0x4000) -> bytes:
    """A reply whose fixed part is honest about its length."""
    return struct.pack("<IIIIQQ", 32 + len(chain), flags, 0, cap, size, 0) + chain


def sparse(next_: int, *areas: tuple[int, int], count: int | None = None) -> bytes:
    """A sparse mmap capability, with a count that may lie."""
    head = struct.pack("<HHIII", 1, 1, next_, len(areas) if count is None else count, 0)
    return head + b"".join(struct.pack("<QQ", *area) for area in areas)


def test_region_without_capabilities_needs_no_more() -> None:
    """However large argsz is, the reply is its 32 bytes and carries no descriptor."""
    for argsz in (32, 40, 1000):
        payload, attach = region_info_reply(RegionSpec(0, 0x1000), argsz)
        assert (32, R | W, 0, 0, 0x1000, 0) == fixed(payload)
        assert (32, False) == (len(payload), attach)


def test_absent_region_is_a_success_with_zeroes() -> None:
    """An index below num_regions without a region says size 0, flags 0."""
    assert (struct.pack("<IIIIQQ", 32, 0, 4, 0, 0, 0), False) == region_info_reply(RegionSpec.absent(4), 32)


@pytest.mark.parametrize("argsz", [0, 8, 31])
def test_argsz_below_the_fixed_part_is_refused(argsz: int) -> None:
    """An argsz that cannot take the fixed part is EINVAL."""
    with pytest.raises(CommandError) as info:
        region_info_reply(TWO_AREAS, argsz)
    assert errno.EINVAL == info.value.errno


@pytest.mark.parametrize("argsz", [32, 40, 64, 79])
def test_short_form(argsz: int) -> None:
    """When capabilities do not fit: CAPS clear, no descriptor, the full argsz, zeroes up to the client's
    argsz."""
    payload, attach = region_info_reply(TWO_AREAS, argsz)
    assert (80, R | W | MMAP, 2, 0, 0x4000, 0) == fixed(payload)
    assert bytes(argsz - 32) == payload[32:]
    assert not attach


@pytest.mark.parametrize("argsz", [80, 96, 4096])
def test_full_form(argsz: int) -> None:
    """The complete reply, byte for byte, with one descriptor, and no longer than needed."""
    payload, attach = region_info_reply(TWO_AREAS, argsz)
    expected = struct.pack("<IIIIQQ", 80, 0xF, 2, 32, 0x4000, 0)
    expected += struct.pack("<HHIIIQQQQ", 1, 1, 0, 2, 0, 0x1000, 0x1000, 0x2000, 0x1000)
    assert expected == payload
    assert attach


def test_whole_region_is_one_area() -> None:
    """A mappable region without areas announces itself as one area, at its file offset."""
    payload, attach = region_info_reply(RegionSpec(0, 0x2000, offset=0x8000, mappable=True), 64)
    assert (64, R | W | MMAP | CAPS, 0, 32, 0x2000, 0x8000) == fixed(payload)
    assert (SparseArea(0, 0x2000),) == parse_region_info(payload).areas
    assert attach


def test_migration_region_chain() -> None:
    """TYPE at 32 points to SPARSE_MMAP at 48; not mappable, it is TYPE alone."""
    payload, attach = region_info_reply(MIGRATION, 80)
    assert struct.pack("<HHIII", 2, 1, 48, 3, 1) == payload[32:48]
    assert struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0x1000, 0xF000) == payload[48:]
    assert attach
    payload, attach = region_info_reply(RegionSpec(9, 0x10000, type=(3, 1)), 4096)
    assert (48, R | W | CAPS, 9, 32, 0x10000, 0) == fixed(payload)
    assert not attach


def test_msix_mappable_is_announced_only_when_mappable() -> None:
    """The capability without a body closes the chain of a mappable region."""
    spec = RegionSpec(0, 0x1000, msix_mappable=True, mappable=True)
    payload, _ = region_info_reply(spec, 4096)
    assert struct.pack("<HHI", 3, 1, 0) == payload[-8:]
    assert parse_region_info(payload).msix_mappable
    assert 32 == len(region_info_reply(RegionSpec(0, 0x1000, msix_mappable=True), 4096)[0])


def test_flags_that_follow_from_the_rest_cannot_be_given() -> None:
    """MMAP and CAPS in a spec's flags are not passed on where there is nothing to map."""
    payload, _ = region_info_reply(RegionSpec(0, 0x1000, flags=0xF), 4096)
    assert R | W == fixed(payload)[1]
    payload, attach = region_info_reply(RegionSpec(1, 0, flags=0, mappable=True), 4096)
    assert (32, 0) == fixed(payload)[:2]
    assert not attach


def test_parse_full_reply() -> None:
    """Areas, type and offsets are what the server rendered."""
    description = parse_region_info(region_info_reply(MIGRATION, 4096)[0])
    assert (9, 0x10000, 80, True) == (
        description.index,
        description.size,
        description.argsz,
        description.complete,
    )
    assert RegionType(3, 1) == description.type
    assert (SparseArea(0x1000, 0xF000),) == description.areas == description.mappable_areas


@pytest.mark.parametrize(("flags", "cap_offset"), [(R | MMAP, 0), (R | MMAP | CAPS, 0), (R | MMAP | CAPS, 32)])
def test_parse_short_forms_of_everybody(flags: int, cap_offset: int) -> None:
    """libvfio-user's, the kernel's and rust-vmm's short reply all mean: ask again with argsz."""
    description = parse_region_info(struct.pack("<IIIIQQ", 80, flags, 0, cap_offset, 0x4000, 0))
    assert (False, 80, None) == (description.complete, description.argsz, description.areas)


def test_parse_whole_region_without_capability() -> None:
    """MMAP without a sparse capability means all of it; a capability with 0 areas means nothing."""
    description = parse_region_info(reply(b"", flags=R | W | MMAP, cap=0))
    assert (SparseArea(0, 0x4000),) == description.mappable_areas
    assert () == parse_region_info(reply(sparse(0))).mappable_areas
    assert () == parse_region_info(reply(b"", flags=R | W, cap=0)).mappable_areas
    assert () == parse_region_info(reply(b"", flags=R | W | MMAP, cap=0, size=0)).mappable_areas


def test_parse_passes_over_what_it_does_not_know() -> None:
    """Unknown capabilities are listed and skipped, areas of size 0 left out, trailing bytes ignored."""
    chain = struct.pack("<HHIQ", 77, 1, 48, 0) + sparse(0, (0, 0), (0x1000, 0x1000))
    description = parse_region_info(reply(chain) + bytes(9))
    assert (77,) == description.unknown
    assert (SparseArea(0x1000, 0x1000),) == description.areas


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(31), id="31 bytes"),
        pytest.param(reply(sparse(32, (0, 0x1000))), id="points at itself"),
        pytest.param(reply(struct.pack("<HHIQ", 77, 1, 48, 0) + sparse(32, (0, 1))), id="circle"),
        pytest.param(reply(struct.pack("<HHIQ", 77, 1, 32, 0)), id="unknown one points at itself"),
        pytest.param(reply(sparse(4096, (0, 0x1000))), id="next outside"),
        pytest.param(reply(sparse(40, (0, 0x1000))), id="next inside its own body"),
        pytest.param(reply(sparse(0xFFFFFFFF)), id="next 2^32-1"),
        pytest.param(reply(b"\1\0\1\0"), id="header cut off"),
        pytest.param(reply(sparse(0)[:12]), id="count cut off"),
        pytest.param(reply(sparse(0, (0, 0x1000), count=2)), id="one area fewer"),
        pytest.param(reply(sparse(0, count=0xFFFFFFFF)), id="2^32-1 areas"),
        pytest.param(reply(sparse(0, (0x1000, 0x4000))), id="area leaves the region"),
        pytest.param(reply(sparse(0, (1 << 63, 1 << 63))), id="area wraps"),
        pytest.param(reply(struct.pack("<HHII", 2, 1, 0, 3)), id="type cut off"),
        pytest.param(reply(sparse(0), cap=8), id="first in the fixed part"),
        pytest.param(reply(sparse(0), cap=4096), id="first outside"),
        pytest.param(reply(sparse(0, *[(0, 0x1000)] * 1025)), id="1,025 areas"),
        pytest.param(reply(b"".join(struct.pack("<HHI", 77, 1, 40 + 8 * n) for n in range(64)) + bytes(8)), id="long"),
        pytest.param(struct.pack("<IIIIQQ", 32, R, 0, 0, 1 << 63, 0), id="region of 2^63 bytes"),
        pytest.param(
            struct.pack("<IIIIQQ", 32, R | MMAP, 0, 0, 4096, (1 << 63) - 1), id="ends behind what mmap reaches"
        ),
    ],
)
def test_parse_refuses_lies(payload: bytes) -> None:
    """A chain or count that cannot be true is an error of the peer, not an index error or an endless loop."""
    with pytest.raises(RemoteProtocolError):
        parse_region_info(payload)


def test_flag_names_are_the_wire_bits() -> None:
    """The bit values used in this module are those of RegionFlags."""
    assert (R, W, MMAP, CAPS) == tuple(int(flag) for flag in RegionFlags)
