"""Reading one TOML table by a list of its keys: unknown ones are refused with a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.values import shown


@dataclass(frozen=True, slots=True)
class Key:
    """One key that a table may have.

    Args:
        name: the key; also the name of the dataclass field that it fills.
        read: turns the raw value into the typed one, or raises ValueError.
        required: whether the table is refused without it.
    """

    name: str
    read: Callable[[Any], Any]
    required: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table stands, for error messages.

    Args:
        label: the table as a person would call it, for example ``[[function]] "nvme0"``.
        source: file or option that it came from.
        line_of: gives the line of one of its keys; with None, of the table itself.
    """

    label: str
    source: str | None = None
    line_of: Callable[[str | None], int | None] = lambda key: None

    def fail(self, message: str, key: str | None = None) -> NoReturn:
        """Refuse the table.

        Args:
            message: what came and what is allowed.
            key: the key that it is about, for the line number.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.label}: {message}", self.source, self.line_of(key))


def suggestion(word: str, allowed: Sequence[str]) -> str:
    """The end of a message about an unknown word: the nearest one that is allowed, and all of them."""
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (allowed: {', '.join(allowed)})"


def read_table(raw: Any, keys: Sequence[Key], place: Place) -> dict[str, Any]:
    """Read a table.

    Args:
        raw: what TOML holds in its place.
        keys: the keys that it may have.
        place: where it stands.

    Returns:
        The typed values of those keys that are present, ready to be passed on by keyword.

    Raises:
        ConfigError: not a table, an unknown or missing key, or an unusable value.
    """
    if not isinstance(raw, Mapping):
        place.fail(f"must be a table, got {shown(raw)}")
    allowed = [key.name for key in keys]
    for name in raw:
        if name not in allowed:
            place.fail(f"unknown key {name!r}{suggestion(name, allowed)}", name)
    values: dict[str, Any] = {}
    for key in keys:
        if key.name in raw:
            try:
                values[key.name] = key.read(raw[key.name])
            except ValueError as error:
                place.fail(f"{key.name} {error}", key.name)
        elif key.required:
            place.fail(f"key {key.name!r} is missing")
    return values
