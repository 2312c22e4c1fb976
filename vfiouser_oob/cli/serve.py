"""`serve`: the daemon itself."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.long_lived import settle_objects
from vfiouser_oob.cli.options import (
    add_control_socket_argument,
    add_key,
    add_logging_arguments,
    add_state_directory_argument,
    chosen_path,
    count,
    option,
)
from vfiouser_oob.cli.parser import HelpText
from vfiouser_oob.config.agents import parse_agent
from vfiouser_oob.config.devices import device_forms, parse_device
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.load import check_unique, load_config
from vfiouser_oob.config.schema import (
    DaemonConfig,
    DmaMode,
    FunctionConfig,
    LogFormat,
    LogLevel,
    default_control_socket,
    default_state_directory,
)
from vfiouser_oob.config.tables import brief
from vfiouser_oob.config.values import PATH, SOCKET_PATH, Value

# Options that describe the one function of the form without a file.
_ONE_FUNCTION = {
    "socket_path": "--socket-path",
    "fd": "--fd",
    "device": "--device",
    "name": "--name",
    "dma": "--dma",
    "agent": "--agent",
}
_FD_MAX = (1 << 31) - 1


class _WithShortForms(HelpText):
    """Help that ends with what ``--device`` takes; models are loaded for it, so it is not made before it is read."""

    def format_help(self) -> str:
        """Return the help."""
        head = "devices (options follow as ,KEY=VALUE; write a comma inside a value twice):"
        return "\n".join([super().format_help(), head, *short_forms(self._width)]) + "\n"


def short_forms(width: int) -> Iterator[str]:
    """Each kind of device and its keys, as lines.

    Args:
        width: columns.
    """
    for form, options in device_forms().items():
        yield f"  {form}"
        for one in options:
            choices = "|".join(one.value.choices) if isinstance(one.value, Value) else ""
            text = f"{one.name}={choices or '…'}  {brief(one)}"
            yield textwrap.fill(text, width, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `serve`."""
    parser.formatter_class = _WithShortForms
    parser.add_argument(
        "--config", metavar="FILE", type=option(PATH.read), help="serve the functions of this TOML file"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket-path", metavar="PATH", type=option(SOCKET_PATH.read), help="serve one function on this socket"
    )
    where.add_argument(
        "--fd", metavar="N", type=count(0, _FD_MAX), help="serve one function on this inherited descriptor"
    )
    parser.add_argument("--device", metavar="KIND:…", help="the function's device: one of those below")
    parser.add_argument(
        "--agent",
        metavar="KIND:…",
        help="the agent that migrates it, e.g. msgpack-rpc:unix:///run/agent.sock,function=f0",
    )
    add_key(parser, "--name", FunctionConfig, "name", "its name (default: from the socket's path)")
    add_key(parser, "--dma", FunctionConfig, "dma")
    add_key(parser, "--reply-budget", DaemonConfig, "reply_budget_s", metavar="SECONDS")
    add_control_socket_argument(parser, "; 'none' disables it")
    add_state_directory_argument(parser)
    parser.add_argument(
        "--fd-store",
        metavar="unix:PATH",
        type=option(_fd_store),
        help="socket of the service that keeps clients' descriptors over a restart, by the protocol of sd_notify(3) "
        "(default: $NOTIFY_SOCKET)",
    )
    add_logging_arguments(parser)


def _fd_store(text: str) -> str:
    return str(SOCKET_PATH.read(text.removeprefix("unix:")))


def config_from(args: argparse.Namespace) -> DaemonConfig:
    """The configuration that the command line asks for.

    Args:
        args: what the parser made of it.

    Raises:
        ConfigError: the file or the options cannot be used.
    """
    base = _from_file(args) if args.config is not None else _one_function(args)
    control_socket = chosen_path(args.control_socket, base.control_socket)
    state_directory = chosen_path(args.state_directory, base.state_directory)
    overrides: dict[str, Any] = {"control_socket": control_socket, "state_directory": state_directory}
    if args.log_level is not None:
        overrides["log_level"] = LogLevel(args.log_level)
    if args.log_format is not None:
        overrides["log_format"] = LogFormat(args.log_format)
    if args.reply_budget is not None:
        overrides["reply_budget_s"] = args.reply_budget
    config = dataclasses.replace(base, fd_store=args.fd_store, **overrides)
    check_unique(config)
    return config


def _from_file(args: argparse.Namespace) -> DaemonConfig:
    for attribute, flag in _ONE_FUNCTION.items():
        if getattr(args, attribute) is not None:
            raise ConfigError(f"{flag} describes one function and cannot be used with --config")
    return load_config(args.config, lenient=True)


def _one_function(args: argparse.Namespace) -> DaemonConfig:
    if args.device is None:
        raise ConfigError("either --config FILE or --device KIND:… is needed (see vfiouser-oob serve --help)")
    if args.socket_path is None and args.fd is None and "LISTEN_FDS" not in os.environ:
        raise ConfigError("--device needs --socket-path PATH or --fd N, or a socket passed by systemd")
    device = parse_device(args.device, "--device")
    function = FunctionConfig(
        name=args.name or _name_for(args.socket_path, args.fd),
        device=device,
        socket=args.socket_path,
        fd=args.fd,
        dma=DmaMode(args.dma) if args.dma else DmaMode.FILES,
        agent=parse_agent(args.agent, device, "--agent") if args.agent else None,
    )
    return DaemonConfig(
        functions=(function,), control_socket=default_control_socket(), state_directory=default_state_directory()
    )


def _name_for(socket_path: Path | None, fd: int | None) -> str:
    if socket_path is None:
        return "function" if fd is None else f"fd{fd}"
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", socket_path.stem).lstrip("._-")
    return stem[:63] or "function"


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    config = config_from(args)
    # Imported here: a mistake on the command line is reported without loading the whole daemon first.
    import trio

    from vfiouser_oob.control.metrics_http import serve_metrics
    from vfiouser_oob.control.server import serve_control
    from vfiouser_oob.observability import log
    from vfiouser_oob.server.daemon import run_daemon
    from vfiouser_oob.vm.kind import vm_kind

    log.configure(config.log_level, config.log_format)
    settle_objects()
    reread = None if args.config is None else partial(config_from, args)
    run = partial(run_daemon, config, control=serve_control, metrics=serve_metrics, vms=vm_kind, reread=reread)
    trio.run(run)
    return ExitCode.DONE
