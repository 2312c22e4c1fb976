"""Man page and shell completions, made of the parser that also makes `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import PurePosixPath

from vfiouser_oob import __version__
from vfiouser_oob.cli.shipped import ShippedFile

PROGRAM = "vfiouser-oob"
#: Shell: where its completion goes, below the prefix.
COMPLETIONS = {
    "bash": f"share/bash-completion/completions/{PROGRAM}",
    "zsh": f"share/zsh/site-functions/_{PROGRAM}",
    "fish": f"share/fish/vendor_completions.d/{PROGRAM}.fish",
}
MAN = f"share/man/man1/{PROGRAM}.1"


def generated(parser: argparse.ArgumentParser, prefix: str) -> Iterator[ShippedFile]:
    """Every file that is made of the parser.

    Args:
        parser: with the options of every sub-command.
        prefix: relative to the root, such as ``usr/local``.

    Raises:
        ImportError: the packages that make them are not installed: the extra `package`.
    """
    below = PurePosixPath(prefix)
    yield ShippedFile(below / MAN, man_page(parser).encode())
    for shell, target in COMPLETIONS.items():
        yield ShippedFile(below / target, completion(parser, shell).encode())


def man_page(parser: argparse.ArgumentParser) -> str:
    """The man page, in roff.

    Args:
        parser: with the options of every sub-command.
    """
    from argparse_manpage.manpage import Manpage

    data = {
        "project_name": PROGRAM,
        "prog": PROGRAM,
        "description": "vfio-user server for the PCI functions of an IPU/DPU",
        "version": __version__,
        "manual_title": "vfiouser-oob",
        # The day of a build does not change the page.
        "date": "",
    }
    return str(Manpage(parser, format="pretty", _data=data))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for a shell.

    Args:
        parser: with the options of every sub-command.
        shell: one of `COMPLETIONS`.
    """
    import shtab

    _complete_paths(parser)
    return str(shtab.complete(parser, shell))


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let the shell offer files where an option takes one; argparse does not know of that."""
    import shtab

    kinds = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete_paths(sub)
        elif isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
