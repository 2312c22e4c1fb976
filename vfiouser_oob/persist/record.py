"""One small JSON document per file, written whole or not at all. Everything here blocks: call it from a thread.

    {"kind": "agent-capabilities", "version": 1, …}

A reader gets the document, or None where there is none, or an error with the reason why it cannot be used; it never
gets half of one.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: A document of ours has a few hundred bytes; what is larger is not ours.
MAX_SIZE = 64 << 10
_MODE = 0o600
_DIRECTORY_MODE = 0o700


class UnusableRecord(Exception):
    """A file is there, but cannot be used; the text says why."""


def read_record(path: Path, kind: str, version: int) -> dict[str, Any] | None:
    """Read a document.

    Args:
        path: its file.
        kind: what it has to be.
        version: the only version of that kind which we understand.

    Returns:
        None if there is no such file.

    Raises:
        UnusableRecord: it is damaged, of another kind or version, or no plain file.
        OSError: it cannot be read.
    """
    try:
        # A link or a pipe in its place was not made by us; neither shall lead or hold us anywhere.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnusableRecord("it is not a regular file")
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise UnusableRecord(f"it is larger than {MAX_SIZE} bytes")
    return _checked(data, kind, version)


def _checked(data: bytes, kind: str, version: int) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnusableRecord(f"it is damaged: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise UnusableRecord(f"it is not a document of kind {kind!r}")
    if type(document.get("version")) is not int or document["version"] != version:
        raise UnusableRecord(f"it has version {document.get('version')!r}; {version} is understood")
    return document


def write_record(path: Path, kind: str, version: int, fields: Mapping[str, Any]) -> None:
    """Write a document so that after a crash there is the old one or the new one; the directory is made if need be.

    Args:
        path: its file.
        kind: what it is.
        version: of that kind.
        fields: what it says.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
    text = json.dumps({"kind": kind, "version": version, **fields}, indent=1, sort_keys=True)
    draft = path.with_name(f".{path.name}.new")
    # What a write that was cut short has left behind is of no use; a link there is not ours to follow.
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(fd)
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
