"""Migrations that are over: how what each side tells of them, at once and after a restart."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio

from migrationkit import PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY, Bed, Vmm, bed, until
from vfiouser_agents.errors import Busy, DeviceFailed
from vfiouser_agents.faults import Fails
from vfiouser_oob.observability.status import MigrationEntry


async def saved(src: Vmm) -> bytes:
    """The whole state of a function, which stands still after it."""
    await src.set_state(PRE_COPY)
    stream = await src.data_read(1000)
    await src.set_state(STOP_COPY)
    stream += await src.read_stream()
    await src.set_state(STOP)
    return stream


def of(both: Bed, name: str) -> list[MigrationEntry]:
    """What is remembered of a function."""
    return [entry for entry in both.daemon.migrations() if entry["function"] == name]


async def last_of(both: Bed, name: str) -> MigrationEntry:
    """The only migration of a function, once it is over."""
    with trio.fail_after(10):
        await until(lambda: bool(of(both, name)))
    (entry,) = of(both, name)
    return entry


async def test_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both sides tell of a migration that went well, with the same bytes; another daemon still knows of it."""
    caplog.set_level(logging.INFO)
    async with bed(tmp_path, state_directory=tmp_path / "state") as both:
        watcher = both.daemon.subscribe()
        async with both.source.vmm() as src, both.destination.vmm() as dst:
            stream = await saved(src)
            await dst.set_state(RESUMING)
            await dst.write_stream(stream)
            assert not of(both, "dst")
            await dst.set_state(RUNNING)
            assert not of(both, "src")
            there = await last_of(both, "dst")
        gone = await last_of(both, "src")
        for entry, direction in ((gone, "out"), (there, "in")):
            shown = entry["direction"], entry["outcome"], entry["way"], entry["bytes"], entry["why"]
            assert (direction, "done", "v2", len(stream), None) == shown
            assert entry["began"] <= entry["ended"]
            assert entry["downtime_s"] is not None
            assert 0 <= entry["downtime_s"] <= entry["duration_s"]
            assert entry["bytes_per_s"] > 0
        told = [record for record in caplog.records if record.getMessage() == "migration finished"]
        assert {"out", "in"} == {fields_of(record)["direction"] for record in told}
        assert 2 == len(told)
        seen = 0
        while seen < 2:
            seen += (await watcher.receive())["type"] == "migration-finished"
        watcher.close()
    async with bed(tmp_path, state_directory=tmp_path / "state") as both:
        assert {"src", "dst"} == {gone["function"], there["function"]}
        await until(lambda: len(both.daemon.migrations()) == 2)
        assert [gone] == of(both, "src")
        assert [there] == of(both, "dst")


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a log record carries."""
    return record.fields  # type: ignore[attr-defined,no-any-return]


async def test_cancelled(tmp_path: Path) -> None:
    """A client that lets the source run again has cancelled it: no failure, and the time that it stood still."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(PRE_COPY)
        await src.data_read(1000)
        await src.set_state(STOP_COPY)
        await src.set_state(RUNNING)
        entry = await last_of(both, "src")
        assert ("out", "cancelled", 1000, None) == (
            entry["direction"],
            entry["outcome"],
            entry["bytes"],
            entry["why"],
        )
        assert entry["downtime_s"] is not None


async def test_returned(tmp_path: Path) -> None:
    """A source that runs again after its client had everything: the other side has failed, and that is said."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await saved(src)
        assert not of(both, "src")
        await src.set_state(RUNNING)
        assert "returned" == (await last_of(both, "src"))["outcome"]


async def test_a_client_that_goes(tmp_path: Path) -> None:
    """A client that has gone before it had everything has cancelled; only then another one begins."""
    async with bed(tmp_path) as both:
        async with both.source.vmm() as src:
            await src.set_state(PRE_COPY)
            await src.data_read(10)
        entry = await last_of(both, "src")
        assert ("cancelled", None) == (entry["outcome"], entry["downtime_s"])


async def test_failed(tmp_path: Path) -> None:
    """A step that fails is the reason, in the agent's words."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        both.agent.inject("save", Fails(DeviceFailed("the card is on fire")), function_id="src")
        assert not await src.set_state_errno(PRE_COPY)
        entry = await last_of(both, "src")
        assert "failed" == entry["outcome"]
        assert "on fire" in (entry["why"] or "")


async def test_begun_in_vain(tmp_path: Path) -> None:
    """What failed before there was any state is no migration."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        both.agent.inject("begin", Fails(Busy("not now")), count=None, function_id="src")
        assert await src.set_state_errno(PRE_COPY)
        await src.set_state(STOP)
        await src.set_state(RUNNING)
        assert not both.daemon.migrations()


async def test_refused_by_the_destination(tmp_path: Path) -> None:
    """A state that is refused is a failed migration in, once the function was reset."""
    async with bed(tmp_path) as both:
        async with both.destination.vmm() as dst:
            await dst.set_state(RESUMING)
            assert await dst.data_write_errno(b"no stream at all" * 64)
        entry = await last_of(both, "dst")
        assert ("in", "failed", 1024) == (entry["direction"], entry["outcome"], entry["bytes"])
        assert entry["why"]
