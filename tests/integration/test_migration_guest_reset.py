"""A guest that resets its NVMe function while it is copied, against real processes: what arrives is what it is then."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from killbed.trip import Trip
from vfiouser_oob.client.client import Client
from vfiouser_oob.lab.demo.hosts import HostOptions, two_hosts
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_protocol.constants import RegionIndex

pytestmark = pytest.mark.slow

CC, CSTS, AQA = 0x14, 0x1C, 0x24
PCI_EXPRESS, DEVICE_CONTROL, INITIATE_FLR = 0x10, 8, 0x8000


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


async def registers(client: Client) -> list[int]:
    """What the controller says about itself: CC, ready, AQA."""
    data = [await client.region_read(RegionIndex.BAR0, offset, 4) for offset in (CC, CSTS, AQA)]
    cc, csts, aqa = (int.from_bytes(item, "little") for item in data)
    return [cc, csts & 1, aqa]


async def function_level_reset(client: Client) -> None:
    """As a guest's driver does it, through the PCI Express capability."""
    position = (await client.region_read(RegionIndex.CONFIG, 0x34, 1))[0]
    while (head := await client.region_read(RegionIndex.CONFIG, position, 2))[0] != PCI_EXPRESS:
        position = head[1]
    await client.region_write(RegionIndex.CONFIG, position + DEVICE_CONTROL, INITIATE_FLR.to_bytes(2, "little"))


@pytest.mark.parametrize("generation", list(Generation))
async def test_a_controller_that_is_reset_in_precopy(place: Path, generation: Generation) -> None:
    """The stream begins anew; at the destination the controller is off, with what the guest set up since."""
    options = HostOptions(tls=False, size=1 << 20, state_size=1 << 20)
    async with (
        two_hosts(place, options, lambda line: None) as pair,
        Trip.open(pair.socket("A", "f0"), pair.socket("B", "f0"), generation) as trip,
    ):
        with trio.fail_after(60):
            source, destination, client = trip.source, trip.destination, trip.source._client
            await destination.load_setup()
            assert await source.save_setup()
            portion = await source.read()
            assert portion.data
            await destination.load(portion.data)
            assert 1 == (await registers(client))[1]
            await function_level_reset(client)
            assert [0, 0, 0] == await registers(client)
            await client.region_write(RegionIndex.BAR0, AQA, (0x000F000F).to_bytes(4, "little"))
            stream = portion.data
            await source.stop()
            while not (portion := await source.read()).last:
                stream += portion.data
                await destination.load(portion.data)
            assert 2 == stream.count(b"VFUOOBST")
            await source.save_cleanup()
            await destination.start()
            assert [0, 0, 0x000F000F] == await registers(trip.target.client)
