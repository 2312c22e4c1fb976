"""Real functions under vfio-pci: a guest with an IOMMU runs our daemon on emulated devices, and clients beside it.

One boot serves all scenarios, which the guest runs one after the other; see `tests/support/kvfio/scenarios.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import trio

from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.guest import Answer
from vmbed.pythonguest import ENVIRONMENT, PYTHON, write_python_guest
from vmbed.qemu import QemuConfig, start_qemu

pytestmark = [pytest.mark.vm, pytest.mark.slow]

DRIVERS = ("vfio-pci", "vfio_iommu_type1", "pci-pf-stub")
SUPPORT = ("kvfio", "vmbed")
SCENARIO_S = 70.0
#: In the order in which they run; `bind_nvme` comes first, since most others use that function.
SCENARIOS = (
    "not_bound",
    "not_viable",
    "bind_nvme",
    "no_permission",
    "data_path",
    "trap_policy",
    "unprivileged_daemon",
    "intx",
    "msix",
    "resets",
    "unmap_under_io",
    "map_errors",
    "locked_memory_limit",
    "kept_descriptor",
    "second_daemon",
    "killed_daemon",
    "igb_vf",
    "qemu",
)


def machine(workdir: Path, initramfs: Path) -> QemuConfig:
    """A machine with an IOMMU: an NVMe controller alone, two in one IOMMU group, and a network card with VFs."""
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
    return QemuConfig(
        [],
        memory_mib=1536,
        trace=(),
        early=["-device", "intel-iommu,intremap=on,aw-bits=48"],
        initramfs=initramfs,
        kernel_arguments="intel_iommu=on",
        extra=devices,
    )


async def run_all(assets: Assets, workdir: Path) -> Mapping[str, Answer | BedError]:
    """Boot once, run every scenario, and keep what each one said."""
    initramfs = workdir / "initramfs.cpio"
    write_python_guest(initramfs, assets, workdir, drivers=DRIVERS, support=SUPPORT, qemu=True)
    answers: dict[str, Answer | BedError] = {}
    async with start_qemu(assets, machine(workdir, initramfs), workdir) as qemu:
        await qemu.guest.ready()
        await qemu.guest.start(f"sh {ENVIRONMENT} exec {PYTHON} -m kvfio")
        uptime = await qemu.guest.ready()
        sys.stdout.write(f"\nguest ready to serve scenarios after {uptime:.0f} s\n")
        for name in SCENARIOS:
            try:
                answers[name] = await qemu.guest.run(name, SCENARIO_S)
            except BedError as error:
                answers[name] = error
                break
    return answers


@pytest.fixture(scope="module")
def answers(assets: Assets) -> Iterator[Mapping[str, Answer | BedError]]:
    """What every scenario said."""
    workdir = Path(tempfile.mkdtemp(prefix="vmbed-"))
    try:
        yield trio.run(run_all, assets, workdir)
    finally:
        if "KEEP_VMBED" not in os.environ:
            shutil.rmtree(workdir)


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_the_guest(answers: Mapping[str, Answer | BedError], name: str) -> None:
    """The scenario succeeded; what it proves stands with it."""
    answer = answers.get(name)
    assert answer is not None, "the guest was lost in an earlier scenario"
    if isinstance(answer, BedError):
        raise answer
    sys.stdout.write("\n".join(answer.lines))
    assert 0 == answer.status, "\n".join(answer.lines)
