"""Histograms of durations: which bucket, which quantile, what is recent."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_oob.observability import latency as latency_module
from vfiouser_oob.observability.latency import MARK_S, POWER_BOUNDS_S, CommandTimings

READ, WRITE = 9, 10


@settings(deadline=None)
@given(st.integers(1 << 10, (1 << 42) - 1))
def test_a_quantile_is_right_within_an_eighth(nanoseconds: int) -> None:
    """Whatever was recorded comes back within the width of half a bucket."""
    timings = CommandTimings(16, 0.0)
    timings.record(READ, nanoseconds)
    latency = timings.summary(1.0)[READ]
    assert latency.p50_s == latency.p99_s == pytest.approx(nanoseconds / 1e9, rel=0.13)
    assert nanoseconds / 1e9 == latency.total_s


@pytest.mark.parametrize("nanoseconds", [0, 1, 1023, 1 << 42, 1 << 70])
def test_extremes_are_counted(nanoseconds: int) -> None:
    """What is too short or too long to be told apart is counted all the same."""
    timings = CommandTimings(16, 0.0)
    timings.record(READ, nanoseconds)
    assert 1 == timings.summary(1.0)[READ].answered
    assert 1 == timings.powers(READ)[-1]


def test_quantiles_tell_the_slow_ones() -> None:
    """Half of all are quick; the slow hundredth shows in p99 once there are more of them than one in a hundred."""
    timings = CommandTimings(16, 0.0)
    for _ in range(97):
        timings.record(READ, 20_000)
    for _ in range(3):
        timings.record(READ, 5_000_000)
    latency = timings.summary(10.0)[READ]
    assert latency.p50_s == pytest.approx(20e-6, rel=0.13)
    assert latency.p99_s == pytest.approx(5e-3, rel=0.13)
    assert 10.0 == latency.per_s


def test_what_is_old_does_not_count_as_recent() -> None:
    """After two marks only what came since the first of them has a rate; without any, the quantiles are of all."""
    timings = CommandTimings(16, 0.0)
    for _ in range(100):
        timings.record(READ, 1_000_000)
    timings.mark(MARK_S)
    for _ in range(30):
        timings.record(READ, 10_000)
    timings.mark(2 * MARK_S)
    latency = timings.summary(2 * MARK_S)[READ]
    assert (130, 1.0) == (latency.answered, latency.per_s)
    assert pytest.approx(10e-6, rel=0.13) == latency.p99_s
    timings.mark(3 * MARK_S)
    latency = timings.summary(3 * MARK_S)[READ]
    assert 0.0 == latency.per_s
    assert latency.p99_s == pytest.approx(1e-3, rel=0.13)


def test_commands_that_never_came_are_left_out() -> None:
    """A summary has what there was."""
    timings = CommandTimings(16, 0.0)
    assert not timings.summary(1.0)
    timings.record(WRITE, 1)
    assert [WRITE] == list(timings.summary(1.0))


def test_powers_add_up() -> None:
    """Each power of two counts what is below it, the last all."""
    timings = CommandTimings(16, 0.0)
    for nanoseconds in (500, 1500, 3000, 1 << 50):
        timings.record(READ, nanoseconds)
    powers = timings.powers(READ)
    assert len(POWER_BOUNDS_S) + 1 == len(powers)
    assert (2, 3, 4) == (powers[0], powers[1], powers[-1])
    assert 2.048e-6 == POWER_BOUNDS_S[0]


def test_marks_of_an_idle_function_share_their_counts() -> None:
    """A thousand functions that nobody uses hold one copy of their counts each, however often time is marked."""
    timings = CommandTimings(16, 0.0)
    timings.record(READ, 10_000)
    timings.mark(MARK_S)
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        for turn in range(2, 8):
            timings.mark(turn * MARK_S)
        grown = tracemalloc.take_snapshot().compare_to(before, "filename")
    finally:
        tracemalloc.stop()
    assert sum(each.size_diff for each in grown if each.traceback[0].filename == latency_module.__file__) < 1024
