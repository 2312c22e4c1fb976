"""`reload`: a running daemon reads its configuration again."""

from __future__ import annotations

import argparse

from vfiouser_oob.cli.administer import any_failed, ask, outcome_lines
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `reload`."""
    parser.add_argument(
        "--force", action="store_true", help="disconnect clients of functions that change, instead of waiting for them"
    )
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Have it done, and show the difference."""
    answer = ask(args, "reload", force=args.force)
    changes, applied, restart = answer["changes"], answer["applied"], answer["restart"]
    for line in outcome_lines(changes):
        print(line)
    if applied:
        print(f"[daemon]: changed ({', '.join(applied)})")
    if restart:
        print(f"[daemon]: needs a restart ({', '.join(restart)})")
    if not (changes or applied or restart):
        print("nothing changed")
    if any_failed(changes):
        raise CommandFailed("the daemon could not apply the whole configuration")
    return ExitCode.DONE
