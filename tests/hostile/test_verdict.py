"""The judge of the hostile suite bites: what it must not let pass, it does not."""

import os
import subprocess
import threading
from dataclasses import replace
from typing import Any

import pytest

from hostilekit.catalogue import ATTACKS
from hostilekit.measure import measure
from hostilekit.verdict import Felt, Health, Sample, Verdict
from hostilekit.waits import Waits, waited

QUIET = Felt([Sample(0.001, 0.001)] * 900, 0.003)
WELL = Health(40.0, 20, 1)


def verdict(**what: Any) -> Verdict:
    """A verdict with nothing wrong but this."""
    good = Verdict(name="x", control=QUIET, felt=QUIET, before=WELL, peak=WELL, after=WELL, alive=True)
    return replace(good, **what)


def test_one_stall_counts_for_all_the_reads_that_it_kept_from_being_made() -> None:
    """A stall within the maximum is out of budget when it takes more than a hundredth of the time."""
    once = Felt([*QUIET.samples, Sample(0.2, 0.2)], 0.003)
    assert "p99" in (verdict(felt=once).slow() or "")
    assert verdict(felt=QUIET).slow() is None


def test_waiting_for_a_processor_is_not_the_daemons() -> None:
    """A read that waited for a processor is taken as what remains of it."""
    assert verdict(felt=Felt([Sample(2.0, 0.002)] * 900, 0.003)).slow() is None


def test_a_helper_thread_that_has_no_processor_excuses_its_event_loop_once() -> None:
    """Of each process the longest wait is taken off, be it the loop's or a helper's, new or old; not their sum."""
    milliseconds = 1_000_000
    before = [{1: 5 * milliseconds}, {2: 7 * milliseconds, 3: 0, 4: 50 * milliseconds}]
    after = [{1: 6 * milliseconds}, {2: 9 * milliseconds, 3: 30 * milliseconds, 5: 20 * milliseconds}]
    assert waited(before, after) == pytest.approx(0.031)
    assert waited(before, [{}, {}]) == 0


def test_every_thread_of_a_process_is_looked_at() -> None:
    """Threads that came after the first look are found too."""
    waits, end = Waits([os.getpid()]), threading.Event()
    [first] = waits.look()
    helper = threading.Thread(target=end.wait)
    helper.start()
    try:
        [second] = waits.look()
    finally:
        end.set()
        helper.join()
    assert {os.getpid(), helper.native_id} <= set(second)
    assert helper.native_id not in first


def test_a_process_that_has_ended_waits_no_more() -> None:
    """Its absence is no error: others notice it."""
    process = subprocess.Popen(["sleep", "60"])
    waits = Waits([process.pid])
    before = waits.look()
    process.kill()
    process.wait()
    assert waited(before, waits.look()) == 0


def test_a_busy_machine_is_no_place_to_measure() -> None:
    """A control interval that is out of budget makes the measurement unfit."""
    assert verdict(control=Felt([Sample(0.3, 0.3)] * 3, 0.003)).unfit() is not None


@pytest.mark.parametrize(
    "what",
    [
        {"alive": False},
        {"after": Health(60.0, 20, 1)},
        {"after": Health(40.0, 21, 1)},
        {"harm": ["x"]},
        {"noise": ["x"]},
        {"attack_error": "x"},
        {"felt": Felt([], 0.003)},
    ],
    ids=str,
)
def test_what_counts(what: dict[str, object]) -> None:
    """Each of these alone is enough."""
    found = verdict(**what)
    assert found.wrong(16.0) or found.slow()


@pytest.mark.hostile
def test_a_daemon_that_does_not_run_for_a_moment() -> None:
    """A real daemon that is stopped for 0.4 s is seen, whatever else the machine is doing."""
    found = measure(ATTACKS["stopped_daemon"])
    assert found.unfit() is None
    assert "under attack" in (found.slow() or "")
