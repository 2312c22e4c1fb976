"""A function whose client migrates it by itself, as its VM's carrier has it: left alone from the start."""

from __future__ import annotations

import struct
from pathlib import Path

from migrationkit import GET, MIGRATION, RESUMING, RUNNING, STOP, STOP_COPY, Bed, Vmm, bed
from rawclient import FEATURE
from vfiouser_oob.server.function import Function
from vfiouser_oob.vm.hosted import HostedFunction


def hosted(both: Bed, name: str) -> HostedFunction:
    """A function as its VM moves it."""

    def find(wanted: str) -> Function | None:
        return next((function for function in both.daemon.functions if function.name == wanted), None)

    return HostedFunction(name, find, 1 << 20)


async def realize(client: Vmm) -> None:
    """What such a client asks when its device is made."""
    await client.succeed(FEATURE, struct.pack("<II", 16, MIGRATION | GET))


async def test_the_client_moves_it(tmp_path: Path) -> None:
    """The carrier stops, saves, loads and resumes nothing, before the client's first step and between all others."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        here, there = hosted(both, "src"), hosted(both, "dst")
        before = here.by_client
        await realize(src)
        await realize(dst)
        assert (False, True) == (before, here.by_client)
        both.source.device.work(changes=3000)
        await here.stop()
        assert both.source.runs
        await src.set_state(STOP_COPY)
        state = await here.save()
        assert (True, b"") == (state.by_client, state.stream)
        stream = await src.read_stream()
        await src.set_state(STOP)
        here.handed()
        await dst.set_state(RESUMING)
        await there.load(state)
        await dst.write_stream(stream)
        await there.resume()
        assert not both.destination.runs
        await dst.set_state(RUNNING)
        assert both.migrated()
        assert (False, True) == (both.source.runs, both.destination.runs)
