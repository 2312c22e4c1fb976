"""Entry point: picks the sub-command, runs it, and turns what it raises into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, cast

from vfiouser_oob import __version__
from vfiouser_oob.cli.errors import ExitCode, details, explain
from vfiouser_oob.cli.examples import EXAMPLES
from vfiouser_oob.cli.parser import OneLineParser, did_you_mean
from vfiouser_oob.observability import log

PROGRAM = "vfiouser-oob"


class Subcommand(Protocol):
    """What the module of a sub-command offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; return the exit code."""


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """One row of the table of sub-commands.

    Args:
        name: what the user types.
        module: its module, imported only when it is used, so that ``--help`` is quick.
        summary: one line for the list.
    """

    name: str
    module: str
    summary: str


COMMANDS: Sequence[CommandEntry] = (
    CommandEntry("serve", "vfiouser_oob.cli.serve", "export functions on vfio-user sockets"),
    CommandEntry("keep", "vfiouser_oob.cli.keep", "run a command, and restart it with its kept descriptors"),
    CommandEntry("check-config", "vfiouser_oob.cli.check_config", "check a configuration file and summarize it"),
    CommandEntry("status", "vfiouser_oob.cli.status", "show what a running daemon is doing"),
    CommandEntry("add", "vfiouser_oob.cli.add", "add functions to a running daemon"),
    CommandEntry("remove", "vfiouser_oob.cli.remove", "remove a function from a running daemon"),
    CommandEntry("reload", "vfiouser_oob.cli.reload", "make a running daemon read its configuration again"),
    CommandEntry("drain", "vfiouser_oob.cli.drain", "close a function to new clients, and wait for the last one"),
    CommandEntry("disconnect", "vfiouser_oob.cli.disconnect", "disconnect the client of a function"),
    CommandEntry("log-level", "vfiouser_oob.cli.log_level", "choose what a running daemon logs"),
    CommandEntry("migrations", "vfiouser_oob.cli.migrations", "list the last migrations of each function"),
    CommandEntry("metrics", "vfiouser_oob.cli.metrics", "print what a running daemon has measured"),
    CommandEntry("support-bundle", "vfiouser_oob.cli.support_bundle", "collect everything that helps to find a fault"),
    CommandEntry("snippet", "vfiouser_oob.cli.snippet", "print what a VMM needs to use a function"),
    CommandEntry(
        "migrate-check", "vfiouser_oob.cli.migrate_check", "check whether a VM would migrate, and if not, why"
    ),
    CommandEntry("libvirt-hook", "vfiouser_oob.cli.libvirt_hook", "answer libvirt's hook for QEMU"),
    CommandEntry("bind", "vfiouser_oob.cli.bind", "bind a PCI function to vfio-pci"),
    CommandEntry("unbind", "vfiouser_oob.cli.unbind", "return a PCI function to its own driver"),
    CommandEntry("simulate-soc", "vfiouser_soc.command", "play an IPU/DPU with NVMe functions"),
    CommandEntry("agent-check", "vfiouser_oob.cli.agent_check", "check an agent against its contract"),
    CommandEntry("conformance", "vfiouser_oob.cli.conformance", "test any vfio-user server for conformance"),
    CommandEntry("demo", "vfiouser_oob.cli.demo", "demonstrate everything at work, without a VMM"),
    CommandEntry("install-files", "vfiouser_oob.cli.install_files", "install units, configuration and man page"),
    CommandEntry("bench", "vfiouser_oob.cli.bench", "measure the daemon on this machine"),
)


def build_parser(chosen: str | None = None, *, whole: bool = False) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        chosen: the sub-command whose options are wanted; those of the others are left out and not imported.
        whole: those of all sub-commands are wanted.
    """
    parser = OneLineParser(
        prog=PROGRAM,
        description="A vfio-user server between a VMM and the PCI functions of an IPU/DPU.",
        epilog=f"`{PROGRAM} COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for entry in COMMANDS:
        # Not capitalize(), which makes "vmm" of a VMM.
        summary = entry.summary[0].upper() + entry.summary[1:]
        sub = commands.add_parser(entry.name, help=entry.summary, description=f"{summary}.")
        if entry.name in EXAMPLES:
            sub.epilog = f"example:\n  {PROGRAM} {EXAMPLES[entry.name]}"
        if whole or entry.name == chosen:
            _load(entry).add_arguments(sub)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; a mistake ends the process with one line and exit code 2.

    Args:
        arguments: without the program's name.
    """
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    names = [entry.name for entry in COMMANDS]
    parser = build_parser(chosen)
    if chosen is None and not arguments:
        parser.print_help()
        parser.exit(ExitCode.DONE)
    if chosen is not None and chosen not in names:
        parser.error(f"there is no command {chosen!r}{did_you_mean(chosen, names)}")
    if chosen is not None:
        place = arguments.index(chosen)
        sub = _parser_of(parser, chosen)
        sub.check_options(arguments[place + 1 :])
    return parser.parse_args(arguments)


def _parser_of(parser: argparse.ArgumentParser, name: str) -> OneLineParser:
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = commands.choices[name]
    assert isinstance(found, OneLineParser)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None = those of the process.

    Returns:
        The exit code.
    """
    _complete_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    entries = {entry.name: entry for entry in COMMANDS}
    args: argparse.Namespace | None = None
    try:
        args = parse(arguments)
        _end_on_sigterm()
        return _load(entries[args.command]).run(args)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    # The last handler of the process: a user gets a line, never a traceback.
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:  # noqa: BLE001
        return _report(error, args)


def _load(entry: CommandEntry) -> Subcommand:
    return cast("Subcommand", importlib.import_module(entry.module))


def _report(error: BaseException, args: argparse.Namespace | None) -> ExitCode:
    code, lines = explain(error)
    if getattr(args, "log_level", None) == "debug":
        log.write_last(details(error).splitlines(), logging.DEBUG)
    log.write_last([f"{PROGRAM}: {line}" for line in lines])
    return code


def _complete_standard_streams() -> None:
    """Make standard streams out of nothing where the process came without, and let them take every character.

    A closed descriptor would be given to the next socket, and what is meant for standard error would go to a client.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(fd, "w", closefd=False, encoding="utf-8"))  # noqa: SIM115  # open to the end
        elif isinstance(stream, io.TextIOWrapper):
            # A character that the locale does not have is written as an escape, and never is an error.
            stream.reconfigure(errors="backslashreplace")


def _end_on_sigterm() -> None:
    # SIGTERM takes the way of Ctrl-C, so that child processes and sockets are cleaned up by the same code.
    # `serve` puts its own, graceful handler in place of this one.
    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell leaves it for `vfiouser-oob demo &` in a script; then neither signal would end anything.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, interrupt)
