"""A plan of a replay on a client's bus in memory: what is sent when, and what is read back."""

from __future__ import annotations

import trio

from vfiouser_oob.vm.replay import ConfigWrite, MemoryWrite, ReplayPlan
from vfiouser_oob.vm.replay_run import SentReplay
from vfiouser_oob.vm.topology import Bdf

ECAM = 0xB000_0000
PLACE = Bdf(0, 5)
BAR = ConfigWrite(0x10, b"\0\0\0\xfe", b"\0\xf0\xff\xff")
TABLE = MemoryWrite(0xFE00_0000, b"entry", b"\xff" * 5)
POWER = ConfigWrite(0x44, b"\3\0")


class Written:
    """A write that was carried out at once."""

    async def wait(self) -> None:
        """Nothing to wait for."""
        await trio.lowlevel.checkpoint()


class MemoryBus:
    """A bus that keeps what is written."""

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}
        self.done: list[str] = []

    async def bus_read(self, address: int, count: int) -> bytes:
        """Read it back."""
        await trio.lowlevel.checkpoint()
        self.done.append(f"read {address:#x}")
        return self.content.get(address, bytes(count))

    def bus_write(self, address: int, data: bytes) -> Written:
        """Keep it."""
        self.done.append(f"write {address:#x}")
        self.content[address] = data
        return Written()


async def test_what_closes_the_way_comes_after_the_reading_back() -> None:
    """A client that answers now gets it last."""
    bus = MemoryBus()
    replay = SentReplay.send(bus, ReplayPlan((BAR, TABLE), (POWER,)), PLACE, ECAM, free=True)
    assert bus.done == ["write 0xb0028010", "write 0xfe000000"]
    assert await replay.verify() == ""
    assert bus.done[2:] == ["read 0xb0028010", "read 0xfe000000", "write 0xb0028044"]


async def test_a_client_that_answers_later_gets_everything_at_once() -> None:
    """After that its guest may run, and nothing of it may be written any more."""
    bus = MemoryBus()
    replay = SentReplay.send(bus, ReplayPlan((BAR, TABLE), (POWER,)), PLACE, ECAM, free=False)
    assert bus.done == ["write 0xb0028010", "write 0xfe000000", "write 0xb0028044"]
    assert await replay.verify() == ""
    assert len(bus.done) == 3


async def test_what_is_not_as_written_is_told() -> None:
    """Each difference in the bits that can be read back; what would close the way is then not written."""
    bus = MemoryBus()
    replay = SentReplay.send(bus, ReplayPlan((BAR, TABLE), (POWER,)), PLACE, ECAM, free=True)
    bus.content[0xFE00_0000] = b"other"
    bus.content[0xB002_8010] = b"\x0f\0\0\xfe"
    failure = await replay.verify()
    assert "0xfe000000+0x0" in failure
    assert "0xb0028010" not in failure
    assert "write 0xb0028044" not in bus.done


async def test_nothing_to_replay() -> None:
    """A function that its client moves by itself."""
    assert await SentReplay.nothing().verify() == ""
