"""Log records for systemd's journal in its own protocol, so that they can be looked for by function, VM and client.

    journalctl -u vfiouser-oob VFIOUSER_FUNCTION=nvme0 -p warning

One datagram is one record: `KEY=value` lines, or, for a value with line breaks, the key, the length as 64 bits, and the
value (systemd's "Native Journal Protocol"). A thread sends them, as it does for a stream: a journal that hangs costs
records, never replies.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vfiouser_oob.observability.sink import MOST_WAITING, Backlog

SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "vfiouser-oob"
PREFIX = "VFIOUSER_"
#: syslog's numbers, which the journal and sd-daemon(3) want.
PRIORITIES: Mapping[int, int] = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
#: Bytes of a value, and fields of a record; both are a peer's to choose, and a datagram has to fit a socket buffer.
MOST_VALUE = 8192
MOST_FIELDS = 24
_UNFIT = re.compile(r"[^A-Z0-9_]")
_MARK = re.compile(r"^<[0-7]>", re.MULTILINE)


def priority(level: int) -> int:
    """The journal's priority of a level of `logging`."""
    return PRIORITIES.get(level, 6)


def datagram(message: str, level: int, fields: Mapping[str, Any]) -> bytes:
    """One record as the journal takes it.

    Args:
        message: for people; marks of priority at the beginnings of its lines are taken off.
        level: of `logging`.
        fields: what the record carries; a `client` that has a `pid` is told with it.
    """
    pairs = [
        ("MESSAGE", _MARK.sub("", message)),
        ("PRIORITY", str(priority(level))),
        ("SYSLOG_IDENTIFIER", IDENTIFIER),
        *list(_own(fields))[:MOST_FIELDS],
    ]
    return b"".join(_pair(name, value) for name, value in pairs)


def _own(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        key = PREFIX + _UNFIT.sub("_", name.upper())[:48]
        if value is not None:
            yield key, str(value)
        pid = getattr(value, "pid", None)
        if isinstance(pid, int):
            yield f"{key}_PID", str(pid)


def _pair(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")[:MOST_VALUE]
    if b"\n" in data:
        return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


class JournalBacklog(Backlog):
    """Sends records to the journal from a thread of its own.

    Args:
        path: the journal's socket.
        most_waiting: bytes of records that may wait.
    """

    def __init__(self, path: Path = SOCKET, most_waiting: int = MOST_WAITING) -> None:
        super().__init__(most_waiting)
        self._path = str(path)

    def _deliver(self, entries: Sequence[bytes]) -> int:
        lost = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            for entry in entries:
                try:
                    # Not connected, so that a journal which was started anew is found again.
                    sock.sendto(entry, self._path)
                except OSError:
                    lost += 1
        return lost

    def _lost_entry(self, count: int) -> bytes:
        return datagram(f"log: log records were lost, because nobody read them lines={count}", logging.WARNING, {})


class JournalHandler(logging.Handler):
    """Hands records to the journal.

    Args:
        formatter: makes the message.
        fields: takes out of a record what it carries.
        path: the journal's socket.
    """

    def __init__(
        self,
        formatter: logging.Formatter,
        fields: Callable[[logging.LogRecord], Mapping[str, Any]],
        path: Path = SOCKET,
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._fields = fields
        self.sink = JournalBacklog(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record; never waits."""
        try:
            fields = {"logger": record.name, **self._fields(record)}
            self.sink.put(datagram(self.format(record), record.levelno, fields))
        except (TypeError, ValueError):  # as in logging: a record that cannot be written ends nothing
            self.handleError(record)

    def close(self) -> None:
        """Take no more (called by logging at exit as well)."""
        self.sink.close()
        super().close()


def is_there(path: Path = SOCKET) -> bool:
    """Whether there is a journal that takes records."""
    return path.is_socket()
