"""`migrations`: the last migrations of each function, also those that a daemon before this one has seen."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vfiouser_oob.cli.asking import asked_daemon
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument
from vfiouser_oob.observability.status import MigrationEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `migrations`."""
    parser.add_argument("name", nargs="*", metavar="NAME", help="only those of this function (default: of all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and print."""
    with asked_daemon(args.control_socket) as client:
        entries = [entry for entry in client.migrations() if not args.name or entry["function"] in args.name]
    print(json.dumps(entries, indent=2) if args.json else render(entries))
    return ExitCode.DONE


def render(entries: Sequence[MigrationEntry], width: int | None = None) -> str:
    """Migrations as a table, the oldest first, and why some failed.

    Args:
        entries: as the daemon gave them.
        width: columns; None folds nothing.
    """
    from vfiouser_oob.cli.status_table import as_text, plain_table
    from vfiouser_oob.cli.status_words import clock, printable, short_size, short_time

    if not entries:
        return "no migrations yet"
    table = plain_table("WHEN (UTC)", "FUNCTION", "", "WAY", "MOVED", "RATE", "TOOK", "DOWNTIME", "OUTCOME")
    for entry in entries:
        table.add_row(
            clock(entry["ended"]),
            printable(entry["function"]),
            printable(entry["direction"]),
            printable(entry["way"] or "-"),
            short_size(entry["bytes"]),
            f"{entry['bytes_per_s'] / 1e6:.3g} MB/s",
            short_time(entry["duration_s"]),
            "-" if entry["downtime_s"] is None else short_time(entry["downtime_s"]),
            printable(entry["outcome"]),
        )
    reasons = [
        f"{clock(entry['ended'])} {printable(entry['function'])}: {printable(entry['why'])}"
        for entry in entries
        if entry["why"]
    ]
    return as_text(table, *([""] if reasons else []), *reasons, width=width)
