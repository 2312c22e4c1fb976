"""What goes into a support bundle: each part is made by itself, and what cannot be made says why."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vfiouser_agents.extras import missing
from vfiouser_oob import __version__
from vfiouser_oob.config.load import CONFIG_SIZE_MAX
from vfiouser_oob.control.client import ControlClient, ControlError

#: Bytes of the largest part; of a longer one the end is kept, which is what happened last.
MOST_BYTES = 8 << 20
#: Lines of the log, and seconds that whoever gives them may take.
LOG_LINES = 5000
_LOG_S = 20.0
#: Keys whose values are left out, wherever they stand; those that name files are kept.
_SECRET = re.compile(r"pass|secret|token|psk|credential|private|cookie|auth", re.IGNORECASE)
_USER_INFO = re.compile(r"(\w+://)[^/@\s]+@")
_HIDDEN = "(left out)"
_CORE = ("trio", "construct", "msgpack", "jeepney", "xxhash", "msgspec", "rich")
_PACKAGES = (*_CORE, "grpcio", "protobuf", "prometheus-client", "h11")
_JOURNALS_MOST = 16


class BundlePart(NamedTuple):
    """One file of a bundle.

    Args:
        name: of the file.
        meaning: what it is, for the listing.
        data: what is in it.
    """

    name: str
    meaning: str
    data: bytes


def part(name: str, meaning: str, text: str) -> BundlePart:
    """A part made of text.

    Args:
        name: of the file.
        meaning: what it is.
        text: what is in it; of too much the end is kept.
    """
    return BundlePart(name, meaning, text.encode(errors="backslashreplace")[-MOST_BYTES:])


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def versions() -> BundlePart:
    """What runs here."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        system: Any = platform.freedesktop_os_release()
    except OSError:
        system = None
    return part(
        "versions.json",
        "versions of this program, of what it uses, and of the system",
        _as_json(
            {
                "vfiouser-oob": __version__,
                "python": platform.python_version(),
                "kernel": " ".join(os.uname()[2:]),
                "system": system,
                "packages": found,
            }
        ),
    )


def without_secrets(value: Any) -> Any:
    """A configuration whose secrets are left out, at every depth.

    Args:
        value: any part of it.
    """
    if isinstance(value, Mapping):
        return {name: _HIDDEN if _SECRET.search(str(name)) else without_secrets(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return _USER_INFO.sub(rf"\1{_HIDDEN}@", value) if isinstance(value, str) else value


def configuration(path: Path) -> BundlePart:
    """The configuration file, as it was understood: comments are left out as well, for they may say anything.

    Args:
        path: the file.
    """
    meaning = f"{path}, without secrets and comments"
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_SIZE_MAX).decode()
        return part("config.json", meaning, _as_json(without_secrets(tomllib.loads(text))))
    except OSError as error:
        return part("config.json", meaning, f"{path} cannot be read: {error.strerror}\n")
    except ValueError as error:  # of which the text may quote the file
        place = re.search(r"line \d+", str(error))
        return part("config.json", meaning, f"{path} is not TOML{f', see {place[0]}' if place else ''}\n")


def of_daemon(path: Path) -> Iterator[BundlePart]:
    """What a running daemon says of itself.

    Args:
        path: its control socket.
    """
    from vfiouser_oob.cli.migrations import render as render_migrations
    from vfiouser_oob.cli.status_table import render
    from vfiouser_oob.observability.openmetrics import render as render_metrics

    try:
        with ControlClient(path) as client:
            status, migrations, measured = client.status(), client.migrations(), client.metrics()
    except ControlError as error:
        yield part("status.txt", "the daemon's state", f"{error}\n")
        return
    yield part("status.txt", "the daemon's state, for people", render(status) + "\n")
    yield part("status.json", "the daemon's state", _as_json(status))
    yield part("migrations.txt", "the last migrations, for people", render_migrations(migrations) + "\n")
    yield part("migrations.json", "the last migrations", _as_json(migrations))
    yield part("metrics.json", "what was measured", _as_json(measured))
    if missing("metrics") is None:
        yield BundlePart("metrics.txt", "what was measured, as OpenMetrics", render_metrics(measured))
    yield records(status["daemon"]["pid"])


def last_logs(unit: str) -> BundlePart:
    """The end of the log, as the journal has it.

    Args:
        unit: the daemon's unit.
    """
    meaning = f"the last {LOG_LINES} lines of the journal of {unit}"
    program = shutil.which("journalctl")
    if program is None:
        return part("log.txt", meaning, "this machine has no journalctl; add the daemon's log by hand\n")
    command = [program, "--unit", unit, "--lines", str(LOG_LINES), "--no-pager", "--output", "short-iso-precise"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LOG_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it did not answer within {_LOG_S:g} s"
        return part("log.txt", meaning, f"journalctl does not run: {reason}\n")
    text = done.stdout or done.stderr or b"journalctl gave nothing\n"
    return BundlePart("log.txt", meaning, text[-MOST_BYTES:])


def records(pid: int) -> BundlePart:
    """What a daemon keeps in memory for its successor, decoded.

    Args:
        pid: the daemon.
    """
    meaning = "what the daemon keeps for its successor, decoded"
    found: dict[str, Any] = {}
    try:
        # Memory that is mapped has more than one descriptor.
        seen: set[int] = set()
        for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
            decoded = _decoded(Path(f"/proc/{pid}/fd/{number}"), seen) if len(found) < _JOURNALS_MOST else None
            if decoded is not None:
                found[f"descriptor {number}"] = decoded
    except OSError as error:
        return part("records.json", meaning, f"process {pid} cannot be examined: {error.strerror}\n")
    return part("records.json", meaning, _as_json(found) if found else "the daemon has no such record\n")


def _decoded(path: Path, seen: set[int]) -> Any:
    """A journal's records; None if it is not a journal, which is so of other memory that a daemon has, or was seen."""
    from vfiouser_oob.persist.journal.journal import read_journal
    from vfiouser_oob.persist.journal.layout import MAGIC
    from vfiouser_oob.persist.record import UnusableRecord

    try:
        if not os.readlink(path).startswith("/memfd:"):
            return None
        with path.open("rb", buffering=0) as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode in seen or os.pread(file.fileno(), len(MAGIC), 0) != MAGIC:
                return None
            seen.add(inode)
            history = read_journal(file)
    except UnusableRecord as error:
        return f"it cannot be read: {error}"
    except OSError:  # it was closed meanwhile
        return None
    things = [_thing(kind, value) for kind, values in history.records.items() for value in values.values()]
    return {"generation": history.generation, "changes": history.changes, "torn": history.torn, "records": things}


def _thing(kind: int, record: bytes) -> Any:
    from vfiouser_oob.persist.record import UnusableRecord
    from vfiouser_oob.persist.successor.things import THINGS

    try:
        thing = next(each for each in THINGS if kind == each.KIND).from_record(record)
    except (StopIteration, UnusableRecord):
        return {"kind": kind, "bytes": record[:4096].hex()}
    return {"kind": type(thing).__name__, **asdict(thing)}
