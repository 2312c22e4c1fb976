"""Errors in words: what has happened, and not which exception told us so."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from types import MappingProxyType

#: What exceptions mean that come without words, by name: whoever asks has not always loaded what they are from.
_SAID: Mapping[str, str] = MappingProxyType(
    {
        "BrokenResourceError": "the other side left",
        "BrokenPipeError": "the other side left",
        "ClosedResourceError": "it was closed",
        "EndOfChannel": "the other side left",
        "IncompleteReadError": "the other side left in the middle of a message",
        "EOFError": "the other side left in the middle of a message",
        "SSLEOFError": "the other side left in the middle of a message",
        "TooSlowError": "it took too long",
        "TimeoutError": "it took too long",
        "BusyResourceError": "it is in use",
        "MemoryError": "there is not enough memory",
        "RecursionError": "it is nested too deeply",
    }
)


def words_of(error: BaseException) -> str:
    """What has happened, in words for people.

    The system's reason counts most, wherever in the chain of causes it is; then what the exception itself says; and the
    last resort is its name.

    Args:
        error: an exception, or a group of them, of which the first one counts.
    """
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, OSError):
            words = _of_system(each)
            if words:
                return words
    for each in chain:
        if text := " ".join(str(each).split()):
            return text
    return next((_SAID[name] for each in chain if (name := type(each).__name__) in _SAID), type(chain[0]).__name__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, then what caused it; of a group the first one."""
    while error is not None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        yield error
        error = error.__cause__


def _of_system(error: OSError) -> str:
    """The system's word for an error, without what a library has put before it, such as an address as a tuple."""
    if isinstance(error, socket.gaierror) or error.errno is None or error.errno <= 0:
        return error.strerror or ""
    plain = os.strerror(error.errno)
    return plain if error.strerror is None or error.strerror.endswith(f": {plain}") else error.strerror
