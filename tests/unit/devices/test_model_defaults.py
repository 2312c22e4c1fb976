"""What a model need not say, since its config space says it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vfiouser_oob.devices import model
from vfiouser_protocol.constants import RegionIndex

MSIX = model.Msix(vectors=3, table_bar=0, table_offset=0x800, pba_bar=0, pba_offset=0xC00)


class Plain(model.DeviceModel):
    """A device that says only what it must."""

    def __init__(self, config: model.ConfigSpace) -> None:
        self.config = config

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Zeros."""
        return bytes(count)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Nothing."""

    def reset(self, kind: model.ResetKind) -> None:
        """Nothing."""


def plain(*, rom_size: int = 0, interrupt_pin: int = 0, capabilities: Sequence[model.Msi | model.Msix] = ()) -> Plain:
    """A device with two BARs."""
    config = model.ConfigSpace(
        model.PciIdentity(vendor=1, device=2, class_code=0xFF0000),
        bars=[model.BarSpec(0, 0x1000), model.BarSpec(2, 0x4000, is_64=True)],
        rom_size=rom_size,
        interrupt_pin=interrupt_pin,
        capabilities=capabilities,
    )
    return Plain(config)


def test_regions_are_those_of_config_space() -> None:
    """Each BAR is there in its size and without memory, and the ROM, which is read only, if there is one."""
    bars = {0: model.ModelRegion(0, 0x1000), 2: model.ModelRegion(2, 0x4000)}
    assert bars == plain().regions
    rom = RegionIndex.ROM
    assert {**bars, rom: model.ModelRegion(rom, 0x800, model.RegionFlags.READ)} == plain(rom_size=0x800).regions


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (plain(), model.interrupts()),
        (plain(interrupt_pin=1), model.interrupts(intx=True)),
        (plain(capabilities=[model.Msi(vectors=4)]), model.interrupts(msi=4)),
        (plain(capabilities=[MSIX, model.Msi(vectors=2)], interrupt_pin=2), model.interrupts(intx=True, msi=2, msix=3)),
    ],
)
def test_interrupts_are_those_of_config_space(device: Plain, expected: Sequence[model.IrqDescription]) -> None:
    """The pin, and the vectors of each capability."""
    assert expected == device.irqs


def test_what_a_model_says_counts() -> None:
    """A model that sets them is asked for nothing else."""
    device = plain(capabilities=[MSIX])
    assert "model:Plain" == device.summary
    device.summary, device.irqs, device.regions = "mine", model.interrupts(), {}
    assert ("mine", model.interrupts(), {}) == (device.summary, device.irqs, device.regions)
