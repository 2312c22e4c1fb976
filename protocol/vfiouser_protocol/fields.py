"""The vocabulary of message declarations: field types, and how a debug line shows a field.

A payload is a NamedTuple whose annotations carry its layout in construct's words. `Annotated[int, Int32ul]` is a field
of four bytes; the aliases here are the common ones. A field that is on the wire but not in the tuple (a count that
follows from the data, padding) is a *named* construct field in front of the field that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeAlias, get_args, get_type_hints

from construct import Construct, ConstructError, GreedyBytes, IfThenElse, Int16ul, Int32ul, Int64ul, Struct, Terminated

#: Any payload: a NamedTuple whose annotations carry its layout.
Payload: TypeAlias = NamedTuple

U16 = Annotated[int, Int16ul]
U32 = Annotated[int, Int32ul]
U64 = Annotated[int, Int64ul]
#: The rest of the payload.
Rest = Annotated[bytes, GreedyBytes]

#: Version data is text and short; more than this of it is not shown.
MAX_TEXT = 300


class Show(NamedTuple):
    """How a debug line shows a field; a field without one is not shown.

    Args:
        form: the value as text.
        label: what comes before the text.
        unless: a value that says nothing and is left out.
        close: whether the text follows the one before without a space.
    """

    form: Callable[[Any], str] = str
    label: str = ""
    unless: object = None
    close: bool = False


def letters(flags: int, alphabet: str) -> str:
    """Return flags as letters, one per bit from bit 0, with ``-`` for a clear bit and unknown bits in hex.

    Args:
        flags: the bits.
        alphabet: the letter of each bit.
    """
    text = "".join(letter if flags >> bit & 1 else "-" for bit, letter in enumerate(alphabet))
    unknown = flags >> len(alphabet) << len(alphabet)
    return f"{text}+{unknown:#x}" if unknown else text


def flag_names(flags: int, kind: type[IntFlag]) -> str:
    """Return the names of the bits that are set, unknown ones in hex.

    Args:
        flags: the bits.
        kind: the flags' enumeration.
    """
    names = [member.name or "" for member in kind if flags & member]
    known = sum(member for member in kind if flags & member)
    if flags & ~known:
        names.append(f"{flags & ~known:#x}")
    return "|".join(names) or "0"


def member_name(value: int, kind: type[IntEnum]) -> str:
    """Return the name of a number, or the number.

    Args:
        value: any number.
        kind: the numbers' enumeration.
    """
    return kind(value).name if value in kind._value2member_map_ else str(value)


def quoted(data: bytes) -> str:
    """Return a peer's text on one line, whatever the peer put into it, and not more than `MAX_TEXT` of it.

    Args:
        data: the text as UTF-8, with or without NULs at its end; other bytes are replaced.
    """
    text = data.rstrip(b"\0").decode("utf-8", "replace")
    return ascii(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…") if text else ""


def shown_flags(kind: type[IntFlag]) -> Show:
    """Show flags by their names, and nothing if none is set.

    Args:
        kind: the flags' enumeration.
    """
    return Show(lambda flags: flag_names(flags, kind), unless=0)


def shown_member(label: str, kind: type[IntEnum]) -> Show:
    """Show a number by its name.

    Args:
        label: what comes before the name.
        kind: the numbers' enumeration.
    """
    return Show(lambda value: member_name(value, kind), label)


def shown(label: str, unless: object = None) -> Show:
    """Show a number behind a label.

    Args:
        label: what comes before the number.
        unless: a value that says nothing and is left out.
    """
    return Show(str, label, unless)


def shown_letters(alphabet: str) -> Show:
    """Show flags as letters, and nothing if none is set.

    Args:
        alphabet: the letter of each bit, as for `letters`.
    """
    return Show(lambda flags: letters(flags, alphabet), unless=0)


def shown_hex(label: str) -> Show:
    """Show an address or a size behind a label, unless it is 0.

    Args:
        label: what comes before the number.
    """
    return Show(lambda value: f"{value:#x}", label, unless=0)


def shown_length(label: str) -> Show:
    """Show how much or how many there is behind a label, not what.

    Args:
        label: what comes before the length.
    """
    return Show(lambda value: str(len(value)), label, unless=b"")


#: Bytes that a register holds at most.
REGISTER_SIZE = 8


def register_value(data: bytes) -> str:
    """Return the bytes of a register access as a number.

    Args:
        data: what was read or written, little-endian.

    Returns:
        The text; empty for no bytes, or for more than `REGISTER_SIZE`.
    """
    return f" value={int.from_bytes(data, 'little'):#x}" if 0 < len(data) <= REGISTER_SIZE else ""


#: What was read or written, if it is a register's worth.
REGISTER_VALUE = Show(register_value, close=True)
#: The start of a range of addresses, and its length behind it.
START = Show(lambda address: f"{address:#x}", "iova=")
LENGTH = Show(lambda size: f"+{size:#x}", close=True)
#: An offset inside a region.
AT = Show(lambda offset: f"+{offset:#x}")


@cache
def layout_of(cls: type[Payload]) -> Struct:
    """Return the layout that the annotations of a payload make, in construct's words.

    Args:
        cls: a payload class.
    """
    parts = [
        # The field itself is the one without a name; Terminated, which takes no bytes, has none either.
        part if part.name or part is Terminated else name / part
        for name, hint in get_type_hints(cls, include_extras=True).items()
        for part in get_args(hint)[1:]
        if isinstance(part, Construct)
    ]
    return Struct(*parts)


@cache
def items_of(cls: type[Payload]) -> tuple[str, type[Any]] | None:
    """Return the field of a payload that holds several items.

    Args:
        cls: a payload class.

    Returns:
        The field's name and the class of an item; None if the payload has no such field.
    """
    for name, hint in get_type_hints(cls).items():
        inner = get_args(hint)
        if inner and inner[-1] is Ellipsis:
            return name, inner[0]
    return None


@cache
def shows_of(cls: type[Payload]) -> tuple[tuple[str, Show], ...]:
    """Return the fields of a payload that a debug line shows.

    Args:
        cls: a payload class.

    Returns:
        The name of each, and how it is shown.
    """
    hints = get_type_hints(cls, include_extras=True)
    found = ((name, extra) for name, hint in hints.items() for extra in get_args(hint)[1:] if isinstance(extra, Show))
    return tuple(found)


def phrase(message: Payload) -> str:
    """Return the fields of a payload as one line for people.

    Args:
        message: any payload.
    """
    text = ""
    for name, show in shows_of(type(message)):
        value = getattr(message, name)
        if value is None or value == show.unless:
            continue
        text += f"{'' if show.close or not text else ' '}{show.label}{show.form(value)}"
    return text


class LayoutRow(NamedTuple):
    """One field of a layout.

    Args:
        offset: bytes from the start of the payload.
        size: bytes, or None if it varies.
        name: the field's name.
        conditional: whether it is there only under a condition.
    """

    offset: int
    size: int | None
    name: str
    conditional: bool = False


def layout_table(what: type[Any] | Struct) -> list[LayoutRow]:
    """Return the rows of a layout table, derived from its declaration.

    Args:
        what: a payload class, or a layout such as that of the header.

    Returns:
        The fields in order; only the last may vary in size.
    """
    rows = []
    offset = 0
    for part in (layout_of(what) if isinstance(what, type) else what).subcons:
        if part.name is None:
            continue
        content = part.subcon
        conditional = isinstance(content, IfThenElse)
        if conditional:
            content = content.thensubcon
        try:
            size = content.sizeof()
        except ConstructError:
            size = None
        rows.append(LayoutRow(offset, size, part.name, conditional))
        offset += size or 0
    return rows


def least_size(cls: type[Any]) -> int:
    """Return how many bytes a payload has at least: those of its fixed fields that are always there.

    Args:
        cls: a payload class.
    """
    return sum(row.size or 0 for row in layout_table(cls) if not row.conditional)
