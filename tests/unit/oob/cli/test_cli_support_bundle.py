"""A support bundle: what is in it, and what must not be."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from vfiouser_oob.cli.bundle_parts import MOST_BYTES, configuration, last_logs, part, records, without_secrets
from vfiouser_oob.cli.main import main
from vfiouser_oob.persist.journal.journal import Journal
from vfiouser_oob.persist.successor.things import FunctionThing

CONFIG = """
# the password is hunter2
[daemon]
log_level = "info"
[[function]]
name = "f0"
socket = "/run/f0.sock"
device = { kind = "model", model = "nvme", size = "64M" }
agent = { kind = "jsonrpc", address = "tcp://me:hunter2@soc:1", function = "f0", password = "hunter2", tls = { key = "k.pem" }, headers = [{ auth_token = "hunter2" }] }
"""  # noqa: E501


def test_the_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a daemon there is a bundle all the same, which says so; only its owner may read it."""
    config, bundle = tmp_path / "c.toml", tmp_path / "b.tar.gz"
    config.write_text(CONFIG)
    arguments = ["support-bundle", "--config", str(config), "--output", str(bundle), "--control-socket", "/gone"]
    assert 0 == main(arguments)
    assert 0o600 == bundle.stat().st_mode & 0o777
    with tarfile.open(bundle) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers()}
        texts = {}
        for name, member in members.items():
            file = archive.extractfile(member)
            assert file is not None
            texts[name] = file.read().decode()
    assert {"LISTING.txt", "versions.json", "config.json", "status.txt", "log.txt"} == set(texts)
    assert not [name for name, text in texts.items() if "hunter2" in text]
    assert "no daemon answers at /gone" in texts["status.txt"]
    kept = json.loads(texts["config.json"])
    assert "k.pem" == kept["function"][0]["agent"]["tls"]["key"]
    assert "tcp://(left out)@soc:1" == kept["function"][0]["agent"]["address"]
    listing = texts["LISTING.txt"]
    assert all(name in listing for name in texts if name != "LISTING.txt")
    assert listing in capsys.readouterr().out
    assert 1 == main(arguments)
    assert "b.tar.gz cannot be written: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["password", "Passphrase", "api_token", "psk", "client_secret", "authorization"])
def test_secrets(key: str) -> None:
    """What is called like a secret is left out at every depth, whatever it is."""
    assert {"a": [{"b": {key: "(left out)"}}]} == without_secrets({"a": [{"b": {key: {"deep": ["hunter2"]}}}]})


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    """Nothing of a file that cannot be read as TOML is quoted, for nobody knows what it is."""
    path = tmp_path / "c.toml"
    path.write_text('password = "hunter2" hunter2')
    assert b"hunter2" not in configuration(path).data
    assert b"cannot be read: No such file" in configuration(tmp_path / "none").data


def test_the_end_of_a_long_part() -> None:
    """Of too much the end is kept."""
    data = part("x", "y", "a" * MOST_BYTES + "end").data
    assert (MOST_BYTES, b"end") == (len(data), data[-3:])


def test_a_log_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without journalctl, or with one that fails, the part says so."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert b"this machine has no journalctl" in last_logs("x.service").data
    program = tmp_path / "journalctl"
    program.write_text("#!/bin/sh\necho no such unit >&2\nexit 1\n")
    program.chmod(0o755)
    assert b"no such unit" in last_logs("x.service").data


def test_records() -> None:
    """What a daemon keeps for its successor is found among its descriptors and decoded."""
    assert b"no such record" in records(os.getpid()).data
    with Journal.create("test") as journal:
        thing = FunctionThing("nvme0", "digest", "0.1.0")
        journal.put(thing.KIND, thing.key, thing.to_record())
        (found,) = json.loads(records(os.getpid()).data).values()
        assert "FunctionThing" == found["records"][0]["kind"]
    assert b"cannot be examined" in records(1 << 30).data
