"""Log levels that are chosen while the process runs: for all of it, and for single functions.

A function's level counts for every record that carries its name, whoever writes it, and comes before the level of the
whole process. Like the levels of `logging` itself it belongs to the process, not to any object.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vfiouser_oob.config.schema import LogLevel

NUMBERS: Mapping[LogLevel, int] = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}

#: By function.
_chosen: dict[str, LogLevel] = {}


def choose(function: str, level: LogLevel | None) -> None:
    """Choose a function's level.

    Args:
        function: its name.
        level: the least important log records to write; None for that of the whole process.
    """
    if level is None:
        _chosen.pop(function, None)
    else:
        _chosen[function] = level


def chosen(function: str) -> LogLevel | None:
    """The level that was chosen for a function; None for that of the whole process."""
    return _chosen.get(function)


def number_for(function: object) -> int | None:
    """The number of a function's level, as `logging` counts; None if none was chosen."""
    level = _chosen.get(function) if _chosen and isinstance(function, str) else None
    return None if level is None else NUMBERS[level]
