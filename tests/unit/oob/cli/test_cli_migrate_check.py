"""`migrate-check`: how another host is asked, and how people are told. The rest is tested with a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vfiouser_oob.cli.main import main
from vfiouser_oob.cli.migrate_check import told
from vfiouser_oob.vm.counterpart import VmOffer

OFFER = json.dumps(VmOffer("web", ("dbus-vmstate",), {}).to_document())


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        (f"echo '{OFFER}'", 1, "no daemon answers"),
        ("echo nonsense", 2, "host there: it is not JSON"),
        ("echo 'there is no VM' >&2; exit 1", 1, "host there: there is no VM"),
        ("exit 255", 1, "host there: ssh ended with 255"),
    ],
)
def test_another_host_is_asked_by_ssh(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    script: str,
    code: int,
    words: str,
) -> None:
    """With the same command; what cannot be used is told from what it says."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n{script}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    argv = ["migrate-check", "web", "--destination", "there", "--control-socket", str(tmp_path / "none")]
    assert main(argv) == code
    assert words in capsys.readouterr().err
    asked = (tmp_path / "asked").read_text()
    assert asked == "-o BatchMode=yes -- there vfiouser-oob migrate-check web --export -\n"


def test_without_ssh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """There is another way, which is told."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["migrate-check", "web", "--destination", "there", "--control-socket", str(tmp_path / "none")]) == 1
    assert "give a file that `migrate-check --export FILE` wrote there" in capsys.readouterr().err


def test_what_people_are_told() -> None:
    """The verdict first; what is in the way is told from what is to be minded."""
    reasons = [
        {"code": "a", "text": "It is old.", "weight": "refused"},
        {"code": "b", "text": "So so.", "weight": "advice"},
    ]
    assert told({"vm": "web", "migratable": False, "reasons": reasons}) == (
        "VM web would not migrate\n  no: It is old.\n  mind: So so."
    )
    assert told({"vm": "web", "migratable": True, "reasons": []}) == "VM web would migrate"
