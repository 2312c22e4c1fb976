"""Real functions under vfio-pci: a guest with an IOMMU runs our daemon on emulated devices, and clients beside it.

One boot serves all scenarios, which the guest runs one after the other; see `scenarios.py`, `hardware.py` and
`obstacles.py` of `tests/support/kvfio`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vmbed.assets import AssetError, Assets
from vmbed.boots import Boots
from vmbed.vfioguest import Answers, Boot, expect_success, run_scenarios

pytestmark = [pytest.mark.vm, pytest.mark.slow]

#: In the order in which they run; `bind_nvme` comes before those that use that function.
SCENARIOS = (
    "bypassed",
    "not_bound",
    "not_viable",
    "group_in_use",
    "bind_nvme",
    "no_permission",
    "data_path",
    "trap_policy",
    "dma_buf",
    "config_space",
    "unprivileged_daemon",
    "intx",
    "msix",
    "msi_without_reset",
    "error_and_request",
    "resets",
    "unmap_under_io",
    "map_under_io",
    "read_only_memory",
    "huge_pages",
    "map_errors",
    "iova_windows",
    "entry_limit",
    "read_only_files",
    "peer_to_peer",
    "locked_memory_limit",
    "kept_descriptor",
    "kept_mapping",
    "second_daemon",
    "killed_daemon",
    "killed_client",
    "asked_back",
    "survives",
    "igb_vf",
    "qemu",
)
LINUX_S = 1600.0
#: By the fixture that has its answers.
BOOTS = {"answers": Boot(SCENARIOS)}


@pytest.fixture(scope="module")
def answers(boots: Boots) -> Answers:
    """What every scenario said."""
    return boots.answers(BOOTS["answers"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_the_guest(answers: Answers, name: str) -> None:
    """The scenario succeeded; what it proves stands with it."""
    sys.stdout.write(expect_success(answers, name))


def oldest(assets: Assets) -> Path:
    """The oldest supported kernel."""
    if assets.oldest_kernel is None:
        raise AssetError("the oldest supported kernel is not in the cache: run `make test-vm-long`")
    return assets.oldest_kernel


@pytest.fixture(scope="module")
def answers_of_the_oldest(assets: Assets) -> Answers:
    """What every scenario said on the oldest supported kernel."""
    return run_scenarios(assets, Boot(SCENARIOS, kernel=oldest))


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_on_the_oldest_kernel(answers_of_the_oldest: Answers, name: str) -> None:
    """The same on a kernel whose MSI-X vectors cannot be added one by one, among other things."""
    sys.stdout.write(expect_success(answers_of_the_oldest, name))


@pytest.mark.long
def test_a_machine_without_an_iommu(assets: Assets) -> None:
    """Daemon and `bind` say what is missing in one line, and the function's own driver keeps it."""
    answers = run_scenarios(assets, Boot(("no_iommu",), qemu=False, iommu=False))
    sys.stdout.write(expect_success(answers, "no_iommu"))


@pytest.mark.long
def test_linux_in_nested_qemu(assets: Assets) -> None:
    """Linux in QEMU in the guest does verified I/O on the function, by interrupts and without messages."""
    answers = run_scenarios(assets, Boot(("bind_nvme", "linux"), seconds=LINUX_S))
    sys.stdout.write(expect_success(answers, "linux"))
