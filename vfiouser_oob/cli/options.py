"""Options that several sub-commands share, and argparse types made of the configuration's readers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vfiouser_oob.config.schema import LogFormat, LogLevel, default_control_socket
from vfiouser_oob.config.values import read_control_socket, read_state_directory

T = TypeVar("T")


def option(read: Callable[[Any], T]) -> Callable[[str], T]:
    """An argparse type out of a reader of values, so that a file and an option obey the same rules."""

    def parse(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number within limits."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text[:20]) <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-level`` and ``--log-format``; without them the configuration or its defaults count."""
    levels = [level.value for level in LogLevel]
    formats = [log_format.value for log_format in LogFormat]
    parser.add_argument("--log-level", choices=levels, help="least important record written")
    parser.add_argument("--log-format", choices=formats, help="for people or for machines")


def add_control_socket_argument(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add ``--control-socket``."""
    parser.add_argument(
        "--control-socket",
        metavar="PATH",
        type=option(_control_socket),
        help=f"control socket (default: {default_control_socket()}){note}",
    )


def _control_socket(text: str) -> Path | str:
    path = read_control_socket(text)
    return "none" if path is None else path


def add_state_directory_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--state-directory``."""
    parser.add_argument(
        "--state-directory",
        metavar="PATH",
        type=option(_state_directory),
        help="where what agents can do is remembered (default: $STATE_DIRECTORY); 'none' for nowhere",
    )


def _state_directory(text: str) -> Path | str:
    path = read_state_directory(text)
    return "none" if path is None else path


def chosen_path(value: Path | str | None, default: Path | None) -> Path | None:
    """A path that can be switched off, after the command line had its say.

    Args:
        value: what the option holds; ``none`` switches it off.
        default: what counts without it.
    """
    if value is None:
        return default
    return None if isinstance(value, str) else value
