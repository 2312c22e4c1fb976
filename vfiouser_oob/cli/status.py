"""`status`: what a running daemon is doing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from vfiouser_oob.cli.asking import asked_daemon, control_path
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.observability.status import StatusReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `status`."""
    parser.add_argument("name", nargs="*", metavar="NAME", help="show only this function (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one object per line")
    parser.add_argument("--watch", action="store_true", help="keep running and show every change")
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and print."""
    with asked_daemon(args.control_socket) as client:
        if args.watch:
            _watch(client, control_path(args.control_socket), args)
        else:
            status = _chosen(client.status(), args.name)
            if args.json:
                print(json.dumps(status, indent=2))
            else:
                _show(status, args.name)
    return ExitCode.DONE


def _chosen(status: StatusReport, names: Sequence[str]) -> StatusReport:
    """What is told of these functions."""
    known = [function["name"] for function in status["functions"]]
    for name in names:
        if name not in known:
            raise CommandFailed(f"there is no function {name!r}; there are {', '.join(known) or 'none'}")
    if not names:
        return status
    return cast(
        "StatusReport", {**status, "functions": [each for each in status["functions"] if each["name"] in names]}
    )


def _show(status: StatusReport, names: Sequence[str]) -> None:
    from vfiouser_oob.cli.status_live import on_terminal
    from vfiouser_oob.cli.status_table import render, view

    console = on_terminal()
    if console is None:
        print(render(status, width=_columns(), names=names))
    else:
        console.print(view(status, names=names))


def _columns() -> int | None:
    """Columns that were asked for; a pipe has none, and then nothing is folded."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) >= 20 else None


def _watch(client: ControlClient, path: Path, args: argparse.Namespace) -> None:
    try:
        if args.json:
            for event in client.watch():
                print(json.dumps(event), flush=True)
        else:
            _watch_for_people(client, path, args.name)
    except KeyboardInterrupt:
        return
    print("the daemon has stopped", file=sys.stderr)


def _watch_for_people(client: ControlClient, path: Path, names: Sequence[str]) -> None:
    from vfiouser_oob.cli.status_live import live, on_terminal
    from vfiouser_oob.cli.status_table import render

    console = on_terminal()
    if console is not None and not console.is_dumb_terminal:
        with ControlClient(path) as asking:
            live(console, client.watch, asking.status, names)
        return
    for event in client.watch():
        if "status" in event and "type" not in event:
            print(render(_chosen(event["status"], names), width=_columns(), names=names), flush=True)
        elif not names or event.get("function") in (None, *names):
            print(event_line(event), flush=True)


def event_line(event: Mapping[str, Any]) -> str:
    """One event for people.

    Args:
        event: as it came from the daemon.
    """
    from vfiouser_oob.cli.status_words import printable

    when = event.get("time")
    stamp = time.strftime("%H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else "--:--:--"
    shown = {"type", "time", "function"}
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in event.items() if key not in shown}
    fields = "".join(f" {key}={printable(value)}" for key, value in values.items())
    return f"{stamp} {event.get('function') or 'daemon'} {event.get('type', '?')}{fields}"
