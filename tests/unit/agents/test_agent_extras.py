"""What is not installed is named before anything starts, with the command that installs it."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from vfiouser_agents.extras import EXTRAS, missing
from vfiouser_oob.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
GRPC = f"{sys.executable} -m pip install 'vfiouser-oob[grpc]'"
DEMO = f"{sys.executable} -m pip install 'vfiouser-oob[demo]'"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python with none of the extras."""
    hidden = {module for modules in EXTRAS.values() for module in modules}
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        if name == "google.protobuf":
            raise ModuleNotFoundError(name)
        return None if name in hidden else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_all_is_here() -> None:
    """The environment of the tests has every extra."""
    assert {None} == {missing(extra) for extra in EXTRAS}


def test_the_packages_are_those_of_the_project() -> None:
    """An extra of pyproject.toml that is looked for consists of exactly these packages."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert set(modules.values()) == {requirement.split(">")[0] for requirement in declared[extra]}


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ["serve", "--socket-path", "/nowhere/s", "--device", "model:test", "--agent", "grpc:unix:///a,function=f"],
            GRPC,
        ),
        (["simulate-soc", "--socket-dir", "/nowhere/soc", "--agent-protocol", "grpc"], GRPC),
        (["demo"], DEMO),
        (["demo", "--agent", "grpc", "--json"], DEMO),
    ],
)
def test_a_missing_extra(arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and nothing was started."""
    assert 2 == main(arguments)
    captured = capsys.readouterr()
    assert ("", 1) == (captured.out, captured.err.count("\n"))
    assert "not installed; install with: " + command in captured.err


@pytest.mark.usefixtures("bare")
def test_check_config_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the line of the file."""
    path = tmp_path / "c.toml"
    path.write_text(
        '[[function]]\nname = "f"\nsocket = "/run/f.sock"\ndevice = { kind = "model", model = "test" }\n'
        'agent = { kind = "grpc", address = "unix:///a", function = "f" }\n'
    )
    assert 2 == main(["check-config", str(path)])
    assert f"{path}:5: " in (told := capsys.readouterr().err)
    assert GRPC in told
