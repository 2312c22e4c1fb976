"""`snippet`: what to tell a VMM so that it uses a function, or all functions of a VM."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.function_snippet import needed_budget_s, qemu_arguments, socket_path
from vfiouser_oob.cli.options import option
from vfiouser_oob.cli.vm_snippet import CPUS, carrier_of, functions_of, libvirt_domain, qemu_options
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.load import load_config
from vfiouser_oob.config.schema import DEFAULT_SOCKET_GROUP, DaemonConfig, FunctionConfig
from vfiouser_oob.config.tables import suggestion
from vfiouser_oob.config.values import PATH, SIZE, format_size
from vfiouser_oob.config.vms import VmConfig

DEFAULT_CONFIG = Path("/etc/vfiouser-oob/config.toml")
DEFAULT_MEMORY = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `snippet`."""
    parser.add_argument("vmm", choices=["qemu", "libvirt"], help="for which VMM")
    parser.add_argument("name", metavar="NAME", help="name of the VM; for qemu also of a single function")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=option(PATH.read),
        default=DEFAULT_CONFIG,
        help=f"the daemon's configuration (default: {DEFAULT_CONFIG})",
    )
    parser.add_argument(
        "--memory",
        metavar="BYTES",
        type=option(SIZE.read),
        default=DEFAULT_MEMORY,
        help=f"the VM's memory (default: {format_size(DEFAULT_MEMORY)})",
    )
    parser.add_argument(
        "--domain-type", choices=list(CPUS), default="kvm", help="type of the libvirt domain (default: kvm)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the snippet; what else to mind goes to standard error."""
    config = load_config(args.config)
    vm = config.vm(args.name)
    function = config.function(args.name)
    if vm is not None:
        _print_vm(config, vm, args)
    elif function is not None and args.vmm == "qemu":
        _print_function(config, function, args.memory)
    else:
        known = [vm.name for vm in config.vms]
        known += [each.name for each in config.functions] if args.vmm == "qemu" else []
        what = "VM or function" if args.vmm == "qemu" else "VM"
        told = suggestion(args.name, known) if known else f"; the configuration names no {what}"
        raise ConfigError(f"no {what} is named {args.name!r}{told}", str(args.config))
    return ExitCode.DONE


def _print_vm(config: DaemonConfig, vm: VmConfig, args: argparse.Namespace) -> None:
    functions = functions_of(config, vm)
    budget_s = max([config.reply_budget_s, *(needed_budget_s(config, each, args.memory) for each in functions)])
    if args.vmm == "qemu":
        _print_words(qemu_options(config, vm, args.memory, budget_s))
    else:
        print(libvirt_domain(config, vm, args.memory, budget_s, kind=args.domain_type))
    sockets = [*map(socket_path, functions), *_used(vm, carrier_of(vm, functions).value)]
    modes = {vm.socket_mode, *(function.socket_mode for function in functions)}
    group = vm.socket_group or DEFAULT_SOCKET_GROUP
    print(
        f"note: QEMU 11.1 or later is needed for migration; start the daemon first. QEMU's user needs access to "
        f"{', '.join(map(str, sockets))} (mode {'/'.join(f'{mode:04o}' for mode in sorted(modes))}, normally group "
        f"{group})",
        file=sys.stderr,
    )
    _note_budget(config, args.memory, budget_s)


def _used(vm: VmConfig, carrier: str) -> list[Path]:
    return [path for what, path in vm.sockets.items() if what in {"monitor", carrier.replace("-", "_")}]


def _print_function(config: DaemonConfig, function: FunctionConfig, memory: int) -> None:
    _print_words(qemu_arguments(config, function, memory))
    group = function.socket_group or DEFAULT_SOCKET_GROUP
    print(
        f"note: add these to `qemu-system-x86_64` (10.1 or later); its user needs access to "
        f"{socket_path(function)} (mode {function.socket_mode:04o}, normally group {group})",
        file=sys.stderr,
    )
    _note_budget(config, memory, needed_budget_s(config, function, memory))


def _print_words(lines: list[list[str]]) -> None:
    print(" \\\n".join(shlex.join(words) for words in lines))


def _note_budget(config: DaemonConfig, memory: int, needed: float) -> None:
    if needed > config.reply_budget_s:
        print(
            f"note: locking {format_size(memory)} may take longer than reply_budget_s = {config.reply_budget_s:g} "
            f"allows: set reply_budget_s = {needed:g} under [daemon]; the x-msg-timeout above goes with that",
            file=sys.stderr,
        )
