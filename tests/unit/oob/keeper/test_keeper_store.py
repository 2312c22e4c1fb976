"""What a keeper makes of messages: kept, released, passed on, refused; and nothing else, whatever comes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.keeper.store import FORWARDED, MAX_MESSAGE, NO_NAME, KeeperLimits, Store


def names(store: Store[int]) -> list[tuple[str, int, bool]]:
    """What is kept."""
    return [(kept.name, kept.handle, kept.watched) for kept in store]


def test_descriptors_are_kept_in_order_and_removed_by_name() -> None:
    """As sd_notify(3) says: several under one name, the default name, and FDPOLL."""
    store: Store[int] = Store(KeeperLimits())
    assert () == store.take(b"FDSTORE=1\nFDNAME=a\nFDPOLL=0", [1]).released
    assert () == store.take(b"FDSTORE=1", [2, 3]).released
    assert () == store.take(b"FDSTORE=1\nFDNAME=a\n", [4]).released
    assert [("a", 1, False), (NO_NAME, 2, True), (NO_NAME, 3, True), ("a", 4, True)] == names(store)
    assert (9, 1, 4) == store.take(b"FDSTOREREMOVE=1\nFDNAME=a", [9]).released
    assert () == store.take(b"FDSTOREREMOVE=1\nFDNAME=never", []).released
    assert (2, 3) == store.take(b"FDSTOREREMOVE=1", []).released
    assert not len(store)


def test_a_barrier_is_released() -> None:
    """Its descriptor is given up at once, which is what the sender waits for."""
    store: Store[int] = Store(KeeperLimits())
    assert (7,) == store.take(b"BARRIER=1", [7]).released
    assert (7, 8) == store.take(b"STATUS=x", [7, 8]).released


def test_what_is_meant_for_others_is_passed_on() -> None:
    """States go to the manager above; what only a keeper understands does not."""
    store: Store[int] = Store(KeeperLimits())
    outcome = store.take(b"READY=1\nSTATUS=a=b\nMAINPID=1\nX_OWN=2\nFDSTORE=1\nFDNAME=a", [1])
    assert {"READY": "1", "STATUS": "a=b"} == outcome.forwarded
    assert [("a", 1, True)] == names(store)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"x" * (MAX_MESSAGE + 1), "more than 4096 bytes"),
        (b"FDSTORE=1\nFDNAME=\xff", "not made of lines"),
        (b"FDSTORE=1\nrubbish", "not made of lines"),
        (b"=1", "not made of lines"),
        (b"FDSTORE=1\nFDNAME=", "'' as the name"),
        (b"FDSTORE=1\nFDNAME=a:b", "'a:b' as the name"),
        (b"FDSTORE=1\nFDNAME=" + b"x" * 256, "as the name"),
        (b"FDSTORE=1\nFDNAME=\x1b[2J", "as the name"),
    ],
)
def test_nonsense_is_refused_in_words(message: bytes, words: str) -> None:
    """Nothing is kept of it, and what came with it is released."""
    store: Store[int] = Store(KeeperLimits())
    outcome = store.take(message, [1, 2])
    assert words in str(outcome.refused)
    assert (1, 2) == outcome.released
    assert not len(store)


def test_limits_hold() -> None:
    """One more than fits is refused, all of it; room that was given up can be used again."""
    store: Store[int] = Store(KeeperLimits(descriptors=3, names_size=8))
    assert store.take(b"FDSTORE=1\nFDNAME=a", [1, 2]).refused is None
    assert "more than 3 descriptors" == store.take(b"FDSTORE=1\nFDNAME=b", [3, 4]).refused
    assert "more than 8 bytes of names" == store.take(b"FDSTORE=1\nFDNAME=long", [3]).refused
    assert store.take(b"FDSTOREREMOVE=1\nFDNAME=a", []).refused is None
    assert store.take(b"FDSTORE=1\nFDNAME=longer7", [5]).refused is None
    assert (5,) == store.release(tuple(store))
    assert store.take(b"FDSTORE=1\nFDNAME=longer7", [6]).refused is None


lines = st.sampled_from(
    [
        b"FDSTORE=1",
        b"FDSTOREREMOVE=1",
        b"FDNAME=a",
        b"FDNAME=b",
        b"FDNAME=:",
        b"FDPOLL=0",
        b"BARRIER=1",
        b"READY=1",
        b"x",
    ]
)
messages = st.lists(lines, max_size=5).map(b"\n".join) | st.binary(max_size=30)


@given(st.lists(st.tuples(messages, st.integers(0, 4)), max_size=30))
def test_every_descriptor_is_kept_or_released_once(sent: list[tuple[bytes, int]]) -> None:
    """Over any messages: none is lost, none is closed twice, none is kept and closed, and limits hold."""
    store: Store[int] = Store(KeeperLimits(descriptors=6, names_size=40))
    came: list[int] = []
    released: Counter[int] = Counter()
    for message, count in sent:
        handles = list(range(len(came), len(came) + count))
        came += handles
        outcome = store.take(message, handles)
        released.update(outcome.released)
        assert set(outcome.forwarded) <= FORWARDED
        assert len(store) <= 6
    kept = [handle for _, handle, _ in names(store)]
    assert sorted([*kept, *released.elements()]) == came
