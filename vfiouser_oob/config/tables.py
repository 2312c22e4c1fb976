"""Declaring what a TOML table may hold, and reading one.

A section is a class. Each of its keys is one entry, which says all that there is to say of it:

    @section
    class MigrationConfig:
        \"\"\"How a function with an agent is migrated.\"\"\"

        call_s: float = key(SECONDS, "seconds for a small call to the agent", default=2.0)

The dataclass, what is refused and how, the reference page, `--help` and the JSON Schema all come from it. So

* a new key is one entry in its class (in `schema`, or where a model declares its options);
* a new table inside a section is one class, and one entry `key(Table.of(CLASS), …)` in that section;
* a new section of the file is one class, and one entry in `load.ConfigFile`, such as
  `vm: tuple[VmConfig, ...] = key(tables_named("[[vm]]", VmConfig), …)`;
* for either, the page gets a heading with the two marks between which its keys go, and `tools/config_page.py` a row;
* `make pages` then writes the page and the schema.

What two keys must be to each other is checked in the class's `__post_init__`, which raises ValueError; the same rule
for the schema is its `constraints`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar, dataclass_transform

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.values import Value, shown

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SpoiledTable:
    """A table with a name that cannot be used, among others that can.

    Args:
        header: what it is one of, as it is written, for example ``[[function]]``.
        name: its name.
        reason: why it cannot be used, and where it stands.
    """

    header: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table stands, for error messages.

    Args:
        label: the table as a person would call it, for example ``[[function]] "nvme0"``.
        source: file or option that it came from.
        line_of: gives the line of one of its keys; without one, of the table itself.
        spoiled: where named tables that cannot be used are put, so that the others can; None: they are refused.
    """

    label: str
    source: str | None = None
    line_of: Callable[..., int | None] = lambda *keys: None
    spoiled: list[SpoiledTable] | None = None

    def inside(self, key: str) -> Place:
        """Where the table under one of its keys stands."""
        return Place(f"{self.label}: {key}", self.source, partial(self.line_of, key), self.spoiled)

    def fail(self, message: str, key: str | None = None) -> NoReturn:
        """Refuse the table.

        Args:
            message: what came and what is allowed.
            key: the key that it is about, for the line number.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.label}: {message}", self.source, self.line_of(key))


@dataclass(frozen=True, slots=True)
class Table:
    """What a key holds that has a table of its own.

    Args:
        read: reads it: what came, where it stands, and the values of the keys around it.
        schema: makes its JSON Schema.
    """

    read: Callable[[Any, Place, Mapping[str, Any]], Any]
    schema: Callable[[], Mapping[str, Any]]

    @classmethod
    def of(cls, declared: type) -> Table:
        """The table that is a section by itself."""
        return cls(lambda raw, place, around: read_section(declared, raw, place), lambda: schema_of(declared))


@dataclass(frozen=True, slots=True)
class Key:
    """One key that a table may have.

    Args:
        name: the key; also the name of the field that it fills.
        value: what it may hold.
        meaning: what it means, in Markdown; the part before the first semicolon or full stop is enough for `--help`.
        default: its value if it is not there; MISSING = it must be there.
        unset: what happens without it, where the default cannot be written in TOML.
    """

    name: str
    value: Value[Any] | Table
    meaning: str
    default: Any
    unset: str

    @property
    def required(self) -> bool:
        """Whether the table is refused without it."""
        return self.default is MISSING

    def fits(self, raw: Any) -> bool:
        """Whether it may hold a single value."""
        return isinstance(self.value, Value) and self.value.fits(raw)

    @property
    def full(self) -> str:
        """What it means, and each word that it may be."""
        choices = self.value.choices if isinstance(self.value, Value) else {}
        words = "; ".join(f'`"{word}"`: {meaning}' for word, meaning in choices.items() if meaning)
        return f"{self.meaning}. {words}" if words else self.meaning

    @property
    def literal(self) -> str:
        """Its default as TOML (and JSON) has it; empty if there is none that can be written."""
        if isinstance(self.value, Table) or self.default in (MISSING, None):
            return ""
        return self.value.literal(self.default)


def key(
    value: Value[Any] | Table, meaning: str, *, default: Any = MISSING, factory: Any = MISSING, unset: str = ""
) -> Any:
    """Declare a key of a section; see `Key` for the arguments.

    Args:
        value: what it may hold.
        meaning: what it means.
        default: its value if it is not there.
        factory: makes that value, as `dataclasses.field` has it.
        unset: what happens without it.
    """
    metadata = {"key": (value, meaning, unset)}
    if factory is not MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(key, dataclasses.field))
def section(cls: type[T]) -> type[T]:
    """Make a section of a class: a frozen dataclass whose fields may be keys."""
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)


@section
class NoOptions:
    """A section without keys."""


def keys(declared: type) -> Mapping[str, Key]:
    """The keys of a section, by name."""
    found: dict[str, Key] = {}
    for field in dataclasses.fields(declared):
        if "key" in field.metadata:
            value, meaning, unset = field.metadata["key"]
            default = None if field.default_factory is not MISSING else field.default
            found[field.name] = Key(field.name, value, meaning, default, unset)
    return found


def brief(one: Key, *, default: bool = True) -> str:
    """What a key means in a few plain words, as `--help` has it.

    Args:
        one: the key.
        default: whether to tell its default, too.
    """
    text, unset = (_plain(text) for text in (re.split(r"[;:]|\. |, see ", one.meaning)[0], one.unset))
    told = one.literal.strip('"') or unset
    return f"{text} (default: {told})" if default and told else text


def _plain(markdown: str) -> str:
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).replace("`", "")


def suggestion(word: str, allowed: Sequence[str]) -> str:
    """The end of a message about an unknown word: the nearest one that is allowed, and all of them."""
    near = difflib.get_close_matches(word, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (allowed: {', '.join(allowed)})"


def read_table(declared: type, raw: Any, place: Place) -> dict[str, Any]:
    """Read the keys of a section.

    Args:
        declared: the section.
        raw: what TOML holds in its place.
        place: where it stands.

    Returns:
        The typed values of those keys that are present, ready to be passed on by keyword.

    Raises:
        ConfigError: not a table, an unknown or missing key, or an unusable value.
    """
    if not isinstance(raw, Mapping):
        place.fail(f"must be a table, got {shown(raw)}")
    allowed = keys(declared)
    for name in raw:
        if name not in allowed:
            place.fail(f"unknown key {name!r}{suggestion(name, tuple(allowed))}", name)
    values: dict[str, Any] = {}
    # Tables come last: how one is read may depend on what stands around it.
    for declared_key in sorted(allowed.values(), key=lambda one: isinstance(one.value, Table)):
        name = declared_key.name
        if name in raw:
            values[name] = _read_key(declared_key, raw[name], place, values)
        elif declared_key.required:
            place.fail(f"key {name!r} is missing")
    return values


def _read_key(declared: Key, raw: Any, place: Place, around: Mapping[str, Any]) -> Any:
    if isinstance(declared.value, Table):
        return declared.value.read(raw, place.inside(declared.name), around)
    try:
        return declared.value.read(raw)
    except ValueError as error:
        place.fail(f"{declared.name} {error}", declared.name)


def read_section(declared: type[T], raw: Any, place: Place, **fields: Any) -> T:
    """Read a section.

    Args:
        declared: the section.
        raw: what TOML holds in its place.
        place: where it stands.
        fields: those of the class that are no keys.

    Raises:
        ConfigError: it cannot be used.
    """
    values = read_table(declared, raw, place)
    try:
        return declared(**values, **fields)
    except ValueError as error:
        place.fail(str(error))


def written(declared: Any) -> Iterator[tuple[str, str]]:
    """The keys of a section that differ from their defaults, each with its value as text."""
    for one in keys(type(declared)).values():
        value = getattr(declared, one.name)
        if value != one.default and isinstance(one.value, Value):
            yield one.name, one.value.write(value)


def schema_of(declared: type, **constants: str) -> dict[str, Any]:
    """The JSON Schema of a section.

    Args:
        declared: the section.
        constants: further keys, each of which must be there and hold this word.
    """
    properties: dict[str, Any] = {name: {"const": word} for name, word in constants.items()}
    required = list(constants)
    for one in (one for name, one in keys(declared).items() if name not in constants):
        shape = one.value.schema if isinstance(one.value, Value) else one.value.schema()
        properties[one.name] = {"description": _plain(one.full), **shape}
        if one.required:
            required.append(one.name)
        elif one.literal:
            properties[one.name]["default"] = json.loads(one.literal)
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {}) | getattr(declared, "constraints", {})
