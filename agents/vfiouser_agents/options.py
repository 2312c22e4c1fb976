"""Options of agents: from a configuration's table, or from text."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class OptionError(ValueError):
    """An option of an agent cannot be used; the message says why and what would do.

    Args:
        message: why.
        key: the key that it is about, with dots between tables; the message begins with it.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message if key is None else f"{key}: {message}")
        self.key = key


def read_options(options: Mapping[str, Any], readers: Mapping[str, Callable[[str, Any], Any]]) -> dict[str, Any]:
    """Read each option with its reader.

    Args:
        options: by name.
        readers: what there may be; each gets the name and the value.

    Raises:
        OptionError: an option is unknown, or cannot be used.
    """
    for name in options:
        if name not in readers:
            raise OptionError(f"unknown option {name!r}{hint(name, readers)}")
    return {name: readers[name](name, value) for name, value in options.items()}


def hint(name: str, known: Mapping[str, Any]) -> str:
    """What may have been meant.

    Args:
        name: what came.
        known: the names that exist.
    """
    close = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (allowed: {', '.join(known)})"


def text(name: str, value: Any) -> str:
    """Text that is not empty.

    Args:
        name: the option.
        value: what came.

    Returns:
        The text.

    Raises:
        OptionError: it is something else, or empty.
    """
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} must be text, got {value!r}")
    return value


def switch(name: str, value: Any) -> bool:
    """True or false, also as a word.

    Args:
        name: the option.
        value: what came.

    Returns:
        The truth value.

    Raises:
        OptionError: it is something else.
    """
    words = {"true": True, "false": False}
    found = words.get(value, value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise OptionError(f"{name} must be true or false, got {value!r}")
    return found


def seconds(low: float, high: float) -> Callable[[str, Any], float]:
    """A reader of times within limits, in seconds.

    Args:
        low: the shortest time allowed, seconds.
        high: the longest time allowed, seconds.

    Returns:
        The reader; it raises OptionError for anything else.
    """

    def read(name: str, value: Any) -> float:
        try:
            found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
        except ValueError:
            found = -1.0
        if not low <= found <= high:
            raise OptionError(f"{name} must be {low:g} to {high:g} seconds, got {value!r}")
        return found

    return read


def number(low: int, high: int) -> Callable[[str, Any], int]:
    """A reader of whole numbers within limits; text may end in K, M or G.

    Args:
        low: the smallest number allowed.
        high: the largest number allowed.

    Returns:
        The reader; it raises OptionError for anything else.
    """
    factors = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

    def read(name: str, value: Any) -> int:
        found = value
        if isinstance(value, str) and value:
            digits, factor = (value[:-1], factors[value[-1]]) if value[-1] in factors else (value, 1)
            found = int(digits) * factor if digits.isdecimal() and len(digits) < 20 else None
        if not isinstance(found, int) or isinstance(found, bool) or not low <= found <= high:
            raise OptionError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
        return found

    return read
