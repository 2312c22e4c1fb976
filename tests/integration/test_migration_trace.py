"""What a migration under way shows: an event per step, progress, the same in the log, and figures in `status`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from migrationkit import FAST, PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY, V1_PRE_COPY, Bed, Side, bed, until
from vfiouser_agents.errors import Busy
from vfiouser_agents.faults import Delay, Fails
from vfiouser_oob.observability.log import JsonFormatter

SIZE = 1 << 20


def events_of(watcher: trio.MemoryReceiveChannel[dict[str, Any]]) -> list[dict[str, Any]]:
    """What has been announced so far."""
    found = []
    try:
        while True:
            found.append(watcher.receive_nowait())
    except trio.WouldBlock:
        return found


def migration_status(both: Bed, name: str) -> Any:
    """The `migration` of a function in `status`."""
    (function,) = (item for item in both.daemon.status()["functions"] if item["name"] == name)
    return function["migration"]


async def at_rest(side: Side) -> None:
    """What is asked when a client comes, and by the background after it, has been answered."""

    def idle() -> bool:
        return side.runner.record.asked and side.runner.tracer.doing is None and not side.runner.link.is_open

    await until(idle)
    await trio.testing.wait_all_tasks_blocked(0.01)  # the background had its turn
    await until(idle)


async def test_events_of_every_step(tmp_path: Path) -> None:
    """Each step is started and then complete, under the name of its arc, with what it took; an arc has its bytes."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await at_rest(both.source)
        watcher = both.daemon.subscribe()
        await src.set_state(PRE_COPY)
        stream = await src.data_read(100_000)
        await src.set_state(STOP_COPY)
        stream += await src.read_stream()
        await src.set_state(STOP)
        told = [item for item in events_of(watcher) if item["type"] == "migration" and item["function"] == "src"]
        arcs = ["RUNNING → PRE_COPY", "PRE_COPY → STOP_COPY", "STOP_COPY → STOP"]
        steps = [
            ["arc", "begin", "describe", "estimate", "arc"],
            ["arc", "flush", "quiesce", "stop", "arc"],
            ["arc", "arc"],
        ]
        for arc, expected in zip(arcs, steps, strict=True):
            mine = [item for item in told if item["arc"] == arc]
            begun = [item["step"] for item in mine if item["phase"] == "started"]
            done = [item["step"] for item in mine if item["phase"] == "complete"]
            assert (expected[:-1], expected[1:]) == (begun, done)
            assert all(item["duration_s"] >= 0 for item in mine if item["phase"] == "complete")
        assert {*arcs} == {item["arc"] for item in told}
        assert len(stream) == told[-1]["bytes"]
        await dst.set_state(RESUMING)
        await dst.write_stream(stream)
        await dst.set_state(RUNNING)
        told = [item for item in events_of(watcher) if item["type"] == "migration" and item["function"] == "dst"]
        moved = {item["bytes"] for item in told if item["step"] in ("arc", "commit") and item.get("bytes")}
        assert {len(stream)} == moved
        watcher.close()


async def test_a_step_outside_of_an_arc_has_none(tmp_path: Path) -> None:
    """Chunks are fetched while arcs come and go; what happens after an arc is not told as a part of it."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        both.agent.inject("save", Delay(0.05), count=None, function_id="src")
        await src.set_state(PRE_COPY)
        await src.data_read(1)
        assert "" == both.source.runner.tracer.arc
        watcher = both.daemon.subscribe()
        await src.succeed(13)
        told = [item["arc"] for item in events_of(watcher) if item["type"] == "migration"]
        assert told
        assert {""} == set(told)
        watcher.close()


async def test_a_failed_step_says_why(tmp_path: Path) -> None:
    """The event of a failure has the error; `status` keeps the last one."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await at_rest(both.source)
        both.agent.inject("stop", Fails(Busy("not at all now")), function_id="src")
        watcher = both.daemon.subscribe()
        assert await src.set_state_errno(STOP)
        told = [item for item in events_of(watcher) if item["type"] == "migration" and item["phase"] == "failed"]
        assert ["stop", "arc"] == [item["step"] for item in told]
        assert "not at all now" in told[0]["error"]
        assert "not at all now" in migration_status(both, "src")["last_failure"]
        assert 2 == migration_status(both, "src")["failures"]
        watcher.close()


@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
async def test_progress(tmp_path: Path, v1: bool) -> None:
    """From the first byte on it is known how much there is to come, in events, in `status` and in pending_bytes."""
    async with bed(tmp_path, state_size=SIZE) as both, both.source.vmm() as src:
        watcher = both.daemon.subscribe()
        if v1:
            await src.v1_set(V1_PRE_COPY)
            assert SIZE < await src.v1_register(8)
        else:
            await src.set_state(PRE_COPY)
        stream = await src.v1_chunk() if v1 else await src.data_read(64 << 10)
        shown = migration_status(both, "src")
        assert ("PRE_COPY", "v1" if v1 else "v2", 64 << 10) == (shown["state"], shown["owner"], shown["bytes"])
        assert len(stream or b"") == 64 << 10
        assert SIZE <= shown["bytes"] + shown["buffered"] + shown["remaining"] < SIZE + (64 << 10)
        first = next(item for item in events_of(watcher) if item["type"] == "migration-progress")
        assert ("src", "precopy") == (first["function"], first["phase"])
        assert SIZE <= first["bytes"] + first["remaining"] < SIZE + (64 << 10)
        assert 0 < first["bytes"] < SIZE
        watcher.close()


async def test_progress_after_the_stream_began_anew(tmp_path: Path) -> None:
    """A stream that begins anew has its own figures."""
    async with bed(tmp_path, state_size=SIZE) as both, both.source.vmm() as src:
        await src.set_state(PRE_COPY)
        while len(await src.data_read(64 << 10)) == 64 << 10:
            pass
        assert 0 == migration_status(both, "src")["remaining"]
        both.agent.inject("stop", Fails(Busy("no")), function_id="src")
        assert await src.set_state_errno(STOP_COPY)
        assert PRE_COPY == await src.state()
        shown = migration_status(both, "src")
        assert 2 == shown["epoch"]
        assert SIZE <= shown["buffered"] + shown["remaining"] < SIZE + (64 << 10)


async def test_status_names_the_step_under_way(tmp_path: Path) -> None:
    """While an agent takes its time, `status` says at what."""
    async with bed(tmp_path, config=replace(FAST, stop_s=5.0)) as both, both.source.vmm() as src:
        await at_rest(both.source)
        both.agent.inject("stop", Delay(0.1), function_id="src")
        assert migration_status(both, "src")["step"] is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(src.set_state, STOP)
            await until(lambda: migration_status(both, "src")["step"] == "stop")
        assert migration_status(both, "src")["step"] is None


async def test_what_was_given_up_is_no_failure(tmp_path: Path) -> None:
    """A question that gives way to the client's request is told as given up, and counts as no failure."""
    async with bed(tmp_path) as both:
        await until(lambda: both.source.runner.record.asked)
        both.agent.inject("status", Delay(0.3), function_id="src")
        watcher = both.daemon.subscribe()
        async with both.source.vmm() as src:
            await until(lambda: both.source.runner.tracer.doing == "status")
            await src.set_state(STOP)
            failed = [item for item in events_of(watcher) if item.get("phase") == "failed"]
            assert [("status", "given up")] == [(item["step"], item["error"]) for item in failed]
            shown = migration_status(both, "src")
            assert (0, None) == (shown["failures"], shown["last_failure"])
        watcher.close()


async def test_the_log_has_it_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps, states and progress are records with the function's name, as `journalctl` and a JSON reader want them."""
    caplog.set_level(logging.DEBUG)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(PRE_COPY)
        await src.data_read(64 << 10)
        await src.set_state(RUNNING)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    texts = {line["event"] for line in lines if line.get("function") == "src"}
    assert {"migration step started", "migration step complete", "migration state", "migration progress"} <= texts
