"""The bed itself: what it says when a peer does not do its part, and that its two patterns are one."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.guest import MIB, pattern
from vmbed.qemu import QemuConfig, VfioUserDevice, start_qemu
from vmbed.qmp import QmpError


def test_pattern_differs_by_seed_and_place() -> None:
    """No 4 KiB block comes twice, within one seed's pattern and between two seeds'."""
    blocks = [data[at : at + 4096] for data in (pattern(1, 8), pattern(2, 8)) for at in range(0, 8 * MIB, 4096)]
    assert len(set(blocks)) == len(blocks) == 2 * 8 * 256


@pytest.mark.vm
async def test_refused_device_is_told_in_qemus_words(assets: Assets, workdir: Path) -> None:
    """QEMU ends at once when no server is there; the error has its message, and comes without a wait."""
    device = VfioUserDevice(workdir / "nobody.sock")
    with pytest.raises(BedError, match=r"qemu ended with status 1[\s\S]*nobody\.sock"):
        async with start_qemu(assets, QemuConfig([device], accel="qtest", memory_mib=64), workdir):
            pass


@pytest.mark.vm
async def test_guest_without_a_function_answers(assets: Assets, workdir: Path) -> None:
    """The guest boots, counts no function, and tells unknown and failing commands from good ones."""
    async with start_qemu(assets, QemuConfig([]), workdir) as qemu:
        assert await qemu.guest.ready() > 0
        assert (await qemu.guest.check("count")).lines == ("0",)
        assert (await qemu.guest.run("nonsense")).status == 127
        assert (await qemu.guest.run("sh exit 3")).status == 3
        with pytest.raises(BedError, match="no NVMe function number 0"):
            await qemu.guest.ident()
        with pytest.raises(QmpError, match="nonsense"):
            await qemu.qmp.execute("nonsense")
        assert (await qemu.qmp.execute("query-status"))["status"] == "running"
        await qemu.qmp.execute("stop")
        await qemu.qmp.event("STOP")
        await qemu.qmp.execute("cont")
        assert await qemu.guest.power_off() == 0
