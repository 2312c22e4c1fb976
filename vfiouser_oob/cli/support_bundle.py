"""`support-bundle`: everything that somebody needs who is to find out what is wrong, in one file."""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from vfiouser_oob.cli.asking import control_path
from vfiouser_oob.cli.bundle_parts import BundlePart, configuration, last_logs, of_daemon, versions
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument, option
from vfiouser_oob.config.values import PATH

DEFAULT_CONFIG = Path("/etc/vfiouser-oob/config.toml")
DEFAULT_UNIT = "vfiouser-oob.service"
LISTING = "LISTING.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `support-bundle`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=option(PATH.read),
        help=f"the daemon's configuration (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument("--unit", metavar="UNIT", default=DEFAULT_UNIT, help="the daemon's unit")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=option(PATH.read),
        help="the bundle to write (default: vfiouser-oob-DATE.tar.gz, here)",
    )
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Collect and write; print the listing."""
    now = time.time()
    name = time.strftime("vfiouser-oob-%Y%m%d-%H%M%S", time.gmtime(now))
    path = args.output or Path(f"{name}.tar.gz")
    parts = [
        versions(),
        configuration(args.config or DEFAULT_CONFIG),
        *of_daemon(control_path(args.control_socket)),
        last_logs(args.unit),
    ]
    listing = listed(parts)
    try:
        write(path, name, [BundlePart(LISTING, "this list", listing.encode()), *parts], now)
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror or error}") from None
    print(f"{path}:\n\n{listing}\nLook through it before you send it: it has the names of VMs and hosts, and paths.")
    return ExitCode.DONE


def listed(parts: Sequence[BundlePart]) -> str:
    """What a bundle holds, a line each.

    Args:
        parts: its files.
    """
    return "".join(f"{len(each.data):>9}  {each.name:<16}  {each.meaning}\n" for each in parts)


def write(path: Path, name: str, parts: Sequence[BundlePart], now: float) -> None:
    """Write a bundle that only its owner may read; nothing that is there is written over.

    Args:
        path: the file.
        name: of the folder in it.
        parts: its files.
        now: their time, in seconds since 1970.

    Raises:
        OSError: it cannot be written, or there is something of that name.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for each in parts:
            member = tarfile.TarInfo(f"{name}/{each.name}")
            member.size, member.mtime, member.mode = len(each.data), int(now), 0o600
            archive.addfile(member, io.BytesIO(each.data))
