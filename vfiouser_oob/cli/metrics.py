"""`metrics`: what a running daemon has measured, as OpenMetrics text."""

from __future__ import annotations

import argparse
import json
import sys

from vfiouser_oob.cli.asking import asked_daemon
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `metrics`."""
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON; needs no extra")
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and print."""
    from vfiouser_agents.extras import missing
    from vfiouser_oob.observability.openmetrics import render

    with asked_daemon(args.control_socket) as client:
        measured = client.metrics()
    if args.json:
        print(json.dumps(measured, indent=2))
        return ExitCode.DONE
    lacking = missing("metrics")
    if lacking is not None:
        raise CommandFailed(f"cannot print metrics: {lacking}")
    sys.stdout.write(render(measured).decode())
    return ExitCode.DONE
