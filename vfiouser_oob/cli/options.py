"""Options that several sub-commands share, and argparse types made of the configuration's readers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vfiouser_oob.config.schema import DaemonConfig, default_control_socket
from vfiouser_oob.config.tables import brief, keys
from vfiouser_oob.config.values import CONTROL_SOCKET, STATE_DIRECTORY, Value

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


def add_key(
    parser: argparse.ArgumentParser, flag: str, declared: type, name: str, help: str = "", **extra: Any
) -> None:
    """Add an option for a key of the configuration; its rule, its words and its help are the key's.

    Args:
        parser: of the sub-command.
        flag: the option.
        declared: the section.
        name: the key.
        help: what the option means, where that is not what the key means.
        extra: for `add_argument`.
    """
    one = keys(declared)[name]
    assert isinstance(one.value, Value)
    read = one.value.read
    if one.value.choices:
        extra["choices"] = list(one.value.choices)
    elif one.value.schema.get("type") == "number":
        extra["type"] = option(lambda text: read(float(text)))
    elif "action" not in extra:
        extra.setdefault("type", option(read))
    parser.add_argument(flag, help=(help or brief(one)).replace("%", "%%"), **extra)


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-level`` and ``--log-format``; without them the configuration or its defaults count."""
    add_key(parser, "--log-level", DaemonConfig, "log_level")
    add_key(parser, "--log-format", DaemonConfig, "log_format")


def add_control_socket_argument(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add ``--control-socket``."""
    parser.add_argument(
        "--control-socket",
        metavar="PATH",
        type=option(_or_word(CONTROL_SOCKET)),
        help=f"control socket (default: {default_control_socket()}){note}",
    )


def add_state_directory_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--state-directory``."""
    what = brief(keys(DaemonConfig)["state_directory"], default=False)
    parser.add_argument(
        "--state-directory",
        metavar="PATH",
        type=option(_or_word(STATE_DIRECTORY)),
        help=f"{what} (default: $STATE_DIRECTORY); 'none' disables it",
    )


def _or_word(value: Value[Path | None]) -> Callable[[Any], Path | str]:
    return lambda text: value.read(text) or "none"


def chosen_path(value: Path | str | None, default: Path | None) -> Path | None:
    """A path that can be switched off, after the command line had its say.

    Args:
        value: what the option holds; ``none`` switches it off.
        default: what counts without it.
    """
    if value is None:
        return default
    return None if isinstance(value, str) else value
