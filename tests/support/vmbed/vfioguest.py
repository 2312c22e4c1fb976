"""A guest with an emulated IOMMU and devices, which runs the scenarios of `tests/support/kvfio` one after the other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.guest import Answer
from vmbed.pythonguest import ENVIRONMENT, PYTHON, write_python_guest
from vmbed.qemu import Qemu, QemuConfig, start_qemu

__all__ = ["Answers", "Boot", "expect_success", "run_scenarios", "scenarios_of"]

#: By scenario, what it said, or how the guest was lost in it.
Answers = Mapping[str, Answer | BedError]
DRIVERS = ("vfio-pci", "vfio_iommu_type1", "pci-pf-stub")
#: Of the kernel with mediated devices.
MDEV_DRIVERS = ("vfio-pci", "vfio_iommu_type1", "mtty", "mttydma")
SUPPORT = ("kvfio", "vmbed")
SCENARIO_S = 70.0
#: Scenarios that start programs, for each of which an emulated processor takes ten seconds.
LONG_S: Mapping[str, float] = {"survives": 610.0}
#: How much the daemons in the guest log, of which a failed scenario shows the end.
LOGGED = os.environ.get("KVFIO_LOG", "info")


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot, and what is run in it.

    Attributes:
        scenarios: their names, in order.
        kernel: picks the kernel instead of the assets' own.
        drivers: kernel modules to load.
        qemu: whether the guest has QEMU for guests of its own.
        seconds: that each scenario may take.
        interface: the kernel's interface that daemons open functions by: "group" or "cdev".
        iommu: whether the machine has one.
    """

    scenarios: tuple[str, ...]
    kernel: Callable[[Assets], Path] | None = None
    drivers: tuple[str, ...] = DRIVERS
    qemu: bool = True
    seconds: float = SCENARIO_S
    interface: str = "group"
    iommu: bool = True


def _machine(workdir: Path, initramfs: Path, kernel: Path | None, *, iommu: bool) -> QemuConfig:
    """NVMe controllers, two in one group, a network card with VFs, two devices without reset, one past the IOMMU."""
    devices = []
    for name in ("alone", "first", "second"):
        image = workdir / f"{name}.img"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        devices += ["-drive", f"file={image},format=raw,if=none,id={name}"]
    devices += ["-device", "nvme,drive=alone,serial=alone,addr=04.0"]
    devices += ["-device", "nvme,drive=first,serial=first,addr=06.0,multifunction=on"]
    devices += ["-device", "nvme,drive=second,serial=second,addr=06.1"]
    devices += ["-device", "pcie-root-port,id=rp1,chassis=1,slot=1,addr=07.0", "-device", "igb,bus=rp1"]
    devices += ["-device", "edu,addr=09.0"]
    devices += ["-device", "pxb-pcie,id=bypass,bus_nr=64,bypass_iommu=on"]
    devices += ["-device", "pcie-root-port,id=rp2,bus=bypass,chassis=2,slot=2"]
    devices += ["-device", "edu,bus=rp2"]
    return QemuConfig(
        [],
        memory_mib=2048,
        trace=(),
        early=["-device", "intel-iommu,intremap=on,aw-bits=48"] if iommu else [],
        kernel=kernel,
        initramfs=initramfs,
        kernel_arguments="intel_iommu=on",
        extra=devices,
    )


def run_scenarios(assets: Assets, boot: Boot) -> Answers:
    """Boot once, run scenarios in order, and keep what each one said."""
    return trio.run(scenarios_of, assets, boot)


async def scenarios_of(assets: Assets, boot: Boot) -> Answers:
    """The same for those who run beside others."""
    workdir = Path(tempfile.mkdtemp(prefix="vmbed-"))
    try:
        kernel = boot.kernel(assets) if boot.kernel else None
        initramfs = workdir / "initramfs.cpio"
        write = partial(write_python_guest, drivers=boot.drivers, support=SUPPORT, kernel=kernel, qemu=boot.qemu)
        await trio.to_thread.run_sync(write, initramfs, assets, workdir)
        machine = _machine(workdir, initramfs, kernel, iommu=boot.iommu)
        async with start_qemu(assets, machine, workdir) as qemu:
            return await _run_all(qemu, boot)
    finally:
        shutil.rmtree(workdir)


async def _run_all(qemu: Qemu, boot: Boot) -> Answers:
    answers: dict[str, Answer | BedError] = {}
    await qemu.guest.ready()
    environment = f"{ENVIRONMENT} KVFIO_INTERFACE={boot.interface} KVFIO_LOG={LOGGED}"
    await qemu.guest.start(f"sh {environment} exec {PYTHON} -m kvfio")
    await qemu.guest.ready()
    for name in boot.scenarios:
        try:
            answers[name] = await qemu.guest.run(name, max(boot.seconds, LONG_S.get(name, 0.0)))
        except BedError as error:
            answers[name] = error
            break
    return answers


def expect_success(answers: Answers, name: str) -> str:
    """Return what a scenario printed.

    Raises:
        BedError: it failed, or the guest was lost before.
    """
    answer = answers.get(name)
    if answer is None:
        raise BedError("the guest was lost in an earlier scenario")
    if isinstance(answer, BedError):
        raise answer
    text = "\n".join(answer.lines)
    if answer.status != 0:
        raise BedError(f"scenario {name} failed:\n{text}")
    return text
