"""Measurements: control interval, attack, what is left afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
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
#: Cases that are measured at a time: while one attacks, others start, or wait.
AT_A_TIME = 3
#: Whoever keeps processors busy takes turns with those that do, so as to have as much of them as alone.
_BUSY = threading.Lock()
_PYTHON = [sys.executable, "-m"]
#: What no peer may make the daemon say.
_NOISE = ("Traceback", "bug:", "Task exception")


@contextmanager
def background() -> Iterator[Callable[[Attack], Future[Verdict]]]:
    """Gives what has a case measured in the background, where `AT_A_TIME` of them are until the end of the block.

    There is a verdict if the daemon stood it, else an AssertionError with all figures. Latencies out of budget are
    measured again, a bounded number of times, because a shared machine stalls now and then; death, damage and what was
    not given back are not.
    """
    pool = ThreadPoolExecutor(AT_A_TIME)
    with _alone():
        try:
            yield lambda case: pool.submit(_run_case, case)
        finally:
            pool.shutdown(cancel_futures=True)


def _run_case(case: Attack) -> Verdict:
    slow: list[str] = []
    for _ in range(ATTEMPTS):
        verdict = _measure(case)
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
    with _alone():
        return _measure(case)


def _measure(case: Attack) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        place = Path(name)
        house = House(case, place)
        # Both clients start while the daemon does, and wait for it.
        with _attacker(case, place) as attacker, _innocent(house) as innocent, house:
            _attach(innocent, house)
            return _observe(case, house, innocent, attacker)


def _observe(
    case: Attack, house: House, innocent: subprocess.Popen[bytes], attacker: subprocess.Popen[bytes]
) -> Verdict:
    assert innocent.stdin is not None
    _enter(innocent, "control", house)
    time.sleep(CONTROL_S)
    with nullcontext() if case.waits else _BUSY:
        before = house.health()
        _enter(innocent, "felt", house)
        error, peak = _attack(case, house, attacker, before)
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


def _tell(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(word.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended; its report, or its log, says why


@contextmanager
def _attacker(case: Attack, place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Have the attacker's process wait for its word; it is gone, with all that it started, at the end."""
    arguments = [case.run.__module__, case.name, str(place), str(case.seconds)]
    with (place / "attack.log").open("wb") as log:
        process = subprocess.Popen(
            [*_PYTHON, "hostilekit", *arguments],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=_environment(),
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def _attack(case: Attack, house: House, attacker: subprocess.Popen[bytes], before: Health) -> tuple[str | None, Health]:
    """Have the attack carried out to its end; returns why it failed, and the most that was seen of the daemon."""
    _tell(attacker, str(house.daemon.pid))
    peak, end = before, time.monotonic() + case.seconds + GRACE_S
    while attacker.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
        peak = peak.most(house.health())
    if attacker.poll() is None:
        os.killpg(attacker.pid, signal.SIGKILL)
        attacker.wait()
        return f"it did not end within {GRACE_S:g} s of its time", peak
    if attacker.returncode != 0:
        return (house.place / "attack.log").read_text(errors="replace")[-2000:], peak
    return None, peak


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
def _innocent(house: House) -> Iterator[subprocess.Popen[bytes]]:
    """Run the innocent client until the end of the block; it waits for `_attach`."""
    arguments = [str(house.place / "second.sock"), house.kind, str(INTERVAL)]
    with (house.place / "innocent.log").open("wb") as log:
        process = subprocess.Popen(
            [*_PYTHON, "hostilekit.innocent", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _attach(innocent: subprocess.Popen[bytes], house: House) -> None:
    """Have the innocent client attach, and wait until it has."""
    assert innocent.stdout is not None
    _tell(innocent, " ".join(map(str, house.pids())))
    said = innocent.stdout.readline()
    assert said == b"ready\n", (house.place / "innocent.log").read_text() + house.log()


def _enter(innocent: subprocess.Popen[bytes], phase: str, house: House) -> None:
    """Have the innocent client begin a phase, and wait until it has: a read under way belongs to the last one."""
    assert innocent.stdout is not None
    _tell(innocent, phase)
    said = innocent.stdout.readline()
    assert said == f"{phase}\n".encode(), (house.place / "innocent.log").read_text() + house.log() + said.decode()


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
    """Keep measurements of other runs on this machine waiting until those of this one are over."""
    with (Path(tempfile.gettempdir()) / f"hostilekit.{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
