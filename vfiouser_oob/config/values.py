"""Readers of single values: each takes what TOML or the command line holds and returns the typed value.

A reader raises ValueError with the rest of a sentence that starts with the key's name ("must be …, got …");
the caller knows the key, the file and the line.
"""

from __future__ import annotations

import enum
import grp
import math
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_SIZE = re.compile(r"(?P<number>[0-9]+)(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BDF = re.compile(r"(?:(?P<domain>[0-9a-f]{4,8}):)?(?P<rest>[0-9a-f]{2}:[01][0-9a-f]\.[0-7])", re.IGNORECASE)
_MDEV = re.compile(r"(/sys/(.*/)?)?(?P<uuid>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})/?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# struct sockaddr_un has 108 bytes for the path, the last one NUL.
SOCKET_PATH_MAX = 107
UID_MAX = (1 << 32) - 2

EnumT = TypeVar("EnumT", bound=enum.StrEnum)


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


def read_size(value: Any) -> int:
    """Bytes, from a number or from text such as ``64M`` (K, M, G, T are powers of 1024)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"must be a size in bytes such as 4096, 64M or 1G, got {shown(value)}")
    return int(match["number"]) * _UNITS[match["unit"].upper()]


def read_switch(value: Any) -> bool:
    """True or false, also as a word, which is all that the short form has."""
    found = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return found


def read_string(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"must be text that is not empty, got {shown(value)}")
    return value


def read_path(value: Any) -> Path:
    """A file's path, absolute or relative to the working directory."""
    return Path(read_string(value))


def read_socket_path(value: Any) -> Path:
    """A path that a UNIX socket can have."""
    text = read_string(value)
    length = len(text.encode(errors="surrogateescape"))
    if length > SOCKET_PATH_MAX:
        raise ValueError(f"must be a path of at most {SOCKET_PATH_MAX} bytes (UNIX sockets), got {length} bytes")
    if text.endswith("/"):
        raise ValueError(f"must be the path of a socket, not of a directory, got {shown(text)}")
    return Path(text)


def read_absolute_socket_path(value: Any) -> Path:
    """A socket path that means the same whatever the working directory is."""
    path = read_socket_path(value)
    if not path.is_absolute():
        raise ValueError(f"must be an absolute path, got {shown(value)}")
    return path


def read_control_socket(value: Any) -> Path | None:
    """The control socket's path; ``none`` stands for no control socket."""
    return None if value == "none" else read_socket_path(value)


def read_state_directory(value: Any) -> Path | None:
    """Where the daemon keeps what outlives it; ``none`` stands for nowhere."""
    if value == "none":
        return None
    path = read_path(value)
    if not path.is_absolute():
        raise ValueError(f"must be an absolute path or 'none', got {shown(value)}")
    return path


def read_bdf(value: Any) -> str:
    """A PCI function's address with its domain; ``3b:00.2`` is in domain 0000."""
    match = _BDF.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"must be a PCI address such as 0000:3b:00.2, got {shown(value)}")
    return f"{match['domain'] or '0000'}:{match['rest']}".lower()


def is_mdev(text: str) -> bool:
    """Whether a text names a mediated device: its UUID, or a directory in sysfs that is named so."""
    return _MDEV.fullmatch(text) is not None


def read_mdev(value: Any) -> str:
    """A mediated device by its UUID, or by its directory in sysfs."""
    match = _MDEV.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"must be a mediated device's UUID, such as 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001, or its directory below "
            f"/sys, got {shown(value)}"
        )
    return match["uuid"].lower()


def read_name(value: Any) -> str:
    """A function's name, fit for file names, unit instances and logs."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(
            f"must be 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit, got {shown(value)}"
        )
    return value


def read_mode(value: Any) -> int:
    """Permission bits, written as octal text such as ``"0660"``."""
    if not isinstance(value, str) or re.fullmatch(r"0?[0-7]{3}", value) is None:
        raise ValueError(f'must be three octal digits in quotes such as "0660", got {shown(value)}')
    return int(value, 8)


def read_group(value: Any) -> str:
    """The name of a group that exists on this machine."""
    name = read_string(value)
    try:
        grp.getgrnam(name)
    except KeyError:
        raise ValueError(f"must be a group of this machine, got {shown(name)}") from None
    return name


def read_uids(value: Any) -> tuple[int, ...]:
    """User ids, from a list of numbers and user names."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of user ids or names with at least one entry, got {shown(value)}")
    return tuple(_read_uid(entry) for entry in value)


def _read_uid(entry: Any) -> int:
    if isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry <= UID_MAX:
        return entry
    try:
        return pwd.getpwnam(read_string(entry)).pw_uid
    except (KeyError, ValueError):
        raise ValueError(f"must hold user ids or names of this machine, got {shown(entry)}") from None


def seconds_between(low: float, high: float) -> Callable[[Any], float]:
    """A reader of a time in seconds within limits."""

    def read(value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}, got {shown(value)}")
        return float(value)

    return read


def one_of(choices: type[EnumT]) -> Callable[[Any], EnumT]:
    """A reader of a word out of an enumeration."""

    def read(value: Any) -> EnumT:
        try:
            return choices(value)
        except ValueError:
            allowed = ", ".join(f'"{choice.value}"' for choice in choices)
            raise ValueError(f"must be one of {allowed}, got {shown(value)}") from None

    return read
