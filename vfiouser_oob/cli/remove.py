"""`remove`: a function leaves a running daemon."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.administer import add_name_argument, ask
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.status_words import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `remove`."""
    add_name_argument(parser)
    parser.add_argument(
        "--force", action="store_true", help="disconnect its client; without this, a function with a client stays"
    )


def run(args: argparse.Namespace) -> int:
    """Remove it, and tell whom that cost its device."""
    answer = ask(args, "remove", name=args.name, force=args.force)
    turned_out = answer["turned_out"]
    print(f"{args.name}: removed" + (f"; {printable(str(turned_out))} is disconnected" if turned_out else ""))
    return ExitCode.DONE
