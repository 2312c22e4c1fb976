"""The guest's command loop for scenarios."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from kvfio import bed, cdev, hardware, mdev, obstacles, scenarios, survival

SCENARIOS = {
    **scenarios.SCENARIOS,
    **hardware.MORE_SCENARIOS,
    **obstacles.OBSTACLES,
    **cdev.CDEV_SCENARIOS,
    **mdev.SCENARIOS,
    **survival.SCENARIOS,
}
SCENARIO_S = 60
LONG_SCENARIO_S = {"linux": 1500, "survives": 600, **dict.fromkeys(mdev.SCENARIOS, 240)}
OUTPUT = Path("/tmp/scenario.out")


def main() -> None:
    """Serve scenarios until the input ends."""
    bed.prepare()
    _say(f"@@READY {Path('/proc/uptime').read_text().split()[0]}")
    while line := sys.stdin.readline():
        name = line.strip()
        started = time.monotonic()
        status = _run(SCENARIOS[name], LONG_SCENARIO_S.get(name, SCENARIO_S)) if name in SCENARIOS else 127
        _say(OUTPUT.read_text() if status != 127 else f"no such scenario: {name}")
        _say(f"seconds={time.monotonic() - started:.1f}")
        _say(f"@@EXIT {status}")


def _say(text: str) -> None:
    os.write(1, text.rstrip("\n").encode() + b"\n")


def _run(scenario: Callable[[], None], seconds: int) -> int:
    """Run a scenario and end whatever it started; the status is that of a shell."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(_in_child(scenario, seconds))
    _, status = os.waitpid(child, 0)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    bed.collect_children()
    return os.waitstatus_to_exitcode(status) % 256


def _in_child(scenario: Callable[[], None], seconds: int) -> int:
    output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    signal.alarm(seconds)
    try:
        scenario()
    except BaseException:
        traceback.print_exc()
        for log in sorted(bed.RUN.glob("*.log")):
            sys.stderr.write(f"--- {log.name}\n{log.read_text()[-3000:]}\n")
        sys.stderr.flush()
        return 1
    sys.stdout.flush()
    return 0


main()
