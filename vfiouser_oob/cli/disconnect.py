"""`disconnect`: the client of a function is turned out."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.administer import add_name_argument, ask
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.status_words import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `disconnect`."""
    add_name_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Turn it out, and tell who it was."""
    answer = ask(args, "disconnect", name=args.name)
    print(f"{args.name}: {printable(str(answer['turned_out']))} is disconnected; the next client may connect")
    return ExitCode.DONE
