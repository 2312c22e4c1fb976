"""What an agent says is bounded: nothing of it ends a function's migration, floods the log or delays others."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from migrationkit import PRE_COPY, RESUMING, RUNNING, STOP_COPY, V1_PRE_COPY, Bed, bed, until
from vfiouser_agents.api import Event, EventKind
from vfiouser_agents.errors import MAX_MESSAGE, Busy
from vfiouser_agents.faults import ChangesResult, Fails

HUGE = "x" * (9 << 20)


async def migrates(both: Bed) -> None:
    """A whole migration, which shows that both engines live."""
    async with both.source.vmm() as src, both.destination.vmm() as dst:
        await src.set_state(STOP_COPY)
        await dst.set_state(RESUMING)
        await dst.write_stream(await src.read_stream())
        await dst.set_state(RUNNING)
        assert both.migrated()


@pytest.mark.parametrize("change", [{"firmware": HUGE}, {"fingerprint": {"key": HUGE}}, {"fingerprint": "many"}])
@pytest.mark.parametrize("state", [PRE_COPY, STOP_COPY])
async def test_a_descriptor_that_is_too_large(tmp_path: Path, change: dict[str, object], state: int) -> None:
    """The change of state fails with the reason, the function runs, and the next attempt is like any other."""
    if change["fingerprint" if "fingerprint" in change else "firmware"] == "many":
        change = {"fingerprint": {str(number): "" for number in range(5000)}}
    async with bed(tmp_path) as both:
        both.agent.inject("describe", ChangesResult(lambda found: replace(found, **change)), function_id="src")
        async with both.source.vmm() as src:
            assert errno.EPROTO == await src.set_state_errno(state)
            assert RUNNING == await src.state()
            assert both.source.runs
            served = next(item for item in both.daemon.functions if item.name == "src")
            assert "descriptor" in (served.last_error or "")
            assert None is served.failed
        await migrates(both)


async def test_a_descriptor_that_becomes_too_large(tmp_path: Path) -> None:
    """The same when a stream begins anew after a stop that failed."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.set_state(PRE_COPY)
        both.agent.inject("stop", Fails(Busy("not yet")), function_id="src")
        both.agent.inject("describe", ChangesResult(lambda found: replace(found, model=HUGE)), function_id="src")
        assert await src.set_state_errno(STOP_COPY)
        await until(lambda: both.source.runner.record.runs)
        assert both.source.runs
        assert None is next(item for item in both.daemon.functions if item.name == "src").failed


async def test_sizes_that_cannot_be(tmp_path: Path) -> None:
    """Pieces of no bytes are refused when the session opens; estimates without bound are cut."""
    async with bed(tmp_path) as both:
        async with both.source.vmm() as src:
            huge = ChangesResult(lambda found: replace(found, initial_bytes=(1 << 64) - 1, dirty_bytes=(1 << 64) - 1))
            both.agent.inject("estimate", huge, count=None, function_id="src")
            await src.v1_set(V1_PRE_COPY)
            assert 1 << 61 <= await src.v1_register(8) < 1 << 63
            await src.v1_set(1)
            both.agent.heal()
            both.source.runner.link.close(force=True)
            device = both.source.device
            device.caps, usual = replace(device.caps, max_chunk=0), device.caps
            assert errno.EPROTO == await src.set_state_errno(STOP_COPY)
            assert RUNNING == await src.state()
            device.caps = usual
        await migrates(both)


async def test_a_long_message(tmp_path: Path) -> None:
    """Nine megabytes of reason end in nobody's log or status."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        both.agent.inject("begin", Fails(Busy(HUGE)), function_id="src")
        assert errno.EBUSY == await src.set_state_errno(STOP_COPY)
        served = next(item for item in both.daemon.functions if item.name == "src")
        assert len(served.last_error or "") < 2 * MAX_MESSAGE
        assert len(both.source.runner.tracer.last_failure or "") < 2 * MAX_MESSAGE


async def test_a_flood_of_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Events beyond what anybody needs are dropped, oldest first: few lines, and others are served as ever."""
    caplog.set_level("INFO")
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as other:
        await src.set_state(STOP_COPY)
        await until(lambda: both.source.device.feed.watched)
        caplog.clear()
        slowest, started = 0.0, trio.current_time()
        for round_ in range(100):
            for number in range(500):
                both.source.device.feed.put(Event(EventKind.RECONNECTED, f"{round_} {number}"))
            begun = trio.current_time()
            await other.read32(0, 0)
            slowest = max(slowest, trio.current_time() - begun)
        told = sum(record.getMessage() == "agent event" for record in caplog.records)
        # As many as come at once, and then a few at a time.
        most = 64 + 200 * (trio.current_time() - started)
        assert 0 < told < most, f"{told} lines for 50000 events"
        assert slowest < 0.25
        await src.read_stream()
