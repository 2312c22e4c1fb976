"""Finds the lines of keys in a TOML text, since `tomllib` does not tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_\"'.-]+)\s*=")

_Location = tuple[str | int, ...]


class LineMap:
    """Finds the line of a key in a TOML text, since `tomllib` does not tell.

    It reads headers and assignments line by line. A multi-line string could mislead it, which would make a
    line number wrong and nothing else.
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[_Location, int] = {}
        counts: dict[str, int] = {}
        table: _Location = ()
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.fullmatch(line):
                brackets, name = header.groups()
                if brackets == "[[":
                    counts[name] = counts.get(name, -1) + 1
                table = self._location(name, counts)
                self._lines.setdefault(table, number)
                self._lines.setdefault(table[:1], number)
            elif assignment := _ASSIGNMENT.match(line):
                self._lines.setdefault((*table, *_words(assignment[1])), number)

    @staticmethod
    def _location(name: str, counts: Mapping[str, int]) -> _Location:
        first, *rest = _words(name)
        index = (counts[first],) if first in counts else ()
        return (first, *index, *rest)

    def line(self, *location: str | int | None) -> int | None:
        """Line of a key, also one of tables inside each other, or of the nearest thing around it.

        Args:
            location: words, which may have dots between them, and numbers of tables in an array.

        Returns:
            None for the file as a whole.
        """
        words = tuple(
            part
            for word in location
            if word is not None
            for part in (word.split(".") if isinstance(word, str) else (word,))
        )
        while words:
            if words in self._lines:
                return self._lines[words]
            words = words[:-1]
        return None


def _words(dotted: str) -> tuple[str, ...]:
    return tuple(word.strip(" \"'") for word in dotted.split("."))
