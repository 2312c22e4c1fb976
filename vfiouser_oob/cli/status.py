"""`status`: what a running daemon is doing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument, chosen_path
from vfiouser_oob.cli.status_table import printable, render
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import default_control_socket
from vfiouser_oob.control.client import ControlClient, ControlError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `status`."""
    parser.add_argument("--json", action="store_true", help="print JSON; with --watch one object per line")
    parser.add_argument("--watch", action="store_true", help="go on and print every change")
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and print."""
    path = chosen_path(args.control_socket, default_control_socket())
    if path is None:
        raise ConfigError("--control-socket must be a path here")
    try:
        with ControlClient(path) as client:
            if args.watch:
                _watch(client, as_json=args.json)
            else:
                status = client.status()
                print(json.dumps(status, indent=2) if args.json else render(status))
    except ControlError as error:
        raise CommandFailed(str(error)) from error
    return ExitCode.DONE


def _watch(client: ControlClient, *, as_json: bool) -> None:
    try:
        for event in client.watch():
            if as_json:
                print(json.dumps(event), flush=True)
            elif "status" in event and "type" not in event:
                print(render(event["status"]), flush=True)
            else:
                print(event_line(event), flush=True)
    except KeyboardInterrupt:
        return
    print("the daemon has stopped", file=sys.stderr)


def event_line(event: Mapping[str, Any]) -> str:
    """One event for people.

    Args:
        event: as it came from the daemon.
    """
    when = event.get("time")
    stamp = time.strftime("%H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else "--:--:--"
    shown = {"type", "time", "function"}
    values = {key: json.dumps(value, ensure_ascii=False) for key, value in event.items() if key not in shown}
    fields = "".join(f" {key}={printable(value)}" for key, value in values.items())
    return f"{stamp} {event.get('function') or 'daemon'} {event.get('type', '?')}{fields}"
