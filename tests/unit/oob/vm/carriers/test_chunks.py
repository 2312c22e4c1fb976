"""A state in pieces: what was cut is joined, in any order, and nothing else is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.vm.carriers.chunks import HEAD_SIZE, ChunkError, Joiner, cut, pieces_for

LARGEST = HEAD_SIZE + 8


def joined(pieces: list[bytes], order: list[int], most_bytes: int = 1000) -> bytes | None:
    """What comes of pieces that arrive in an order."""
    joiner = Joiner(most_bytes, LARGEST)
    results = [joiner.add(index, pieces[index]) for index in order]
    assert results[:-1] == [None] * (len(order) - 1)
    return results[-1]


@given(st.binary(max_size=100), st.randoms(use_true_random=False))
def test_pieces_join_in_any_order(state: bytes, order: random.Random) -> None:
    """Whatever the size, the last piece completes the state."""
    pieces = [b"".join(piece) for piece in cut(state, LARGEST)]
    assert len(pieces) == pieces_for(len(state), 8)
    assert all(len(piece) <= LARGEST for piece in pieces)
    places = list(range(len(pieces)))
    order.shuffle(places)
    assert joined(pieces, places) == state


def pieces_of(state: bytes) -> list[bytes]:
    """A state's pieces as they travel."""
    return [b"".join(piece) for piece in cut(state, LARGEST)]


@pytest.mark.parametrize(
    ("arrivals", "reason"),
    [
        ([(0, b"")], "not a piece of a state"),
        ([(0, b"x" * LARGEST)], "not a piece of a state"),
        ([(1, pieces_of(b"a" * 20)[0])], "piece 0 .* where piece 1"),
        ([(0, pieces_of(b"a" * 20)[0]), (0, pieces_of(b"a" * 20)[0])], "or twice"),
        ([(0, pieces_of(b"a" * 20)[0]), (1, pieces_of(b"a" * 21)[1])], "pieces of two states"),
        ([(0, pieces_of(b"a" * 20)[0][:-1])], "has 7 bytes"),
        ([(0, pieces_of(b"a" * 20)[0] + b"a")], "has 9 bytes"),
        ([(0, pieces_of(b"a" * 1001)[0])], "1001 bytes, and at most 1000"),
    ],
)
def test_what_is_no_piece_of_the_state_is_refused(arrivals: list[tuple[int, bytes]], reason: str) -> None:
    """The error says what arrived."""
    joiner = Joiner(1000, LARGEST)
    for index, piece in arrivals[:-1]:
        joiner.add(index, piece)
    with pytest.raises(ChunkError, match=reason):
        joiner.add(*arrivals[-1])


def test_a_wrong_number_of_pieces_is_refused() -> None:
    """The number follows from the size."""
    other = b"".join(cut(b"a" * 20, HEAD_SIZE + 10)[0])
    with pytest.raises(ChunkError, match="does not come in 2 pieces"):
        Joiner(1000, LARGEST).add(0, other)
