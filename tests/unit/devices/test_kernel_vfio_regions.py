"""What of a real function's regions a client may map: never the MSI-X table, unless the kernel says so."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fakevfio import FakeKernel
from fakevfio.bed import session
from fakevfio.device import BAR2_SIZE, MSIX
from vfiouser_oob.config.schema import RegionPolicy
from vfiouser_oob.devices.kernel_vfio.msix import capability_offsets, msix_areas, without_pages
from vfiouser_protocol.regions import SparseArea

READ_WRITE_MMAP = 0x7
MSIX_MAPPABLE = (3, b"")
WHOLE = (SparseArea(0, 0x10000),)


def with_msix(kernel: FakeKernel, table: int, pending: int, vectors: int = 65) -> None:
    """Put table and pending bits at register values whose low three bits name the BAR."""
    kernel.device.config[MSIX + 2 : MSIX + 12] = struct.pack("<HII", vectors - 1, table, pending)


async def test_table_and_pending_bits_are_left_out(tmp_path: Path) -> None:
    """Of a BAR that the kernel lets map whole without a word about MSI-X, the pages of both are trapped."""
    kernel = FakeKernel(tmp_path)
    kernel.device.layout[2] = (BAR2_SIZE, READ_WRITE_MMAP, ())
    with_msix(kernel, 0x2000 | 2, 0x5008 | 2)
    async with session(kernel) as client:
        spec = client.description.regions[2]
        assert ((0, 0x2000), (0x3000, 0x2000), (0x6000, 0xA000)) == spec.areas
        assert spec.mappable
        assert not spec.msix_mappable


async def test_the_kernel_may_allow_them(tmp_path: Path) -> None:
    """Where the kernel says that the table may be mapped, the BAR is mapped whole, and the client is told so."""
    kernel = FakeKernel(tmp_path)
    kernel.device.layout[2] = (BAR2_SIZE, READ_WRITE_MMAP, (MSIX_MAPPABLE,))
    with_msix(kernel, 0x2000 | 2, 0x3000 | 2)
    async with session(kernel) as client:
        spec = client.description.regions[2]
        assert () == spec.areas
        assert spec.mappable
        assert spec.msix_mappable


@pytest.mark.parametrize("policy", [RegionPolicy.AUTO, RegionPolicy.DMABUF])
async def test_a_bar_that_is_all_table_is_trapped(tmp_path: Path, policy: RegionPolicy) -> None:
    """Nothing of such a BAR can be mapped, so no descriptor goes with it, and no dma-buf is made of it."""
    kernel = FakeKernel(tmp_path)
    kernel.dma_buf = "mmap"
    kernel.device.layout[2] = (0x1000, READ_WRITE_MMAP, ())
    with_msix(kernel, 2, 0x800 | 2)
    async with session(kernel, policy) as client:
        assert not client.description.regions[2].mappable
        assert client.region_fd(2) is None


@pytest.mark.parametrize(
    ("secret", "kept"),
    [
        ([], WHOLE),
        ([SparseArea(0, 16)], (SparseArea(0x1000, 0xF000),)),
        ([SparseArea(0xFFF0, 16)], (SparseArea(0, 0xF000),)),
        ([SparseArea(0x1FF0, 0x20)], (SparseArea(0, 0x1000), SparseArea(0x3000, 0xD000))),
        ([SparseArea(0, 0x10000)], ()),
        ([SparseArea(0x20000, 16)], WHOLE),
    ],
)
def test_pages_are_cut_out(secret: list[SparseArea], kept: tuple[SparseArea, ...]) -> None:
    """At the start, at the end, across a border, all of it, and outside."""
    assert kept == without_pages(WHOLE, secret)


def test_capability_lists_that_are_broken() -> None:
    """A list that runs in circles or out of config space ends, and so does a config space that is too short."""
    circle = bytearray(256)
    circle[0x34] = 0x40
    circle[0x40:0x42] = bytes([0x01, 0x40])
    assert {0x01: 0x40} == capability_offsets(bytes(circle))
    edge = bytearray(256)
    edge[0x34] = 0xF8
    edge[0xF8:0xFA] = bytes([0x11, 0])
    assert () == msix_areas(bytes(edge))
    assert {} == capability_offsets(bytes(0x20))
