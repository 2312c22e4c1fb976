"""`check-config`: is this file good, and what does it say?"""

from __future__ import annotations

import argparse
import sys

from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.options import option
from vfiouser_oob.config.load import load_config, verify_agents
from vfiouser_oob.config.summary import summary, warnings
from vfiouser_oob.config.values import PATH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `check-config`."""
    parser.add_argument("file", metavar="FILE", type=option(PATH.read), help="the TOML file")


def run(args: argparse.Namespace) -> int:
    """Check the file; warnings go to standard error and do not fail it."""
    config = load_config(args.file)
    verify_agents(config, str(args.file))
    for line in summary(config):
        print(line)
    for warning in warnings(config):
        print(f"warning: {warning}", file=sys.stderr)
    return ExitCode.DONE
