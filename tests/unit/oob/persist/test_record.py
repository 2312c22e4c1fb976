"""A document on disk is whole or not there, and nothing that lies in its place does harm."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from vfiouser_oob.persist import record
from vfiouser_oob.persist.record import MAX_SIZE, UnusableRecord, read_record, write_record


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A document comes back; its directories were made, and only its owner may look into them."""
    path = tmp_path / "state" / "agents" / "f0.json"
    assert read_record(path, "k", 1) is None
    write_record(path, "k", 1, {"x": [1, "ä"]})
    write_record(path, "k", 1, {"x": [2, "ä"]})
    assert {"kind": "k", "version": 1, "x": [2, "ä"]} == read_record(path, "k", 1)
    assert (0o600, 0o700) == (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777)
    assert ["f0.json"] == [entry.name for entry in path.parent.iterdir()]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b'{"kind": "k", "version": 1', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 60_000, "damaged"),
        (b"[]", "not a document of kind 'k'"),
        (b'{"kind": "other", "version": 1}', "not a document of kind 'k'"),
        (b'{"kind": "k", "version": 2}', "version 2; 1 is understood"),
        (b'{"kind": "k", "version": true}', "version True"),
        (b'{"kind": "k"}', "version None"),
        (b" " * (MAX_SIZE + 1), "larger than"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    """Damaged, foreign, newer and oversized files are refused with the reason."""
    path = tmp_path / "f0.json"
    path.write_bytes(data)
    with pytest.raises(UnusableRecord, match=words):
        read_record(path, "k", 1)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A pipe does not hold us, a link does not lead us anywhere, a directory is no document."""
    good = tmp_path / "good"
    write_record(good, "k", 1, {})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(good)
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises((UnusableRecord, OSError)):
            read_record(tmp_path / name, "k", 1)
    with pytest.raises(OSError, match="symbolic links"):
        read_record(tmp_path / "link", "k", 1)


def test_a_write_that_was_cut_short_leaves_the_old_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of writing fails, a reader gets the old document, and the next write succeeds."""
    path = tmp_path / "f0.json"
    write_record(path, "k", 1, {"x": 1})

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as broken:
            broken.setattr(module, name, fails)
            with pytest.raises(OSError, match="No space left"):
                write_record(path, "k", 1, {"x": 2})
        assert {"kind": "k", "version": 1, "x": 1} == read_record(path, "k", 1)
    write_record(path, "k", 1, {"x": 3})
    assert {"kind": "k", "version": 1, "x": 3} == read_record(path, "k", 1)


def test_a_link_in_place_of_the_draft_is_not_followed(tmp_path: Path) -> None:
    """What somebody put where the draft goes is removed, not written through."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".f0.json.new").symlink_to(victim)
    write_record(tmp_path / "f0.json", "k", 1, {})
    assert "precious" == victim.read_text()
    assert not (tmp_path / "f0.json").is_symlink()


def test_readers_beside_a_writer_see_whole_documents(tmp_path: Path) -> None:
    """While documents of different sizes are written, every read gives one of them."""
    path = tmp_path / "f0.json"
    write_record(path, "k", 1, {"x": ""})
    stop = threading.Event()

    def write() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            write_record(path, "k", 1, {"x": "y" * (count % 2 * 20_000)})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        lengths = {len((read_record(path, "k", 1) or {})["x"]) for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert lengths <= {0, 20_000}


def test_the_written_form(tmp_path: Path) -> None:
    """The file is JSON that a person can read."""
    write_record(tmp_path / "f", "k", 1, {"b": 1, "a": 2})
    assert {"a": 2, "b": 1, "kind": "k", "version": 1} == json.loads((tmp_path / "f").read_text())
    assert record.MAX_SIZE > len((tmp_path / "f").read_bytes()) > 30
