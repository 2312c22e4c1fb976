"""The one error of configuration, whatever it came from."""

from __future__ import annotations


class ConfigError(Exception):
    """A configuration or a command line cannot be used as it stands; exit code 2.

    Args:
        message: what came, what is allowed.
        source: the file (or option) that it came from, if known.
        line: line of that file, counted from 1, if known.
    """

    def __init__(self, message: str, source: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.source = source
        self.line = line

    def __str__(self) -> str:
        if self.source is None:
            return self.message
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return f"{where}: {self.message}"
