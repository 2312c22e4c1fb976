"""Mediated devices and the kernel's own migration: a guest with a kernel that has both runs our daemons and clients.

One boot serves all scenarios, which the guest runs one after the other; see `tests/support/kvfio/mdev.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvfio.mdev import SCENARIOS as KNOWN
from kvfio.scenarios import bind_nvme
from vmbed.assets import AssetError, Assets
from vmbed.boots import Boots
from vmbed.vfioguest import MDEV_DRIVERS, Answers, Boot, expect_success

pytestmark = [pytest.mark.vm, pytest.mark.slow]

#: In the order in which they run: the first finds no mediated device, `make_mdevs` makes those of the others, and two
#: also need the NVMe controller.
SCENARIOS = (
    "mdev_errors",
    "make_mdevs",
    "bind_nvme",
    "mdev_registers",
    "mdev_unprivileged",
    "mdev_memory",
    "mdev_removed",
    "mdev_move",
    "mdev_cancel",
    "mdev_corruption",
    "mdev_reset",
    "mdev_dirty",
    "mdev_killed",
    "contract",
    "container_log",
)
#: Generous: most take a few seconds on an idle machine, and attach a dozen clients.
SCENARIO_S = 250.0


def kernel(assets: Assets) -> Path:
    """The kernel with mediated devices."""
    if assets.mdev_kernel is None:
        raise AssetError("the kernel with mediated devices is not in the cache: run `make vm-assets`")
    return assets.mdev_kernel


#: By the fixture that has its answers.
BOOTS = {"answers": Boot(SCENARIOS, kernel=kernel, drivers=MDEV_DRIVERS, qemu=False, seconds=SCENARIO_S)}


@pytest.fixture(scope="module")
def answers(boots: Boots) -> Answers:
    """What every scenario said."""
    return boots.answers(BOOTS["answers"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_mediated_devices_in_the_guest(answers: Answers, name: str) -> None:
    """The scenario succeeded; what it proves stands with it."""
    sys.stdout.write(expect_success(answers, name))


def test_every_scenario_is_run() -> None:
    """None is forgotten, and none is asked for that the guest does not know; what it runs can be imported."""
    assert {*KNOWN, bind_nvme.__name__} == set(SCENARIOS)
