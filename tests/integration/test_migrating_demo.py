"""`demo` as a user runs it: two hosts, migrations under I/O in both generations, one clear line when something fails,
nothing left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--size=4M", "--state-size=1M")


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demonstration with its temporary files below a directory of ours."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TMPDIR": str(directory),
    }
    command = [sys.executable, "-m", "vfiouser_oob", "demo", *SMALL, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as place:
        yield Path(place)


@pytest.mark.parametrize(("doorbells", "functions"), [("trapped", 1), ("polled", 2)])
def test_demo_migrates_there_and_back(short_path: Path, doorbells: str, functions: int) -> None:
    """Every command is executed exactly once, all data is right, dirty pages are carried, nothing is left behind."""
    demo = start(short_path, "--json", f"--functions={functions}", f"--doorbells={doorbells}")
    output, errors = demo.communicate(timeout=150)
    assert 0 == demo.returncode, errors
    result = json.loads(output)
    assert result["ok"]
    assert [f"f{number}" for number in range(functions)] == [function["name"] for function in result["functions"]]
    for function in result["functions"]:
        assert [("A", "B", "v1"), ("B", "A", "v2")] == [
            (leg["source"], leg["destination"], leg["generation"]) for leg in function["legs"]
        ]
        for leg in function["legs"]:
            assert 1 << 20 < sum(leg["state_bytes"].values())
            assert leg["state_bytes"]["stop-copy"]
            assert leg["memory_equal"]
            assert 0 < leg["dirty_by_device"]
            assert 0 < leg["in_flight"]
            assert 0 < leg["commands_after"]
            assert 0 < leg["downtime_s"] < 30
        assert (function["writes"], function["reads"]) == (function["device_writes"], function["device_reads"])
        assert 0 == function["mismatches"]
        assert function["verified"] >= 512 * function["writes"]
        assert all(function["interrupts"])
    assert [] == os.listdir(short_path)


def test_data_that_is_spoiled_is_noticed(short_path: Path) -> None:
    """What is called verified was: with somebody else writing to the disk, the demonstration fails and says why."""
    demo = start(short_path, "--json")
    while demo.poll() is None:
        with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
            for image in short_path.glob("*/disk.img"):
                with image.open("r+b", buffering=0) as file:
                    file.write(bytes(4 << 20))
            demo.wait(0.01)
    output, errors = demo.communicate(timeout=10)
    assert 1 == demo.returncode
    result = json.loads(output)
    (function,) = result["functions"]
    assert (False, False) == (result["ok"], function["ok"])
    assert 0 < function["mismatches"]
    assert f"{function['mismatches']} reads brought wrong data" in function["error"]
    assert "brought wrong data" in errors.splitlines()[-1]
    assert [] == os.listdir(short_path)


def test_demo_shows_phases_and_a_summary(short_path: Path) -> None:
    """Without a terminal there is one line per phase of each migration, then a table, then the verdict; and the page
    that shows such a run is true, numbers aside.
    """
    tool = runpy.run_path(str(ROOT / "tools" / "demo_page.py"))
    demo = start(short_path)
    output, errors = demo.communicate(timeout=150)
    assert (0, "") == (demo.returncode, errors)
    for way in ("A→B v1", "B→A v2"):
        seen = re.findall(rf"^f0 {way}  \[[#.]+\] +\d+%  (\S+)", output, re.MULTILINE)
        assert ["setup", "pre-copy", "stop", "stop-copy", "switch", "done"] == seen
    assert re.search(r"^f0 +A→B v1 .* ms +\d+ I/O$", output, re.MULTILINE)
    assert "each executed exactly once" in output.splitlines()[-1]
    assert tool["shape"](tool["shown"](tool["PAGE"].read_text())) == tool["shape"](output)


def gone(pid: int) -> bool:
    """Whether no process has this id any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("victim", "name"),
    [
        (r"host A: simulator is ready, pid (\d+)", "simulate-soc-A"),
        (r"host B: .*daemon is ready, pid (\d+)", "serve-B"),
    ],
)
def test_process_that_dies_is_named(short_path: Path, victim: str, name: str) -> None:
    """When a process of either host is killed, the demonstration fails with one line that says so."""
    demo = start(short_path, "--state-size=256M")
    assert demo.stdout is not None
    seen = ""
    for line in demo.stdout:
        seen += line
        if "pre-copy" in line:
            break
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", seen)]
    found = re.search(victim, seen)
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    _, errors = demo.communicate(timeout=60)
    assert 1 == demo.returncode
    assert f"vfiouser-oob: the demo failed: {name} was killed by SIGKILL\n" == errors
    assert 4 == len(pids)
    assert all(gone(pid) for pid in pids)
    assert [] == os.listdir(short_path)


def test_certificates_need_their_package(short_path: Path) -> None:
    """Without the package that makes certificates, one line says what to install and how to do without."""
    (short_path / "none").mkdir()
    (short_path / "none" / "trustme.py").write_text("raise ImportError('not here')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(short_path / "none"), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "vfiouser_oob", "demo", "--json"]
    demo = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert 1 == demo.returncode
    result = json.loads(demo.stdout)
    assert not result["ok"]
    assert "vfiouser-oob[demo]" in result["error"]
    assert "--no-migration" in demo.stderr.splitlines()[-1]
