"""How a status document and an event look to people."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vfiouser_oob.cli.status import event_line
from vfiouser_oob.cli.status_live import live, on_terminal
from vfiouser_oob.cli.status_table import FEW, render
from vfiouser_oob.cli.status_words import FunctionWord, age, short_size, short_time, word_of
from vfiouser_oob.observability.status import FunctionStatus, MigrationStatus, StatusReport, VmStatus

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
#: What the tables looked like when somebody last looked at them; delete a file and run the test to write it anew.
SNAPSHOTS = Path(__file__).parent / "snapshots"


def ago(**delta: float) -> str:
    """A time before NOW, as the daemon writes it."""
    return (NOW - timedelta(**delta)).isoformat()


ATTACHED: FunctionStatus = {
    "name": "nvme0",
    "socket": "/run/vfio-user/nvme0.sock",
    "device": "vfio-user:/run/soc/f0.sock",
    "phase": "attached",
    "since": ago(minutes=2, seconds=5),
    "failed": None,
    "client": {"pid": 412, "uid": 64055, "command": "qemu-system\x1b[3"},
    "regions": [
        {"index": 0, "name": "BAR0", "size": 16384, "mapped": True},
        {"index": 7, "name": "config", "size": 4096, "mapped": False},
    ],
    "maps": {"count": 5, "bytes": 1 << 30, "files": 1},
    "irqs": {"INTX": 0, "MSIX": 3},
    "fds": 4,
    "messages": {"REGION_READ": 20, "DMA_MAP": 5},
    "commands": {
        "DMA_MAP": {"count": 5, "per_s": 0.0, "p50_s": 0.000182, "p99_s": 0.0021},
        "REGION_READ": {"count": 20, "per_s": 1.25, "p50_s": 0.0000312, "p99_s": 0.000118},
    },
    "dma": {"read_messages": 0},
    "migration": None,
    "unavailable": None,
    "unavailable_since": None,
    "last_error": None,
    "last_error_at": None,
}
IDLE: FunctionStatus = {
    **ATTACHED,
    "name": "f1",
    "socket": "/run/f1",
    "phase": "listening",
    "since": ago(days=1, hours=3),
    "client": None,
    "regions": [],
    "maps": {"count": 0, "bytes": 0, "files": 0},
    "irqs": {},
    "fds": 0,
    "messages": {},
    "commands": {},
    "last_error": "upstream refused\nthe version",
    "last_error_at": ago(seconds=90),
}
STATUS: StatusReport = {
    "daemon": {
        "version": "0.1.0",
        "python": "3.11.7",
        "kernel": "6.1.0-18-amd64",
        "pid": 99,
        "started": ago(hours=26),
        "functions": 2,
    },
    "functions": [ATTACHED, IDLE],
}


MIGRATION: MigrationStatus = {
    "agent": "f0",
    "migratable": True,
    "blocked": None,
    "p2p": False,
    "state": "RUNNING",
    "known": True,
    "unknown_since": None,
    "agent_away_since": None,
    "paused_over_link": False,
    "reset_due": False,
    "held_back": False,
    "owner": None,
    "fenced": False,
    "epoch": 0,
    "bytes": 0,
    "buffered": 0,
    "remaining": 0,
    "step": None,
    "steps": 1,
    "failures": 0,
    "last_failure": None,
    "last_failure_at": None,
    "capabilities": {
        "source": "agent",
        "learned": ago(hours=1),
        "stop_copy": True,
        "precopy": True,
        "dirty": True,
        "problem": None,
    },
}


DEAD: FunctionStatus = {
    **ATTACHED,
    "name": "nvme-with-a-long-name-1",
    "phase": "failed",
    "since": ago(seconds=3),
    "failed": "the upstream server /run/soc/f2.sock has gone: it closed the connection",
    "unavailable": "the upstream server /run/soc/f2.sock has gone: it closed the connection",
    "unavailable_since": ago(seconds=3),
    "last_error": "the upstream server /run/soc/f2.sock has gone: it closed the connection",
    "last_error_at": ago(seconds=3),
    "maps": {"count": 3, "bytes": 2 << 30, "files": 0},
}
MOVING: FunctionStatus = {
    **IDLE,
    "name": "f3",
    "last_error": None,
    "last_error_at": None,
    "migration": {
        **MIGRATION,
        "state": "PRE_COPY",
        "owner": "v2",
        "bytes": 1 << 20,
        "remaining": 5 << 20,
        "step": "save",
    },
}
ORPHAN: FunctionStatus = {
    **MOVING,
    "name": "f4",
    "migration": {
        **MIGRATION,
        "agent_away_since": ago(minutes=4),
        "last_failure": "resume: the agent did not answer resume in time; its effect is unknown",
        "last_failure_at": ago(minutes=4),
    },
}
VM: VmStatus = {
    "name": "web-1",
    "phase": "armed",
    "since": ago(hours=2),
    "migration": "none",
    "qemu": {"pid": 412, "uid": 64055, "command": "qemu"},
    "version": "11.1.3",
    "carrier": "dbus-vmstate",
    "carriers": [],
    "refused": "return-path is off, so a failed migration would lose the VM",
    "functions": [
        {"name": "nvme0", "place": "runs", "doing": None},
        {"name": "f3", "place": "stands", "doing": "save"},
    ],
    "sockets": {"monitor": "/run/vm.sock"},
    "last_error": None,
}
ALL: StatusReport = {
    "daemon": {**STATUS["daemon"], "functions": 5},
    "functions": [ATTACHED, IDLE, DEAD, MOVING, ORPHAN],
    "vms": [VM],
}


@pytest.mark.parametrize("width", [80, 120])
def test_snapshot(width: int) -> None:
    """The whole document, at the width of a plain terminal and of a wide one; nothing is wider than it."""
    text = render(ALL, NOW, width) + "\n"
    assert width >= max(map(len, text.splitlines()))
    path = SNAPSHOTS / f"status-{width}.txt"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path} was written; look at it")
    assert path.read_text() == text


def test_a_pipe_folds_nothing() -> None:
    """Without a width each fact is one line, so that `grep` finds it whole."""
    text = render(ALL, NOW)
    assert "the upstream server /run/soc/f2.sock has gone: it closed the connection (3s ago)" in text
    assert "upstream refused?the version" in text
    assert "\x1b" not in text


def word(**changes: object) -> FunctionWord:
    """What a function with this in its migration does."""
    migration: MigrationStatus = {**MIGRATION, **changes}  # type: ignore[typeddict-item]
    return word_of({**IDLE, "migration": migration})


def test_words() -> None:
    """An idle function runs, whatever the state of its migration is called; what is not so is said in plain words."""
    assert FunctionWord.RUNNING is word_of(IDLE) is word_of(ATTACHED) is word()
    assert FunctionWord.FAILED is word_of(DEAD) is word(state="ERROR")
    assert FunctionWord.FAILED is word_of({**IDLE, "unavailable": "not bound", "unavailable_since": ago(seconds=1)})
    assert FunctionWord.CONNECTING is word_of({**IDLE, "phase": "negotiating"})
    assert FunctionWord.PAUSED is word(state="STOP") is word(state="RUNNING_P2P")
    assert FunctionWord.MIGRATING_OUT is word(state="PRE_COPY") is word(state="STOP_COPY")
    assert FunctionWord.MIGRATING_IN is word(state="RESUMING")
    assert FunctionWord.UNKNOWN is word(known=False, unknown_since=ago(seconds=7))
    assert FunctionWord.HELD is word(fenced=True, state="STOP")


def test_many_functions() -> None:
    """Of many functions only those are told of at length that need somebody; each one is, if it is asked for."""
    healthy: list[FunctionStatus] = [{**ATTACHED, "name": f"f{n}"} for n in range(FEW)]
    status: StatusReport = {**STATUS, "functions": [*healthy, DEAD]}
    text = render(status, NOW)
    assert f"{FEW} functions more without trouble" in text
    assert 1 == text.count("\n  socket ")
    text = render(status, NOW, names=["f3"])
    assert "\n  socket " in text
    assert "f4" not in text


def said(**changes: object) -> str:
    """What is said of a migration, in one line."""
    migration: MigrationStatus = {**MIGRATION, **changes}  # type: ignore[typeddict-item]
    text = render({**STATUS, "functions": [{**IDLE, "migration": migration}]}, NOW)
    lines = [re.sub(" +", " ", line).strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line.startswith(("migration", "agent", "last failure")))


def test_migration_words() -> None:
    """What is certain is said plainly; what is not is said to be unknown, since when, and what it was before."""
    assert "migration possible, mostly while it runs; agent calls the function f0" == said()
    line = said(known=False, unknown_since=ago(seconds=7), state="PRE_COPY", owner="v2")
    assert "unknown since 2026-05-01 11:59:53 (7s ago), last known PRE_COPY, by v2" in line
    assert "it is being copied while it runs (PRE_COPY), by v2, 1M moved, about 5M left, doing stop" in said(
        state="PRE_COPY", owner="v2", bytes=1 << 20, remaining=5 << 20, step="stop"
    )
    assert "not possible: no library" in said(blocked="no library", migratable=False)
    assert "last failure 9s ago: stop: no" in said(last_failure="stop: no", last_failure_at=ago(seconds=9))


def test_migration_words_without_the_agent() -> None:
    """An agent that is away is shown with since when, and so is what was done without it."""
    since = ago(seconds=9)
    line = said(state="STOP", paused_over_link=True, agent_away_since=since)
    assert "migration it is stopped (STOP), paused without its agent" in line
    assert "agent has not answered since 2026-05-01 11:59:51 (9s ago)" in line
    line = said(reset_due=True, held_back=True, agent_away_since=since)
    assert "reset as soon as its agent answers, guest writes are held back" in line


def test_migration_words_without_the_agents_word() -> None:
    """What the agent has not said to this daemon itself is marked, and so is a store that does not work."""
    stored = {**MIGRATION["capabilities"], "source": "stored", "learned": "2026-05-01T00:00:00+00:00"}
    line = said(capabilities=stored, migratable=False)
    assert "not possible: the agent cannot save its state, as its agent said at 2026-05-01" in line
    nothing = dict.fromkeys(stored, None) | {"source": "configuration", "problem": "/x\n: full"}
    line = said(capabilities=nothing)
    assert "possible, but its agent has never answered" in line
    assert "the daemon does not remember what it can do: /x?: full" in line


def test_live() -> None:
    """The live view shows the figures, and what happened below them; it ends with the daemon."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, height=60, force_terminal=True, color_system=None)
    asked: list[int] = []

    def ask() -> StatusReport:
        asked.append(1)
        return {**STATUS, "daemon": {**STATUS["daemon"], "version": "0.9.9"}}

    events: list[dict[str, Any]] = [
        {"status": STATUS},
        {"type": "phase", "time": 0, "function": "f1", "phase": "failed"},
        {"type": "phase", "time": 0, "function": "other", "phase": "never seen"},
        {},
    ]
    time = iter(range(100))
    live(console, lambda beat_s: iter(events), ask, ["f1"], clock=lambda: next(time))
    shown = screen.getvalue()
    assert asked
    assert "vfiouser-oob 0.9.9" in shown
    assert 'f1 phase phase="failed"' in shown
    assert "never seen" not in shown


@pytest.mark.parametrize(
    ("delta", "shown"),
    [
        ({"seconds": 0}, "0s"),
        ({"seconds": -5}, "0s"),
        ({"seconds": 59}, "59s"),
        ({"minutes": 59, "seconds": 1}, "59m1s"),
        ({"hours": 23, "minutes": 5}, "23h5m"),
        ({"days": 400}, "400d0h"),
    ],
)
def test_ages(delta: dict[str, float], shown: str) -> None:
    """Ages have two units at most, and a clock that was set back does not show negative ones."""
    assert shown == age(ago(**delta), NOW)


@pytest.mark.parametrize("since", ["", "yesterday", "2026-05-01T12:00:00"])
def test_unreadable_ages(since: str) -> None:
    """A time that cannot be read is a question mark, not a failure."""
    assert "?" == age(since, NOW)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0"),
        (4096, "4K"),
        (3 << 30, "3G"),
        ((1 << 30) + 4096, "1.0G"),
        ((5 << 20) + 512, "5.0M"),
        (5000, "5000"),
    ],
)
def test_short_sizes(size: int, shown: str) -> None:
    """Sizes are short; an odd one is rounded."""
    assert shown == short_size(size)


def test_event_lines() -> None:
    """An event is one line; text of a peer is quoted."""
    line = event_line({"type": "client-connected", "time": 0, "function": "f0", "command": "a\nb"})
    assert re.fullmatch(r'\d\d:\d\d:\d\d f0 client-connected command="a\\nb"', line)
    assert "--:--:-- daemon ?" == event_line({})
    line = event_line({"type": "migration", "time": 0, "function": "f0", "arc": "RUNNING → STOP", "step": "\x9b31m"})
    assert line.endswith(' f0 migration arc="RUNNING → STOP" step="?31m"')


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0"), (3e-7, "300 ns"), (0.0000312, "31.2 µs"), (0.002, "2 ms"), (0.25, "250 ms"), (4.0, "4 s")],
)
def test_short_times(seconds: float, shown: str) -> None:
    """Durations have a unit that leaves few figures."""
    assert shown == short_time(seconds)


def test_the_daemon_loads_no_tables() -> None:
    """What only the command line needs costs the daemon neither memory nor time."""
    modules = "vfiouser_oob.cli.main, vfiouser_oob.cli.serve, vfiouser_oob.server.daemon, vfiouser_oob.control.server"
    wanted = {"rich", "prometheus_client", "h11"}
    program = f"import sys, {modules}; print(sorted({wanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "[]\n" == done.stdout


@pytest.mark.parametrize(
    ("environ", "dumb", "colours"),
    [
        ({"TERM": "xterm"}, False, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, True, False),
    ],
    ids=["colours", "NO_COLOR", "dumb"],
)
def test_what_a_terminal_can_show(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], dumb: bool, colours: bool
) -> None:
    """TERM and NO_COLOR are obeyed; a dumb terminal gets lines of events rather than a table that moves."""
    for name in ("TERM", "NO_COLOR", "COLORTERM", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb"):
        monkeypatch.setattr(sys, "stdout", terminal)
        console = on_terminal()
        assert console is not None
        assert dumb == console.is_dumb_terminal
        assert colours == bool(console.color_system and not console.no_color)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert on_terminal() is None
