"""`install-files`: lay out units, configuration, man page and completions, for who installed with pip or pipx."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.generated import generated
from vfiouser_oob.cli.options import option
from vfiouser_oob.cli.shipped import NoFiles, ShippedFile, shipped
from vfiouser_oob.config.values import PATH

_OURS = "vfiouser-oob"
_NO_MAKERS = (
    "the man page and completions are left out: argparse-manpage and shtab are not installed; install with: {command}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `install-files`."""
    parser.add_argument(
        "--root", metavar="DIR", type=option(PATH.read), required=True, help="directory to install below, such as /"
    )
    parser.add_argument(
        "--prefix",
        metavar="DIR",
        default="/usr/local",
        help="directory below the root for everything but the configuration",
    )
    parser.add_argument(
        "--command",
        metavar="PATH",
        dest="program",
        help="the program that the units start (default: this one)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    parser.add_argument("--remove", action="store_true", help="remove the installed files, but not the configuration")


def run(args: argparse.Namespace) -> int:
    """Lay the files out, or remove them; one line for each that was touched."""
    try:
        files = [*shipped(args.prefix.strip("/"), args.program or _this_program()), *_made(args.prefix.strip("/"))]
        for file in files:
            done = _remove(args.root, file, args.dry_run) if args.remove else _write(args.root, file, args.dry_run)
            if done:
                print(f"{done} {args.root / file.target}")
    except NoFiles as error:
        raise CommandFailed(str(error)) from error
    return ExitCode.DONE


def _made(prefix: str) -> Sequence[ShippedFile]:
    from vfiouser_agents.extras import install_command, missing
    from vfiouser_oob.cli.main import build_parser

    if missing("package") is not None:
        print(_NO_MAKERS.format(command=install_command("package")), file=sys.stderr)
        return ()
    return tuple(generated(build_parser(whole=True), prefix))


def _this_program() -> str:
    return os.path.abspath(sys.argv[0])


def _write(root: Path, file: ShippedFile, dry_run: bool) -> str:
    path = root / file.target
    if path.exists() and (file.keep or path.read_bytes() == file.content):
        return ""
    if not dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
        path.chmod(file.mode)
    return "would write" if dry_run else "wrote"


def _remove(root: Path, file: ShippedFile, dry_run: bool) -> str:
    path = root / file.target
    if file.keep or not path.exists():
        return ""
    if not dry_run:
        path.unlink()
        for folder in path.parents:
            # Others put files into all folders but those of our name.
            if _OURS not in str(folder.relative_to(root)):
                break
            with suppress(OSError):  # the configuration is still in it
                folder.rmdir()
    return "would remove" if dry_run else "removed"
