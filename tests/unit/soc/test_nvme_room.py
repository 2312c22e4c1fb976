"""How much data commands hold at one time, whatever becomes of those that wait."""

from __future__ import annotations

import trio
import trio.testing

from vfiouser_soc.nvme.room import DataRoom


class Commands:
    """Commands that hold data until they are told to end.

    Args:
        room: what they share.
    """

    def __init__(self, room: DataRoom) -> None:
        self.room = room
        self.inside: list[str] = []
        self.ends: dict[str, trio.Event] = {}

    async def run(self, name: str, size: int) -> None:
        """One command."""
        self.ends[name] = trio.Event()
        async with self.room.of(size):
            self.inside.append(name)
            await self.ends[name].wait()
            self.inside.remove(name)


async def test_no_more_than_fits_at_one_time() -> None:
    """Commands wait for room in the order that they came in, and a small one does not overtake."""
    commands = Commands(DataRoom(100))
    async with trio.open_nursery() as nursery:
        for name, size in (("a", 60), ("b", 60), ("c", 10)):
            nursery.start_soon(commands.run, name, size)
            await trio.testing.wait_all_tasks_blocked()
        assert (["a"], 60) == (commands.inside, commands.room.used)
        commands.ends["a"].set()
        await trio.testing.wait_all_tasks_blocked()
        # Both were let in at once, and which of their tasks runs first is the event loop's to choose.
        assert (["b", "c"], 70) == (sorted(commands.inside), commands.room.used)
        commands.ends["b"].set()
        commands.ends["c"].set()
    assert 0 == commands.room.used


async def test_one_that_is_too_large_for_the_room() -> None:
    """A command larger than all the room is let in alone."""
    commands = Commands(DataRoom(100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commands.run, "large", 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert ["large"] == commands.inside
        commands.ends["large"].set()


async def test_cancelled_while_it_waits() -> None:
    """A command that is cancelled leaves its place to the next one."""
    commands = Commands(DataRoom(100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commands.run, "a", 100)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(commands.run, "b", 100)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(commands.run, "c", 100)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert ["a"] == commands.inside
        commands.ends["a"].set()
        await trio.testing.wait_all_tasks_blocked()
        assert ["c"] == commands.inside
        commands.ends["c"].set()
    assert 0 == commands.room.used


async def test_cancelled_when_it_is_let_in() -> None:
    """A command that is cancelled in the moment when there is room for it gives that back."""
    commands = Commands(DataRoom(100))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commands.run, "a", 100)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(commands.run, "b", 100)
                await trio.testing.wait_all_tasks_blocked()
                commands.room._used = 0  # as if "a" had just given its room back
                commands.room._let_in()
                scope.cancel()
        assert 0 == commands.room.used
        commands.room._used = 100
        commands.ends["a"].set()
    assert 0 == commands.room.used
