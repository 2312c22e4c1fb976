"""What a user sees when something goes wrong: one line per cause, and an exit code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from enum import IntEnum

from vfiouser_agents.causes import words_of
from vfiouser_oob.config.errors import ConfigError
from vfiouser_protocol.errors import VfioUserError


class ExitCode(IntEnum):
    """What the process ends with."""

    #: Done as asked.
    DONE = 0
    #: What was asked for failed.
    FAILED = 1
    #: It was asked for wrongly: bad usage or configuration.
    USAGE = 2


class CommandFailed(Exception):
    """What a sub-command was asked for did not succeed; the message is for the user, exit code 1."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The single errors inside nested exception groups, in order."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def explain(error: BaseException) -> tuple[ExitCode, list[str]]:
    """Turn an error into what the user sees.

    Args:
        error: an exception or a group of them.

    Returns:
        The exit code, and one line per distinct cause.
    """
    causes = list(leaves(error))
    lines = list(dict.fromkeys(_line(cause) for cause in causes))
    usage = any(isinstance(cause, ConfigError) for cause in causes)
    return (ExitCode.USAGE if usage else ExitCode.FAILED), lines


def details(error: BaseException) -> str:
    """The tracebacks of an error, for the debug level."""
    return "".join(traceback.format_exception(error))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{words_of(error)}"
    if isinstance(error, ConfigError | CommandFailed | VfioUserError | OSError) and text:
        return text
    return f"internal error: {type(error).__name__}: {text or 'no message'}"
