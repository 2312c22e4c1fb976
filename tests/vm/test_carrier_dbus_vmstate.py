"""Carrier V against stock QEMU: what only concerns `dbus-vmstate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from carrierbed.machines import begin, machine, outcome
from carrierbed.sides import KINDS, two_sides
from vfiouser_oob.vm.carriers.interface import QemuAttached, StateLoaded
from vmbed.assets import Assets
from vmbed.errors import BedError

pytestmark = pytest.mark.vm
VMSTATE = KINDS["dbus-vmstate"]


async def test_a_lost_endpoint_is_repaired(assets: Assets, workdir: Path) -> None:
    """Without its daemon the source does not migrate; the repair's commands connect a new one, and then it does."""
    async with two_sides(VMSTATE, workdir, b"state") as (source, destination):
        async with machine(assets, workdir, "a", source.arguments) as a:
            await source.hand.until(QemuAttached)
            source.stop()
            async with machine(assets, workdir, "b", destination.arguments, incoming=True) as b:
                await begin(a, b, workdir)
                assert await outcome(a) == "failed"
                assert (await a.qmp.execute("query-status"))["status"] == "running"
                await b.process.wait()
            await source.start(b"new state")
            for command in source.hand.carrier.repair():
                await a.qmp.execute(command.execute, **command.arguments)
            await source.hand.until(QemuAttached)
            async with machine(assets, workdir, "c", destination.arguments, incoming=True) as c:
                await begin(a, c, workdir)
                assert await outcome(a) == "completed"
        assert bytes((await destination.hand.until(StateLoaded)).state) == b"new state"


async def test_qemu_does_not_start_without_its_carrier(assets: Assets, workdir: Path) -> None:
    """A QEMU whose carrier's socket is missing says so and ends."""
    with pytest.raises(BedError, match="failed to connect to DBus"):
        async with machine(assets, workdir, "a", VMSTATE.arguments(workdir / "nobody.bus")):
            pass
