"""What `--help` says: the texts as they are kept, and the rules that each of them obeys."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from vfiouser_oob.cli import main as cli
from vfiouser_oob.cli.examples import EXAMPLES
from vfiouser_oob.cli.parser import OneLineParser

ROOT = Path(__file__).resolve().parents[4]
NAMES = [entry.name for entry in cli.COMMANDS]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The tool that writes the texts."""
    spec = importlib.util.spec_from_file_location("help_texts", ROOT / "tools" / "help_texts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    parser = cli.build_parser(name)
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found: argparse.ArgumentParser = commands.choices[name]
    return found


def body(text: str) -> str:
    """A text whose usages are on one line: how they are folded differs between Pythons."""
    return re.sub(r"usage: .*?\n\n", lambda match: " ".join(match[0].split()) + "\n", text, flags=re.DOTALL)


@pytest.mark.parametrize("width", [80, 120])
def test_the_texts(maker: ModuleType, width: int) -> None:
    """They are those that are kept; `make pages` writes them."""
    assert body(maker.target(width).read_text()) == body(maker.help_text(width))


@pytest.mark.parametrize("width", [80, 120])
def test_they_fit(maker: ModuleType, width: int) -> None:
    """No line is wider than the terminal, but for usages, which argparse folds; no word is broken at a hyphen."""
    text = body(maker.help_text(width))
    usages = [line for line in text.splitlines() if line.startswith("usage: ")]
    assert len(NAMES) + 1 == len(usages)
    assert [] == [line for line in text.splitlines() if len(line) > width and line not in usages]
    assert [] == re.findall(r"[a-z]-\n", text)
    assert text.count("msgpack-rpc:") == len(re.findall(r"msgpack-rpc:\S", text))


@pytest.mark.parametrize("name", NAMES)
def test_every_default_is_told(name: str) -> None:
    """Each option that counts when it is not given says so."""
    text = " ".join(command(name).format_help().split())
    for action in command(name)._actions:
        if action.option_strings and action.nargs != 0 and not action.required and action.default is not None:
            start = text.index(action.option_strings[-1] + " ", text.index("options:"))
            assert "(default: " in text[start : start + 400], action.option_strings


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_an_example(name: str) -> None:
    """It stands at the end of the help, and the command takes it."""
    words = shlex.split(EXAMPLES[name])
    assert name == words[0]
    assert f"\nexample:\n  vfiouser-oob {EXAMPLES[name]}\n" in command(name).format_help()
    assert name == cli.parse(words).command


def test_acronyms_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A summary becomes a sentence by its first letter alone."""
    assert "Play an IPU/DPU with NVMe functions." in command("simulate-soc").format_help()
    assert "Bind a PCI function to vfio-pci." in command("bind").format_help()
    assert "Print what a VMM needs" in command("snippet").format_help()


def test_nothing_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The bare command explains itself."""
    with pytest.raises(SystemExit) as end:
        cli.main([])
    captured = capsys.readouterr()
    assert (0, "") == (end.value.code, captured.err)
    assert captured.out == cli.build_parser().format_help()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["srve"], "vfiouser-oob: there is no command 'srve'; did you mean serve? (see vfiouser-oob --help)"),
        (["zzz"], "vfiouser-oob: there is no command 'zzz' (see vfiouser-oob --help)"),
        (
            ["serve", "--devise=x"],
            "there is no option --devise; did you mean --device? (see vfiouser-oob serve --help)",
        ),
        (["simulate-soc", "--socketdir", "x"], "there is no option --socketdir; did you mean --socket-dir?"),
        (["status", "--nothing-like-it"], "there is no option --nothing-like-it (see"),
    ],
)
def test_did_you_mean(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    """What is nearly right is told how to be right, before anything else that is wrong."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert (2, 1) == (end.value.code, captured.err.count("\n"))
    assert told in captured.err


def test_what_is_not_ours_is_left_alone() -> None:
    """Options of the command that `keep` runs, words after `--`, and abbreviations are no mistakes."""
    assert ["--", "sleep", "--unknown"] == cli.parse(["keep", "--", "sleep", "--unknown"]).argv
    assert cli.parse(["demo", "--no-migr"]).no_migration
    parser = OneLineParser(prog="x")
    parser.check_options(["--", "--unknown"])
