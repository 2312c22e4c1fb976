"""Records as the journal takes them: on a socket that stands for the journal's, whose reader does as it likes."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_oob.config import LogFormat, LogLevel
from vfiouser_oob.observability import log
from vfiouser_oob.observability.journal import MOST_FIELDS, MOST_VALUE, JournalBacklog, datagram
from vfiouser_oob.transport.peer import Peer

CLIENT = Peer(412, 64055, 107, "qemu\nPRIORITY=0")


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    """The standard library's loggers are one per process: other tests must not see our handlers."""
    roots = [logging.getLogger(name) for name in (log.ROOT, log.AGENTS)]
    before = [(root.handlers[:], root.level, root.propagate) for root in roots]
    yield
    for root, was in zip(roots, before, strict=True):
        for handler in set(root.handlers) - set(was[0]):
            handler.close()
        root.handlers[:], root.level, root.propagate = was


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that takes datagrams, as the journal's does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.settimeout(20)
        yield sock


def fields(data: bytes) -> dict[str, str]:
    """What the journal makes of a datagram; systemd's words are the pattern of this."""
    found: dict[str, str] = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        assert name.decode() not in found
        found[name.decode()] = value.decode()
        data = rest
    return found


def configured(journal: socket.socket, stream: object, level: LogLevel, log_format: LogFormat) -> dict[str, str]:
    """Log into the journal; returns the environment of a service whose standard error the journal reads."""
    status = os.fstat(stream.fileno())  # type: ignore[attr-defined]
    environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
    log.configure(level, log_format, stream, environ, Path(journal.getsockname()))  # type: ignore[arg-type]
    return environ


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_fields(journal: socket.socket, tmp_path: Path, log_format: LogFormat) -> None:
    """Function, VM and client are fields of their own, and so is all else; nothing goes to standard error."""
    with (tmp_path / "stderr").open("w+") as stream:
        configured(journal, stream, LogLevel.INFO, log_format)
        log.get("function").bind(function="nvme0").warning("turned away", client=CLIENT, vm="web-1", reason="a\nb")
        found = fields(journal.recv(65536))
        assert not (tmp_path / "stderr").read_text()
    assert ("nvme0", "web-1", "412") == tuple(found[f"VFIOUSER_{name}"] for name in ("FUNCTION", "VM", "CLIENT_PID"))
    assert ("4", "vfiouser-oob", "a\nb") == (found["PRIORITY"], found["SYSLOG_IDENTIFIER"], found["VFIOUSER_REASON"])
    assert "turned away" in found["MESSAGE"]
    assert not found["MESSAGE"].startswith("<")
    assert "turned away" == found["VFIOUSER_EVENT"]
    assert "vfiouser_oob.function" == found["VFIOUSER_LOGGER"]


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3"), (logging.CRITICAL, "2")],
)
def test_last_words(
    journal: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int, priority: str
) -> None:
    """The lines that a process ends with have their priority, too."""
    with (tmp_path / "stderr").open("w+") as stream:
        environ = configured(journal, stream, LogLevel.INFO, LogFormat.HUMAN)
        monkeypatch.setattr(sys, "stderr", stream)
        log.write_last(["first", "second"], level, environ, Path(journal.getsockname()))
        told = [fields(journal.recv(65536)) for _ in range(2)]
    assert [("first", priority), ("second", priority)] == [(each["MESSAGE"], each["PRIORITY"]) for each in told]


def test_without_its_socket_lines_are_written(tmp_path: Path) -> None:
    """A service that cannot reach the journal's socket writes lines with priorities, as ever."""
    with (tmp_path / "stderr").open("w+") as stream:
        status = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        log.configure(LogLevel.INFO, LogFormat.HUMAN, stream, environ, tmp_path / "gone")
        log.get("a").warning("careful")
        stream.seek(0)
        assert "<4>a: careful\n" == stream.read()


def test_hostile_fields() -> None:
    """What a peer chose is bounded, and can neither be another field nor a priority; no name is unfit."""
    wild = {f"n{number}": "x" for number in range(1000)}
    data = datagram("<0>m\n<1>n", logging.INFO, {"client": CLIENT, "a=b\n": 1, "big": "ß\n" * MOST_VALUE, **wild})
    found = fields(data)
    assert ("m\nn", "6") == (found["MESSAGE"], found["PRIORITY"])
    assert "1" == found["VFIOUSER_A_B_"]
    assert MOST_FIELDS + 3 == len(found)
    assert MOST_VALUE >= len(found["VFIOUSER_BIG"].encode())
    assert len(data) < 200_000


def test_a_journal_that_does_not_read(journal: socket.socket) -> None:
    """Nobody waits; what does not fit is lost, and its number is told once the journal reads again."""
    backlog = JournalBacklog(Path(journal.getsockname()), most_waiting=50_000)
    for _ in range(2000):
        backlog.put(datagram("x" * 200, logging.INFO, {}))
    assert not backlog.flush(0)
    told = seen = 0
    while told + seen < 2000:
        message = fields(journal.recv(65536))["MESSAGE"]
        _, lost, number = message.partition("lines=")
        told += int(number) if lost else 0
        seen += not lost
    assert 2000 == told + seen
    assert told
    backlog.close()


def test_a_journal_that_was_started_anew(tmp_path: Path) -> None:
    """While it is away records are lost; the next journal under that name gets those that come then."""
    path = tmp_path / "socket"
    backlog = JournalBacklog(path)
    backlog.put(datagram("nobody hears", logging.INFO, {}))
    assert backlog.flush(20)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(20)
        backlog.put(datagram("somebody does", logging.INFO, {}))
        assert "somebody does" == fields(sock.recv(65536))["MESSAGE"]
        assert "lines=1" in fields(sock.recv(65536))["MESSAGE"]
    backlog.close()
