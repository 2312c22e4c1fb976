"""How a status document and an event look to people."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from vfiouser_oob.cli.status import event_line
from vfiouser_oob.cli.status_table import age, render, short_size
from vfiouser_oob.observability.status import FunctionStatus, MigrationStatus, StatusReport

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)


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
    "client": {"pid": 412, "uid": 64055, "command": "qemu\x1b[31m"},
    "regions": [
        {"index": 0, "name": "BAR0", "size": 16384, "mapped": True},
        {"index": 7, "name": "config", "size": 4096, "mapped": False},
    ],
    "maps": {"count": 5, "bytes": 1 << 30, "files": 1},
    "irqs": {"INTX": 0, "MSIX": 3},
    "fds": 4,
    "messages": {"REGION_READ": 20, "DMA_MAP": 5},
    "dma": {"read_messages": 0},
    "migration": None,
    "unavailable": None,
    "last_error": None,
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
    "migration": None,
    "unavailable": None,
    "last_error": "upstream refused\nthe version",
}
STATUS: StatusReport = {
    "daemon": {"version": "0.1.0", "pid": 99, "started": ago(hours=26), "functions": 2},
    "functions": [ATTACHED, IDLE],
}


def test_table() -> None:
    """One row per function under one heading, then its socket, regions and last error."""
    lines = render(STATUS, NOW).splitlines()
    assert [
        "vfiouser-oob 0.1.0, pid 99, up 1d2h, 2 functions",
        "",
        "FUNCTION PHASE SINCE CLIENT MAPS IRQS FDS MESSAGES DEVICE",
        "nvme0 attached 2m5s qemu?[31m[412] uid 64055 5 (1G, 1 files) MSIX:3 4 25 vfio-user:/run/soc/f0.sock",
        "f1 listening 1d3h - - - 0 0 vfio-user:/run/soc/f0.sock",
        "",
        "nvme0: socket /run/vfio-user/nvme0.sock",
        "nvme0: regions BAR0 16K mapped, config 4K",
        "f1: socket /run/f1",
        "f1: last error: upstream refused?the version",
    ] == [re.sub(" +", " ", line) for line in lines]
    assert lines[2].index("PHASE") == lines[3].index("attached") == lines[4].index("listening")


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
    "capabilities": {
        "source": "agent",
        "learned": ago(hours=1),
        "stop_copy": True,
        "precopy": True,
        "dirty": True,
        "problem": None,
    },
}


def migration_line(**changes: object) -> str:
    """What is said of a migration."""
    migration: MigrationStatus = {**MIGRATION, **changes}  # type: ignore[typeddict-item]
    status: StatusReport = {**STATUS, "functions": [{**IDLE, "migration": migration}]}
    return next(line for line in render(status, NOW).splitlines() if "migration" in line)


def test_migration_line() -> None:
    """What is certain is said plainly; what is not is said to be unknown, since when, and what it was before."""
    assert "f1: migration RUNNING, agent's function f0" == migration_line()
    since = ago(seconds=7)
    line = migration_line(known=False, unknown_since=since, state="PRE_COPY", owner="v2")
    assert f"f1: migration unknown since {since} (7s), last known PRE_COPY, by v2, agent's function f0" == line


def test_migration_line_without_the_agent() -> None:
    """An agent that is away is shown with since when, and so is what was done without it."""
    since = ago(seconds=9)
    line = migration_line(state="STOP", paused_over_link=True, agent_away_since=since)
    away = f"agent away since {since} (9s)"
    assert f"f1: migration STOP, paused without its agent, {away}, agent's function f0" == line
    line = migration_line(reset_due=True, held_back=True, agent_away_since=since)
    assert f"RUNNING, reset as soon as its agent answers, guest writes are held back, {away}," in line


def test_migration_line_without_the_agents_word() -> None:
    """What the agent has not said to this daemon itself is marked, and so is a store that does not work."""
    stored = {**MIGRATION["capabilities"], "source": "stored", "learned": "2026-05-01T00:00:00+00:00"}
    line = migration_line(capabilities=stored, migratable=False)
    assert "RUNNING, not migratable, agent not heard yet, as it said at 2026-05-01T00:00:00+00:00" in line
    nothing = dict.fromkeys(stored, None) | {"source": "configuration", "problem": "/x\n: full"}
    line = migration_line(capabilities=nothing)
    assert "RUNNING, agent never heard, agent's function f0, not remembered: /x?: full" in line


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


def test_migration_line_under_way() -> None:
    """What is moved, what is to come, and what is being done at this moment."""
    line = migration_line(state="PRE_COPY", owner="v2", bytes=1 << 20, remaining=5 << 20, step="stop")
    assert "f1: migration PRE_COPY, by v2, 1M moved, about 5M to come, doing stop, agent's function f0" == line
