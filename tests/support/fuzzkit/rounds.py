"""Fuzz one target after the other: `python -m fuzzkit.rounds SECONDS [TARGET…]`; exit code 1 if there are findings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from fuzzkit.targets import TARGETS

ROOT = Path(__file__).resolve().parents[3]
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
#: Bytes of an input: all that is checked is within reach of far less than a real stream has.
MOST = 16384


def fuzz(name: str, seconds: float, place: Path) -> tuple[int, str | None]:
    """Fuzz one target in a process of its own, with atheris.

    Args:
        name: the target.
        seconds: how long.
        place: directory for what is found.

    Returns:
        How often it ran, and the end of the log if there is a finding.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "kept").mkdir(exist_ok=True)
    limits = [f"-max_total_time={max(1, round(seconds))}", f"-max_len={MOST}", "-timeout=30", "-rss_limit_mb=3000"]
    search = os.pathsep.join(str(ROOT / folder) for folder in (".", "protocol", "agents", "tests/support"))
    done = subprocess.run(
        [sys.executable, "-m", "fuzzkit", name, *limits, str(place / "kept"), str(CORPUS / name)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    counts = re.findall(r"^(?:Done |#)(\d+)", done.stderr + done.stdout, re.MULTILINE)
    log = None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]
    return max(map(int, counts), default=0), log


def main() -> int:
    """Fuzz all, or those that are named."""
    seconds, *names = sys.argv[1:]
    total, findings = 0, 0
    for name in names or TARGETS:
        runs, log = fuzz(name, float(seconds), ROOT / ".cache" / "fuzz" / name)
        total += runs
        findings += log is not None
        print(f"{name:16} {runs:10} runs" if log is None else f"{name:16} {runs:10} runs, FINDING\n{log}", flush=True)
    print(f"{total} runs, {findings} findings")
    return findings > 0


if __name__ == "__main__":
    sys.exit(main())
