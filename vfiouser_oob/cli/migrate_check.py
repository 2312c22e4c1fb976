"""`migrate-check`: would a VM migrate, and if not, why."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.options import add_control_socket_argument, chosen_path
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import default_control_socket
from vfiouser_oob.control.client import ControlClient, ControlError
from vfiouser_oob.vm.counterpart import CounterpartError, VmOffer

#: Seconds for the other host's answer.
REMOTE_S = 30.0
#: Bytes of the largest document that is read.
_MOST_BYTES = 1 << 20
_STANDARD = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `migrate-check`."""
    parser.add_argument("vm", metavar="VM", help="name of the VM")
    parser.add_argument(
        "--destination",
        metavar="HOST|FILE",
        help="check also whether that host would accept the VM, by ssh or by a file that --export wrote there",
    )
    parser.add_argument(
        "--export", metavar="FILE", help="write this host's answer for another host to this file; - for standard output"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_control_socket_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Ask the daemon, and print what is in the way.

    Returns:
        Exit code 0 if the VM would migrate, 1 if it would not; 2 (by ConfigError) if a document cannot be used.
    """
    path = chosen_path(args.control_socket, default_control_socket())
    if path is None:
        raise ConfigError("--control-socket must be a path here")
    params: dict[str, Any] = (
        {} if args.destination is None else {"destination": _document_of(args.destination, args.vm)}
    )
    try:
        with ControlClient(path) as client:
            found = client.ask("migrate-check", vm=args.vm, **params)
    except ControlError as error:
        raise CommandFailed(str(error)) from error
    if args.export is not None:
        _export(found["offer"], args.export)
        return ExitCode.DONE
    print(json.dumps(found, indent=2) if args.json else told(found))
    return ExitCode.DONE if found["migratable"] else ExitCode.FAILED


def told(found: Mapping[str, Any]) -> str:
    """What was found, for people.

    Args:
        found: the daemon's answer.
    """
    verdict = "would migrate" if found["migratable"] else "would not migrate"
    marks = {"refused": "no", "advice": "mind"}
    lines = [f"{marks.get(each['weight'], each['weight'])}: {each['text']}" for each in found["reasons"]]
    return "\n".join([f"VM {found['vm']} {verdict}", *(f"  {line}" for line in lines)])


def _export(offer: Mapping[str, Any], file: str) -> None:
    text = json.dumps(offer, indent=2) + "\n"
    if file == _STANDARD:
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{file}: cannot write it: {error.strerror}") from error


def _document_of(destination: str, vm: str) -> str:
    """What another host says: a file of it, or the host's own answer."""
    if "/" in destination or destination == _STANDARD or Path(destination).is_file():
        text, source = _read(destination), destination
    else:
        text, source = _ask_host(destination, vm), f"host {destination}"
    try:
        VmOffer.read(text)
    except CounterpartError as error:
        raise ConfigError(str(error), source) from None
    return text


def _read(file: str) -> str:
    try:
        if file == _STANDARD:
            return sys.stdin.read(_MOST_BYTES)
        with open(file, encoding="utf-8", errors="replace") as source:
            return source.read(_MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file) from error


def _ask_host(host: str, vm: str) -> str:
    if host.startswith("-"):
        raise ConfigError(f"{host!r} is not the name of a host")
    # ssh joins the words and gives them to a shell, to which a VM's name must not mean anything.
    argv = ["ssh", "-o", "BatchMode=yes", "--", host, "vfiouser-oob", "migrate-check", shlex.quote(vm), "--export", "-"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=REMOTE_S, check=False)
    except FileNotFoundError:
        raise CommandFailed(
            "ssh is not installed: give a file that `migrate-check --export FILE` wrote there"
        ) from None
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"host {host} did not answer within {REMOTE_S:g} s") from None
    if done.returncode != 0:
        raise CommandFailed(f"host {host}: {' '.join(done.stderr.split()) or f'ssh ended with {done.returncode}'}")
    return done.stdout
