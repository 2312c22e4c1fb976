"""A payload that lies in several places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pieces:
    """The payload of a large reply, which is sent from where it lies.

    Args:
        pieces: the payload; what they lie in does not change any more.
    """

    pieces: Sequence[bytes | memoryview]

    @property
    def size(self) -> int:
        """Bytes of all pieces together."""
        return sum(map(len, self.pieces))
