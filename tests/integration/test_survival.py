"""Daemons that are restarted and killed under clients which reconnect nothing; the device counts what it is told."""

from __future__ import annotations

import os
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from restartbed import COUNTED, COUNTING, VECTORS, CountingDevice, KeptDaemon, memory, restarting
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.errors import ServerGone
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import IrqIndex

pytestmark = pytest.mark.slow  # each starts the daemon many times, one after the other
#: A burst has more maps than a socket holds.
_BURST = 96
_RANGE = 4096
Disturbance = Callable[[KeptDaemon], None]


class Guest:
    """What a client does all the time, and what it must find.

    Args:
        client: the connection, the same from the first to the last.
        seed: of what it does.
    """

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.count = 0
        self.stopping = False
        self.memory = OwnedFd(memory(_BURST * _RANGE))
        #: Two for each vector, which take turns.
        self.eventfds = [[OwnedFd(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(VECTORS)] for _ in range(2)]
        #: Seconds from one answer to the next; something is asked all the time.
        self.gaps: list[float] = []
        self._heard = time.monotonic()

    async def run(self) -> None:
        """Use the function until told to stop, and leave nothing mapped."""
        while not self.stopping:
            await self.random.choice((self.registers, self.burst, self.interrupts))()

    async def registers(self) -> None:
        """Each write counts once, and each read."""
        for _ in range(20):
            self.count += 1
            await self.client.region_write(0, COUNTED, struct.pack("<I", self.count))
            self.answered()
            found = await self.client.region_read(0, COUNTING, 4)
            self.answered()
            assert struct.pack("<I", self.count) == found

    async def burst(self) -> None:
        """Many maps at once, with one file, and as many unmaps."""
        places = [number * _RANGE for number in range(_BURST)]
        maps = [self.client.submit_dma_map(at, _RANGE, fd=self.memory, offset=at) for at in places]
        for call in maps:
            await call.wait()
            self.answered()
        for call in [self.client.submit_dma_unmap(at, _RANGE) for at in places]:
            await call.wait()
            self.answered()

    async def interrupts(self) -> None:
        """Eventfds come and go, while the device raises interrupts."""
        self.eventfds.reverse()
        await self.client.set_eventfds(IrqIndex.MSIX, self.eventfds[0])
        self.answered()

    def answered(self) -> None:
        """Something was."""
        before, self._heard = self._heard, time.monotonic()
        self.gaps.append(self._heard - before)

    def interrupted(self) -> dict[int, int]:
        """How many interrupts have come, by vector."""
        return {vector: sum(map(_counted, pair)) for vector, pair in enumerate(zip(*self.eventfds, strict=True))}

    def report(self) -> str:
        """How long it has waited for answers, for people: nothing is asserted of it."""
        gaps = sorted(self.gaps)
        percentiles = (f"p{part * 100:g} {gaps[int(part * (len(gaps) - 1))] * 1e3:.1f} ms" for part in (0.5, 0.99, 1))
        return f"{len(gaps)} answers, from one to the next: {', '.join(percentiles)}"

    def close(self) -> None:
        """Close what was lent."""
        for fd in (self.memory, *self.eventfds[0], *self.eventfds[1]):
            fd.close()


def _counted(fd: OwnedFd) -> int:
    try:
        return os.eventfd_read(fd.fileno())
    except BlockingIOError:
        return 0


async def disturbed(place: Path, disturb: Disturbance, times: int, seed: int) -> tuple[CountingDevice, Guest, str]:
    """Use a function while its daemon is disturbed so many times; returns the device, the guest, and the log."""
    moments = random.Random(seed)
    async with restarting(place) as (kept, device):
        async with Client.connect(kept.socket) as client:
            guest = Guest(client, seed)
            await guest.interrupts()
            async with trio.open_nursery() as device_runs:
                device_runs.start_soon(device.storm)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.run)
                    for number in range(times):
                        await trio.sleep(moments.random() * 0.2)
                        disturb(kept)
                        await kept.lives(number + 2)
                    guest.stopping = True
                device_runs.cancel_scope.cancel()
            await guest.registers()
            assert client.failure is None
            assert device.raised == guest.interrupted()
        guest.close()
    return device, guest, kept.log.read_text()


@pytest.mark.parametrize("disturb", [KeptDaemon.restart, KeptDaemon.kill])
def test_a_client_only_notices_time(tmp_path: Path, disturb: Disturbance) -> None:
    """Twenty times at any moment: no error; of what the device and its client told each other, nothing is missing or
    there twice: accesses, maps, and a storm of interrupts.
    """
    device, guest, log = trio.run(disturbed, tmp_path, disturb, 20, 7)
    assert device.written == list(range(1, guest.count + 1))
    assert device.reads == guest.count
    assert not device.odd
    assert not device.maps
    assert "client goes on after a restart" in log
    assert "Traceback" not in log
    sys.stdout.write(f"{disturb.__name__}: {device.raised.total()} interrupts; {guest.report()}\n")


def test_killed_while_a_client_attaches(tmp_path: Path) -> None:
    """The client gets its answer to VERSION, and all others, whenever the daemon is killed meanwhile."""

    async def main() -> None:
        moments = random.Random(3)
        async with restarting(tmp_path) as (kept, device):
            for number in range(8):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(attach, kept)
                    await trio.sleep(moments.random() * 0.03)
                    kept.kill()
                    await kept.lives(number + 2)
            assert not device.odd

    async def attach(kept: KeptDaemon) -> None:
        while True:
            try:
                async with Client.connect(kept.socket) as client:
                    info = await client.get_info()
                    for index in range(info.num_regions):
                        (await client.get_region_info(index)).close()
                    await client.region_read(0, 0x40, 4)
                    return
            except ServerGone as error:
                # Accepted, and killed before it could be kept; it is as if nobody had been there.
                if "VERSION was outstanding" not in str(error):
                    raise

    trio.run(main)
