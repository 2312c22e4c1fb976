"""A queue whose requests are all refused, and queues that make no sense."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.vm.carriers.vring import Vring, VringError, VringPlace

SIZE = 4
PLACE = VringPlace(SIZE, 0, 256, 512)
BUFFER = 1024
NEXT, WRITE = 1, 2


class Memory:
    """Guest memory, 4 KiB of it."""

    def __init__(self) -> None:
        self.data = bytearray(4096)

    def read(self, address: int, length: int) -> bytes:
        """Read bytes."""
        self._check(address, length)
        return bytes(self.data[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        """Write bytes."""
        self._check(address, len(data))
        self.data[address : address + len(data)] = data

    def _check(self, address: int, length: int) -> None:
        if address + length > len(self.data):
            raise VringError("no memory")

    def describe(self, *rows: tuple[int, int, int, int]) -> None:
        """Fill in descriptors."""
        for index, row in enumerate(rows):
            struct.pack_into("<QIHH", self.data, 16 * index, *row)

    def offer(self, *heads: int, base: int = 0, flags: int = 0) -> None:
        """Make requests available."""
        for number, head in enumerate(heads):
            struct.pack_into("<H", self.data, 256 + 4 + 2 * ((base + number) % SIZE), head)
        struct.pack_into("<HH", self.data, 256, flags, (base + len(heads)) & 0xFFFF)

    def used(self, at: int = 0) -> tuple[int, int, int]:
        """How many were given back, and one of them: which, and how many bytes were written."""
        return struct.unpack_from("<H", self.data, 514) + struct.unpack_from("<II", self.data, 516 + 8 * at)


def request(memory: Memory, unique: int = 9) -> None:
    """A request with room for an answer, in two descriptors."""
    struct.pack_into("<IIQ", memory.data, BUFFER, 40, 26, unique)
    memory.describe((BUFFER, 40, NEXT, 1), (BUFFER + 512, 80, WRITE, 0))


def test_a_request_is_given_back_with_an_error() -> None:
    """To the one that asked, and the driver is interrupted."""
    memory = Memory()
    request(memory)
    memory.offer(0)
    ring = Vring(PLACE, 0)
    assert ring.serve(memory)
    assert memory.used() == (1, 0, 16)
    assert struct.unpack_from("<IiQ", memory.data, BUFFER + 512) == (16, -5, 9)
    assert ring.base == 1
    assert not ring.serve(memory)


def test_indices_wrap_around() -> None:
    """After 65535 comes 0."""
    memory = Memory()
    request(memory)
    struct.pack_into("<H", memory.data, 514, 0xFFFF)
    memory.offer(0, 0, base=0xFFFF, flags=1)
    ring = Vring(PLACE, 0xFFFF)
    assert not ring.serve(memory)
    assert (memory.used()[0], ring.base) == (1, 1)


@pytest.mark.parametrize(
    "rows", [[(BUFFER, 40, 0, 0)], [(BUFFER, 8, NEXT, 1), (BUFFER, 80, WRITE, 0)], [(BUFFER, 80, WRITE, 0)]]
)
def test_what_has_no_room_for_an_answer_is_given_back_without_one(rows: list[tuple[int, int, int, int]]) -> None:
    """FORGET, for one, has no answer."""
    memory = Memory()
    memory.describe(*rows)
    memory.offer(0)
    assert Vring(PLACE, 0).serve(memory)
    assert memory.used() == (1, 0, 0)


@pytest.mark.parametrize(
    ("place", "rows", "heads"),
    [
        (PLACE, [(BUFFER, 40, NEXT, 0)], [0]),
        (PLACE, [(BUFFER, 40, NEXT, SIZE)], [0]),
        (PLACE, [], [SIZE]),
        (PLACE, [], [0] * (SIZE + 1)),
        (PLACE, [(1 << 60, 40, 0, 0)], [0]),
        (PLACE._replace(size=3), [], [0]),
        (PLACE._replace(size=0), [], [0]),
        (PLACE._replace(size=2048), [], [0]),
        (PLACE._replace(available=1 << 62), [], []),
    ],
)
def test_queues_without_sense_are_not_served(
    place: VringPlace, rows: list[tuple[int, int, int, int]], heads: list[int]
) -> None:
    """Loops, indices outside, more requests than fit."""
    memory = Memory()
    memory.describe(*rows)
    memory.offer(*heads)
    with pytest.raises(VringError):
        Vring(place, 0).serve(memory)


@given(st.binary(min_size=600, max_size=600), st.integers(0, 0xFFFF))
def test_noise_is_served_or_refused(noise: bytes, base: int) -> None:
    """And never takes long, or raises anything else."""
    memory = Memory()
    memory.data[:600] = noise
    try:
        Vring(PLACE, base).serve(memory)
    except VringError:
        pass
