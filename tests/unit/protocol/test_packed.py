"""What is derived for `struct` from declarations that are no payloads."""

from __future__ import annotations

import pytest
from construct import (
    Bytes,
    Const,
    GreedyBytes,
    If,
    Int8ul,
    Int16ub,
    Int16ul,
    Int32ul,
    Int64ul,
    Padding,
    Rebuild,
    Struct,
)

from vfiouser_protocol import regions
from vfiouser_protocol.fields import layout_of
from vfiouser_protocol.messages import RegionInfo, RegionRead
from vfiouser_protocol.packed import packed, picked

MIXED = Struct(
    "magic" / Const(b"MAGIC"),
    "kind" / Int8ul,
    Padding(2),
    "size" / Rebuild(Int32ul, 7),
    "digest" / Bytes(4),
    "serial" / Int64ul,
)


def test_packed_is_what_construct_builds() -> None:
    """Constants, rebuilt fields, padding, bytes and numbers stand where the declaration puts them."""
    built = MIXED.build({"kind": 3, "digest": b"abcd", "serial": 1 << 60})
    form = packed(MIXED)
    assert MIXED.sizeof() == form.size
    assert built == form.pack(b"MAGIC", 3, 7, b"abcd", 1 << 60)
    assert (b"MAGIC", 3, 7, b"abcd", 1 << 60) == form.unpack(built)


def test_packed_ends_where_it_is_told_to() -> None:
    """The fields in front of one that is named, and no others."""
    assert (b"MAGIC", 3) == packed(MIXED, "size").unpack(b"MAGIC\3\0\0")


def test_packed_ends_with_the_fixed_fields() -> None:
    """What varies in size, or is there only sometimes, and all behind it, is left out."""
    assert 4 == packed(Struct("a" / Int32ul, "rest" / GreedyBytes)).size
    assert 4 == packed(Struct("a" / Int32ul, "b" / If(lambda this: this.a, Int32ul), "c" / Int32ul)).size
    assert 32 == packed(layout_of(RegionInfo)).size


def test_packed_keeps_the_byte_order() -> None:
    """Big-endian declarations make big-endian structures; a mixture is refused."""
    assert b"\1\2" == packed(Struct("a" / Int16ub)).pack(0x0102)
    with pytest.raises(ValueError, match="byte orders < and >"):
        packed(Struct("a" / Int16ub, "b" / Int16ul))


def test_picked_skips_what_is_in_front() -> None:
    """One field of a whole message, wherever it is."""
    form = picked(layout_of(RegionRead), "region")
    assert (12, (9,)) == (
        form.size,
        form.unpack_from(layout_of(RegionRead).build({"offset": 5, "region": 9, "count": 4})),
    )
    assert (b"abcd",) == picked(MIXED, "digest").unpack_from(bytes(12) + b"abcd")


def test_absent_fields_are_refused() -> None:
    """A name that the layout does not have is a mistake, not the whole layout; so is what cannot be reached."""
    with pytest.raises(ValueError, match="without a field sise"):
        packed(MIXED, "sise")
    with pytest.raises(ValueError, match="no fixed size"):
        picked(layout_of(RegionInfo), "capabilities")


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        (regions.CAP_HEADER_LAYOUT, {"id": 1, "version": 2, "next": 3}),
        (layout_of(regions.SparseArea), {"offset": 1 << 40, "size": 1 << 41}),
        (layout_of(regions.RegionType), {"type": 1 << 31, "subtype": 2}),
    ],
)
def test_region_capabilities_are_as_declared(layout: Struct, values: dict[str, int]) -> None:
    """The parts of a region's capabilities are packed as construct builds them."""
    assert layout.build(values) == packed(layout).pack(*values.values())
