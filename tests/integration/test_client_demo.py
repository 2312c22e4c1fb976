"""`demo --no-migration` as a user runs it: real processes, verified data, one clear line when something fails, nothing
left behind.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demonstration with its temporary files below a directory of ours."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TMPDIR": str(directory),
    }
    command = [sys.executable, "-m", "vfiouser_oob", "demo", "--no-migration", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as place:
        yield Path(place)


@pytest.mark.slow
@pytest.mark.parametrize("doorbells", ["trapped", "polled"])
def test_demo_verifies_its_data(short_path: Path, doorbells: str) -> None:
    """Every function's namespace is written and read back equal, interrupts arrive, nothing is left behind."""
    demo = start(short_path, "--json", "--size=2M", "--functions=2", f"--doorbells={doorbells}")
    output, errors = demo.communicate(timeout=100)
    assert 0 == demo.returncode, errors
    result = json.loads(output)
    assert result["ok"]
    assert ["f0", "f1"] == [function["name"] for function in result["functions"]]
    for function in result["functions"]:
        assert 2 << 20 == function["verified"] == function["written"]
        assert function["sha256_written"] == function["sha256_read"]
        assert all(function["interrupts"])
        assert function["survived_reset"]
        # Polled doorbells are stores to shared memory; trapped ones are messages.
        assert (doorbells == "polled") == (function["direct"] > 0)
    assert result["functions"][0]["sha256_read"] != result["functions"][1]["sha256_read"]
    assert [] == os.listdir(short_path)


def read_until(demo: subprocess.Popen[str], text: str) -> str:
    """Read progress lines up to the one with a text."""
    assert demo.stdout is not None
    seen = ""
    for line in demo.stdout:
        seen += line
        if text in line:
            break
    return seen


def gone(pid: int) -> bool:
    """Whether no process has this id any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("victim", "name"), [("simulator", "simulate-soc"), ("daemon", "serve")])
def test_process_that_dies_is_named(short_path: Path, victim: str, name: str) -> None:
    """When simulator or daemon is killed in the middle, the demonstration fails with one line that says so."""
    demo = start(short_path, "--size=256M")
    seen = read_until(demo, "blocks of")
    pids = {who: int(pid) for who, pid in re.findall(r"\((\w+) is ready, pid (\d+)\)", seen)}
    os.kill(pids[victim], signal.SIGKILL)
    _, errors = demo.communicate(timeout=60)
    assert 1 == demo.returncode
    assert f"vfiouser-oob: the demo failed: {name} was killed by SIGKILL\n" == errors
    assert all(gone(pid) for pid in pids.values())
    assert [] == os.listdir(short_path)


@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_cleans_up(short_path: Path, number: signal.Signals, inherited: signal.Handlers) -> None:
    """Ctrl-C and SIGTERM end the demonstration and both of its processes, and remove its files.

    Also when a script's shell started it in the background, where it begins with SIGINT ignored.
    """
    before = signal.signal(signal.SIGINT, inherited)
    try:
        demo = start(short_path, "--size=256M")
    finally:
        signal.signal(signal.SIGINT, before)
    seen = read_until(demo, "blocks of")
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", seen)]
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=60)
    assert 1 == demo.returncode
    assert "vfiouser-oob: the demo failed: interrupted\n" == errors
    assert 2 == len(pids)
    assert all(gone(pid) for pid in pids)
    assert [] == os.listdir(short_path)


def test_bad_option_is_one_line(short_path: Path) -> None:
    """A size that is no multiple of the block size is a usage error."""
    demo = start(short_path, "--size=1000")
    _, errors = demo.communicate(timeout=60)
    assert 2 == demo.returncode
    assert 1 == len(errors.splitlines())
