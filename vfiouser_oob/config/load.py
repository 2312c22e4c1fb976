"""A configuration file becomes a DaemonConfig, or one line that says why not."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vfiouser_oob.config.agents import read_agent, read_migration
from vfiouser_oob.config.devices import read_device
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import (
    DaemonConfig,
    DmaMode,
    FunctionConfig,
    LogFormat,
    LogLevel,
    UpstreamDevice,
    default_control_socket,
    default_state_directory,
)
from vfiouser_oob.config.tables import Key, Place, read_table
from vfiouser_oob.config.values import (
    one_of,
    read_absolute_socket_path,
    read_control_socket,
    read_group,
    read_mode,
    read_name,
    read_state_directory,
    read_switch,
    read_uids,
    seconds_between,
    shown,
)

# Far more than hundreds of functions need; a wrong path (a disk image) is refused before it fills memory.
CONFIG_SIZE_MAX = 4 << 20

read_reply_budget = seconds_between(0.1, 3600)

DAEMON_KEYS = (
    Key("control_socket", read_control_socket),
    Key("state_directory", read_state_directory),
    Key("log_level", one_of(LogLevel)),
    Key("log_format", one_of(LogFormat)),
    Key("reply_budget_s", read_reply_budget),
)

FUNCTION_KEYS = (
    Key("name", read_name, required=True),
    Key("device", lambda raw: raw, required=True),  # read on its own: it has keys of its own
    Key("socket", read_absolute_socket_path),
    Key("socket_mode", read_mode),
    Key("socket_group", read_group),
    Key("allow_uids", read_uids),
    Key("dma", one_of(DmaMode)),
    Key("retain_state", read_switch),
    Key("agent", lambda raw: raw),  # as `device`
    Key("migration", lambda raw: raw),
)

TOP_KEYS = (Key("daemon", lambda raw: raw), Key("function", lambda raw: raw))

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_\"'.-]+)\s*=")
_TOML_PLACE = re.compile(r"\s*\(at line (\d+), column \d+\)")

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


def load_config(path: Path) -> DaemonConfig:
    """Read a configuration file.

    Args:
        path: the TOML file.

    Raises:
        ConfigError: it cannot be read or used.
    """
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
    if len(data) > CONFIG_SIZE_MAX:
        raise ConfigError(f"is larger than {CONFIG_SIZE_MAX >> 20} MiB, hardly a configuration file", str(path))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("is not UTF-8 text", str(path), line) from error
    return parse_config(text, path)


def parse_config(text: str, path: Path) -> DaemonConfig:
    """Read the text of a configuration file.

    Args:
        text: TOML.
        path: where it came from, for messages.

    Raises:
        ConfigError: it cannot be used.
    """
    source = str(path)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        message = _TOML_PLACE.sub("", str(error))
        raise ConfigError(f"not valid TOML: {message}", source, int(place[1]) if place else None) from error
    except RecursionError as error:
        raise ConfigError("not valid TOML: nested too deeply", source) from error
    lines = LineMap(text)
    top = read_table(raw, TOP_KEYS, Place("top level", source, lines.line))
    daemon = read_table(top.get("daemon", {}), DAEMON_KEYS, Place("[daemon]", source, partial(lines.line, "daemon")))
    tables = top.get("function")
    if not isinstance(tables, list) or not tables:
        raise ConfigError("there must be at least one [[function]]", source, lines.line("function"))
    functions = tuple(_read_function(table, index, source, lines) for index, table in enumerate(tables))
    daemon.setdefault("control_socket", default_control_socket())
    daemon.setdefault("state_directory", default_state_directory())
    config = DaemonConfig(functions=functions, source=path, **daemon)
    check_unique(config)
    return config


def _read_function(raw: Any, index: int, source: str, lines: LineMap) -> FunctionConfig:
    name = raw.get("name") if isinstance(raw, Mapping) else None
    label = "[[function]]" + (f" {shown(name)}" if isinstance(name, str) else f" number {index + 1}")
    values = read_table(raw, FUNCTION_KEYS, Place(label, source, partial(lines.line, "function", index)))
    place = Place(f"{label}: device", source, partial(lines.line, "function", index, "device"))
    values["device"] = read_device(values["device"], place)
    if "agent" in values:
        place = Place(f"{label}: agent", source, partial(lines.line, "function", index, "agent"))
        values["agent"] = read_agent(values["agent"], place, values["device"])
    if "migration" in values:
        place = Place(f"{label}: migration", source, partial(lines.line, "function", index, "migration"))
        if "agent" not in values:
            place.fail("there is no agent, so the function cannot be migrated")
        values["migration"] = read_migration(values["migration"], place)
    return FunctionConfig(**values, line=lines.line("function", index))


def check_unique(config: DaemonConfig) -> None:
    """Refuse two functions of one name or two users of one socket path.

    Raises:
        ConfigError: there are such.
    """
    source = str(config.source) if config.source else None
    names: set[str] = set()
    sockets: dict[Path, str] = {}
    if config.control_socket is not None:
        sockets[config.control_socket] = "the control socket"
    for function in config.functions:
        if function.name in names:
            raise ConfigError(f"two functions are named {function.name!r}", source, function.line)
        names.add(function.name)
        if function.socket is None:
            continue
        if function.socket in sockets:
            user = sockets[function.socket]
            message = f"function {function.name!r}: socket {function.socket} is that of {user} already"
            raise ConfigError(message, source, function.line)
        sockets[function.socket] = f"function {function.name!r}"
    for function in config.functions:
        # A function wrapped around its own socket would wait for itself.
        if isinstance(function.device, UpstreamDevice) and function.device.socket == function.socket:
            raise ConfigError(
                f"function {function.name!r}: its device's socket is its own socket, {function.socket}",
                source,
                function.line,
            )
