"""Fast codecs, derived from the construct declarations.

construct reads a small structure in 3 to 10 µs, `struct` in a tenth of one. So each layout that is made of the parts
below gets two functions that do with `struct` what the declaration says. They are written as source, once, at import:
what runs for every message has neither a loop over fields nor a table look-up. A property test holds them equal to
construct on random messages and on random bytes. A layout with any other part is left to construct itself.

Decoders let `struct.error` out for a payload that is too short and ValueError for one that contradicts itself; `codec`
turns both into a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from struct import Struct as PackedStruct
from typing import Any, NamedTuple, TypeAlias

import construct

from vfiouser_protocol.fields import Payload, items_of, layout_of

#: What a field is called in a format of `struct`, by what construct calls it: standard sizes, no padding.
_FORMATS = {"<B": "B", "<H": "H", "<L": "I", "<Q": "Q"}


class Twin(NamedTuple):
    """The fast codec of one payload class.

    Args:
        encode: message to bytes.
        decode: bytes to message.
        source: what both were made of, for people who want to see it.
    """

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    source: str


# What a layout can be made of. `exact` says that nothing may follow (construct's Terminated).


class _Fixed(NamedTuple):
    """Fields of fixed size that follow each other; `rebuilt` are those that an expression gives, not the message."""

    names: tuple[str, ...]
    format: str
    rebuilt: tuple[tuple[str, str], ...] = ()


class _Data(NamedTuple):
    """Bytes, as many as an expression says; None is all the rest."""

    name: str
    size: str | None
    exact: bool


class _If(NamedTuple):
    """Parts that are there under a condition, and what their fields are without them."""

    condition: str
    parts: tuple[_Fixed | _Data, ...]
    absent: tuple[tuple[str, str], ...]


class _Many(NamedTuple):
    """Items of one size, as many as an expression says; `room` is that of an item's data, which its `count` cuts."""

    name: str
    number: str
    item: _Fixed
    room: int
    exact: bool


_Part: TypeAlias = _Fixed | _Data | _If | _Many


def derive(cls: type[Payload]) -> Twin | None:
    """Make the fast codec of a payload class.

    Args:
        cls: a payload class.

    Returns:
        The codec; None for a layout that is left to construct.
    """
    parts = _parts(layout_of(cls).subcons)
    if parts is None:
        return None
    writer = _Writer(cls, parts)
    # The source is made of our own declarations and of nothing that came from outside.
    exec(writer.source, writer.names)
    return Twin(writer.names["encode"], writer.names["decode"], writer.source)


# Reading a layout


def _parts(subcons: Sequence[Any]) -> list[_Part] | None:
    """Return what a layout is made of; None if it has a part that is not known here."""
    found: list[_Part] = []
    for subcon, follower in zip(subcons, [*subcons, None][1:], strict=True):
        content = _content(subcon)
        if content is construct.Terminated:
            continue  # the part before it knows
        reader = _READERS.get(type(content))
        part = None if reader is None else reader(subcon.name, content, follower is construct.Terminated)
        if part is None:
            return None
        _append(found, part)
    return found


def _append(parts: list[_Part], part: _Part) -> None:
    """Add a part, joined to the one before where the two make one."""
    last = parts[-1] if parts else None
    if isinstance(last, _Fixed) and isinstance(part, _Fixed):
        parts[-1] = _joined(last, part)
    elif isinstance(last, _If) and isinstance(part, _If) and last.condition == part.condition:
        inner: list[_Part] = list(last.parts)
        for item in part.parts:
            _append(inner, item)
        parts[-1] = _If(part.condition, tuple(inner), last.absent + part.absent)  # type: ignore[arg-type]
    else:
        parts.append(part)


def _joined(first: _Fixed, second: _Fixed) -> _Fixed:
    return _Fixed(first.names + second.names, first.format + second.format, first.rebuilt + second.rebuilt)


def _content(subcon: Any) -> Any:
    while isinstance(subcon, construct.Renamed):
        subcon = subcon.subcon
    return subcon


def _python(expression: object) -> str:
    """construct's `this.flags & 4` as an expression over local variables."""
    return re.sub(r"this\['(\w+)'\]", r"\1", repr(expression)).replace("len_(", "len(")


def _read_fixed(name: str, content: Any, exact: bool) -> _Part:
    return _Fixed((name,), _FORMATS[content.fmtstr])


def _read_rebuilt(name: str, content: Any, exact: bool) -> _Part:
    return _Fixed((name,), _FORMATS[content.subcon.fmtstr], ((name, _python(content.func)),))


def _read_bytes(name: str, content: Any, exact: bool) -> _Part:
    return _Data(name, _python(content.length), exact)


def _read_rest(name: str, content: Any, exact: bool) -> _Part:
    return _Data(name, None, exact)


def _read_if(name: str, content: Any, exact: bool) -> _Part | None:
    reader = _READERS.get(type(content.thensubcon))
    inner = None if reader is None else reader(name, content.thensubcon, exact)
    if not isinstance(inner, _Fixed | _Data):
        return None
    absent = repr(getattr(content.elsesubcon, "func", None))
    return _If(_python(content.condfunc), (inner,), ((name, absent),))


def _read_many(name: str, content: Any, exact: bool) -> _Part | None:
    item, room = _Fixed((), ""), 0
    for subcon in content.subcon.subcons:
        inner = _content(subcon)
        if isinstance(inner, construct.FixedSized):
            room = inner.length
            item = _joined(item, _Fixed((subcon.name,), f"{room}s"))
        else:
            item = _joined(item, _Fixed((subcon.name,), _FORMATS[inner.fmtstr]))
    return _Many(name, _python(content.count), item, room, exact)


_READERS: dict[type[Any], Callable[[str, Any, bool], _Part | None]] = {
    construct.FormatField: _read_fixed,
    construct.Rebuild: _read_rebuilt,
    construct.Bytes: _read_bytes,
    type(construct.GreedyBytes): _read_rest,
    construct.IfThenElse: _read_if,
    construct.Array: _read_many,
}


# Writing the functions


def _miscounted(count: int, size: int) -> ValueError:
    return ValueError(f"the count says {count}, there are {size} bytes")


class _Writer:
    """Writes the two functions of one layout.

    Args:
        cls: the payload class.
        parts: what its layout is made of.
    """

    def __init__(self, cls: type[Payload], parts: Sequence[_Part]) -> None:
        self.names: dict[str, Any] = {"new": tuple.__new__, "cls": cls, "miscounted": _miscounted}
        items = items_of(cls)
        if items is not None:
            self.names["item"] = items[1]
        if [type(part) for part in parts] == [_Fixed] and parts[0].names == cls._fields:  # type: ignore[union-attr]
            self.source = self._plain(parts[0].format)  # type: ignore[union-attr]
            return
        fields = "".join(f"{name}, " for name in cls._fields)
        encode, pieces = self._encode(parts)
        decode = self._decode(parts, 0)
        body = [f"{fields}= message", *encode] if fields else []
        lines = ["def encode(message):", *_indented([*body, f"return {' + '.join(pieces) or repr(b'')}"])]
        lines += ["def decode(payload):", *_indented([*decode, f"return new(cls, ({fields}))"])]
        self.source = "\n".join(lines)

    def _plain(self, form: str) -> str:
        """What is packed as it stands needs no local variables: these are the reads and replies of the hot path."""
        packed = self._packed(form)
        return (
            f"def encode(message):\n    return {packed}.pack(*message)\n"
            f"def decode(payload):\n    return new(cls, {packed}.unpack_from(payload))"
        )

    def _packed(self, form: str) -> str:
        """Return the name of a packed structure."""
        name = f"_{form}"
        self.names[name] = PackedStruct(f"<{form}")
        return name

    def _encode(self, parts: Sequence[_Part]) -> tuple[list[str], list[str]]:
        """Return statements, and the expressions whose bytes make the message."""
        lines: list[str] = []
        pieces: list[str] = []
        for part in parts:
            match part:
                case _Fixed():
                    lines += [f"{name} = {expression}" for name, expression in part.rebuilt]
                    pieces.append(f"{self._packed(part.format)}.pack({', '.join(part.names)})")
                case _Data():
                    if part.size is not None:
                        lines.append(_refusal(part.size, "!=", part.name))
                    pieces.append(part.name)
                case _If():
                    inner, inner_pieces = self._encode(part.parts)
                    built = f"{' + '.join(inner_pieces)} if {part.condition} else b''"
                    lines += [f"if {part.condition}:", *_indented(inner)] if inner else []
                    pieces.append(f"({built})")
                case _Many():
                    lines += self._encode_many(part)
                    pieces.append(f"b''.join({part.name})")
        return lines, pieces

    def _encode_many(self, part: _Many) -> Iterator[str]:
        names = ", ".join(part.item.names)
        if part.room:
            data = part.item.names[-1]
            yield f"for {names} in {part.name}:"
            yield f"    if count != len({data}) or count > {part.room}: raise miscounted(count, len({data}))"
        yield f"{part.name} = [{self._packed(part.item.format)}.pack({names}) for {names} in {part.name}]"

    def _decode(self, parts: Sequence[_Part], at: int) -> list[str]:
        """Return statements that take a message apart from an offset on."""
        lines: list[str] = []
        for part in parts:
            match part:
                case _Fixed():
                    names = "".join(f"{name}, " for name in part.names)
                    packed = self._packed(part.format)
                    lines.append(f"{names}= {packed}.unpack_from(payload{f', {at}' if at else ''})")
                    at += self.names[packed].size
                case _Data():
                    lines += _decode_data(part, at)
                case _If():
                    lines += [f"if {part.condition}:", *_indented(self._decode(part.parts, at))]
                    lines += ["else:", *_indented(f"{name} = {value}" for name, value in part.absent)]
                case _Many():
                    lines += self._decode_many(part, at)
        return lines

    def _decode_many(self, part: _Many, at: int) -> Iterator[str]:
        packed = self._packed(part.item.format)
        # Compared before anything is made: the count may be any number.
        yield f"end = {at} + {self.names[packed].size} * {part.number}"
        yield f"if len(payload) {'!=' if part.exact else '<'} end: raise miscounted({part.number}, len(payload))"
        pieces = f"{packed}.iter_unpack(memoryview(payload)[{at}:end])"
        if not part.room:
            yield f"{part.name} = tuple([new(item, piece) for piece in {pieces}])"
            return
        names = ", ".join(part.item.names)
        yield f"{part.name} = []"
        yield f"for {names} in {pieces}:"
        yield f"    if count > {part.room}: raise miscounted(count, {part.room})"
        yield f"    {part.name}.append(new(item, ({names}[:count])))"
        yield f"{part.name} = tuple({part.name})"


def _decode_data(part: _Data, at: int) -> Iterator[str]:
    yield f"{part.name} = payload[{at}:]"
    if part.size is not None:
        yield _refusal(part.size, "!=" if part.exact else ">", part.name)
        if not part.exact:
            yield f"if {part.size} < len({part.name}): {part.name} = {part.name}[:{part.size}]"


def _refusal(size: str, relation: str, data: str) -> str:
    return f"if {size} {relation} len({data}): raise miscounted({size}, len({data}))"


def _indented(lines: Sequence[str] | Iterator[str]) -> list[str]:
    return [f"    {line}" for line in lines]
