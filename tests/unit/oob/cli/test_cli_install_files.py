"""`install-files`, and what it makes of the parser: the man page and the completions."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vfiouser_agents import extras
from vfiouser_oob.cli.generated import COMPLETIONS, MAN, completion, generated
from vfiouser_oob.cli.main import COMMANDS, build_parser, main
from vfiouser_oob.cli.shipped import shipped, source

ROOT = Path(__file__).resolve().parents[4]
SYNTAX = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """The whole parser."""
    return build_parser(whole=True)


def files_below(root: Path) -> dict[str, int]:
    """Every file below a root, with its permission bits."""
    return {str(path.relative_to(root)): path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()}


def test_lay_out_and_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each file goes where it is looked for; a second run does nothing; removing leaves the configuration alone."""
    command = ["install-files", "--root", str(tmp_path), "--command", "/opt/x/bin/vfiouser-oob"]
    assert 0 == main(command)
    assert len(files_below(tmp_path)) == capsys.readouterr().out.count("wrote ")
    found = files_below(tmp_path)
    for name in (
        "lib/systemd/system/vfiouser-oob@.socket",
        "lib/sysusers.d/vfiouser-oob.conf",
        MAN,
        *COMPLETIONS.values(),
    ):
        assert 0o644 == found[f"usr/local/{name}"]
    unit = (tmp_path / "usr/local/lib/systemd/system/vfiouser-oob.service").read_text()
    assert "ExecStart=/opt/x/bin/vfiouser-oob serve" in unit
    config = tmp_path / "etc/vfiouser-oob/config.toml"
    config.write_text("# mine\n")
    assert 0 == main(command)
    assert "" == capsys.readouterr().out
    assert "# mine\n" == config.read_text()
    assert 0 == main([*command, "--remove"])
    assert {"etc/vfiouser-oob/config.toml"} == files_below(tmp_path).keys()
    assert [tmp_path / "etc/vfiouser-oob"] == [path for path in tmp_path.rglob("*oob*") if path.is_dir()]
    assert (tmp_path / "usr/local/lib/systemd/system").is_dir()


def test_a_dry_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what would be done."""
    assert 0 == main(["install-files", "--root", str(tmp_path), "--prefix", "/usr", "--dry-run"])
    assert f"would write {tmp_path}/usr/lib/systemd/system/vfiouser-oob.service\n" in capsys.readouterr().out
    assert {} == files_below(tmp_path)


def test_without_what_makes_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything else is laid out, and one line names the command that installs it."""
    monkeypatch.setattr(extras, "_is_there", lambda module: False)
    assert 0 == main(["install-files", "--root", str(tmp_path)])
    assert "-m pip install 'vfiouser-oob[package]'" in capsys.readouterr().err
    assert not (tmp_path / "usr/local/share/man").exists()
    assert (tmp_path / "usr/local/lib/systemd/system/vfiouser-oob.service").exists()


def test_everything_in_packaging_is_shipped() -> None:
    """But for what builds the packages and images themselves."""
    assert ROOT / "packaging" == source()
    sources = {path for path in (ROOT / "packaging").rglob("*") if path.is_file()}
    builders = {path for path in sources if "debian" in path.parts or path.name == "Containerfile"}
    contents = [file.content for file in shipped("usr", "/usr/bin/vfiouser-oob")]
    assert [] == [path for path in sources - builders if path.read_bytes() not in contents]


def test_the_man_page(parser: argparse.ArgumentParser) -> None:
    """It names every command and every option, and groff finds nothing wrong with it."""
    [page] = [file.content.decode() for file in generated(parser, "usr") if file.target.name.endswith(".1")]
    plain = page.replace("\\-", "-")
    for entry in COMMANDS:
        assert f"vfiouser-oob {entry.name}" in plain
    for option in ("--reply-budget", "--state-size", "--destination-socket", "--dry-run"):
        assert option in plain
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-Kutf8", "-z"], input=page, capture_output=True, text=True, check=False
        )
        assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_completions(parser: argparse.ArgumentParser, shell: str, tmp_path: Path) -> None:
    """Each knows every command and the options, and its shell takes it."""
    text = completion(parser, shell)
    for entry in COMMANDS:
        assert re.search(rf"\b{entry.name}\b", text)
    assert "reply-budget" in text
    if shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(text)
        done = subprocess.run([*SYNTAX[shell], str(path)], capture_output=True, text=True, check=False)
        assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vfiouser-oob", "check"], {"check-config"}),
        (["vfiouser-oob", "demo", "--no"], {"--no-migration"}),
        (["vfiouser-oob", "serve", "--log-level", "w"], {"warning"}),
    ],
)
def test_bash_completes(parser: argparse.ArgumentParser, words: list[str], expected: set[str]) -> None:
    """A real bash offers what the parser has."""
    script = completion(parser, "bash") + (
        f"\nCOMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        "_shtab_vfiouser_oob; printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True, check=True)
    assert expected == {line.strip() for line in done.stdout.split()}
