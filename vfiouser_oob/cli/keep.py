"""`keep`: what systemd does for a service that hands descriptors over, where there is no systemd."""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vfiouser_oob.cli.errors import CommandFailed
from vfiouser_oob.cli.options import add_logging_arguments, count, option
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import LogFormat, LogLevel
from vfiouser_oob.config.values import SOCKET_PATH

_MAX_DESCRIPTORS = 1 << 16
_MAX_STOP_S = 3600
_MAX_STARTS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `keep`."""
    parser.description = (
        "Runs a command, keeps the descriptors that it hands over by the protocol of sd_notify(3), and starts it again "
        "with them (LISTEN_FDS) when it failed or was killed. SIGUSR2 restarts the command; SIGTERM ends it, and the "
        "keeper with it; SIGHUP and SIGUSR1 are passed on."
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        type=option(_socket),
        help="socket for the command's messages (default: one in a new directory)",
    )
    parser.add_argument(
        "--max-descriptors",
        metavar="N",
        type=count(0, _MAX_DESCRIPTORS),
        default=4096,
        help="keep at most this many descriptors (default: 4096)",
    )
    parser.add_argument(
        "--stop-timeout",
        metavar="SECONDS",
        type=count(1, _MAX_STOP_S),
        default=15,
        help="seconds after which a command that does not end is killed (default: 15)",
    )
    parser.add_argument(
        "--max-starts",
        metavar="N",
        type=count(1, _MAX_STARTS),
        default=5,
        help="give up after this many starts within ten seconds (default: 5)",
    )
    add_logging_arguments(parser)
    parser.add_argument("argv", metavar="COMMAND …", nargs=argparse.REMAINDER, help="the command, after --")


def _socket(text: str) -> Path:
    return SOCKET_PATH.read(text.removeprefix("unix:"))


def run(args: argparse.Namespace) -> int:
    """Keep until the command has ended for good."""
    command = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not command:
        raise ConfigError("the command is missing; for example: keep -- vfiouser-oob serve --config FILE")
    import trio

    from vfiouser_oob.keeper.keeper import Keeper
    from vfiouser_oob.keeper.store import KeeperLimits
    from vfiouser_oob.observability import log
    from vfiouser_oob.systemd.listen import announced
    from vfiouser_oob.transport.fds import OwnedFd

    log.configure(args.log_level or LogLevel.INFO, args.log_format or LogFormat.HUMAN)
    with ExitStack() as resources:
        address = args.socket
        if address is None:
            address = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="vfiouser-keep-"))) / "notify"
        inherited = [(name, OwnedFd(number)) for number, name in announced(os.environ)]
        try:
            limits = KeeperLimits(args.max_descriptors)
            keeper = Keeper(command, address, limits, args.stop_timeout, inherited, most_starts=args.max_starts)
            resources.callback(keeper.close)
            return trio.run(keeper.run)
        except OSError as error:
            raise CommandFailed(f"{command[0]}: {error.strerror}") from error
