"""A real Linux guest in stock QEMU uses an NVMe function through the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from vmbed.assets import Assets
from vmbed.guest import pattern
from vmbed.qemu import Qemu, QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import MIB, SocConfig, Stack, soc_and_daemon

pytestmark = [pytest.mark.vm, pytest.mark.slow]

IO_MIB = 64  # what the proof is about
# NVMe commands that 64 MiB each way need at the least: the driver asks for no more than 4 MiB at once
COMMANDS = 2 * IO_MIB // 4
TOUCH_MIB = 8  # enough to see that a function works again after some event


def machine(stack: Stack, *, shared_memory: bool = True) -> QemuConfig:
    """Return a machine with the daemon's function in it."""
    return QemuConfig([VfioUserDevice(stack.socket)], shared_memory=shared_memory)


@asynccontextmanager
async def bed(
    assets: Assets, workdir: Path, config: SocConfig | None = None, *, shared_memory: bool = True
) -> AsyncIterator[tuple[Stack, Qemu]]:
    """Simulator, daemon and a QEMU whose guest has booted."""
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(soc_and_daemon(workdir, config))
        config_of_qemu = machine(stack, shared_memory=shared_memory)
        qemu = await exits.enter_async_context(start_qemu(assets, config_of_qemu, workdir))
        await qemu.guest.ready()
        yield stack, qemu


async def test_io_is_verified_in_the_guest_and_in_the_backing_file(assets: Assets, workdir: Path) -> None:
    """64 MiB written with O_DIRECT read back equal, are in the file, and came by interrupts and doorbells."""
    image = workdir / "disk"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    async with bed(assets, workdir, SocConfig(image=image)) as (stack, qemu):
        assert qemu.qmp.version >= (10, 1, 0)
        ident = await qemu.guest.ident()
        assert ident["state"] == "live"
        assert ident["class"] == "0x010802"
        assert ident["bytes"] == str(128 * MIB)
        interrupts = await qemu.guest.irqs()
        doorbells = await stack.messages("REGION_WRITE")

        await qemu.guest.io(seed=1, mib=IO_MIB)

        after = await qemu.guest.irqs()
        queues = sorted(name for name in after if not name.endswith("q0"))
        assert queues == ["nvme0q1", "nvme0q2"]
        assert sum(after[name] - interrupts[name] for name in queues) >= COMMANDS
        assert await stack.messages("REGION_WRITE") - doorbells >= COMMANDS
        assert await qemu.guest.power_off() == 0
    with image.open("rb") as file:
        assert file.read(IO_MIB * MIB) == pattern(1, IO_MIB), "the file differs from what the guest wrote"
    image.unlink()  # the logs are kept for a while, this need not be


async def test_driver_rebind_and_resets_are_survived(assets: Assets, workdir: Path) -> None:
    """After an unbind and bind, a reset through sysfs and one of the controller, data and I/O are right."""
    async with bed(assets, workdir) as (_, qemu):
        guest = qemu.guest
        await guest.io(seed=2, mib=TOUCH_MIB)
        for seed, event in enumerate(("rebind", "reset", "reset_controller", "rebind"), start=3):
            await guest.check(event)
            await guest.verify(seed=seed - 1, mib=TOUCH_MIB)
            await guest.io(seed=seed, mib=TOUCH_MIB)
            assert (await guest.check("state")).lines == ("live",)


async def test_guest_reboot_is_survived(assets: Assets, workdir: Path) -> None:
    """A rebooted guest finds the function, its own old data, and can write."""
    async with bed(assets, workdir) as (_, qemu):
        await qemu.guest.io(seed=10, mib=TOUCH_MIB)
        await qemu.guest.reboot()
        await qemu.guest.verify(seed=10, mib=TOUCH_MIB)
        await qemu.guest.io(seed=11, mib=TOUCH_MIB)


async def test_second_qemu_takes_over_after_sigkill(assets: Assets, workdir: Path) -> None:
    """QEMU killed in the middle of I/O leaves a function that a second QEMU boots on at once."""
    async with soc_and_daemon(workdir) as stack:
        async with start_qemu(assets, machine(stack), workdir, name="first") as qemu:
            await qemu.guest.ready()
            await qemu.guest.io(seed=20, mib=TOUCH_MIB)
            await qemu.guest.start("sh while :; do dd if=/dev/nvme0n1 of=/dev/null bs=1M count=64 iflag=direct; done")
            await qemu.guest.line_with("records in")  # the loop has come around: I/O is in flight
            await qemu.kill()
        stack.check_alive()
        async with start_qemu(assets, machine(stack), workdir, name="second") as qemu:
            await qemu.guest.ready()
            await qemu.guest.verify(seed=20, mib=TOUCH_MIB)
            await qemu.guest.io(seed=21, mib=TOUCH_MIB)


async def test_io_without_shared_guest_memory(assets: Assets, workdir: Path) -> None:
    """With guest RAM that no fd stands for, the same 64 MiB travel as DMA_READ and DMA_WRITE messages."""
    async with bed(assets, workdir, shared_memory=False) as (_, qemu):
        await qemu.guest.io(seed=30, mib=IO_MIB)
        assert sum((await qemu.guest.irqs()).values()) > 0


async def test_polled_doorbells_and_cmb_need_no_messages(assets: Assets, workdir: Path) -> None:
    """With doorbells and memory buffer mapped, 64 MiB of I/O need no register write by message."""
    config = SocConfig(cmb=4 * MIB, doorbells="polled")
    async with bed(assets, workdir, config) as (stack, qemu):
        guest = qemu.guest
        assert (await guest.ident())["cmbsz"] not in {"", "0x00000000"}
        available, size = (int(line) for line in (await guest.check("p2pmem")).lines)
        assert size == 4 * MIB
        assert available < size, "the driver put none of its queues into the memory buffer"
        messages, trapped = await stack.messages("REGION_WRITE"), len(qemu.traced("vfio_region_write"))

        await guest.io(seed=40, mib=IO_MIB)

        assert await stack.messages("REGION_WRITE") == messages
        assert len(qemu.traced("vfio_region_write")) == trapped
        assert sum((await guest.irqs()).values()) > 0
