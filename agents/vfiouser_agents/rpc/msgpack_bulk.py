"""Large values in msgpack-RPC messages, without copying them: found in what came, and left out of what is packed.

Only the usual place is looked at, a binary directly in the parameters of a request or in the result of a response, and
only the first one of a message. Everything else goes through the parser, which gives the same, slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: Bytes from which a binary is worth it.
LEAST = 64 << 10
#: Bytes of a message in which the large binary has to begin.
HEAD = 512

#: First byte of a value: how many bytes of length follow it.
_BINARIES = {0xC5: 2, 0xC6: 4}
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4}
_FIXED |= {0xD3: 8}
_LENGTHS = {0xC4: 1, 0xD9: 1, 0xDA: 2, **_BINARIES}
_REQUEST, _RESPONSE = 0, 1


class Bulk(NamedTuple):
    """A large binary in a message of which the beginning has come.

    Args:
        start: bytes in front of the binary's own head.
        data: where its bytes begin.
        size: how many there are.
        key: under which it is found.
    """

    start: int
    data: int
    size: int
    key: str


class _Strange(Exception):
    """The message has another shape than the usual one."""


def find_bulk(head: bytes) -> Bulk | None:
    """Look for a large binary in the beginning of a message.

    Args:
        head: at most `HEAD` bytes; the message goes on behind them.

    Returns:
        The binary; None when there is none in here, but may be in what follows.

    Raises:
        ValueError: the message has another shape, so that the parser has to deal with it.
    """
    walk = _Walk(head)
    try:
        return walk.find()
    except IndexError:
        return None
    except _Strange:
        raise ValueError("not the usual shape") from None


class _Walk:
    """One walk over the values of a message; IndexError where what came ends."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._at = 0

    def find(self) -> Bulk | None:
        self._expect(0x94)
        kind = self._byte()
        if kind not in (_REQUEST, _RESPONSE):
            raise _Strange
        self._skip()
        if kind == _REQUEST:
            self._text()
            self._expect(0x91)
        else:
            self._expect(0xC0)
        for _ in range(self._pairs()):
            key = self._text()
            start = self._at
            width = _BINARIES.get(self._head[start])
            if width is not None:
                self._at += 1
                size = self._number(width)
                if size >= LEAST:
                    return Bulk(start, self._at, size, key)
                self._at = start
            self._skip()
        raise _Strange

    def _byte(self) -> int:
        value = self._head[self._at]
        self._at += 1
        return value

    def _expect(self, byte: int) -> None:
        if self._byte() != byte:
            raise _Strange

    def _number(self, width: int) -> int:
        end = self._at + width
        if end > len(self._head):
            raise IndexError
        value = int.from_bytes(self._head[self._at : end], "big")
        self._at = end
        return value

    def _pairs(self) -> int:
        first = self._byte()
        if first & 0xF0 == 0x80:
            return first & 0x0F
        if first == 0xDE:
            return self._number(2)
        raise _Strange

    def _text(self) -> str:
        first = self._byte()
        if first & 0xE0 == 0xA0:
            size = first & 0x1F
        elif first == 0xD9:
            size = self._byte()
        else:
            raise _Strange
        end = self._at + size
        if end > len(self._head):
            raise IndexError
        try:
            text = self._head[self._at : end].decode()
        except UnicodeDecodeError:
            raise _Strange from None
        self._at = end
        return text

    def _skip(self) -> None:
        """Go over a value that holds no others."""
        first = self._byte()
        if first < 0x80 or first >= 0xE0:
            return
        if first & 0xE0 == 0xA0:
            self._at += first & 0x1F
        elif first in _FIXED:
            self._at += _FIXED[first]
        elif first in _LENGTHS:
            self._at += self._number(_LENGTHS[first])
        else:
            raise _Strange


def head_of(size: int) -> bytes:
    """What stands in front of a binary.

    Args:
        size: its bytes, at least `LEAST`.
    """
    return b"\xc6" + size.to_bytes(4, "big")


def holds_large(values: Any) -> bool:
    """Whether a map has large binaries as values.

    Args:
        values: parameters or a result; anything but a map has none.
    """
    return isinstance(values, dict) and any(map(_is_large, values.values()))


def _is_large(value: Any) -> bool:
    return isinstance(value, bytes | bytearray | memoryview) and len(value) >= LEAST


def pack_apart(
    pack: Callable[[Any], bytes], shell: tuple[bytes, ...], values: Mapping[Any, Any]
) -> list[bytes | bytearray | memoryview]:
    """Pack a message around large binaries, which stay where they are.

    Args:
        pack: packs a value.
        shell: what is in front of the map.
        values: the map.
    """
    pieces: list[bytes | bytearray | memoryview] = []
    small = [*shell, _map_head(len(values))]
    for key, value in values.items():
        small.append(pack(key))
        if _is_large(value):
            small.append(head_of(len(value)))
            pieces += [b"".join(small), value]
            small = []
        else:
            small.append(pack(value))
    if small:
        pieces.append(b"".join(small))
    return pieces


def _map_head(count: int) -> bytes:
    if count < 16:
        return bytes([0x80 | count])
    return b"\xde" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdf" + count.to_bytes(4, "big")
