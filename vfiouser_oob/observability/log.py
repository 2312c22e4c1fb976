"""Structured logs on top of the standard library's `logging`.

    log = get("server.connection").bind(function="nvme0")
    log.info("client connected", pid=412, command="qemu-system-x86")

A record is an event (a fixed phrase, greppable) and fields. `configure` chooses how records are written:
lines for people, JSON for machines, and with a priority prefix where the journal reads our standard error.
Text that a peer chose (a process's name, say) is quoted, so that it can neither forge a record nor move the
cursor.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vfiouser_oob.config.schema import LogFormat, LogLevel
from vfiouser_oob.observability import journal, levels
from vfiouser_oob.observability.journal import priority
from vfiouser_oob.observability.sink import Sink

ROOT = "vfiouser_oob"
#: Where the adapters write, and what vendors' libraries print in them; they know nothing of us.
AGENTS = "vfiouser_agents"

_COLOURS: Mapping[int, str] = {
    logging.DEBUG: "2",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "31;1",
}
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:+@%,<>#*()[]")


class Logger:
    """Writes records under one name, with fields that all of them carry.

    Args:
        logger: the standard library's logger behind it.
        fields: what every record carries.
    """

    __slots__ = ("_fields", "_logger")

    def __init__(self, logger: logging.Logger, fields: Mapping[str, Any] | None = None) -> None:
        self._logger = logger
        self._fields = dict(fields or {})

    @property
    def debug_enabled(self) -> bool:
        """Whether debug records are written; ask before building an expensive one."""
        return self._enabled(logging.DEBUG, self._fields.get("function"))

    def bind(self, **fields: Any) -> Logger:
        """A logger whose records carry these fields as well."""
        return Logger(self._logger, {**self._fields, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        """Write what only a developer wants to know."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Write what normally happens."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Write what works, but not as it should."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Write what failed."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, error: BaseException, **fields: Any) -> None:
        """Write a failure in our own code; its traceback is kept for the debug level."""
        described = {"error": f"{type(error).__name__}: {error}", **fields}
        exc_info = error if self.debug_enabled else None
        self._log(logging.ERROR, event, described, exc_info)

    def traceback(self, event: str, error: BaseException, **fields: Any) -> None:
        """Write a failure of code that is not ours, at every level with the traceback that its author needs."""
        described = {"error": f"{type(error).__name__}: {error}", **fields}
        self._log(logging.ERROR, event, described, error, spread=True)

    def _log(
        self,
        level: int,
        event: str,
        fields: Mapping[str, Any],
        exc_info: BaseException | None = None,
        *,
        spread: bool = False,
    ) -> None:
        if not self._enabled(level, fields.get("function", self._fields.get("function"))):
            return
        merged = {**self._fields, **fields}
        # Not `log`, which would ask for the level of the whole process once more.
        raised = None if exc_info is None else (type(exc_info), exc_info, exc_info.__traceback__)
        extra = {"event": event, "fields": merged, "spread": spread}
        name = self._logger.name
        self._logger.handle(self._logger.makeRecord(name, level, "", 0, "%s", (event,), raised, extra=extra))

    def _enabled(self, level: int, function: Any) -> bool:
        chosen = levels.number_for(function)
        return self._logger.isEnabledFor(level) if chosen is None else level >= chosen


class RateLimited:
    """A logger for records that a peer can provoke at will: a burst of each kind, then a few, then their number.

    A kind is an event, and the command that it is about: whoever provokes one kind does not hide another.

    Args:
        logger: where they go.
        burst: how many of a kind may come at once.
        interval_s: seconds after which another one may come.
        clock: seconds that only move forward.
    """

    __slots__ = ("_burst", "_clock", "_interval_s", "_kinds", "_logger")

    def __init__(
        self,
        logger: Logger,
        *,
        burst: int = 5,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._burst = float(burst)
        self._interval_s = interval_s
        self._clock = clock
        self._kinds: dict[tuple[str, Any], _Allowance] = {}

    def warning(self, event: str, **fields: Any) -> bool:
        """Write a warning unless there were too many records of its kind of late.

        Returns:
            Whether it was written. The next one that is carries `suppressed`, the number of those that were
            not.
        """
        return self._write(self._logger.warning, event, fields)

    def info(self, event: str, **fields: Any) -> bool:
        """Write what normally happens, unless there were too many records of late; like `warning`."""
        return self._write(self._logger.info, event, fields)

    def _write(self, write: Callable[..., None], event: str, fields: dict[str, Any]) -> bool:
        kind = event, fields.get("command")
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            kind = _OTHER_KIND
        now = self._clock()
        allowance = self._kinds.get(kind)
        if allowance is None:
            allowance = self._kinds[kind] = _Allowance(self._burst, now)
        allowance.tokens = min(self._burst, allowance.tokens + (now - allowance.last) / self._interval_s)
        allowance.last = now
        if allowance.tokens < 1:
            allowance.suppressed += 1
            return False
        allowance.tokens -= 1
        if allowance.suppressed:
            fields["suppressed"] = allowance.suppressed
            allowance.suppressed = 0
        write(event, **fields)
        return True


#: Kinds that are told apart; a peer does not choose them, so that this is never reached.
_MOST_KINDS = 64
_OTHER_KIND = ("", None)


@dataclass(slots=True)
class _Allowance:
    """How many records of a kind may be written now, since when, and how many were not."""

    tokens: float
    last: float
    suppressed: int = 0


class HumanFormatter(logging.Formatter):
    """One line per record for people: time, level, where, event, key=value.

    Args:
        colour: whether levels are coloured.
        journal: whether the journal reads the lines: it knows the time itself, and takes the level as a
        prefix.
    """

    def __init__(self, *, colour: bool = False, journal: bool = False) -> None:
        super().__init__()
        self._colour = colour
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        fields = "".join(f" {key}={_readable(value)}" for key, value in _fields(record).items())
        name = _short(record.name)
        line = f"{name}: {_one_line(_event(record))}{fields}"
        below: list[str] = []
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            if getattr(record, "spread", False):
                # Indented, so that none of these lines can pass for a record.
                below = [f"    {_one_line(part)}" for part in trace.splitlines()]
            else:
                line += " traceback=" + json.dumps(trace)
        if self._journal:
            marked = f"<{priority(record.levelno)}>"
            return "\n".join(marked + part for part in [line, *below])
        level = f"{record.levelname.lower():7}"
        if self._colour and record.levelno in _COLOURS:
            level = f"\x1b[{_COLOURS[record.levelno]}m{level}\x1b[0m"
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        return "\n".join([f"{stamp}.{int(record.msecs):03d} {level} {line}", *below])


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with `time`, `level`, `logger`, `event` and the fields.

    Args:
        journal: whether the journal reads the lines, which takes the level as a prefix.
    """

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": _short(record.name),
            "event": _event(record),
        }
        for key, value in _fields(record).items():
            entry.setdefault(key, value)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        prefix = f"<{priority(record.levelno)}>" if self._journal else ""
        return prefix + json.dumps(entry, default=str)


def get(name: str) -> Logger:
    """The logger of one part of the daemon, for example ``get("server.connection")``."""
    return Logger(logging.getLogger(f"{ROOT}.{name}"))


def configure(
    level: LogLevel = LogLevel.INFO,
    log_format: LogFormat = LogFormat.HUMAN,
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    journal_socket: Path = journal.SOCKET,
) -> None:
    """Choose what is written and how; the last call counts.

    Where the journal reads our standard error it is given records with fields instead of lines, if its socket is there.

    Args:
        level: least important log records to write.
        log_format: for people or for machines.
        stream: where to; None = standard error, and then nobody waits for whoever reads it.
        environ: the environment, for JOURNAL_STREAM and NO_COLOR.
        journal_socket: where the journal takes records.
    """
    target = sys.stderr if stream is None else stream
    to_journal = _is_journal(target, environ)
    formatter: logging.Formatter
    if log_format is LogFormat.JSON:
        formatter = JsonFormatter(journal=to_journal)
    else:
        colour = not to_journal and target.isatty() and "NO_COLOR" not in environ
        formatter = HumanFormatter(colour=colour, journal=to_journal)
    blocks = stream is None and _has_descriptor(target)
    handler: logging.Handler
    if to_journal and journal.is_there(journal_socket):
        handler = journal.JournalHandler(formatter, _journal_fields, journal_socket)
    else:
        handler = _SinkHandler(target, formatter) if blocks else logging.StreamHandler(target)
        handler.setFormatter(formatter)
    roots = [logging.getLogger(name) for name in (ROOT, AGENTS)]
    for old in {old for root in roots for old in root.handlers}:
        for root in roots:
            root.removeHandler(old)
        old.close()
    for root in roots:
        root.addHandler(handler)
        root.propagate = False
    set_level(level)


def set_level(level: LogLevel) -> None:
    """Choose the least important log records to write from now on, but for functions with a level of their own."""
    for name in (ROOT, AGENTS):
        logging.getLogger(name).setLevel(levels.NUMBERS[level])


class _SinkHandler(logging.StreamHandler[Any]):
    """Hands records to a sink.

    Args:
        target: where the sink writes; it stays the caller's.
        formatter: makes the line that tells of lost ones.
    """

    def __init__(self, target: TextIO, formatter: logging.Formatter) -> None:
        def tell_lost(count: int) -> str:
            record = logging.LogRecord(f"{ROOT}.log", logging.WARNING, __file__, 0, "", None, None)
            record.event, record.fields = "log lines were lost, because nobody read them", {"lines": count}
            return formatter.format(record)

        self.sink = Sink(target, tell_lost)
        super().__init__(self.sink)
        self.terminator = ""

    def flush(self) -> None:
        """Do nothing: logging asks for it after each record, and nobody waits for one."""

    def close(self) -> None:
        """Take no more (called by logging at exit as well)."""
        self.sink.close()
        super().close()


def write_last(
    lines: Sequence[str],
    level: int = logging.ERROR,
    environ: Mapping[str, str] = os.environ,
    journal_socket: Path = journal.SOCKET,
) -> None:
    """Write lines to standard error that are the process's last; waits a moment, not for ever.

    Args:
        lines: what to write.
        level: the priority that the journal is told, where it reads them.
        environ: the environment, for JOURNAL_STREAM.
        journal_socket: where the journal takes records.
    """
    for handler in logging.getLogger(ROOT).handlers:
        if isinstance(handler, _SinkHandler | journal.JournalHandler):
            handler.sink.flush()
    to_journal = _is_journal(sys.stderr, environ)
    if to_journal and journal.is_there(journal_socket):
        backlog = journal.JournalBacklog(journal_socket)
        for line in lines:
            backlog.put(journal.datagram(line, level, {}))
        backlog.close()
        return
    prefix = f"<{priority(level)}>" if to_journal else ""
    text = [f"{prefix}{line}" for line in lines]
    if not _has_descriptor(sys.stderr):
        print(*text, sep="\n", file=sys.stderr)  # noqa: T201
        return
    sink = Sink(sys.stderr, lambda count: f"{prefix}{count} lines were lost")
    for line in text:
        sink.write(line)
    sink.close()


def _has_descriptor(stream: TextIO) -> bool:
    """Whether a stream leads out of this process; one in memory does not."""
    try:
        stream.fileno()
    except (OSError, ValueError):
        return False
    return True


def _is_journal(stream: TextIO, environ: Mapping[str, str]) -> bool:
    # systemd names the device and inode of the stream that it connected, since a redirected one must not get
    # prefixes.
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    if not _has_descriptor(stream):
        return False
    status = os.fstat(stream.fileno())
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _short(name: str) -> str:
    return f"agents.{name.removeprefix(f'{AGENTS}.')}" if name.startswith(AGENTS) else name.removeprefix(f"{ROOT}.")


def _event(record: logging.LogRecord) -> str:
    return str(getattr(record, "event", None) or record.getMessage())


def _journal_fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return {"event": _event(record), **_fields(record)}


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and _PLAIN.issuperset(text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
