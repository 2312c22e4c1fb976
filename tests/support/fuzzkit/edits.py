"""Single values of a nested structure, replaced as a fuzzer's bytes say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_U64 = (1 << 64) - 1
#: Numbers at which a field of some width ends, or a check has its edge.
_EDGES = (0, 1, 2, 63, 64, 65, 4095, 4096, 0x7FFF, 0xFFFF, 0x1_0000, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 63, _U64)
_MOST = 4


def edit(value: Any, data: bytes) -> None:
    """Change up to four places of a structure.

    Args:
        value: a dict or list; changed in place.
        data: where to go, and what to put there.
    """
    source = iter(data)
    for _ in range(_MOST):
        try:
            _edit_once(value, source)
        except StopIteration:
            return


def _edit_once(value: Any, source: Iterator[int]) -> None:
    while True:
        keys: list[Any] = sorted(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            if isinstance(value, list):
                value.append(_EDGES[next(source) % len(_EDGES)])
            return
        key = keys[next(source) % len(keys)]
        inner = value[key]
        if not isinstance(inner, dict | list) or (how := next(source)) % 8 == 0:
            value[key] = _other(inner, source)
            return
        if how % 8 == 1 and isinstance(inner, list) and inner:
            inner.append(inner[-1])
            return
        if how % 8 == 2 and isinstance(inner, list):
            del inner[-1:]
            return
        value = inner


def _other(old: Any, source: Iterator[int]) -> Any:
    """Something else in the place of a value."""
    how, number = next(source), next(source)
    if isinstance(old, bytes) and old and how % 4:
        at = (number << 8 | next(source)) % len(old)
        return old[:at] + bytes([next(source)]) + old[at + 1 :]
    if type(old) is int and how % 4 == 1:
        return max(0, min(_U64, old + number - 128))
    if how % 16 == 2:
        return None
    if how % 16 == 6:
        return [number] * (number % 12)
    if how % 16 == 10:
        return bytes(number)
    if how % 4 == 3:
        return number << 8 | next(source)
    return _EDGES[number % len(_EDGES)]
