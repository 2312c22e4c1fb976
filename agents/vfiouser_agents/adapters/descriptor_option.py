"""The `descriptor` option of the adapters whose agents tell nothing of the kind: what must be equal on both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from vfiouser_agents.api import Descriptor
from vfiouser_agents.options import OptionError, number, read_options, text

#: Keys that are no plain text.
_OTHERS = ("format_version", "state_max", "fingerprint")


def read_descriptor(raw: Any, most: int = 0, *, state_max: bool = False) -> Descriptor:
    """Read a `descriptor` table.

    Args:
        raw: a map of text; `fingerprint` is a map of text itself, `format_version` a number.
        most: bytes that a state may have: the value of `state_max` where the table does not tell it.
        state_max: the table may tell it, up to `most`.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(raw, Mapping):
        raise OptionError(f"descriptor must be a table, got {raw!r}")
    readers: dict[str, Callable[[str, Any], Any]] = {
        item.name: text for item in fields(Descriptor) if item.name not in _OTHERS
    }
    readers |= {"format_version": number(0, 1 << 31), "fingerprint": _words}
    if state_max:
        readers["state_max"] = number(1, most)
    try:
        told = read_options(raw, readers)
    except OptionError as error:
        raise OptionError(f"{error}", "descriptor") from error
    return replace(Descriptor("", 1, "", "", "", "", most), **told)


def _words(name: str, raw: Any) -> dict[str, str]:
    if not isinstance(raw, Mapping) or not all(isinstance(value, str) for value in raw.values()):
        raise OptionError(f"{name} must be a table of text, got {raw!r}")
    return dict(raw)
