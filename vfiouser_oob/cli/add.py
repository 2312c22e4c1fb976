"""`add`: functions for a running daemon, out of a file that is not its configuration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vfiouser_oob.cli.administer import any_failed, ask, outcome_lines
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument, option
from vfiouser_oob.config.load import parse_functions, read_text
from vfiouser_oob.config.values import PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `add`."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=option(PATH.read),
        help="a TOML file with [[function]] tables; - for standard input",
    )
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Check the file here, where its lines can be named, and hand it over."""
    text = sys.stdin.read() if args.file == Path("-") else read_text(args.file)
    parse_functions(text, str(args.file))
    outcomes = ask(args, "add", toml=text, source=str(args.file))
    for line in outcome_lines(outcomes):
        print(line)
    if any_failed(outcomes):
        raise CommandFailed("not everything was added")
    print("not in the daemon's configuration file: a reload keeps it, a restart forgets it")
    return ExitCode.DONE
