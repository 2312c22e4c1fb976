"""Make `.venv`: a virtual environment with this checkout installed into it, ready to run and to test.

    python3 tools/bootstrap.py [--extra test] [--extra check]

It needs nothing but Python 3.11. Where Debian's Python comes without ensurepip, it goes on with the system's
pip or with virtualenv, whichever is there. Packages come from wherever this machine's pip configuration says.
A second run with nothing changed is over at once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "bootstrap.json"
MINIMUM = (3, 11)
# From this version on pip can install into another interpreter's environment (`pip --python`).
PIP_MINIMUM = (22, 3)
# Twice quiet: errors only. A package source that lacks a package is no news where several are configured.
PIP_OPTIONS = ("--quiet", "--quiet", "--disable-pip-version-check")


class BootstrapError(Exception):
    """The environment cannot be made; the message says what to install."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make or update the environment; return the exit code."""
    parser = argparse.ArgumentParser(description="Make .venv with this checkout in it.")
    parser.add_argument("--extra", action="append", default=[], help="optional dependencies to add")
    extras = set(parser.parse_args(argv).extra)
    if sys.version_info < MINIMUM:
        found = sys.version.split()[0]
        print(f"bootstrap: Python 3.11 or later is needed, this is {found} (PYTHON=… chooses)", file=sys.stderr)
        return 1
    key = fingerprint()
    done = finished_extras(key)
    if done is not None and extras <= done:
        return 0
    try:
        install = installer(fresh=done is None)
        extras |= done or set()
        wanted = f".[{','.join(sorted(extras))}]" if extras else "."
        print(f"bootstrap: installing {wanted} and what it needs into {VENV.relative_to(ROOT)}", flush=True)
        run([*install, "install", *PIP_OPTIONS, "--editable", wanted])
    except BootstrapError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(json.dumps({"key": key, "extras": sorted(extras)}))
    return 0


def fingerprint() -> str:
    """What the environment depends on: the project's metadata and the interpreter."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update((ROOT / "vfiouser_oob" / "_version.py").read_bytes())
    digest.update(f"{sys.executable} {sys.version} {ROOT}".encode())
    return digest.hexdigest()


def finished_extras(key: str) -> set[str] | None:
    """The extras of an environment that is up to date; None when there is none."""
    try:
        stamp = json.loads(STAMP.read_text())
        return set(stamp["extras"]) if stamp["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def installer(*, fresh: bool) -> list[str]:
    """The words of a pip command that installs into the environment.

    Args:
        fresh: make the environment anew first.
    """
    make, install = ways()
    if fresh:
        shutil.rmtree(VENV, ignore_errors=True)
        run(make)
    return install


def ways() -> tuple[list[str], list[str]]:
    """How this machine can make an environment, and how it can install into it."""
    python = str(VENV / "bin" / "python")
    if importlib.util.find_spec("ensurepip") is not None:
        return [sys.executable, "-m", "venv", str(VENV)], [python, "-m", "pip"]
    if importlib.util.find_spec("venv") is not None and pip_version() >= PIP_MINIMUM:
        make = [sys.executable, "-m", "venv", "--without-pip", str(VENV)]
        return make, [sys.executable, "-m", "pip", "--python", python]
    virtualenv = shutil.which("virtualenv")
    if virtualenv is not None:
        return [virtualenv, "--quiet", "--python", sys.executable, str(VENV)], [python, "-m", "pip"]
    raise BootstrapError("this Python has neither ensurepip nor pip; `apt install python3-venv` mends that")


def pip_version() -> tuple[int, ...]:
    """The version of this interpreter's pip; (0,) when it has none."""
    if importlib.util.find_spec("pip") is None:
        return (0,)
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    numbers = words[1].split(".") if len(words) > 1 else []
    return tuple(int(number) for number in numbers[:2] if number.isdecimal()) or (0,)


def run(command: Sequence[str]) -> None:
    """Run a step; its own output explains a failure."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise BootstrapError(f"`{' '.join(command)}` failed with exit code {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
