"""A VMM as a process of its own, to be killed: migrates as far as a phase, says READY, and waits."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from killbed.trip import Phase, Trip
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_oob.systemd.notify import Notifier


async def _main(here: str, there: str, generation: str, phase: str) -> None:
    async with Trip.open(Path(here), Path(there), Generation(generation)) as trip:
        await trip.go(Phase(phase))
        Notifier.from_environment().ready()
        await trio.sleep_forever()


if __name__ == "__main__":
    here, there, generation, phase = sys.argv[1:]
    trio.run(_main, here, there, generation, phase)
