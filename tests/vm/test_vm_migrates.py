"""Plain `migrate` of stock QEMU moves a VM with its functions, under verified I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from vmbed.assets import Assets
from vmbed.companion import SPARE_MEMORY, bind_companion, unbind_companion
from vmbed.hosts import HostConfig, finished, host, make_disk, migrate, shown
from vmbed.load import quiet
from vmbed.loops import begin_loops, loops_go_on

pytestmark = [pytest.mark.vm, pytest.mark.slow]
BY_ITSELF = ("-incoming", "defer")
WAITING = (*BY_ITSELF, "-S")
MANY = 20


@dataclass(frozen=True, slots=True)
class Voyage:
    """A VM, and how it works while it moves.

    Args:
        config: of both hosts.
        loops: of verified I/O, on each function; each has eight commands under way.
        driver: whether the guest has a driver for the companion.
    """

    config: HostConfig
    loops: int = 2
    driver: bool = False


VOYAGES: Mapping[str, Voyage] = MappingProxyType(
    {
        # Three functions, one of them behind a root port; queues in device memory, and doorbells that nobody sees.
        "V": Voyage(
            HostConfig(functions=3, behind=1, cpus=2, soc=("--cmb", "2M", "--doorbells", "polled")),
            loops=1,
        ),
        "V-deep": Voyage(HostConfig(cpus=2), loops=4),
        "F": Voyage(HostConfig("vhost-user-fs", cpus=2)),
        "F-driver": Voyage(HostConfig("vhost-user-fs", cpus=2, kernel_arguments=SPARE_MEMORY), driver=True),
        "F-large": Voyage(
            HostConfig("vhost-user-fs", soc=("--state-size", "512M", "--state-churn", "0"), more='state_max = "600M"')
        ),
    }
)


def often(name: str) -> object:
    """A voyage of many hops, for which there is time only in the long run."""
    return pytest.param(name, [WAITING] * MANY, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("name", "hops"),
    [
        ("V", [WAITING, WAITING, BY_ITSELF]),
        ("F-driver", [WAITING, WAITING, BY_ITSELF]),
        pytest.param("F", [WAITING, WAITING, BY_ITSELF], marks=pytest.mark.long),
        *map(often, ("V", "V-deep", "F", "F-driver")),
        pytest.param("F-large", [WAITING, BY_ITSELF], marks=pytest.mark.long),
    ],
)
async def test_a_vm_hops(assets: Assets, workdir: Path, name: str, hops: Sequence[Sequence[str]]) -> None:
    """A guest is moved to and fro while it writes and reads back: every byte is right, and its driver never waits.

    A destination that is not told to wait goes on by itself.
    """
    voyage = VOYAGES[name]
    config = voyage.config
    disk = make_disk(workdir, config.functions)
    async with host(workdir, "a", disk, config) as a, host(workdir, "b", disk, config) as b, AsyncExitStack() as boot:
        here, there = a, b
        qemu = await boot.enter_async_context(here.machine(assets))
        await qemu.guest.ready()
        if voyage.driver:
            await bind_companion(qemu.guest)
        elif config.carrier == "vhost-user-fs":
            await unbind_companion(qemu.guest)
        await begin_loops(qemu.guest, config.functions, voyage.loops)
        before = await qemu.guest.irqs()
        for number, incoming in enumerate(hops):
            other = await boot.enter_async_context(there.machine(assets, incoming=incoming))
            await there.phase("incoming")
            (workdir / "stream").unlink(missing_ok=True)
            await migrate(qemu, other, workdir / "stream")
            assert await finished(qemu) == "completed"
            assert await finished(other) == "completed"
            if incoming is WAITING:
                await other.qmp.execute("cont")
            await loops_go_on(other.guest)
            await quiet(other.guest)
            assert await shown(qemu) == "postmigrate"
            await qemu.kill()
            qemu, here, there = other, there, here
            await here.phase("running")
            print(f"hop {number + 1} of {len(hops)}")  # noqa: T201
        after = await qemu.guest.irqs()
        more = {queue: count - before[queue] for queue, count in after.items()}
        for number in range(config.functions):
            assert any(count > 0 for queue, count in more.items() if queue.startswith(f"nvme{number}q")), more
        for number in range(1, config.cpus + 1):
            assert any(count > 0 for queue, count in more.items() if queue.endswith(f"q{number}")), more
        # Only with a driver QEMU itself asks for the stop, before it sends the memory for the last time.
        held = "phase=holding" in a.daemon.log.read_text()
        assert held == voyage.driver
