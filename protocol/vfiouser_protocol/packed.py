"""Fixed parts of layouts, derived from their construct declarations for `struct`.

What is not a payload (a header, a record, a capability) is declared in construct too, and read and written with what
these functions make of the declaration, once, at import. `codec_derived` does the same for whole payloads.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct as PackedStruct
from typing import Any

import construct


def packed(layout: construct.Struct, until: str | None = None) -> PackedStruct:
    """Return the fields of fixed size that a layout begins with.

    Constants and what construct rebuilds are values like any other here; nameless padding is skipped, and written as
    zero bytes.

    Args:
        layout: the declaration.
        until: the name of the first field that is left out; None is the first one of no fixed size.

    Returns:
        The fields in order, for `struct`.

    Raises:
        ValueError: the layout has no such field, or mixes byte orders.
    """
    return _joined([form for _name, form in _fields(layout, until)])


def picked(layout: construct.Struct, name: str) -> PackedStruct:
    """Return one field of a layout, and skip what comes before it.

    Args:
        layout: the declaration.
        name: the field's name.

    Returns:
        The field, for `struct`; the size is that up to the field's end.

    Raises:
        ValueError: the layout has no such field, or one of no fixed size in front of it.
    """
    before = packed(layout, name)
    for found, form in _fields(layout, None):
        if found == name:
            return PackedStruct(f"{form[0]}{before.size}x{form[1:]}")
    raise ValueError(f"{name} has no fixed size")


def _fields(layout: construct.Struct, until: str | None) -> Iterator[tuple[str | None, str]]:
    """The name and the format, byte order first, of each field at the beginning of a layout."""
    if until is not None and until not in {part.name for part in layout.subcons}:
        raise ValueError(f"a layout without a field {until}")
    for part in layout.subcons:
        form = None if until is not None and part.name == until else _format(part)
        if form is None:
            return
        yield part.name, form


def _joined(forms: list[str]) -> PackedStruct:
    orders = {form[0] for form in forms} - {"="} or {"="}
    if len(orders) > 1:
        raise ValueError(f"byte orders {' and '.join(sorted(orders))} in one layout")
    return PackedStruct(orders.pop() + "".join(form[1:] for form in forms))


def _format(part: Any) -> str | None:
    """The format of one field, `=` in front where its byte order means nothing; None if it has no fixed size."""
    match part:
        case construct.Renamed() | construct.Rebuild() | construct.Const():
            return _format(part.subcon)
        case construct.FormatField():
            return str(part.fmtstr)
        case construct.Bytes() if isinstance(part.length, int):
            return f"={part.length}s"
        case construct.Padded() if part.subcon is construct.Pass:
            return f"={part.length}x"
    return None
