"""A status document as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from vfiouser_oob.config.values import format_size
from vfiouser_oob.observability.status import ClientStatus, FunctionStatus, MigrationStatus, StatusReport

#: What is said of capabilities that the agent itself has not told this daemon.
_HEARSAY = {
    "stored": "agent not heard yet, as it said at {learned}",
    "configuration": "agent never heard",
}
_HEADINGS = ("FUNCTION", "PHASE", "SINCE", "CLIENT", "MAPS", "IRQS", "FDS", "MESSAGES", "DEVICE")


def render(status: StatusReport, now: datetime | None = None) -> str:
    """The whole document: a line about the daemon, a table of functions, then what is wrong or worth knowing.

    Args:
        status: as the daemon gave it.
        now: the time that ages are counted from; None = now.
    """
    now = now or datetime.now(UTC)
    daemon = status["daemon"]
    head = (
        f"vfiouser-oob {daemon['version']}, pid {daemon['pid']}, up {age(daemon['started'], now)}, "
        f"{daemon['functions']} function{'s' if daemon['functions'] != 1 else ''}"
    )
    rows = [_HEADINGS, *(_row(function, now) for function in status["functions"])]
    notes = [line for function in status["functions"] for line in _notes(function, now)]
    return "\n".join([head, "", *_columns(rows), *([""] if notes else []), *notes])


def _row(function: FunctionStatus, now: datetime) -> tuple[str, ...]:
    maps = function["maps"]
    irqs = " ".join(f"{name}:{count}" for name, count in function["irqs"].items() if count)
    return (
        function["name"],
        function["phase"],
        age(function["since"], now),
        _client(function["client"]),
        f"{maps['count']} ({short_size(maps['bytes'])}, {maps['files']} files)" if maps["count"] else "-",
        irqs or "-",
        str(function["fds"]),
        str(sum(function["messages"].values())),
        function["device"],
    )


def _client(client: ClientStatus | None) -> str:
    return "-" if client is None else f"{printable(client['command']) or '?'}[{client['pid']}] uid {client['uid']}"


def _notes(function: FunctionStatus, now: datetime) -> Iterator[str]:
    yield f"{function['name']}: socket {function['socket']}"
    if function["regions"]:
        regions = ", ".join(
            f"{region['name']} {short_size(region['size'])}{' mapped' if region['mapped'] else ''}"
            for region in function["regions"]
        )
        yield f"{function['name']}: regions {regions}"
    migration = function["migration"]
    if migration is not None:
        yield f"{function['name']}: migration {_migration(migration, now)}"
    if function["unavailable"]:
        yield f"{function['name']}: cannot be used now: {printable(function['unavailable'])}"
    if function["last_error"]:
        yield f"{function['name']}: last error: {printable(function['last_error'])}"


#: What is said of a function whose agent did not do its part.
_WITHOUT_AGENT = {
    "paused_over_link": "paused without its agent",
    "reset_due": "reset as soon as its agent answers",
    "held_back": "guest writes are held back",
}


def _migration(migration: MigrationStatus, now: datetime) -> str:
    words = [migration["state"]]
    if not migration["known"]:
        since = migration["unknown_since"] or ""
        words = [f"unknown since {printable(since)} ({age(since, now)})", f"last known {migration['state']}"]
    words += [said for name, said in _WITHOUT_AGENT.items() if migration[name]]  # type: ignore[literal-required]
    if migration["agent_away_since"]:
        since = migration["agent_away_since"]
        words.append(f"agent away since {printable(since)} ({age(since, now)})")
    capabilities = migration["capabilities"]
    if not migration["migratable"]:
        reason = migration["blocked"]
        words.append("not migratable" + (f": {printable(reason)}" if reason else ""))
    if capabilities["source"] != "agent":
        words.append(_HEARSAY[capabilities["source"]].format(learned=printable(capabilities["learned"] or "")))
    if migration["owner"] is not None:
        words.append(f"by {migration['owner']}")
    if migration["bytes"] or migration["remaining"]:
        words.append(f"{short_size(migration['bytes'])} moved, about {short_size(migration['remaining'])} to come")
    if migration["step"] is not None:
        words.append(f"doing {printable(migration['step'])}")
    if migration["fenced"]:
        words.append("fenced: the next client gets it reset")
    words.append(f"agent's function {printable(migration['agent'])}")
    if capabilities["problem"]:
        words.append(f"not remembered: {printable(capabilities['problem'])}")
    if migration["last_failure"]:
        words.append(f"last failure: {printable(migration['last_failure'])}")
    return ", ".join(words)


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def age(since: str, now: datetime) -> str:
    """How long ago an ISO 8601 time was, in its two largest units.

    Args:
        since: the time; what cannot be read is shown as ``?``.
        now: the time to count from.
    """
    try:
        seconds = max(0, int((now - datetime.fromisoformat(since)).total_seconds()))
    except (ValueError, TypeError):
        return "?"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60}m"
    return f"{minutes}m{seconds % 60}s" if minutes else f"{seconds}s"


def short_size(size: int) -> str:
    """Bytes with a unit; not exact where that would be long."""
    exact = format_size(size)
    if len(exact) <= 6:
        return exact
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20)):
        if size >= factor:
            return f"{size / factor:.1f}{unit}"
    return exact


def printable(text: str) -> str:
    """Text of a peer, made harmless: it must not steer the terminal.

    Args:
        text: as it came.
    """
    return "".join(character if character.isprintable() else "?" for character in text)
