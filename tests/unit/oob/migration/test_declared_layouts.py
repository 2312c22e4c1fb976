"""Layouts outside of the protocol's messages: what runs is what construct builds."""

from __future__ import annotations

import pytest
from construct import Struct

from vfiouser_agents.rpc.legacy_messages import HEADERS, header_layout
from vfiouser_oob.migration.config_shadow import PCI_LAYOUT, RUN_LAYOUT, ConfigShadow
from vfiouser_oob.server.holding import REGION
from vfiouser_protocol.codec import encode
from vfiouser_protocol.messages import RegionRead, RegionWrite


def test_pci_record_is_as_declared() -> None:
    """Two runs of written bytes, and how many there are in front of them."""
    shadow = ConfigShadow()
    shadow.note(4, b"\x07\x01")
    shadow.note(0x10, b"base")
    run = RUN_LAYOUT.build
    expected = run({"start": 4, "length": 2}) + b"\x07\x01" + run({"start": 0x10, "length": 4}) + b"base"
    assert PCI_LAYOUT.build({"version": 1, "runs": 2}) + expected == shadow.encode()


@pytest.mark.parametrize("access", [RegionRead(8, 7, 4), RegionWrite(8, 7, 4, b"data")])
def test_held_access_names_its_region(access: RegionRead | RegionWrite) -> None:
    """Reads and writes name their region in the same place, the one that a held access is judged by."""
    assert (7,) == REGION.unpack_from(encode(access))


@pytest.mark.parametrize(("order", "layout"), [("little", header_layout("<")), ("big", header_layout(">"))])
def test_legacy_header_is_as_declared(order: str, layout: Struct) -> None:
    """The 2022 protocol's header in both byte orders."""
    assert layout.build({"request": 6, "size": 8, "value": 1 << 40}) == HEADERS[order].pack(6, 8, 1 << 40)
