"""`drain`: a function accepts no new client, and somebody waits for the last one to go."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.administer import add_name_argument, ask
from vfiouser_oob.cli.errors import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `drain`."""
    add_name_argument(parser)
    parser.add_argument("--undo", action="store_true", help="let clients connect again")


def run(args: argparse.Namespace) -> int:
    """Close the function for clients, wait, and say so."""
    answer = ask(args, "drain", name=args.name, undo=args.undo)
    outcome = "drained: it has no client and accepts none" if answer["drained"] else "clients may connect again"
    print(f"{args.name}: {outcome}")
    return ExitCode.DONE
