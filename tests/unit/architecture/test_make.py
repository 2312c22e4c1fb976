"""The ways in: make's targets, and the bootstrap on machines that lack this or that."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
TARGETS = (
    "help",
    "demo",
    "demo-vm",
    "guest",
    "test",
    "test-fast",
    "test-vm-long",
    "check",
    "conformance",
    "fuzz",
    "bench",
    "scale",
    "vm-assets",
    "proto",
    "deb",
    "oci",
    "docs",
    "pages",
    "clean",
)
MAKE = shutil.which("make") or "make"
README_COMMANDS = ("make demo", "make test")


@pytest.fixture
def bootstrap() -> ModuleType:
    """The bootstrap script as a module of its own for each test."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str, commands: bool = True) -> None:
    """Make this Python look as if it came without these modules (and the machine without virtualenv)."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name in modules else find_spec(name, package)
    )
    if commands:
        monkeypatch.setattr(shutil, "which", lambda name: None)


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would, even when the tests themselves were started by make."""
    environ = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    environ |= environment
    return subprocess.run([MAKE, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_make_alone_lists_the_targets() -> None:
    """`make` prints each target with what it does, one line each, and does nothing else."""
    done = make()
    assert 0 == done.returncode
    lines = [line.split(None, 1) for line in done.stdout.splitlines()]
    assert TARGETS == tuple(name for name, _ in lines)
    assert all(text for _, text in lines)


@pytest.mark.parametrize("target", [*TARGETS, "venv", "venv-dev"])
def test_targets_can_be_planned(target: str) -> None:
    """make finds a rule for everything that each target needs."""
    done = make("--dry-run", target)
    assert (0, "") == (done.returncode, done.stderr)


def test_what_is_compiled_is_kept() -> None:
    """Whatever the environment says, programs that tests start hundreds of times are not compiled each time."""
    show = "show: ; @echo kept=$${PYTHONDONTWRITEBYTECODE-yes}"
    done = make(f"--eval={show}", "show", PYTHONDONTWRITEBYTECODE="1")
    assert (0, "kept=yes\n", "") == (done.returncode, done.stdout, done.stderr)


def test_guests_and_attacks_run_after_the_other_tests() -> None:
    """Each test is in one of three parts; a guest has a processor, and nothing runs beside an attack."""
    plan = make("--dry-run", "test", "JOBS=4", "GUESTS=2").stdout
    parts = [line for line in plan.splitlines() if '-m "' in line]
    selected = ["not (long or vm or hostile)", "vm and not long", "hostile and not long"]
    assert selected == [line.split('"')[1] for line in parts]
    beside = [" ".join(re.findall(r"-n \d+|--dist \w+", line)) for line in parts]
    assert ["-n 4 --dist worksteal", "-n 2 --dist loadfile", ""] == beside


@pytest.mark.parametrize(("mark", "folder"), [("vm", "tests/vm"), ("hostile", "tests/hostile")])
def test_guests_and_attacks_are_where_they_are_looked_for(mark: str, folder: str) -> None:
    """The part of the run that is theirs collects no other folder, which would take as long as some guests."""
    use = re.compile(rf"mark\.{mark}\b")
    marked = {path.parent for path in ROOT.glob("tests/**/test_*.py") if use.search(path.read_text())}
    assert {ROOT / folder} == marked
    plan = make("--dry-run", "test").stdout
    assert any(f"testpaths={folder} " in line and f'"{mark} ' in line for line in plan.splitlines())


def test_the_readme_names_its_two_commands() -> None:
    """What the README tells a newcomer to type are targets that exist."""
    text = (ROOT / "README.md").read_text()
    for command in README_COMMANDS:
        assert f"\n{command}\n" in text
        assert command.split()[1] in TARGETS


@pytest.mark.parametrize(("builder", "format_"), [("podman", True), ("buildah", True), ("docker", False)])
def test_an_image_keeps_its_health_check(tmp_path: Path, builder: str, format_: bool) -> None:
    """podman and buildah are asked for Docker's format, since the other one has none; docker knows no such option."""
    program = tmp_path / builder
    program.write_text('#!/bin/sh\necho "asked: $*"\n')
    program.chmod(0o755)
    done = make("oci", PATH=str(tmp_path))
    wanted = "--format docker " if format_ else ""
    assert f"asked: build {wanted}-t vfiouser-oob -f packaging/Containerfile ." in done.stdout.splitlines()


def test_ci_runs_check_and_all_tests() -> None:
    """The CI script checks, builds the site and runs all tests, and stops at the first failure."""
    text = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in text
    assert text.endswith("make check\nmake docs\nmake test\n")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_bootstrap_with_ensurepip(bootstrap: ModuleType) -> None:
    """A complete Python makes the environment by itself, and the environment's own pip installs."""
    make, install = bootstrap.ways()
    assert [sys.executable, "-m", "venv"] == make[:-1]
    assert install[0].endswith("/.venv/bin/python")


def test_bootstrap_without_ensurepip(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's Python without python3-venv makes an environment without pip; the system's pip installs into it."""
    hide(monkeypatch, "ensurepip")
    monkeypatch.setattr(bootstrap, "pip_version", lambda: (23, 0))
    make, install = bootstrap.ways()
    assert "--without-pip" in make
    assert [sys.executable, "-m", "pip", "--python"] == install[:-1]


@pytest.mark.parametrize("pip", [(22, 2), (0,)])
def test_bootstrap_by_virtualenv(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, pip: tuple[int, ...]) -> None:
    """With a pip that is too old, or none, virtualenv does it."""
    hide(monkeypatch, "ensurepip", commands=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(bootstrap, "pip_version", lambda: pip)
    make, _ = bootstrap.ways()
    assert "/usr/bin/virtualenv" == make[0]


def test_bootstrap_names_the_missing_package(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing works, one line names the package to install, and nothing is made."""
    hide(monkeypatch, "ensurepip", "pip")
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / ".venv" / "bootstrap.json")
    assert 1 == bootstrap.main([])
    assert "`apt install python3-venv`" in capsys.readouterr().err
    assert not (tmp_path / ".venv").exists()


def test_bootstrap_is_over_at_once_when_nothing_changed(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A finished environment with at least the wanted extras is left alone; a change of the project is not missed."""
    stamp = tmp_path / "bootstrap.json"
    monkeypatch.setattr(bootstrap, "STAMP", stamp)
    stamp.write_text(json.dumps({"key": bootstrap.fingerprint(), "extras": ["check", "test"]}))
    monkeypatch.setattr(bootstrap, "installer", lambda **_: pytest.fail("nothing was to be installed"))
    assert 0 == bootstrap.main(["--extra", "test"])
    assert bootstrap.finished_extras("another project") is None
    stamp.write_text("{")
    assert bootstrap.finished_extras(bootstrap.fingerprint()) is None


def test_pip_version(bootstrap: ModuleType) -> None:
    """The version of a pip that is there is read right."""
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, text=True, check=False)
    found = bootstrap.pip_version()
    if done.returncode:
        assert (0,) == found
    else:
        assert done.stdout.split()[1].startswith(".".join(map(str, found)))
