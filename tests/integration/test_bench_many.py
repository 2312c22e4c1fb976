"""`bench --scale` and `bench --against` on real daemons: that everything is measured, not how fast it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutants.server import serving
from vfiouser_oob.lab.bench.against import AgainstEffort, measure_against
from vfiouser_oob.lab.bench.scale import ScaleEffort, measure_scale
from vfiouser_oob.lab.bench.scale_figures import Spread, scale_results

pytestmark = pytest.mark.slow


async def test_two_functions_in_one_daemon_and_in_two_processes() -> None:
    """Each figure is there for each."""
    lines: list[str] = []
    effort = ScaleEffort(sizes=(2,), state_size=1 << 18, rounds=1, idle_s=0.1, at_least=2)
    one, each = await measure_scale(effort, lines.append)
    assert ["2 functions in one daemon", "2 functions in a process each"] == lines
    for figures, spread in ((one, Spread.ONE_DAEMON), (each, Spread.MANY_PROCESSES)):
        assert (spread.value, 2) == (figures.spread, figures.functions)
        measured = figures.as_json()
        assert [] == [name for name in measured if name != "idle_wake_ups" and not measured[name]]
        assert figures.storm_p50_ms <= figures.storm_p99_ms
    assert 10 == len(scale_results([one, each]))


async def test_our_daemon_beside_another_server(tmp_path: Path) -> None:
    """All contests are held, and the state of ours is as large as theirs."""
    with serving(str(tmp_path / "other")):
        found = await measure_against(
            tmp_path / "other", AgainstEffort(rounds=2, reads=5, bursts=1, patience_s=20), lambda line: None
        )
    assert [] == found.notes
    assert 12 == len(found.results)
