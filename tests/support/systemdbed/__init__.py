"""A real systemd for tests: a user manager with nothing but a test's units, in namespaces of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import trio

SYSTEMD = Path("/lib/systemd/systemd")
#: Hierarchies in which a manager makes groups of its own; it gets one to itself in each that there is.
CGROUPS = (Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
# A manager refuses to run where the machine was not booted with systemd, and looks for this directory.
_START = """
for group in $GROUPS; do echo $$ > $group/cgroup.procs || exit 1; done
exec unshare --mount --pid --fork --kill-child --mount-proc sh -c '
    mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system || exit 1
    env -i PATH="$PATH" HOME="$PLACE" XDG_RUNTIME_DIR="$PLACE/run" SYSTEMD_UNIT_PATH="$PLACE/units" "$SYSTEMD" --user
    exit $?  # process 1 cannot be a user manager
'
"""


def why_not() -> str | None:
    """Why there can be no manager here; None if there can."""
    if os.geteuid():
        return "a manager of its own needs root"
    if not SYSTEMD.exists() or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return "there is no systemd, or no util-linux"
    if not any(os.access(place / "cgroup.procs", os.W_OK) for place in CGROUPS):
        return "control groups cannot be made"
    return None


class Manager:
    """A manager that runs.

    Args:
        place: its directory, with units in `units`.
        process: what holds its namespaces.
    """

    def __init__(self, place: Path, process: subprocess.Popen[bytes]) -> None:
        self._place = place
        self._process = process

    def ctl(self, *arguments: str, check: bool = True) -> str:
        """Run `systemctl --user`; returns what it prints."""
        (child,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        done = subprocess.run(
            ["nsenter", "-t", child, "-m", "-p", "systemctl", "--user", "--no-pager", *arguments],
            env={"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self._place / "run")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextmanager
def running(place: Path, units: dict[str, str]) -> Iterator[Manager]:
    """A manager with these units.

    Args:
        place: an empty directory.
        units: their texts by file name.
    """
    (place / "units").mkdir()
    (place / "run").mkdir(mode=0o700)
    targets = {f"{name}.target": f"[Unit]\nDescription={name}\n" for name in ("default", "basic", "shutdown")}
    for name, text in {**targets, **units}.items():
        (place / "units" / name).write_text(text)
    groups = [at / f"vfiouser-test-{os.getpid()}" for at in CGROUPS if os.access(at / "cgroup.procs", os.W_OK)]
    for group in groups:
        group.mkdir()
    environ = {
        "PATH": os.environ["PATH"],
        "PLACE": str(place),
        "SYSTEMD": str(SYSTEMD),
        "GROUPS": " ".join(map(str, groups)),
    }
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(["sh", "-c", _START], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        manager = Manager(place, process)
        _wait_for(place / "run" / "systemd" / "private", process)
        yield manager
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        for group in groups:
            _remove(group)


@asynccontextmanager
async def started(place: Path, units: dict[str, str], service: str) -> AsyncIterator[Manager]:
    """The same beside other tasks, once a service is up.

    Args:
        place: an empty directory.
        units: their texts by file name.
        service: the unit to start.
    """
    beginning = running(place, units)
    manager = await trio.to_thread.run_sync(beginning.__enter__)
    try:
        await trio.to_thread.run_sync(manager.ctl, "start", service)
        yield manager
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(partial(beginning.__exit__, None, None, None))


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file is there; the manager tells nobody of it."""
    for _ in range(1000):
        if path.exists():
            return
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the manager did not start: {(path.parents[2] / 'log').read_text()}")


def _remove(group: Path) -> None:
    """Remove a control group, and those in it, as soon as the last process in them is gone."""
    for path in sorted(group.rglob("*"), reverse=True):
        if path.is_dir():
            _remove_one(path)
    _remove_one(group)


def _remove_one(group: Path) -> None:
    for _ in range(500):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.02)
        else:
            return
