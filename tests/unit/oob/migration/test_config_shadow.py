"""Configuration space as written, with and without an agent."""

from __future__ import annotations

from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_protocol.constants import IrqIndex


def written(shadow: ConfigShadow) -> dict[int, bytes]:
    """What it has."""
    return dict(shadow.writes())


def test_a_function_level_reset_leaves_the_addresses() -> None:
    """QEMU keeps them, so the guest finds them unchanged and writes none of them again."""
    shadow = ConfigShadow()
    for offset, data in (
        (0x10, b"\4\0\0\xfe"),
        (0x24, b"\0\0\0\xfd"),
        (0x30, b"\1\0\0\xfc"),
        (0x3C, b"\x0b"),
        (4, b"\6\4"),
        (0x52, b"\0\x80"),
    ):
        shadow.note(offset, data)
    shadow.clear(keep_addresses=True)
    assert {0x10: b"\4\0\0\xfe", 0x24: b"\0\0\0\xfd", 0x30: b"\1\0\0\xfc", 0x3C: b"\x0b"} == written(shadow)
    shadow.clear()
    assert {} == written(shadow)


def test_only_msix_counts_as_a_change_of_the_table() -> None:
    """INTx and MSI have none."""
    shadow = ConfigShadow()
    for index in IrqIndex:
        shadow.note_interrupts(index)
    assert 1 == shadow.vector_changes
