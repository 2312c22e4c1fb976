"""What all things have in common that a successor rebuilds: how they are written down, read and checked.

A record is a list of a version and the fields of the value in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeAlias, get_type_hints

import msgpack

from vfiouser_oob.persist.journal.layout import Key
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.descriptors import DescriptorKind
from vfiouser_protocol.capabilities import MigrationCapability, TwinSocket, VersionCapabilities

_U64 = (1 << 64) - 1
#: How fields are read, by their names; and what takes their values.
Readers: TypeAlias = Mapping[str, Callable[[str, Any], Any]]
Values: TypeAlias = Callable[["Thing"], tuple[Any, ...]]
#: Both by kind, made when they are needed first.
_FIELD_READERS: dict[type[Thing], Readers] = {}
_FIELD_VALUES: dict[type[Thing], Values] = {}


@dataclass(frozen=True, slots=True)
class Thing:
    """What all things have in common."""

    #: Which kind of record it is, and the version of that kind.
    KIND: ClassVar[int]
    VERSION: ClassVar[int] = 1
    #: Its fields that tell it from others of its kind, with the bytes that each has in a key; none if there is one.
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({})
    #: Its fields that name kept descriptors, and what each has to be.
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType({})
    #: Largest values of its numbers, where that is not 64 bits.
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({})

    @property
    def key(self) -> Key:
        """Which one of its kind it is."""
        return b"".join(getattr(self, name).to_bytes(size, "big") for name, size in self.KEY.items())

    def to_record(self) -> bytes:
        """Write it down."""
        record: bytes = msgpack.packb((self.VERSION, *values_of(type(self))(self)))
        return record

    @classmethod
    def from_record(cls, record: bytes) -> Self:
        """Read what `to_record` wrote.

        Args:
            record: the value of a journal's record.

        Raises:
            UnusableRecord: it is damaged, or of a version that is not understood.
        """
        try:
            values = msgpack.unpackb(record, use_list=False, strict_map_key=False)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise UnusableRecord(f"it is damaged: {error}") from error
        if not isinstance(values, tuple) or not values:
            raise UnusableRecord("it is damaged: it is not a list")
        if values[0] != cls.VERSION:
            raise UnusableRecord(f"it is of version {values[0]!r}; {cls.VERSION} is understood")
        readers = _readers_of(cls)
        if len(values) != len(readers) + 1:
            raise UnusableRecord(f"it is damaged: it has {len(values) - 1} fields of {len(readers)}")
        return cls(**{name: read(name, value) for (name, read), value in zip(readers.items(), values[1:], strict=True)})


def _is(kind: type) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if type(value) is not kind:
            raise UnusableRecord(f"it is damaged: {name} is {type(value).__name__}, it has to be {kind.__name__}")
        return value

    return read


def _or_none(reader: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else reader(name, value)


def _number(largest: int) -> Callable[[str, Any], int]:
    whole = _is(int)

    def read(name: str, value: Any) -> int:
        number: int = whole(name, value)
        if not 0 <= number <= largest:
            raise UnusableRecord(f"it is damaged: {name} is {number}, it has to be from 0 to {largest}")
        return number

    return read


def _parts(kind: type, readers: Sequence[Callable[[str, Any], Any]]) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if not isinstance(value, tuple) or len(value) != len(readers):
            raise UnusableRecord(f"it is damaged: {name} is not a list of {len(readers)}")
        return kind(*(reader(name, item) for reader, item in zip(readers, value, strict=True)))

    return read


_ANY_NUMBER = _number(_U64)
_TWIN = _parts(TwinSocket, (_is(bool), _or_none(_ANY_NUMBER)))
_MIGRATION = _parts(MigrationCapability, (_ANY_NUMBER, _ANY_NUMBER))
#: How a field is read, by its type.
_READERS: Mapping[Any, Callable[[str, Any], Any]] = MappingProxyType(
    {
        int: _ANY_NUMBER,
        int | None: _or_none(_ANY_NUMBER),
        bool: _is(bool),
        bytes: _is(bytes),
        str: _is(str),
        str | None: _or_none(_is(str)),
        VersionCapabilities: _parts(
            VersionCapabilities, (*[_ANY_NUMBER] * 4, _is(bool), _or_none(_TWIN), _or_none(_MIGRATION))
        ),
    }
)


def _readers_of(kind: type[Thing]) -> Readers:
    found = _FIELD_READERS.get(kind)
    if found is None:
        found = _FIELD_READERS[kind] = _made_readers(kind)
    return found


def _made_readers(kind: type[Thing]) -> Readers:
    hints = get_type_hints(kind)
    return {
        field.name: _number(kind.LARGEST[field.name]) if field.name in kind.LARGEST else _READERS[hints[field.name]]
        for field in fields(kind)
    }


def values_of(kind: type[Thing]) -> Values:
    """What takes the values of a thing's fields, in their order."""
    found = _FIELD_VALUES.get(kind)
    if found is None:
        found = _FIELD_VALUES[kind] = _made_values(kind)
    return found


def _made_values(kind: type[Thing]) -> Values:
    names = [field.name for field in fields(kind)]
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda thing: (get(thing),)
