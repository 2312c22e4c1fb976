"""Where a function has its MSI-X table and pending bits, so that they are kept out of what a client may map.

vfio-pci says itself what may be mapped: it leaves these pages out, or says that mapping them is safe because the IOMMU
remaps interrupts. A driver that says neither has not thought of them.

Spec: PCI Local Bus 3.0, 6.8.2 (MSI-X capability structure).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence

from vfiouser_protocol.regions import SparseArea

CAP_MSIX = 0x11
_CONTROL, _TABLE, _PENDING = 2, 4, 8
_VECTORS = 0x7FF
_BAR = 0x7
_ENTRY_SIZE = 16
#: What a processor maps at least, in bytes.
_PAGE = mmap.PAGESIZE


def capability_offsets(config: bytes) -> Mapping[int, int]:
    """Where each PCI capability starts; of several of one kind the first.

    Args:
        config: config space, from its beginning; what lies beyond it is not found.
    """
    found: dict[int, int] = {}
    seen = set[int]()
    offset = config[0x34] & ~3 if len(config) > 0x34 else 0
    while offset and offset not in seen and offset + 2 <= len(config):
        seen.add(offset)
        found.setdefault(config[offset], offset)
        offset = config[offset + 1] & ~3
    return found


def msix_areas(config: bytes) -> Sequence[tuple[int, SparseArea]]:
    """The MSI-X table and the pending bits: the region that each lies in, and its place there.

    Args:
        config: the first 256 bytes of config space.
    """
    offset = capability_offsets(config).get(CAP_MSIX)
    if offset is None or offset + 12 > len(config):
        return ()
    vectors = (int.from_bytes(config[offset + _CONTROL : offset + _CONTROL + 2], "little") & _VECTORS) + 1
    places = []
    for register, size in ((_TABLE, vectors * _ENTRY_SIZE), (_PENDING, (vectors + 63) // 64 * 8)):
        word = int.from_bytes(config[offset + register : offset + register + 4], "little")
        places.append((word & _BAR, SparseArea(word & ~_BAR, size)))
    return places


def without_pages(areas: Sequence[SparseArea], secret: Sequence[SparseArea]) -> tuple[SparseArea, ...]:
    """Cut out of some areas every page that others touch.

    Args:
        areas: what may be mapped.
        secret: what may not.
    """
    kept = list(areas)
    for hidden in secret:
        first = hidden.offset // _PAGE * _PAGE
        end = -(-(hidden.offset + hidden.size) // _PAGE) * _PAGE
        kept = [piece for area in kept for piece in _pieces(area, first, end)]
    return tuple(kept)


def _pieces(area: SparseArea, first: int, end: int) -> Iterator[SparseArea]:
    area_end = area.offset + area.size
    before, after = min(area_end, first), max(area.offset, end)
    if area.offset < before:
        yield SparseArea(area.offset, before - area.offset)
    if after < area_end:
        yield SparseArea(after, area_end - after)
