"""How a sub-command asks a running daemon: a connection, or one line that says why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfiouser_oob.cli.errors import CommandFailed
from vfiouser_oob.cli.options import chosen_path
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import default_control_socket
from vfiouser_oob.control.client import ControlClient, ControlError


def control_path(chosen: Path | str | None) -> Path:
    """The control socket to ask at.

    Args:
        chosen: what ``--control-socket`` holds.

    Raises:
        ConfigError: it was switched off.
    """
    path = chosen_path(chosen, default_control_socket())
    if path is None:
        raise ConfigError("--control-socket must be a path here")
    return path


@contextmanager
def asked_daemon(chosen: Path | str | None) -> Iterator[ControlClient]:
    """A connection to the daemon.

    Args:
        chosen: what ``--control-socket`` holds.

    Raises:
        CommandFailed: it cannot be asked, or refused.
        ConfigError: the socket was switched off.
    """
    try:
        with ControlClient(control_path(chosen)) as client:
            yield client
    except ControlError as error:
        raise CommandFailed(str(error)) from error
