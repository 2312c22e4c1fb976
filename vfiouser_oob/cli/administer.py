"""What the commands have in common that change a running daemon."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vfiouser_oob.cli.errors import CommandFailed
from vfiouser_oob.cli.options import add_control_socket_argument, chosen_path, option
from vfiouser_oob.cli.status_table import printable
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import default_control_socket
from vfiouser_oob.config.values import NAME
from vfiouser_oob.control.client import ControlClient, ControlError

#: Words for what became of a function, once it is done and before.
_STEPS: Mapping[str, tuple[str, str]] = {
    "add": ("added", "add"),
    "remove": ("removed", "remove"),
    "adapt": ("changed", "change"),
    "replace": ("changed", "change"),
    "retry": ("tried again, works", "try again"),
    "spoiled": ("configured wrongly", "use"),
}


def add_name_argument(parser: argparse.ArgumentParser) -> None:
    """Add the function's name, and ``--control-socket``."""
    parser.add_argument("name", metavar="NAME", type=option(NAME.read), help="the function's name")
    add_control_socket_argument(parser)


def ask(args: argparse.Namespace, verb: str, **params: Any) -> Any:
    """Ask the daemon, and wait for its answer as long as it takes.

    Args:
        args: with ``control_socket``.
        verb: what for.
        params: its parameters; those that are None are left to the daemon.

    Returns:
        The result.

    Raises:
        CommandFailed: it cannot be asked, or it refused.
    """
    path = chosen_path(args.control_socket, default_control_socket())
    if path is None:
        raise ConfigError("--control-socket must be a path here")
    given = {name: value for name, value in params.items() if value is not None}
    try:
        with ControlClient(path) as client:
            return client.ask(verb, patient=True, **given)
    except ControlError as error:
        raise CommandFailed(printable(str(error))) from error


def outcome_lines(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What came of each change, a line each.

    Args:
        outcomes: as the daemon told them.
    """
    for outcome in outcomes:
        done, wanted = _STEPS.get(str(outcome["step"]), (str(outcome["step"]),) * 2)
        keys = f" ({', '.join(map(str, outcome['keys']))})" if outcome["keys"] else ""
        detail = printable(str(outcome["detail"]))
        said = {"done": f"{done}{keys}", "waiting": f"waits to {wanted}{keys} {detail}"}
        yield f"{printable(str(outcome['name']))}: {said.get(str(outcome['state']), f'cannot {wanted}: {detail}')}"


def any_failed(outcomes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of the changes failed."""
    return any(outcome["state"] == "failed" for outcome in outcomes)
