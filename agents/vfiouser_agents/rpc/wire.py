"""The types of the interface as maps, lists and numbers that any RPC protocol can carry.

A dataclass is a map of its fields, an enum its value, a `Range` the pair [iova, length]. Bytes may come as base64
where a protocol has no bytes of its own. Reading is strict about types and sizes; a key that is missing takes the
field's default, and keys that are not known are ignored, so that either side may be newer. Sizes are bounded, since all
of it is somebody else's word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from vfiouser_agents.api import Range

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
    if isinstance(value, Range):
        return [value.iova, value.length]
    if dataclasses.is_dataclass(value):
        return {field.name: to_wire(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes | str | memoryview):
        return value
    if isinstance(value, tuple | list):
        return [to_wire(item) for item in value]
    return value


def from_wire(hint: Any, value: Any, where: str = "value") -> Any:
    """Plain data as a value of the interface.

    Args:
        hint: the type wanted.
        value: what came.
        where: its name, for the error.

    Raises:
        WireError: it is something else.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType or NoneType in arguments:
        if value is None:
            return None
        return from_wire(next(choice for choice in arguments if choice is not NoneType), value, where)
    if origin is tuple or origin is Sequence:
        if not isinstance(value, list | tuple):
            raise _wrong(where, "a list", value)
        if len(value) > MAX_ITEMS:
            raise WireError(f"{where} has {len(value)} elements; allowed are {MAX_ITEMS}")
        return tuple(from_wire(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping) or not all(type(x) is str for pair in value.items() for x in pair):
            raise _wrong(where, "a map of text to text", value)
        if len(value) > MAX_PAIRS or sum(len(x) for pair in value.items() for x in pair) > MAX_TEXT:
            raise WireError(
                f"{where} is a map of {len(value)} pairs; allowed are {MAX_PAIRS}, of {MAX_TEXT} characters"
            )
        return dict(value)
    if hint is Range:
        return Range(*_pair(value, where))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    if hint is bytes and type(value) in (str, memoryview):
        return value if type(value) is memoryview else _from_base64(value, where)
    if type(value) is not hint:
        raise _wrong(where, hint.__name__, value)
    if hint is str and len(value) > MAX_TEXT:
        raise WireError(f"{where} is text of {len(value)} characters; allowed are {MAX_TEXT}")
    if hint is int and not 0 <= value < _U64:
        raise WireError(f"{where} is {value}; allowed are 0 to 2**64 - 1")
    return value


def _from_base64(value: str, where: str) -> bytes:
    # It takes a megabyte with what it brings along, which only those have whose protocol has no bytes.
    import msgspec

    try:
        return msgspec.convert(value, bytes)
    except msgspec.ValidationError:
        raise WireError(f"{where} is text of {len(value)} characters that is no base64") from None


def _pair(value: Any, where: str) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(where, "a pair of iova and length", value)
    return from_wire(int, value[0], f"{where}.iova"), from_wire(int, value[1], f"{where}.length")


def _enum(hint: type[Enum], value: Any, where: str) -> Enum:
    for member in hint:
        if member.value == value and type(value) is str:
            return member
    allowed = ", ".join(str(member.value) for member in hint)
    raise WireError(f"{where} is {_shown(value)}; allowed are {allowed}")


def _dataclass(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, "a map", value)
    found = {}
    for field, kind in _fields(hint):
        if field.name in value:
            found[field.name] = from_wire(kind, value[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise WireError(f"{where} has no {field.name!r}")
    return hint(**found)


@cache
def _fields(hint: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    hints = get_type_hints(hint)
    return tuple((field, hints[field.name]) for field in dataclasses.fields(hint))


def _wrong(where: str, wanted: str, value: Any) -> WireError:
    return WireError(f"{where} is {_shown(value)}; it must be {wanted}")


def _shown(value: Any) -> str:
    # Never the bytes themselves: they may be a function's state.
    return f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)[:100]
