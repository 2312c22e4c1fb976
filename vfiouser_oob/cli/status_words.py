"""What a status document says of a function, in the words of somebody who has never read the specification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from vfiouser_oob.config.values import format_size
from vfiouser_oob.observability.status import ClientStatus, FunctionStatus, MapsStatus, MigrationStatus


class FunctionWord(Enum):
    """What a function does, in one or two words."""

    RUNNING = "running"
    CONNECTING = "connecting"
    PAUSED = "paused"
    MIGRATING_OUT = "migrating out"
    MIGRATING_IN = "migrating in"
    HELD = "held"
    UNKNOWN = "not known"
    FAILED = "failed"


#: States of the v2 generation in which there is more to say than that it runs.
_BY_STATE: Mapping[str, FunctionWord] = MappingProxyType(
    {
        "ERROR": FunctionWord.FAILED,
        "STOP": FunctionWord.PAUSED,
        "RUNNING_P2P": FunctionWord.PAUSED,
        "STOP_COPY": FunctionWord.MIGRATING_OUT,
        "PRE_COPY": FunctionWord.MIGRATING_OUT,
        "PRE_COPY_P2P": FunctionWord.MIGRATING_OUT,
        "RESUMING": FunctionWord.MIGRATING_IN,
    }
)
_DOING: Mapping[str, str] = MappingProxyType(
    {
        "ERROR": "broken until it is reset",
        "STOP": "it is stopped",
        "RUNNING_P2P": "it starts no new transfers",
        "STOP_COPY": "it is stopped and being copied",
        "PRE_COPY": "it is being copied while it runs",
        "PRE_COPY_P2P": "it is being copied and starts no new transfers",
        "RESUMING": "a state is being loaded",
    }
)
#: What is said of capabilities that the agent itself has not told this daemon.
_HEARSAY = {
    "stored": "as its agent said at {learned}; it has not answered yet",
    "configuration": "but its agent has never answered",
}
#: What is said of a function whose agent did not do its part.
_WITHOUT_AGENT = {
    "paused_over_link": "paused without its agent",
    "reset_due": "reset as soon as its agent answers",
    "held_back": "guest writes are held back",
}


class StatusLine(NamedTuple):
    """One thing that is said of a function.

    Args:
        label: what about.
        text: what.
        wrong: whether somebody ought to look at it.
    """

    label: str
    text: str
    wrong: bool = False


def word_of(function: FunctionStatus) -> FunctionWord:
    """What a function does.

    Args:
        function: as the daemon described it.
    """
    migration = function["migration"]
    if function["phase"] == "failed" or function["unavailable"]:
        return FunctionWord.FAILED
    if migration is not None:
        if not migration["known"]:
            return FunctionWord.UNKNOWN
        if migration["fenced"]:
            return FunctionWord.HELD
        if migration["state"] in _BY_STATE:
            return _BY_STATE[migration["state"]]
    return FunctionWord.CONNECTING if function["phase"] == "negotiating" else FunctionWord.RUNNING


def since_of(function: FunctionStatus) -> str:
    """Since when it does that.

    Args:
        function: as the daemon described it.

    Returns:
        ISO 8601.
    """
    migration = function["migration"]
    if function["phase"] != "failed" and function["unavailable_since"]:
        return function["unavailable_since"]
    if migration is not None and migration["unknown_since"]:
        return migration["unknown_since"]
    return function["since"]


def client_words(client: ClientStatus | None) -> str:
    """Who uses a function.

    Args:
        client: None if nobody does.
    """
    return "none" if client is None else f"{printable(client['command']) or '?'}[{client['pid']}]"


def memory_words(maps: MapsStatus) -> str:
    """What a client lets a device reach.

    Args:
        maps: its DMA mappings.
    """
    if not maps["count"]:
        return "-"
    shared = f"in {plural(maps['files'], 'file')}" if maps["files"] else "not shared"
    return f"{short_size(maps['bytes'])} {shared}"


def notes_of(function: FunctionStatus, now: datetime) -> Iterator[StatusLine]:
    """What else is worth knowing, the worst first.

    Args:
        function: as the daemon described it.
        now: the time that ages are counted from.
    """
    failed, unavailable, migration = function["failed"], function["unavailable"], function["migration"]
    if failed:
        yield StatusLine("failed", f"{printable(failed)} ({age(function['since'], now)} ago)", wrong=True)
    if unavailable and unavailable != failed:
        since = age(function["unavailable_since"] or "", now)
        yield StatusLine("failed", f"{printable(unavailable)} ({since} ago); each new client tries again", wrong=True)
    if function["last_error"] and function["last_error"] not in (failed, unavailable):
        yield StatusLine(
            "last error", f"{age(function['last_error_at'] or '', now)} ago: {printable(function['last_error'])}", True
        )
    if migration is not None:
        yield from _migration_notes(migration, now)
    else:
        yield StatusLine("migration", "none: no agent is configured")
    maps = function["maps"]
    if function["client"] is not None and maps["count"] and not maps["files"]:
        yield StatusLine(
            "memory", "the client shares no memory (QEMU: share=on): all DMA goes through slow messages", wrong=True
        )
    yield StatusLine("device", printable(function["device"]))
    yield StatusLine("socket", printable(function["socket"]))
    if function["client"] is not None:
        yield StatusLine("client", f"{client_words(function['client'])}, user {function['client']['uid']}")
    if function["regions"]:
        yield StatusLine(
            "regions",
            ", ".join(
                f"{region['name']} {short_size(region['size'])}{' mapped' if region['mapped'] else ''}"
                for region in function["regions"]
            ),
        )


def _migration_notes(migration: MigrationStatus, now: datetime) -> Iterator[StatusLine]:
    capabilities = migration["capabilities"]
    blocked, away = migration["blocked"], migration["agent_away_since"]
    yield StatusLine("migration", ", ".join(_migration_words(migration, now)), wrong=bool(blocked))
    words = [f"calls the function {printable(migration['agent'])}"]
    if away:
        words.insert(0, f"has not answered since {clock(away)} ({age(away, now)} ago)")
    if capabilities["problem"]:
        words.append(f"the daemon does not remember what it can do: {printable(capabilities['problem'])}")
    yield StatusLine("agent", ", ".join(words), wrong=bool(away or capabilities["problem"]))
    if migration["last_failure"]:
        when = age(migration["last_failure_at"] or "", now)
        yield StatusLine("last failure", f"{when} ago: {printable(migration['last_failure'])}", wrong=True)


def _migration_words(migration: MigrationStatus, now: datetime) -> Iterator[str]:
    if not migration["known"]:
        since = migration["unknown_since"] or ""
        yield f"unknown since {clock(since)} ({age(since, now)} ago)"
        yield f"last known {migration['state']}"
    elif migration["state"] in _DOING:
        yield f"{_DOING[migration['state']]} ({migration['state']})"
    yield from (said for name, said in _WITHOUT_AGENT.items() if migration[name])  # type: ignore[literal-required]
    if migration["owner"] is not None:
        yield f"by {migration['owner']}"
    if migration["bytes"] or migration["remaining"]:
        yield f"{short_size(migration['bytes'])} moved, about {short_size(migration['remaining'])} left"
    if migration["step"] is not None:
        yield f"doing {printable(migration['step'])}"
    if migration["fenced"]:
        yield "a copy may run elsewhere: it is reset for the next client"
    yield from _ability(migration)


def _ability(migration: MigrationStatus) -> Iterator[str]:
    capabilities = migration["capabilities"]
    if migration["blocked"] or not migration["migratable"]:
        yield f"not possible: {printable(migration['blocked'] or 'the agent cannot save its state')}"
    elif migration["state"] == "RUNNING" and migration["known"]:
        yield "possible, mostly while it runs" if capabilities["precopy"] else "possible"
    if capabilities["source"] != "agent":
        yield _HEARSAY[capabilities["source"]].format(learned=clock(capabilities["learned"] or ""))


def plural(count: int, noun: str) -> str:
    """A number and what it counts.

    Args:
        count: how many.
        noun: of what, one of them.
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def clock(when: str) -> str:
    """An ISO 8601 time as people read it, in UTC.

    Args:
        when: the time; what cannot be read is shown as it is.
    """
    try:
        return f"{datetime.fromisoformat(when):%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return printable(when) or "?"


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


def short_time(seconds: float) -> str:
    """A duration with a unit and two or three figures.

    Args:
        seconds: the duration.
    """
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.0f} ns" if seconds else "0"


def printable(text: str) -> str:
    """Text of a peer, made harmless: it must not steer the terminal.

    Args:
        text: as it came.
    """
    return "".join(character if character.isprintable() else "?" for character in text)
