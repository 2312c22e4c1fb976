"""The types of the interface as maps, lists and numbers that any RPC protocol can carry.

A dataclass is a map of its fields, an enum its value, a `Range` the pair [iova, length]. Bytes may come as base64
where a protocol has no bytes of its own. Reading is strict about types and sizes; a key that is missing takes the
field's default, and keys that are not known are ignored, so that either side may be newer. Sizes are bounded, since all
of it is somebody else's word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from vfiouser_agents.api import Range

#: Reads a value; the text is its name, for the error.
Reader: TypeAlias = Callable[[Any, str], Any]

_U64 = 1 << 64
#: Characters of a text, and of all texts of a map: what is said of a function ends in streams, logs and `status`.
MAX_TEXT = 64 << 10
#: Pairs of a map, and elements of a list such as that of the dirty ranges.
MAX_PAIRS, MAX_ITEMS = 1024, 1 << 20


class WireError(ValueError):
    """A value is not what was expected; the message says where."""


def to_wire(value: Any) -> Any:
    """A value of the interface as plain data.

    Args:
        value: a dataclass, an enum, or what is plain already; sequences of them.
    """
    kind: Any = type(value)
    write = _writer(kind)
    return value if write is None else write(value)


@cache
def _writer(kind: Any) -> Callable[[Any], Any] | None:
    """What makes plain data of a type; None: it is plain."""
    if issubclass(kind, Range):
        return lambda value: [value.iova, value.length]
    if dataclasses.is_dataclass(kind):
        names = tuple(field.name for field in dataclasses.fields(kind))
        return lambda value: {name: to_wire(getattr(value, name)) for name in names}
    if issubclass(kind, Enum):
        return lambda value: value.value
    return (lambda value: [to_wire(item) for item in value]) if issubclass(kind, tuple | list) else None


def from_wire(hint: Any, value: Any, where: str = "value") -> Any:
    """Plain data as a value of the interface.

    Args:
        hint: the type wanted.
        value: what came.
        where: its name, for the error.

    Raises:
        WireError: it is something else.
    """
    return _reader(hint)(value, where)


@cache
def _reader(hint: Any) -> Reader:
    """What reads a type: looked up once, since each answer and each event of an agent has a dozen of them."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType or NoneType in arguments:
        return partial(_optional, _reader(next(choice for choice in arguments if choice is not NoneType)))
    if origin is tuple or origin is Sequence:
        return partial(_items, _reader(arguments[0]))
    if origin is Mapping:
        return _texts
    if hint is Range:
        return _range
    if isinstance(hint, type) and issubclass(hint, Enum):
        return partial(_enum, hint, {member.value: member for member in hint})
    if dataclasses.is_dataclass(hint):
        return partial(_dataclass, hint)
    return _bytes if hint is bytes else partial(_plain, hint)


def _optional(read: Reader, value: Any, where: str) -> Any:
    return None if value is None else read(value, where)


def _items(read: Reader, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    if len(value) > MAX_ITEMS:
        raise WireError(f"{where} has {len(value)} elements; allowed are {MAX_ITEMS}")
    return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))


def _texts(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(type(x) is str for pair in value.items() for x in pair):
        raise _wrong(where, "a map of text to text", value)
    if len(value) > MAX_PAIRS or sum(len(x) for pair in value.items() for x in pair) > MAX_TEXT:
        raise WireError(f"{where} is a map of {len(value)} pairs; allowed are {MAX_PAIRS}, of {MAX_TEXT} characters")
    return dict(value)


def _plain(hint: Any, value: Any, where: str) -> Any:
    if type(value) is not hint:
        raise _wrong(where, hint.__name__, value)
    if hint is str and len(value) > MAX_TEXT:
        raise WireError(f"{where} is text of {len(value)} characters; allowed are {MAX_TEXT}")
    if hint is int and not 0 <= value < _U64:
        raise WireError(f"{where} is {value}; allowed are 0 to 2**64 - 1")
    return value


def _bytes(value: Any, where: str) -> Any:
    if type(value) is str:
        return _from_base64(value, where)
    return value if type(value) is memoryview else _plain(bytes, value, where)


def _from_base64(value: str, where: str) -> bytes:
    # It takes a megabyte with what it brings along, which only those have whose protocol has no bytes.
    import msgspec

    try:
        return msgspec.convert(value, bytes)
    except msgspec.ValidationError:
        raise WireError(f"{where} is text of {len(value)} characters that is not base64") from None


def _range(value: Any, where: str) -> Range:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(where, "a pair of iova and length", value)
    return Range(_plain(int, value[0], f"{where}.iova"), _plain(int, value[1], f"{where}.length"))


def _enum(hint: type[Enum], members: Mapping[str, Enum], value: Any, where: str) -> Enum:
    member = members.get(value) if type(value) is str else None
    if member is None:
        raise WireError(f"{where} is {_shown(value)}; allowed are {', '.join(map(str, members))}")
    return member


def _dataclass(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, "a map", value)
    found = {}
    for name, read, required in _fields(hint):
        if name in value:
            found[name] = read(value[name], f"{where}.{name}")
        elif required:
            raise WireError(f"{where} has no {name!r}")
    return hint(**found)


@cache
def _fields(hint: Any) -> tuple[tuple[str, Reader, bool], ...]:
    """The name and the reader of each field, and whether it has to be there."""
    hints, nothing = get_type_hints(hint), dataclasses.MISSING
    return tuple(
        (field.name, _reader(hints[field.name]), field.default is nothing and field.default_factory is nothing)
        for field in dataclasses.fields(hint)
    )


def _wrong(where: str, wanted: str, value: Any) -> WireError:
    return WireError(f"{where} is {_shown(value)}; it must be {wanted}")


def _shown(value: Any) -> str:
    # Never the bytes themselves: they may be a function's state.
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)[:100]
