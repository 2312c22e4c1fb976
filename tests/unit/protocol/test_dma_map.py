"""The rules of the DMA map, one test per rule and errno."""

from __future__ import annotations

import errno

import pytest

from vfiouser_protocol.constants import DmaMapFlags
from vfiouser_protocol.dma import DmaRegion, DmaTable
from vfiouser_protocol.errors import CommandError, DmaFault

RW = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
READ = int(DmaMapFlags.READ)
WRITE = int(DmaMapFlags.WRITE)
FILE = (1, 2)
TOP = 1 << 64


def refused(dma: DmaTable, *args: object, **kwargs: object) -> int:
    """The errno of a refused map; the map must be unchanged by it."""
    before = list(dma)
    with pytest.raises(CommandError) as info:
        dma.map(*args, **kwargs)  # type: ignore[arg-type]
    assert before == list(dma)
    return info.value.errno


def test_region_keeps_what_the_client_sent() -> None:
    """A mapped region carries all that the client sent and is found by each of its addresses."""
    dma = DmaTable()
    owner = object()
    region = dma.map(0x1000, 0x2000, RW, offset=0x4000, file=FILE, owner=owner)
    assert isinstance(region, DmaRegion)
    assert (0x1000, 0x2000, 0x3000, RW, 0x4000, FILE) == (
        region.address,
        region.size,
        region.end,
        region.flags,
        region.offset,
        region.file,
    )
    assert owner is region.owner
    assert (True, True) == (region.readable, region.writable)
    assert [None, region, region, None] == [dma.find(a) for a in (0xFFF, 0x1000, 0x2FFF, 0x3000)]
    assert "0x1000+0x2000 rw file (1, 2) +0x4000" in repr(region)


@pytest.mark.parametrize(
    ("address", "size", "flags", "file", "offset", "expected"),
    [
        pytest.param(0x1000, 0, RW, None, 0, errno.EINVAL, id="size 0"),
        pytest.param(TOP - 0x1000, 0x1001, RW, None, 0, errno.EINVAL, id="past 2^64"),
        pytest.param(TOP - 1, TOP - 1, RW, None, 0, errno.EINVAL, id="far past 2^64"),
        pytest.param(TOP, 1, RW, None, 0, errno.EINVAL, id="address 2^64"),
        pytest.param(0x1000, 0x1000, 0x10, None, 0, errno.EINVAL, id="unknown flag"),
        pytest.param(0x1000, 0x1000, RW | 1 << 31, FILE, 0, errno.EINVAL, id="unknown high flag"),
        pytest.param(0x1000, 0x1000, RW | DmaMapFlags.MMAP, None, 0, errno.EINVAL, id="MMAP without file"),
        pytest.param(0x1000, 0x1000, RW | DmaMapFlags.FILE_IO, None, 0, errno.EINVAL, id="FILE_IO without file"),
        pytest.param(0, (1 << 43) + 1, RW, None, 0, errno.ENOSPC, id="above 8 TiB"),
        pytest.param(0, 0x1000, RW, FILE, (1 << 63) - 0xFFF, errno.EINVAL, id="offset no file has"),
    ],
)
def test_map_refusals(
    address: int, size: int, flags: int, file: tuple[int, int] | None, offset: int, expected: int
) -> None:
    """Each bad request gets the errno of its rule, and nothing is mapped."""
    assert expected == refused(DmaTable(), address, size, flags, offset=offset, file=file)


@pytest.mark.parametrize(
    ("address", "size", "flags", "file"),
    [
        pytest.param(TOP - 0x1000, 0x1000, RW, None, id="ends at 2^64"),
        pytest.param(0, 1, 0, None, id="flags 0"),
        pytest.param(0x1001, 0x3, READ, None, id="unaligned"),
        pytest.param(0, 1 << 43, RW, FILE, id="8 TiB"),
        pytest.param(0, 0x1000, RW | DmaMapFlags.MMAP, FILE, id="MMAP with file"),
        pytest.param(0, 0x1000, RW | DmaMapFlags.FILE_IO, FILE, id="FILE_IO with file"),
    ],
)
def test_map_accepts_the_unusual(address: int, size: int, flags: int, file: tuple[int, int] | None) -> None:
    """What is odd but legal is mapped."""
    dma = DmaTable()
    assert dma.map(address, size, flags, file=file) is not None
    assert dma.find(address + size - 1) is not None


def test_identical_mapping_is_idempotent() -> None:
    """The same mapping again succeeds without a new region, even when the table is full."""
    dma = DmaTable(max_regions=1)
    region = dma.map(0x1000, 0x1000, RW, offset=0x2000, file=FILE, owner="first")
    assert dma.map(0x1000, 0x1000, RW, offset=0x2000, file=FILE, owner="second") is None
    assert [region] == list(dma)
    assert region is not None
    assert "first" == region.owner


@pytest.mark.parametrize(
    ("address", "size", "flags", "offset", "file"),
    [
        pytest.param(0x1000, 0x1000, RW, 0x3000, FILE, id="other offset"),
        pytest.param(0x1000, 0x1000, READ, 0x2000, FILE, id="other flags"),
        pytest.param(0x1000, 0x1000, RW, 0x2000, (1, 3), id="other file"),
        pytest.param(0x1000, 0x1000, RW, 0x2000, None, id="no file"),
        pytest.param(0x1000, 0x800, RW, 0x2000, FILE, id="shorter"),
        pytest.param(0x1000, 0x2000, RW, 0x2000, FILE, id="longer"),
        pytest.param(0x1800, 0x100, RW, 0, FILE, id="inside"),
        pytest.param(0x0, 0x1001, RW, 0, FILE, id="over its start"),
        pytest.param(0x1FFF, 0x1000, RW, 0, FILE, id="over its end"),
        pytest.param(0x0, 0x4000, RW, 0, FILE, id="around it"),
    ],
)
def test_any_other_overlap_is_eexist(
    address: int, size: int, flags: int, offset: int, file: tuple[int, int] | None
) -> None:
    """A different mapping over an existing one is EEXIST, and the old one stays."""
    dma = DmaTable()
    dma.map(0x1000, 0x1000, RW, offset=0x2000, file=FILE)
    assert errno.EEXIST == refused(dma, address, size, flags, offset=offset, file=file)


def test_one_region_too_many_is_enospc() -> None:
    """The limit counts live regions: a freed place can be used again, earlier regions stay."""
    dma = DmaTable(max_regions=2)
    dma.map(0x0000, 0x1000, RW)
    dma.map(0x1000, 0x1000, RW)
    assert errno.ENOSPC == refused(dma, 0x2000, 0x1000, RW)
    dma.unmap(0x0000, 0x1000)
    assert dma.map(0x2000, 0x1000, RW) is not None


@pytest.mark.parametrize(
    ("address", "size"), [(0x2000, 0x1000), (0x1000, 0x800), (0x1800, 0x800), (0x1000, 0x2000), (0, 0x1000)]
)
def test_unmap_needs_the_exact_range(address: int, size: int) -> None:
    """Absent, partial and spanning ranges are ENOENT; the mappings stay."""
    dma = DmaTable()
    regions = [dma.map(0x1000, 0x1000, RW), dma.map(0x2000, 0x2000, RW)]
    with pytest.raises(CommandError) as info:
        dma.unmap(address, size)
    assert errno.ENOENT == info.value.errno
    assert regions == list(dma)


def test_unmapped_range_can_be_mapped_again() -> None:
    """After an unmap the range is free for any mapping."""
    dma = DmaTable()
    region = dma.map(0x1000, 0x1000, RW)
    assert region is dma.unmap(0x1000, 0x1000)
    assert dma.find(0x1000) is None
    assert dma.map(0x0, 0x4000, READ) is not None


def test_unmap_all_empties_the_map() -> None:
    """unmap_all gives back every region in address order and also succeeds on an empty map."""
    dma = DmaTable()
    regions = [dma.map(address, 0x1000, RW) for address in (0x5000, 0x1000, 0x3000)]
    assert [regions[1], regions[2], regions[0]] == dma.unmap_all()
    assert 0 == len(dma)
    assert [] == dma.unmap_all()
    assert dma.map(0x1000, 0x9000, RW) is not None


def test_access_spanning_adjacent_regions_is_split() -> None:
    """One access over three adjacent regions comes back as three parts, with offsets inside each region."""
    dma = DmaTable()
    a, b, c = (dma.map(address, 0x1000, RW) for address in (0x1000, 0x2000, 0x3000))
    assert [(a, 0xF00, 0x100), (b, 0, 0x1000), (c, 0, 0x80)] == dma.segments(0x1F00, 0x1180, write=True)
    assert [(b, 0x10, 4)] == dma.segments(0x2010, 4, write=False)
    assert [] == dma.segments(0x2010, 0, write=False)
    assert [] == dma.segments(0x9999_0000, 0, write=False)


@pytest.mark.parametrize(
    ("address", "count", "write", "expected"),
    [
        pytest.param(0x0FFF, 2, False, errno.EFAULT, id="starts before"),
        pytest.param(0x2FFF, 2, True, errno.EFAULT, id="runs past the end"),
        pytest.param(0x9000, 1, False, errno.EFAULT, id="nothing there"),
        pytest.param(TOP - 1, 2, False, errno.EFAULT, id="past 2^64"),
        pytest.param(0x1000, 4, True, errno.EPERM, id="write to read-only"),
        pytest.param(0x1FFC, 8, False, errno.EPERM, id="read reaches write-only"),
        pytest.param(0x1FFC, 8, True, errno.EPERM, id="write begins in read-only"),
    ],
)
def test_faults(address: int, count: int, write: bool, expected: int) -> None:
    """Unmapped bytes are EFAULT, a missing permission is EPERM, whatever part of the access is affected."""
    dma = DmaTable()
    dma.map(0x1000, 0x1000, READ)
    dma.map(0x2000, 0x1000, WRITE)
    with pytest.raises(DmaFault) as info:
        dma.segments(address, count, write)
    assert expected == info.value.errno


def test_overlapping_lists_in_address_order() -> None:
    """overlapping() yields the regions that share a byte with the range, also the one it starts inside."""
    dma = DmaTable()
    a, b, c = (dma.map(address, 0x1000, RW) for address in (0x1000, 0x4000, 0x6000))
    assert [a, b] == list(dma.overlapping(0x1800, 0x4000))
    assert [c] == list(dma.overlapping(0x5000, 0x1001))
    assert [] == list(dma.overlapping(0x5000, 0x1000))
    assert [] == list(dma.overlapping(0x1000, 0))
    assert [a, b, c] == list(dma.overlapping(0, TOP))
    assert dma.find(-1) is None


def test_qemu_startup_sequence() -> None:
    """The maps of a 64 MiB q35 guest, machine reset included, are accepted as QEMU sends them."""
    dma = DmaTable()
    assert dma.map(0, 0x4000000, RW, file=FILE) is not None
    assert dma.map(0xFFFC0000, 0x40000, READ) is not None
    dma.unmap(0, 0x4000000)
    for address, size, flags, offset, file in (
        (0, 0xC0000, RW, 0, FILE),
        (0xC0000, 0x20000, READ, 0, None),
        (0xE0000, 0x20000, READ, 0, None),
        (0x100000, 0x3F00000, RW, 0x100000, FILE),
        (0xFE001000, 0x1000, RW, 0, None),
    ):
        assert dma.map(address, size, flags, offset=offset, file=file) is not None
    assert 6 == len(dma)
    parts = dma.segments(0xBF000, 0x2000, write=False)
    assert [0xBF000, 0] == [offset for _, offset, _ in parts]


def test_ordered_beyond_one_leaf() -> None:
    """With thousands of regions mapped and unmapped in a scattered order, order and neighbours stay right."""
    dma = DmaTable()
    count = 3001
    order = [i * 1009 % count for i in range(count)]
    for i in order:
        assert dma.map(i * 0x1000, 0x1000, RW) is not None
    assert [i * 0x1000 for i in range(count)] == [r.address for r in dma]
    assert errno.EEXIST == refused(dma, 0x800, 0x1000, RW)
    for i in order[::2]:
        dma.unmap(i * 0x1000, 0x1000)
    left = sorted(order[1::2])
    assert [i * 0x1000 for i in left] == [r.address for r in dma]
    for i in left:
        dma.unmap(i * 0x1000, 0x1000)
    assert dma.map(0, TOP >> 22, RW) is not None


def test_overlaps_across_leaf_boundaries() -> None:
    """At every gap between 400 regions, a mapping that runs into the next one, or over its old place, is refused."""
    dma = DmaTable()
    starts = [i * 0x2000 for i in range(1, 401)]
    for start in starts:
        dma.map(start, 0x1000, RW)
    for start in starts[:-1]:
        assert errno.EEXIST == refused(dma, start + 0x1800, 0x801, RW)
    for start in starts:
        # A region that begins below an address that used to be a start, and covers it.
        dma.unmap(start, 0x1000)
        across = dma.map(start - 0x800, 0x1000, RW)
        assert [None, across, across, None] == [dma.find(start + delta) for delta in (-0x801, -1, 0x7FF, 0x800)]
        assert errno.EEXIST == refused(dma, start + 0x400, 0x100, RW)
        dma.unmap(start - 0x800, 0x1000)
        assert dma.map(start, 0x1000, RW) is not None
