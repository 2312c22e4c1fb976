"""What firmware and an operating system do to the host bridge and to a function, played over qtest."""

from __future__ import annotations

from vmbed.pci import PciFunction
from vmbed.qtest import Qtest

__all__ = ["MESSAGE", "MESSAGES", "set_up", "turn_ecam_on"]

ECAM = 0xB000_0000
#: Where interrupts are aimed, and what is found there after one.
MESSAGES, MESSAGE = 0x10_0000, 0xCAFE
_PCIEXBAR = 0x60


async def turn_ecam_on(qtest: Qtest) -> None:
    """Turn q35's ECAM on.

    Spec: Intel 3 Series Express Chipset, 5.1.15 (PCIEXBAR).
    """
    for offset, value in ((_PCIEXBAR, ECAM | 1), (_PCIEXBAR + 4, 0)):
        await qtest.port_out(0xCF8, 0x8000_0000 | offset)
        await qtest.port_out(0xCFC, value)


async def set_up(function: PciFunction, vector: int) -> None:
    """Give a function its addresses and one vector."""
    await function.place_bars()
    msix = await function.msix()
    await msix.program(vector, MESSAGES, MESSAGE)
    await msix.enable()
