"""Log records as people, machines and the journal read them, and the limit on what a peer can provoke."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_oob.config import LogFormat, LogLevel
from vfiouser_oob.observability import log


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    """The standard library's loggers are one per process: other tests must not see our handlers."""
    roots = [logging.getLogger(name) for name in (log.ROOT, log.AGENTS)]
    before = [(root.handlers[:], root.level, root.propagate) for root in roots]
    yield
    for root, was in zip(roots, before, strict=True):
        root.handlers[:], root.level, root.propagate = was


def test_human_lines() -> None:
    """A record is one line: time, level, where, event, fields; without a terminal there is no colour."""
    stream = io.StringIO()
    log.configure(LogLevel.INFO, LogFormat.HUMAN, stream)
    log.get("server.connection").bind(function="f0").info("client connected", pid=7, ratio=0.25)
    log.get("x").debug("not wanted")
    pattern = r"\d\d:\d\d:\d\d\.\d{3} info    server\.connection: client connected function=f0 pid=7 ratio=0\.25\n"
    assert re.fullmatch(pattern, stream.getvalue())


def test_json_lines() -> None:
    """A record is one JSON object with the fixed keys, which fields cannot replace."""
    stream = io.StringIO()
    log.configure(LogLevel.DEBUG, LogFormat.JSON, stream)
    log.get("a").debug("event", path=Path("/x"), level="forged", n=1)
    entry = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert {"level": "debug", "logger": "a", "event": "event", "path": "/x", "n": 1} == entry


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_peers_cannot_forge_records(log_format: LogFormat) -> None:
    """Text from a peer stays inside its field: neither line breaks nor escape sequences get out."""
    stream = io.StringIO()
    log.configure(LogLevel.INFO, log_format, stream)
    log.get("a").info("connected", command="x\n00:00:00 error   fake \x1b[31m", other='a"b')
    text = stream.getvalue()
    assert 1 == text.count("\n")
    assert "\x1b" not in text


def test_journal_gets_priorities(tmp_path: Path) -> None:
    """Where the journal reads our standard error, a line starts with its priority and has no time."""
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        log.configure(LogLevel.INFO, LogFormat.HUMAN, stream, environ, tmp_path / "none")
        log.get("a").warning("careful", n=1)
        log.configure(LogLevel.INFO, LogFormat.JSON, stream, environ, tmp_path / "none")
        log.get("a").error("broken")
        stream.seek(0)
        first, second = stream.read().splitlines()
    assert "<4>a: careful n=1" == first
    assert second.startswith("<3>{")


def test_a_redirected_stream_gets_no_priorities(tmp_path: Path) -> None:
    """JOURNAL_STREAM of another stream (standard error was redirected) changes nothing."""
    with (tmp_path / "file").open("w+") as stream:
        log.configure(LogLevel.INFO, LogFormat.HUMAN, stream, {"JOURNAL_STREAM": "1:2"})
        log.get("a").info("plain")
        stream.seek(0)
        assert not stream.read().startswith("<")


def test_configuring_again_replaces() -> None:
    """The last configuration counts; no record is written twice."""
    first, second = io.StringIO(), io.StringIO()
    log.configure(LogLevel.INFO, LogFormat.HUMAN, first)
    log.configure(LogLevel.ERROR, LogFormat.HUMAN, second)
    log.get("a").error("once")
    log.get("a").info("too quiet")
    assert ("", 1) == (first.getvalue(), second.getvalue().count("\n"))


def test_debug_enabled_follows_the_configuration() -> None:
    """A caller can ask whether an expensive debug record is worth building, also after a change."""
    logger = log.get("a")
    log.configure(LogLevel.DEBUG, LogFormat.HUMAN, io.StringIO())
    assert logger.debug_enabled
    log.configure(LogLevel.INFO, LogFormat.HUMAN, io.StringIO())
    assert not logger.debug_enabled


@pytest.mark.parametrize(("level", "has_traceback"), [(LogLevel.INFO, False), (LogLevel.DEBUG, True)])
def test_tracebacks_are_for_developers(level: LogLevel, has_traceback: bool) -> None:
    """A failure of our own is one line; its traceback is in it at the debug level only."""
    stream = io.StringIO()
    log.configure(level, LogFormat.HUMAN, stream)
    try:
        raise KeyError("missing")
    except KeyError as error:
        log.get("a").exception("handler failed", error, function="f0")
    line = stream.getvalue()
    assert 1 == line.count("\n")
    assert "handler failed error=\"KeyError: 'missing'\" function=f0" in line
    assert has_traceback == ("Traceback" in line)


def test_the_traceback_of_others(tmp_path: Path) -> None:
    """A failure of code that is not ours has its traceback at every level; no line of it can pass for a record."""
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        for environ in ({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, {}):
            log.configure(LogLevel.ERROR, LogFormat.HUMAN, stream, environ)
            try:
                raise KeyError("10:00:00.000 error   forged\x1b[2J")
            except KeyError as error:
                log.get("a").traceback("a model failed", error, method="run")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert lines[0].startswith("<3>a: a model failed error=")
    assert "method=run" in lines[0]
    half = len(lines) // 2
    assert "<3>    Traceback (most recent call last):" == lines[1]
    assert all(line.startswith("<3>    ") for line in lines[1:half])
    assert all(line.startswith("    ") for line in lines[half + 1 :])
    assert not any("\x1b" in line for line in lines)


def test_rate_limit_counts_what_it_keeps_back() -> None:
    """After the burst only one record per interval is written, and it tells how many were not."""
    stream = io.StringIO()
    log.configure(LogLevel.INFO, LogFormat.JSON, stream)
    now = [100.0]
    limited = log.RateLimited(log.get("a"), burst=3, interval_s=10, clock=lambda: now[0])
    assert [True] * 3 + [False] * 7 == [limited.warning("noise", n=n) for n in range(10)]
    now[0] += 9.9
    assert not limited.warning("noise")
    now[0] += 0.2
    assert limited.warning("noise")
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [None, None, None, 8] == [entry.get("suppressed") for entry in entries]


def test_one_kind_of_noise_does_not_hide_another() -> None:
    """Each event, and each command that it is about, has an allowance of its own; there are not endlessly many."""
    stream = io.StringIO()
    log.configure(LogLevel.INFO, LogFormat.JSON, stream)
    limited = log.RateLimited(log.get("a"), burst=1, interval_s=10, clock=lambda: 0.0)
    assert [True, False] == [limited.warning("refused", command="DMA_MAP") for _ in range(2)]
    assert limited.warning("refused", command="SET_IRQS")
    assert limited.warning("turned away")
    assert limited.info("attached")
    written = sum(limited.warning(f"kind {number}") for number in range(1000))
    assert 50 < written < 100


def test_what_adapters_log_is_written() -> None:
    """Their loggers are not ours, but what they say, such as a library's output, goes where our records go."""
    stream = io.StringIO()
    log.configure(stream=stream)
    logging.getLogger("vfiouser_agents.adapters.plugin_so").info("plug-in of %s: %s", "nvme0", "hello")
    assert "agents.adapters.plugin_so: plug-in of nvme0: hello" in stream.getvalue()
