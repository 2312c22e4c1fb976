"""The third-party adapter of the examples: built, installed beside us, tested by its own tests, and used."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "third-party-adapter"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed, from the wheel that its pyproject makes."""
    place = tmp_path_factory.mktemp("acme")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(command, cwd=EXAMPLE, check=True, capture_output=True)
    [wheel] = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    paths = [str(place / "site"), *(str(ROOT / part) for part in ("", "protocol", "agents"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_its_own_tests_pass(environment: dict[str, str]) -> None:
    """The example's tests pass, against us as we are."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(EXAMPLE), str(EXAMPLE)]
    done = subprocess.run(command, cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout
    assert "3 passed" in done.stdout


def test_the_daemon_finds_it(environment: dict[str, str], tmp_path: Path) -> None:
    """A configuration with its kind is accepted, one with a wrong option is not, and the kind is listed."""
    config = tmp_path / "config.toml"
    device = 'device = { kind = "vfio-user", socket = "/run/soc/a.sock" }'
    function = f'[[function]]\nname = "a"\nsocket = "/run/a.sock"\n{device}\nagent = {{ '
    for agent, code in [
        ('kind = "acme", address = "unix:///run/acme.sock", function = "disk0" }', 0),
        ('kind = "acme", colour = "red", function = "disk0" }', 2),
        ('kind = "acmee", function = "disk0" }', 2),
    ]:
        config.write_text(f"{function}{agent}\n")
        command = [sys.executable, "-m", "vfiouser_oob", "check-config", str(config)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert code == done.returncode, done.stderr
    assert "did you mean 'acme'?" in done.stderr


def test_agent_check_runs_against_it(environment: dict[str, str], tmp_path: Path) -> None:
    """`agent-check --agent acme:…` proves it as any other."""
    path = tmp_path / "acme.sock"
    with subprocess.Popen(
        [sys.executable, str(EXAMPLE / "tests" / "acme_server.py"), str(path)], env=environment
    ) as server:
        try:
            command = [sys.executable, "-m", "vfiouser_oob", "agent-check", "--agent", f"acme:unix://{path}"]
            while not path.exists():
                assert server.poll() is None
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        finally:
            server.kill()
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "0 failed" in done.stdout


def test_it_is_short() -> None:
    """What a vendor has to write is less than 150 lines."""
    lines = [line for path in (EXAMPLE / "src").rglob("*.py") for line in path.read_text().splitlines()]
    assert len(lines) < 150
