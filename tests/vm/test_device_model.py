"""The device of `write-a-device`, attached to stock QEMU; the test is what a guest's driver would be."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.notify import NotifySocket
from vmbed.nvme import until
from vmbed.pci import CAP_MSIX, CAP_PCIE, PciFunction
from vmbed.processes import logged_process
from vmbed.qemu import QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import CHECKOUT, IMPORT_ROOTS, PROGRAM

pytestmark = pytest.mark.vm

SLOT = 5
MESSAGE = 0x10_0000  # guest RAM where the MSI-X message lands
DATA = 0x20_0000


async def test_the_example_device_in_qemu(assets: Assets, workdir: Path) -> None:
    """QEMU shows its BAR and capabilities; it reads guest RAM by DMA and raises its MSI-X vector."""
    socket = workdir / "d.sock"
    serve = ["serve", "--socket-path", str(socket), "--control-socket", "none"]
    serve += ["--device", "model:acme_device.checksum:Checksum"]
    roots = [str(CHECKOUT / "examples/device-model/src"), *map(str, IMPORT_ROOTS)]
    async with NotifySocket(workdir / "notify") as notify:
        environment = {**os.environ, **notify.environment, "PYTHONPATH": os.pathsep.join(roots)}
        log = workdir / "daemon.log"
        async with logged_process("daemon", [*PROGRAM, *serve], log, env=environment) as daemon:
            await notify.ready(daemon)
            machine = QemuConfig([VfioUserDevice(socket, slot=SLOT)], accel="qtest", memory_mib=64)
            async with start_qemu(assets, machine, workdir) as qemu:
                function = PciFunction(qemu.qtest, SLOT)
                assert await function.config_read(0x00) == 0x00F1_1B36
                assert {CAP_MSIX, CAP_PCIE} <= (await function.capabilities()).keys()
                [bar] = await function.place_bars()
                assert bar.size == 4096
                registers = function.addresses[bar.index]
                msix = await function.msix()
                await msix.program(0, MESSAGE, 0xCAFE)
                await msix.enable()
                data = bytes(range(256)) * 8
                await qemu.qtest.write(DATA, data)
                await qemu.qtest.store(registers, DATA, 8)
                await qemu.qtest.store(registers + 8, len(data))
                await qemu.qtest.store(registers + 0xC, 1)

                async def arrived() -> bool:
                    return await qemu.qtest.load(MESSAGE) == 0xCAFE

                await until("the MSI-X message", arrived)
                answer = await qemu.qtest.read(registers + 0x10, 8)
                assert struct.unpack("<II", answer) == (2, zlib.crc32(data))
