"""One measurement: control interval, attack, what is left afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostilekit.case import Attack
from hostilekit.house import House
from hostilekit.verdict import ATTEMPTS, Felt, Health, Sample, Verdict
from hostilekit.wire import Peer

#: Seconds between two reads of the innocent client.
INTERVAL = 0.003
CONTROL_S = 0.7
#: How long reads are timed after the attack, since leaving may cost others as much as being there.
TAIL_S = 0.5
#: How long an attack may outlive its time, and the innocent client its last read.
GRACE_S = 25.0
#: How long the daemon may take to give back what it had for an attacker.
SETTLE_S = 6.0
_PYTHON = [sys.executable, "-m"]
#: What no peer may make the daemon say.
_NOISE = ("Traceback", "bug:", "Task exception")


def run_case(case: Attack) -> Verdict:
    """Measure, and fail with all figures unless the daemon stood it.

    Latencies out of budget are measured again, a bounded number of times, because a shared machine stalls now and then;
    death, damage and what was not given back are not.

    Args:
        case: the attack.

    Raises:
        AssertionError: the daemon did not stand it.
    """
    slow: list[str] = []
    for _ in range(ATTEMPTS):
        verdict = measure(case)
        wrong = verdict.wrong(case.spare_mb)
        assert not wrong, f"{verdict}\n  " + "\n  ".join(wrong)
        breach = verdict.unfit() or verdict.slow()
        if breach is None:
            return verdict
        slow.append(breach)
    raise AssertionError(f"{verdict}\n  " + "\n  ".join(slow))


def measure(case: Attack) -> Verdict:
    """Carry an attack out against a new daemon, once.

    Args:
        case: the attack.
    """
    with _alone(), tempfile.TemporaryDirectory(prefix="hostile-") as name:
        place = Path(name)
        with House(case, place) as house, _innocent(house, place) as innocent:
            return _observe(case, house, innocent)


def _observe(case: Attack, house: House, innocent: subprocess.Popen[bytes]) -> Verdict:
    assert innocent.stdin is not None
    _phase(innocent, "control")
    time.sleep(CONTROL_S)
    before = house.health()
    _phase(innocent, "felt")
    error, peak = _attack(case, house, before)
    time.sleep(TAIL_S)
    innocent.stdin.close()
    report = _report(innocent)
    after = _settled(house, before, case.spare_mb)
    log = house.log()
    return Verdict(
        name=case.name,
        control=_felt(report, "control"),
        felt=_felt(report, "felt"),
        before=before,
        peak=peak,
        after=after,
        alive=house.alive() and _serves(house),
        harm=report["harm"],
        noise=[f"the daemon said: {line}" for line in log.splitlines() if any(word in line for word in _NOISE)][:5],
        log_kb=len(log) / 1024,
        attack_error=error,
    )


def _felt(report: dict[str, Any], phase: str) -> Felt:
    return Felt([Sample(*sample) for sample in report["phases"].get(phase, [])], INTERVAL)


def _phase(innocent: subprocess.Popen[bytes], name: str) -> None:
    assert innocent.stdin is not None
    try:
        innocent.stdin.write(name.encode() + b"\n")
        innocent.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended; its report says why


def _attack(case: Attack, house: House, before: Health) -> tuple[str | None, Health]:
    """Run the attack to its end; returns why it failed, and the most that was seen of the daemon."""
    arguments = [case.run.__module__, case.name, str(house.place), str(house.daemon.pid), str(case.seconds)]
    with (house.place / "attack.log").open("wb") as log:
        attacker = subprocess.Popen(
            [*_PYTHON, "hostilekit", *arguments], stdout=log, stderr=log, env=_environment(), start_new_session=True
        )
    peak, end = before, time.monotonic() + case.seconds + GRACE_S
    try:
        while attacker.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            peak = peak.most(house.health())
        error = None
        if attacker.poll() is None:
            error = f"it did not end within {GRACE_S:g} s of its time"
        elif attacker.returncode != 0:
            error = (house.place / "attack.log").read_text(errors="replace")[-2000:]
        return error, peak
    finally:
        if attacker.poll() is None:
            os.killpg(attacker.pid, signal.SIGKILL)
        attacker.wait()


def _settled(house: House, before: Health, spare_mb: float) -> Health:
    """The daemon once it is as it was, the innocent client's own share apart, or after `SETTLE_S`."""
    end = time.monotonic() + SETTLE_S
    while True:
        health = house.health()
        flat = health.fds <= before.fds and health.rss_mb <= before.rss_mb + spare_mb
        if flat or time.monotonic() > end:
            return health
        time.sleep(0.05)


def _serves(house: House) -> bool:
    """Whether a new client of the second function is served in time, now that the first one has gone."""
    end = time.monotonic() + SETTLE_S
    while time.monotonic() < end:
        try:
            with Peer(house.place / "second.sock", timeout=SETTLE_S) as peer:
                peer.negotiate()
                return len(peer.read(0, 0, 4)) == 4
        except (OSError, EOFError, AssertionError):
            time.sleep(0.05)
    return False


@contextmanager
def _innocent(house: House, place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the innocent client until the end of the block; it is attached when the block begins."""
    arguments = [str(place / "second.sock"), house.kind, str(INTERVAL), *map(str, house.pids())]
    with (place / "innocent.log").open("wb") as log:
        process = subprocess.Popen(
            [*_PYTHON, "hostilekit.innocent", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == b"ready\n", (place / "innocent.log").read_text() + house.log()
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _report(innocent: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the innocent client prints when it ends."""
    assert innocent.stdout is not None
    if not select.select([innocent.stdout], [], [], GRACE_S)[0]:
        return {"phases": {}, "harm": [f"the innocent client waits for an answer since {GRACE_S:g} s"]}
    line = innocent.stdout.readline()
    return json.loads(line) if line else {"phases": {}, "harm": ["the innocent client died"]}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@contextmanager
def _alone() -> Iterator[None]:
    """Keep measurements of other runs on this machine waiting until this one is over."""
    with (Path(tempfile.gettempdir()) / f"hostilekit.{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
