"""Parts of the pipelines: hashing beside the transfer, and memory that is shared."""

from __future__ import annotations

import hashlib
import random
import threading
from contextlib import ExitStack
from itertools import pairwise

import trio

from vfiouser_oob.migration.hashing import BEHIND, Hasher
from vfiouser_oob.migration.sharing import LEAST, TOTAL, BufferShare

DATA = random.Random(1).randbytes(3 << 20)


async def test_the_digest_is_that_of_all_bytes_in_order() -> None:
    """However large the pieces are, and whether they are hashed at once or in the thread."""
    hasher = Hasher()
    cuts = [0, 10, 20_000, 20_001, 1 << 20, (1 << 20) + 5, 2 << 20, len(DATA)]
    for start, end in pairwise(cuts):
        await hasher.room()
        hasher.add(memoryview(DATA)[start:end])
        assert hasher.behind <= BEHIND + 1
    assert hashlib.sha256(DATA).digest() == await hasher.digest()
    assert 0 == hasher.behind
    hasher.add(DATA)
    assert hashlib.sha256(DATA + DATA).digest() == await hasher.digest()


async def test_room_is_waited_for() -> None:
    """Who adds much and asks for room is never more than a few chunks ahead of the thread."""
    hasher = Hasher()
    with trio.fail_after(30):
        for _ in range(40):
            await hasher.room()
            assert hasher.behind <= BEHIND
            hasher.add(DATA)
        assert hashlib.sha256(DATA * 40).digest() == await hasher.digest()


async def test_waiting_for_a_digest_can_be_given_up() -> None:
    """Whoever waits may be cancelled, and another may wait."""
    hasher = Hasher()
    hasher.add(DATA)
    with trio.move_on_after(0):
        await hasher.digest()
    assert hashlib.sha256(DATA).digest() == await hasher.digest()


async def test_bytes_after_a_pause_are_hashed_too() -> None:
    """Whether the thread still waits for more, is about to leave, or has left: nothing is lost."""
    hasher = Hasher()
    for number in range(30):
        hasher.add(DATA[: 1 << 20])
        assert hashlib.sha256(DATA[: 1 << 20] * (number + 1)).digest() == await hasher.digest()
        # Around the time for which the thread stays, which is real time.
        threading.Event().wait(0.015 + number / 3000)


def test_many_get_less_and_never_less_than_the_least() -> None:
    """Two chunks of everybody fit into the total, unless that leaves less than the least for each."""
    sharing = BufferShare()
    assert (False, 4 << 20) == (sharing.busy, sharing.part(4 << 20))
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(sharing.joined())
        assert (True, TOTAL // 10) == (sharing.busy, sharing.part(4 << 20))
        assert 64 << 10 == sharing.part(64 << 10)
        for _ in range(59):
            stack.enter_context(sharing.joined())
        assert TOTAL // 128 < LEAST == sharing.part(4 << 20)
    assert not sharing.busy
