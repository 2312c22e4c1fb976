"""`libvirt-hook`: what libvirt's hook for QEMU asks, with the domain on standard input.

`migrate` and `restore` come before a QEMU is started that waits for a VM: the sockets are named as they are on this
host, and the VM is refused if it could not run here.
`started` comes when QEMU is there, and the source has not begun to send: it waits until the daemon has met QEMU.

What a hook refuses is given up, and libvirt shows what the hook wrote to standard error.

Spec: libvirt, "Hooks for specific system management".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.function_snippet import socket_path
from vfiouser_oob.cli.options import option
from vfiouser_oob.cli.snippet import DEFAULT_CONFIG
from vfiouser_oob.cli.vm_snippet import functions_of
from vfiouser_oob.config.load import load_config
from vfiouser_oob.config.schema import DaemonConfig, default_control_socket
from vfiouser_oob.config.values import PATH
from vfiouser_oob.config.vms import VmConfig
from vfiouser_oob.control.client import ControlClient, ControlError
from vfiouser_oob.vm.domain_xml import DomainError, DomainSockets, LibvirtDomain
from vfiouser_oob.vm.welcome import arrival_refusal, host_refusal, missing_parts

#: Seconds that QEMU may take to connect.
MEET_S = 20.0
#: Where libvirt writes which process a domain is.
PID_FILES = Path("/run/libvirt/qemu")
_LOOK_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what libvirt passes."""
    parser.add_argument("domain", metavar="DOMAIN", help="name of the domain")
    parser.add_argument("operation", metavar="OPERATION", help="such as migrate")
    parser.add_argument("stage", metavar="STAGE", nargs="?", default="", help="such as begin")
    parser.add_argument("extra", metavar="EXTRA", nargs="?", default="", help="normally -")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=option(PATH.read),
        default=DEFAULT_CONFIG,
        help=f"the daemon's configuration (default: {DEFAULT_CONFIG})",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the operation asks for; others are none of ours."""
    work = _OPERATIONS.get(args.operation)
    if work is None:
        return ExitCode.DONE
    try:
        domain = LibvirtDomain(sys.stdin.read())
    except DomainError as error:
        raise CommandFailed(str(error)) from error
    if domain.sockets.functions:
        work(domain, args.config)
    return ExitCode.DONE


def _receive(domain: LibvirtDomain, source: Path) -> None:
    """Look whether the VM can come, and name the sockets as they are here."""
    config = load_config(source)
    vm = vm_of(config, domain.sockets.functions)
    missing = missing_parts(domain.sockets, vm)
    if missing:
        raise CommandFailed(missing)
    try:
        with ControlClient(_control(config)) as client:
            refusal = host_refusal(client.status(), vm.name)
    except ControlError as error:
        raise CommandFailed(str(error)) from error
    if refusal:
        raise CommandFailed(refusal)
    here = {function.name: socket_path(function) for function in functions_of(config, vm)}
    moved = domain.moved(DomainSockets(here, vm.sockets))
    if moved is not None:
        sys.stdout.write(moved)


def _meet(domain: LibvirtDomain, source: Path) -> None:
    """Wait until the daemon knows the QEMU that waits for the VM. One that boots is let go on, whatever it lacks."""
    if not _is_incoming(domain.name):
        return
    config = load_config(source)
    vm = vm_of(config, domain.sockets.functions)
    deadline = time.monotonic() + MEET_S
    while True:
        try:
            with ControlClient(_control(config)) as client:
                refusal = arrival_refusal(client.status(), vm.name)
        except ControlError as error:
            refusal = str(error)
        if not refusal:
            return
        if time.monotonic() > deadline:
            raise CommandFailed(f"{refusal} (waited for {MEET_S:g} s)")
        time.sleep(_LOOK_S)


_OPERATIONS = MappingProxyType({"migrate": _receive, "restore": _receive, "started": _meet})


def vm_of(config: DaemonConfig, functions: Iterable[str]) -> VmConfig:
    """The VM that a domain is, whatever its name: the one with its functions.

    Args:
        config: the daemon's configuration.
        functions: their names.

    Raises:
        CommandFailed: there is none.
    """
    wanted = set(functions)
    for vm in config.vms:
        if set(vm.functions) == wanted:
            return vm
    known = "; ".join(f"{each.name}: {', '.join(each.functions)}" for each in config.vms) or "none"
    raise CommandFailed(f"no [[vm]] on this host has the functions {', '.join(sorted(wanted))} (it has {known})")


def _control(config: DaemonConfig) -> Path:
    return config.control_socket or default_control_socket()


def _is_incoming(domain: str) -> bool:
    """Whether a domain's QEMU was started to wait for a VM; False if that cannot be told."""
    try:
        pid = int((PID_FILES / f"{domain}.pid").read_text())
        return b"\0-incoming\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False
