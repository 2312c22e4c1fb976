"""Device nodes and iommufd on a kernel that has them, which is built here; groups and containers on the same kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vmbed.assets import Assets, default_cache
from vmbed.assets.ownkernel import own_kernel
from vmbed.vfioguest import Answers, Boot, expect_success, run_scenarios

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.long]

#: What is proven by groups, too, in the order in which it runs.
COMMON = (
    "not_bound",
    "not_viable",
    "group_in_use",
    "bind_nvme",
    "no_permission",
    "data_path",
    "trap_policy",
    "config_space",
    "dma_buf",
    "unprivileged_daemon",
    "intx",
    "msix",
    "msi_without_reset",
    "error_and_request",
    "resets",
    "unmap_under_io",
    "map_under_io",
    "read_only_memory",
    "map_errors",
    "iova_windows",
    "read_only_files",
    "huge_pages",
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
#: What is particular to device nodes and iommufd.
OWN = (
    "node_rules",
    "attached_again",
    "unchecked_access",
    "rearranging_client",
    "accounting",
    "many_maps",
    "chosen_interface",
    "device_given_away",
)
#: The kernel's own migration, of mediated devices.
MIGRATION = ("make_mtty", "mdev_registers", "mdev_move", "mdev_cancel", "mdev_corruption", "mdev_reset", "mdev_killed")
WITHOUT_IOMMU = ("no_iommu", "noiommu_mode")


def kernel(_: Assets) -> Path:
    """The kernel with iommufd."""
    return own_kernel(default_cache())


@pytest.fixture(scope="module")
def by_node(assets: Assets) -> Answers:
    """What every scenario said where daemons open device nodes."""
    return run_scenarios(assets, Boot((*COMMON, *OWN, *MIGRATION), kernel=kernel, interface="cdev"))


@pytest.fixture(scope="module")
def by_group(assets: Assets) -> Answers:
    """What every scenario said where daemons open groups."""
    return run_scenarios(assets, Boot(COMMON, kernel=kernel, interface="group"))


@pytest.fixture(scope="module")
def without_iommu(assets: Assets) -> Answers:
    """What is said on a machine that has no IOMMU, by a kernel that can do without."""
    return run_scenarios(assets, Boot(WITHOUT_IOMMU, kernel=kernel, interface="cdev", iommu=False))


@pytest.mark.parametrize("name", [*COMMON, *OWN, *MIGRATION])
def test_by_device_node(by_node: Answers, name: str) -> None:
    """The scenario succeeded; what it proves stands with it."""
    sys.stdout.write(expect_success(by_node, name))


@pytest.mark.parametrize("name", COMMON)
def test_by_group(by_group: Answers, name: str) -> None:
    """The same by the group's node, on a kernel where both ways are open."""
    sys.stdout.write(expect_success(by_group, name))


@pytest.mark.parametrize("name", WITHOUT_IOMMU)
def test_without_an_iommu(without_iommu: Answers, name: str) -> None:
    """A function without an IOMMU is refused, in VFIO's own mode for that as well."""
    sys.stdout.write(expect_success(without_iommu, name))
