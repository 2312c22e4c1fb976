"""The last migrations of a function outlive the daemon; whatever is wrong with the disk costs a warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vfiouser_oob.observability import log
from vfiouser_oob.observability.status import MigrationEntry
from vfiouser_oob.persist.history import KEPT, FunctionHistory, HistoryStore
from vfiouser_oob.persist.record import MAX_SIZE


def drawer(directory: Path | None, function: str = "f0") -> FunctionHistory:
    """A place as another life of the daemon would have it."""
    return HistoryStore(directory, log.get("test")).drawer(function)


def entry(number: int = 0, **changes: object) -> MigrationEntry:
    """A migration."""
    made: MigrationEntry = {
        "function": "f0",
        "direction": "out",
        "way": "v2",
        "began": "2026-01-01T00:00:00.000+00:00",
        "ended": "2026-01-01T00:00:01.000+00:00",
        "bytes": number,
        "duration_s": 1.0,
        "bytes_per_s": 1.0,
        "downtime_s": None,
        "outcome": "done",
        "why": None,
    }
    return {**made, **changes}  # type: ignore[typeddict-item]


async def test_migrations_come_back(tmp_path: Path) -> None:
    """Another daemon finds the last ones, the oldest first, of this function only."""
    first = drawer(tmp_path)
    for number in range(KEPT + 3):
        first.add(entry(number, why="x" * 500))
    await first.write()
    second = drawer(tmp_path)
    await second.recall()
    assert list(range(3, KEPT + 3)) == [each["bytes"] for each in second.entries]
    assert not second.ended
    other = drawer(tmp_path, "f1")
    await other.recall()
    assert not other.entries


async def test_long_reasons(tmp_path: Path) -> None:
    """What an agent says may take more room than there is: the newest are kept."""
    first = drawer(tmp_path)
    for number in range(KEPT):
        first.add(entry(number, why="ä" * 500))
    await first.write()
    assert MAX_SIZE > (tmp_path / "migrations" / "f0.json").stat().st_size
    second = drawer(tmp_path)
    await second.recall()
    assert KEPT / 2 < len(second.entries) < KEPT
    assert KEPT - 1 == second.entries[-1]["bytes"]


async def test_what_came_first_stays_behind_what_is_remembered(tmp_path: Path) -> None:
    """A migration that is over before the disk has answered is the newest all the same."""
    first = drawer(tmp_path)
    for number in range(KEPT):
        first.add(entry(number))
    await first.write()
    second = drawer(tmp_path)
    second.add(entry(1000))
    await second.recall()
    assert [1, 1000] == [second.entries[0]["bytes"], second.entries[-1]["bytes"]]
    assert KEPT == len(second.entries)
    assert {("out", "done"): 1} == second.ended


async def test_without_a_directory(tmp_path: Path) -> None:
    """No directory means memory only, without a complaint."""
    place = drawer(None)
    await place.recall()
    place.add(entry())
    await place.write()
    assert 1 == len(place.entries)


@pytest.mark.parametrize(
    "migrations",
    [None, {}, [1], [{}], [{**entry(), "bytes": "many"}], [{**entry(), "more": 1}], [{**entry(), "way": 1}]],
    ids=["nothing", "object", "number", "empty", "type", "unknown", "way"],
)
async def test_damaged_files(tmp_path: Path, migrations: object, caplog: pytest.LogCaptureFixture) -> None:
    """What is no list of migrations is told of once and forgotten."""
    path = tmp_path / "migrations" / "f0.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"kind": "migrations", "version": 1, "migrations": migrations}))
    place = drawer(tmp_path)
    with caplog.at_level(logging.WARNING):
        await place.recall()
    assert not place.entries
    assert 1 == len(caplog.records)


async def test_a_disk_that_does_not_take_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be written is in memory only."""
    (tmp_path / "migrations").write_text("in the way")
    place = drawer(tmp_path)
    place.add(entry())
    with caplog.at_level(logging.WARNING):
        await place.write()
    assert 1 == len(place.entries)
    assert "could not be written" in caplog.text


async def test_the_end_of_the_daemon_writes_what_waited_for_the_disk(tmp_path: Path) -> None:
    """A writer that was cancelled behind another function's, whose disk was slow, loses nothing."""
    store = HistoryStore(tmp_path, log.get("test"))
    place = store.drawer("f0")
    place.add(entry(7))
    async with trio.open_nursery() as nursery, store.limiter:
        nursery.start_soon(place.write)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.CancelScope() as ended:
        ended.cancel()
        await place.finish()
    again = drawer(tmp_path)
    await again.recall()
    assert [7] == [each["bytes"] for each in again.entries]


async def test_a_disk_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon waits two seconds for it, and says so."""
    store = HistoryStore(tmp_path, log.get("test"))
    place = store.drawer("f0")
    place.add(entry())
    async with store.limiter:
        with caplog.at_level(logging.WARNING):
            await place.finish()
    assert "could not be written" in caplog.text
    assert 2 == trio.current_time()
