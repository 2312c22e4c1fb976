"""A journal that processes write until they are killed: what they do is known beforehand, step by step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from vfiouser_oob.persist.journal.journal import Journal

Model = dict[int, dict[bytes, bytes]]


def plain(records: Mapping[int, Mapping[bytes, bytes]]) -> Model:
    """Records as a plain dict, kinds without any left out."""
    return {kind: dict(each) for kind, each in records.items() if each}


def steps(seed: int) -> Iterator[tuple[str, int, bytes, bytes]]:
    """Changes without end, the same for the same seed: method of the journal, kind, key, value."""
    chance = random.Random(seed)
    while True:
        what = chance.choices(("put", "drop", "forget"), (30, 10, 0.1))[0]
        key = chance.randrange(400).to_bytes(2, "big")
        yield what, chance.randrange(3), key, chance.randbytes(chance.choice((0, 8, 40, 40, 2000)))


def change(target: Journal | Model, what: str, kind: int, key: bytes, value: bytes) -> None:
    """Carry out one change on a journal or on its model."""
    if isinstance(target, Journal):
        arguments = {"put": (kind, key, value), "drop": (kind, key), "forget": (kind,)}[what]
        getattr(target, what)(*arguments)
    elif what == "put":
        target.setdefault(kind, {})[key] = value
    elif what == "drop":
        target.get(kind, {}).pop(key, None)
    else:
        target.pop(kind, None)
