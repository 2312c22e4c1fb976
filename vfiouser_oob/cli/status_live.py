"""`status --watch` on a terminal: the tables, kept up to date, and below them what happened last."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vfiouser_oob.cli.status import event_line
from vfiouser_oob.cli.status_table import view
from vfiouser_oob.observability.status import StatusReport

#: Seconds between two looks at the figures, which no event tells of, and at most so many looks per second.
BEAT_S = 1.0
_LEAST_PAUSE_S = 0.2
#: Events that are shown.
EVENTS = 8


def on_terminal() -> Console | None:
    """The terminal that standard output is; None if it is a pipe or a file."""
    if not sys.stdout.isatty():
        return None
    # rich itself obeys TERM=dumb, NO_COLOR and COLUMNS.
    return Console(highlight=False, emoji=False, markup=False)


def live(
    console: Console,
    watch: Callable[[float], Iterator[dict[str, Any]]],
    ask: Callable[[], StatusReport],
    names: Sequence[str],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show the state and go on showing it until the daemon stops.

    Args:
        console: where.
        watch: gives what happens, and an empty event after so many seconds of silence.
        ask: gives the state.
        names: functions to be told of; empty = all.
        clock: seconds that only move forward.
    """
    happened: deque[str] = deque(maxlen=EVENTS)
    asked = float("-inf")
    status: StatusReport | None = None
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as screen:
        for event in watch(BEAT_S):
            if "status" in event and "type" not in event:
                status, asked = event["status"], clock()
            elif event and (not names or event.get("function") in (None, *names)):
                happened.append(event_line(event))
            if clock() - asked >= _LEAST_PAUSE_S:
                status, asked = ask(), clock()
            if status is not None:
                screen.update(_screen(status, names, happened), refresh=True)


def _screen(status: StatusReport, names: Sequence[str], happened: Sequence[str]) -> Group:
    parts: list[RenderableType] = [view(status, names=names)]
    if happened:
        parts += ["", *(Text(line, overflow="ellipsis", no_wrap=True) for line in happened)]
    return Group(*parts)
