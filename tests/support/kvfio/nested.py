"""Stock QEMU inside the guest, without a CPU: its vfio-user client on the daemon's socket."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from vmbed.assets.store import Assets
from vmbed.guest import digest_line
from vmbed.nvme import PAGE, NvmeDriver, until
from vmbed.pci import PciFunction
from vmbed.qemu import GUEST_QEMU, QemuConfig, VfioUserDevice, start_qemu

KERNEL, INITRAMFS = GUEST_QEMU / "vmlinuz", GUEST_QEMU / "initramfs"
#: A guest in an emulated guest: its seconds are minutes.
BOOT_S = 600.0
COMMAND_S = 300.0
MSG_TIMEOUT_MS = 120_000
SLOT = 3
MESSAGES = 0x10_0000
VECTOR = 1
MARK = 0xCAFE0000


async def stock_qemu(socket: Path, accesses: Callable[[], int]) -> None:
    """Identify and verified block I/O through QEMU's memory core; between set-up and end no access is a message."""
    nowhere = Path("/nowhere")
    assets = Assets(GUEST_QEMU, "", nowhere, "", nowhere, nowhere)
    config = QemuConfig([VfioUserDevice(socket, slot=SLOT)], accel="qtest", memory_mib=64)
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        async with start_qemu(assets, config, Path(folder)) as qemu:
            function = PciFunction(qemu.qtest, SLOT)
            driver = NvmeDriver(function)
            assert 0x010802 == await function.config_read(0x08) >> 8
            await function.place_bars()
            msix = await function.msix()
            for vector in (0, VECTOR):
                await msix.program(vector, MESSAGES + 4 * vector, MARK + vector)
            await msix.enable()
            before = accesses()
            await driver.enable()
            assert b"QEMU NVMe Ctrl" in await driver.identify()
            await driver.create_io_queues(VECTOR)
            data = bytes(index * 7 % 251 for index in range(PAGE))
            await driver.write_blocks(8, data)
            assert data == await driver.read_blocks(8, PAGE)
            assert before == accesses(), "an access of the BAR was a message"

            async def arrived(vector: int) -> bool:
                return await qemu.qtest.load(MESSAGES + 4 * vector) == MARK + vector

            for vector in (0, VECTOR):
                await until(f"message of vector {vector}", lambda v=vector: arrived(v))  # type: ignore[misc]
            mapped = qemu.traced("vfio_region_mmap")
            assert mapped, "QEMU mapped no BAR"
            print(f"qemu={qemu.qmp.version} mapped={len(mapped)} messages_before={before}")


async def stock_linux(socket: Path, accesses: Callable[[], int]) -> None:
    """Linux boots in QEMU in this guest; its nvme driver writes and reads back, and no doorbell is a message."""
    assets = Assets(GUEST_QEMU, "", KERNEL, "", INITRAMFS, GUEST_QEMU)
    device = VfioUserDevice(socket, slot=SLOT, properties={"x-msg-timeout": MSG_TIMEOUT_MS})
    # A plain CPU: features that nobody needs here cost an emulated emulator much. The kernel's messages go to the
    # console, whose end a failure shows.
    config = QemuConfig(
        [device], memory_mib=192, cpus=1, trace=(), kernel_arguments="loglevel=7", extra=("-cpu", "Nehalem")
    )
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        async with start_qemu(assets, config, Path(folder)) as qemu:
            uptime = await qemu.guest.ready(BOOT_S)
            ident = (await qemu.guest.check("ident 0", COMMAND_S)).fields()
            assert "QEMU NVMe Ctrl" == ident["model"], ident
            assert "live" == ident["state"], ident
            before, interrupts = accesses(), await qemu.guest.irqs()
            await qemu.guest.check("write 1 1 0", COMMAND_S)
            assert digest_line(1, 1) in (await qemu.guest.check("read 1 0", COMMAND_S)).lines
            after = await qemu.guest.irqs()
            fired = sum(after.values()) - sum(interrupts.values())
            assert fired > 0, "no interrupt arrived"
            assert before == accesses(), "an access of the BAR was a message"
            print(f"boot={uptime} interrupts={fired} messages_before={before}")
