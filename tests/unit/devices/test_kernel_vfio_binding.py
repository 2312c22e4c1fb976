"""`bind` and `unbind`: what they write into sysfs, and what they say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fakevfio import FakeKernel
from fakevfio.kernel import BDF, GROUP
from vfiouser_oob.cli import bind, unbind
from vfiouser_oob.cli.main import main
from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.kernel_vfio import binding


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """A machine whose sysfs is a directory: what is written there can be read, and nothing follows from it."""
    machine = FakeKernel(tmp_path)
    (machine.sysfs / "bus/pci/drivers/vfio-pci").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(bind, "SYSFS", machine.sysfs)
    monkeypatch.setattr(bind, "DEV", machine.dev)
    monkeypatch.setattr(unbind, "SYSFS", machine.sysfs)
    return machine


def test_what_is_written(kernel: FakeKernel) -> None:
    """The override names vfio-pci, the old driver lets go, and the function is probed: it alone."""
    kernel.set_driver(BDF, "nvme")
    with pytest.raises(BackendUnavailable, match=r"vfio-pci did not take 0000:3b:00.2 .nvme did"):
        binding.bind(kernel.sysfs, BDF)  # a directory has no drivers that take anything
    assert "vfio-pci" == (kernel.function(BDF) / "driver_override").read_text()
    assert BDF == (kernel.sysfs / "bus/pci/drivers/nvme/unbind").read_text()
    assert BDF == (kernel.sysfs / "bus/pci/drivers_probe").read_text()


def test_what_unbind_writes(kernel: FakeKernel) -> None:
    """The override is cleared before the function is probed, so that its own driver takes it."""
    binding.unbind(kernel.sysfs, BDF)
    assert "\n" == (kernel.function(BDF) / "driver_override").read_text()
    assert BDF == (kernel.sysfs / "bus/pci/drivers/vfio-pci/unbind").read_text()


def test_unbind_leaves_another_driver_alone(kernel: FakeKernel) -> None:
    """A function that the host uses is not pulled away from under it."""
    kernel.set_driver(BDF, "nvme")
    binding.unbind(kernel.sysfs, BDF)
    assert not (kernel.sysfs / "bus/pci/drivers/nvme/unbind").exists()


def test_bind_tells_node_and_obstacles(kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    """A function that is bound already is only told about: group, node, and who stands in the way."""
    kernel.add_function("0000:3b:00.0", GROUP, "ixgbe")
    assert 0 == main(["bind", "3b:00.2", "--owner", str(os.getuid())])
    out = capsys.readouterr().out
    assert f"bound to vfio-pci, IOMMU group {GROUP}, node {kernel.dev}/vfio/{GROUP}" in out
    assert "0000:3b:00.0 (ixgbe)" in out


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["bind", "0000:99:00.0"], 1, "there is no PCI function 0000:99:00.0"),
        (["unbind", "0000:99:00.0"], 1, "there is no PCI function 0000:99:00.0"),
        (["bind", "nvme0"], 2, "must be a PCI address such as 0000:3b:00.2"),
        (["bind", BDF, "--owner", "no-such-user"], 2, "there is no user 'no-such-user'"),
    ],
)
def test_mistakes(
    kernel: FakeKernel, argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and the exit code that stands for it."""
    try:
        status = main(argv)
    except SystemExit as end:
        status = int(end.code or 0)
    assert code == status
    assert words in capsys.readouterr().err


def test_without_the_driver(kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    """Where vfio-pci is not loaded, the command says how to load it, before it changes anything."""
    kernel.set_driver(BDF, "nvme")
    (kernel.sysfs / "bus/pci/drivers/vfio-pci").rmdir()
    assert 1 == main(["bind", BDF])
    assert "modprobe vfio-pci" in capsys.readouterr().err
    assert not (kernel.function(BDF) / "driver_override").exists()


def test_without_an_iommu(kernel: FakeKernel, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is changed: vfio-pci would refuse the function, and its own driver would have lost it."""
    kernel.set_driver(BDF, "nvme")
    (kernel.function(BDF) / "iommu_group").unlink()
    assert 1 == main(["bind", BDF])
    error = capsys.readouterr().err
    assert f"{BDF} has no IOMMU group" in error
    assert 1 == error.count("\n")
    assert not (kernel.function(BDF) / "driver_override").exists()
    assert not (kernel.sysfs / "bus/pci/drivers/nvme/unbind").exists()


def test_every_node_is_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon uses the function's own node or its group's, so the owner gets both."""
    machine = FakeKernel(tmp_path, iommufd=True)
    given: list[tuple[Path, int]] = []
    monkeypatch.setattr(bind, "SYSFS", machine.sysfs)
    monkeypatch.setattr(bind, "DEV", machine.dev)
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append((path, uid)))
    assert 0 == main(["bind", BDF, "--owner", "1234"])
    assert [(machine.dev / "vfio/devices/vfio0", 1234), (machine.dev / f"vfio/{GROUP}", 1234)] == given
