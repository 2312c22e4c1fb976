"""What a successor rebuilds of what it was left, and what it cannot: a judgement, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vfiouser_oob.persist.journal.layout import Key
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.descriptors import DescriptorKind
from vfiouser_oob.persist.successor.things import THINGS, Thing

_BY_KIND: Mapping[int, type[Thing]] = MappingProxyType({thing.KIND: thing for thing in THINGS})


@dataclass(frozen=True, slots=True)
class CannotRebuild:
    """Something that cannot be rebuilt.

    Args:
        kind: of record.
        key: which one.
        reason: why not, for people.
        thing: what it was; None if that cannot be read.
    """

    kind: int
    key: Key
    reason: str
    thing: Thing | None = None

    def __str__(self) -> str:
        known = _BY_KIND.get(self.kind)
        what = f"record of kind {self.kind}" if known is None else known.__name__.removesuffix("Thing").lower()
        return f"{what} {self.key.hex()}: {self.reason}".replace(" :", ":")


def rebuild(
    records: Mapping[int, Mapping[Key, bytes]], descriptors: Mapping[str, DescriptorKind]
) -> list[Thing | CannotRebuild]:
    """Judge what was left behind.

    Args:
        records: what the journal says.
        descriptors: what was kept, by name.

    Returns:
        What is to be rebuilt, in the order in which that is possible, and what is not; nothing is left out.
    """
    order = [thing.KIND for thing in THINGS]
    strange = sorted(kind for kind in records if kind not in _BY_KIND)
    return [
        _judged(kind, key, value, descriptors)
        for kind in (*order, *strange)
        for key, value in sorted(records.get(kind, {}).items())
    ]


def _judged(kind: int, key: Key, value: bytes, descriptors: Mapping[str, DescriptorKind]) -> Thing | CannotRebuild:
    known = _BY_KIND.get(kind)
    if known is None:
        return CannotRebuild(kind, key, "this version of the program does not know that kind of record")
    try:
        thing = known.from_record(value)
    except UnusableRecord as error:
        return CannotRebuild(kind, key, str(error))
    if thing.key != key:
        return CannotRebuild(kind, key, "it is damaged: it names another record as itself", thing)
    reason = next(_obstacles(thing, descriptors), None)
    return thing if reason is None else CannotRebuild(kind, key, reason, thing)


def _obstacles(thing: Thing, descriptors: Mapping[str, DescriptorKind]) -> Iterator[str]:
    for field, wanted in thing.DESCRIPTORS.items():
        name = getattr(thing, field)
        if name is None:
            continue
        found = descriptors.get(name)
        if found is None:
            yield f"its {field} {name!r} was not kept"
        elif found is not wanted:
            yield f"its {field} {name!r} is {found.value}, it has to be {wanted.value}"


def unused(things: list[Thing | CannotRebuild], descriptors: Mapping[str, DescriptorKind]) -> set[str]:
    """Kept descriptors that nothing that is rebuilt needs, to be given up.

    Args:
        things: what `rebuild` said.
        descriptors: what was kept, by name.
    """
    used = {getattr(thing, field) for thing in things if isinstance(thing, Thing) for field in thing.DESCRIPTORS}
    return set(descriptors) - used
