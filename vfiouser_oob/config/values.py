"""What a single key may hold: one `Value` for each sort, with its rule, its reader and its JSON Schema.

The rule is written once. The reader refuses with it ("must be RULE, got …"), and the reference page prints it. The
caller of a reader knows the key, the file and the line.
"""

from __future__ import annotations

import enum
import grp
import json
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

_SIZE = re.compile(r"(?P<number>[0-9]+)(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_PAGE = 4096
# struct sockaddr_un has 108 bytes for the path, the last one NUL.
SOCKET_PATH_MAX = 107
UID_MAX = (1 << 32) - 2

T = TypeVar("T")


class Unfit(Exception):
    """A value is not what the rule of its sort says."""


@dataclass(frozen=True, slots=True)
class Value(Generic[T]):
    """A sort of value.

    Args:
        rule: what it must be, as the end of a sentence.
        parse: turns what TOML or the command line holds into the typed value; raises Unfit, or ValueError with a
            sentence of its own.
        schema: the same rule as JSON Schema, as far as that can say it.
        write: turns the typed value into text that `parse` takes.
        choices: the words that it may be, each with its meaning; empty = anything that fits the rule.
    """

    rule: str
    parse: Callable[[Any], T]
    schema: Mapping[str, Any]
    write: Callable[[T], str] = str
    choices: Mapping[str, str] = field(default_factory=dict)

    def read(self, raw: Any) -> T:
        """Return the typed value.

        Args:
            raw: what TOML or the command line holds.

        Raises:
            ValueError: it cannot be used; the message goes on after the key's name ("must be …, got …").
        """
        try:
            return self.parse(raw)
        except Unfit:
            raise ValueError(f"must be {self.rule}, got {shown(raw)}") from None

    def fits(self, raw: Any) -> bool:
        """Whether it can be read."""
        try:
            return self.read(raw) is not None
        except ValueError:
            return False

    def literal(self, value: T) -> str:
        """The typed value as TOML (and JSON) has it."""
        text = self.write(value)
        bare = isinstance(value, bool | float) or (isinstance(value, int) and text == str(value))
        return text if bare else json.dumps(text)


class Word(enum.StrEnum):
    """One word out of a few; a member is declared as the word and its meaning."""

    meaning: str

    def __new__(cls, word: str, meaning: str = "") -> Self:
        """Make a member."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        return member


WordT = TypeVar("WordT", bound=Word)


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def format_size(size: int) -> str:
    """Bytes in the largest unit that leaves no rest, for example ``64M``."""
    for unit in ("T", "G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def _is_number(value: Any, kind: type | tuple[type, ...] = int) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _size(value: Any) -> int:
    if _is_number(value) and value >= 0:
        return int(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise Unfit
    return int(match["number"]) * _UNITS[match["unit"].upper()]


def _size_schema(**limits: int | None) -> Mapping[str, Any]:
    given = {name: limit for name, limit in limits.items() if limit is not None}
    pattern = {"type": "string", "pattern": "^[0-9]+[KMGTkmgt]?([iI]?[bB])?$"}
    return {"anyOf": [{"type": "integer", "minimum": 0, **given}, pattern]}


SIZE = Value("a size in bytes such as 4096, 64M or 1G", _size, _size_schema(), format_size)


def size_of(low: int, high: int | None = None, *, unit: int = 1, or_zero: bool = False, rule: str = "") -> Value[int]:
    """A size within limits.

    Args:
        low: the least number of bytes.
        high: the most; None = no limit.
        unit: bytes that it must be a multiple of.
        or_zero: whether 0 is allowed, too.
        rule: the rule in other words.
    """
    limits = {"minimum": 0 if or_zero else low, "maximum": high, "multipleOf": unit if unit > 1 else None}
    pages = f" in whole pages of {_PAGE} bytes" if unit == _PAGE else ""
    bounds = (
        f"at least {format_size(low)}" if high is None else f"a size from {format_size(low)} to {format_size(high)}"
    )

    def parse(raw: Any) -> int:
        size = SIZE.read(raw)
        fits = low <= size and (high is None or size <= high) and size % unit == 0
        if not fits and not (or_zero and size == 0):
            raise Unfit
        return size

    return Value(rule or f"{'0 or ' if or_zero else ''}{bounds}{pages}", parse, _size_schema(**limits), format_size)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit
    return value


def _switch(value: Any) -> bool:
    return _flag({"true": True, "false": False}.get(value, value) if isinstance(value, str) else value)


def _write_flag(value: bool) -> str:
    return "true" if value else "false"


FLAG = Value("true or false", _flag, {"type": "boolean"}, _write_flag)
#: Also as a word, which is all that the short form has.
SWITCH = Value("true or false", _switch, {"anyOf": [{"type": "boolean"}, {"enum": ["true", "false"]}]}, _write_flag)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Unfit
    return value


_TEXT_SCHEMA = {"type": "string", "pattern": "^[^\\u0000]+$"}
TEXT = Value("text that is not empty", _text, _TEXT_SCHEMA)
#: Absolute or relative to the working directory.
PATH = Value("a path", lambda raw: Path(TEXT.read(raw)), _TEXT_SCHEMA)
#: The path of a file that should be there: `check-config` warns where it is not.
FILE = Value("the path of a file", PATH.read, _TEXT_SCHEMA)


def _socket_path(value: Any) -> Path:
    text = TEXT.read(value)
    length = len(text.encode(errors="surrogateescape"))
    if length > SOCKET_PATH_MAX:
        raise ValueError(f"must be a path of at most {SOCKET_PATH_MAX} bytes (UNIX sockets), got {length} bytes")
    if text.endswith("/"):
        raise ValueError(f"must be the path of a socket, not of a directory, got {shown(text)}")
    return Path(text)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise Unfit
    return path


def _or_none(parse: Callable[[Any], Path]) -> Callable[[Any], Path | None]:
    return lambda raw: None if raw == "none" else parse(raw)


def _socket_schema(start: str = "") -> Mapping[str, Any]:
    return {"type": "string", "maxLength": SOCKET_PATH_MAX, "pattern": f"^{start}[^\\u0000]*[^/\\u0000]$"}


SOCKET_PATH = Value("the path of a socket", _socket_path, _socket_schema())
#: It means the same whatever the working directory is.
ABSOLUTE_SOCKET_PATH = Value("an absolute path", lambda raw: _absolute(_socket_path(raw)), _socket_schema("/"))
#: The word stands for no control socket.
CONTROL_SOCKET = Value("the path of a socket or 'none'", _or_none(_socket_path), _socket_schema())
#: Where the daemon keeps what outlives it; the word stands for nowhere.
STATE_DIRECTORY = Value(
    "an absolute path or 'none'",
    _or_none(lambda raw: _absolute(PATH.read(raw))),
    {"type": "string", "pattern": "^(/[^\\u0000]*|none)$"},
)


def matching(rule: str, pattern: str, convert: Callable[[re.Match[str]], T]) -> Value[T]:
    """Text of a certain form.

    Args:
        rule: what it must be, as the end of a sentence.
        pattern: the form, in what regular expressions of Python and of JSON Schema have in common.
        convert: makes the typed value of it.
    """

    def parse(raw: Any) -> T:
        match = re.fullmatch(pattern, raw) if isinstance(raw, str) else None
        if match is None:
            raise Unfit
        return convert(match)

    return Value(rule, parse, {"type": "string", "pattern": f"^{pattern}$"})


#: Without a domain it is in domain 0000.
BDF = matching(
    "a PCI address such as 0000:3b:00.2",
    r"(?:([0-9A-Fa-f]{4,8}):)?([0-9A-Fa-f]{2}:[01][0-9A-Fa-f]\.[0-7])",
    lambda match: f"{match[1] or '0000'}:{match[2]}".lower(),
)
MDEV = matching(
    "a mediated device's UUID, such as 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001, or its directory below /sys",
    r"(?:/sys/(?:.*/)?)?([0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})/?",
    lambda match: match[1].lower(),
)
#: Fit for file names, unit instances and logs.
NAME = matching(
    "1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit",
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}",
    lambda match: match[0],
)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise Unfit
    return tuple(NAME.read(entry) for entry in value)


NAMES = Value(
    "a list of names with at least one entry",
    _names,
    {"type": "array", "minItems": 1, "items": NAME.schema},
    ", ".join,
)
#: Permission bits.
MODE = replace(
    matching('three octal digits in quotes such as "0660"', r"0?[0-7]{3}", lambda match: int(match[0], 8)),
    write="{:04o}".format,
)


def _group(value: Any) -> str:
    name = TEXT.read(value)
    try:
        grp.getgrnam(name)
    except KeyError:
        raise Unfit from None
    return name


def _uids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise Unfit
    return tuple(_uid(entry) for entry in value)


def _uid(entry: Any) -> int:
    if _is_number(entry) and 0 <= entry <= UID_MAX:
        return int(entry)
    try:
        return pwd.getpwnam(TEXT.read(entry)).pw_uid
    except (KeyError, ValueError):
        raise ValueError(f"must hold user ids or names of this machine, got {shown(entry)}") from None


GROUP = Value("a group of this machine", _group, _TEXT_SCHEMA)
UIDS = Value(
    "a list of user ids or names with at least one entry",
    _uids,
    {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": UID_MAX}, _TEXT_SCHEMA]},
    },
)


def seconds_between(low: float, high: float) -> Value[float]:
    """A time in seconds within limits."""

    def parse(value: Any) -> float:
        if not _is_number(value, (int, float)) or not low <= value <= high:
            raise Unfit
        return float(value)

    schema = {"type": "number", "minimum": low, "maximum": high}
    return Value(f"a number of seconds from {low:g} to {high:g}", parse, schema)


def one_of(words: type[WordT]) -> Value[WordT]:
    """One word out of an enumeration."""

    def parse(value: Any) -> WordT:
        try:
            return words(value)
        except ValueError:
            raise Unfit from None

    choices = {word.value: word.meaning for word in words}
    allowed = ", ".join(f'"{word}"' for word in choices)
    return Value(f"one of {allowed}", parse, {"enum": list(choices)}, choices=choices)
