"""What a new configuration changes, unit by unit, and how that is carried out.

The difference is a value that is made without touching anything. Carrying it out takes one unit after the other, and
what goes wrong with one is the outcome of that one. A unit that is in use is not taken from its user: it takes no new
one, and is changed or removed as soon as that one has gone.

Rule 1: a unit that the file does not name and never named (one that was added by a command) stays.
Rule 2: a unit that failed is tried again, also if nothing changed.
Rule 3: one whose table cannot be used stays as it is if it lives; else it is a failed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import trio

from vfiouser_oob.config.tables import SpoiledTable
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.server.registry import Registry, Units, settle
from vfiouser_oob.server.unit import Origin, Unit, UnitConfig, UnitFailure, UnitHangs, UnitKind, changed_keys


class ReloadStep(StrEnum):
    """What becomes of a unit."""

    REMOVE = "remove"
    ADAPT = "adapt"
    REPLACE = "replace"
    RETRY = "retry"
    SPOILED = "spoiled"
    ADD = "add"


@dataclass(frozen=True, slots=True)
class Change:
    """One unit's part of the difference.

    Args:
        step: what becomes of it.
        kind: what it is.
        name: its name.
        config: what it is to be; None if it is to go, or cannot be read.
        keys: which keys differ.
        reason: why its table cannot be used.
    """

    step: ReloadStep
    kind: UnitKind
    name: str
    config: UnitConfig | None = None
    keys: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ChangeOutcome:
    """What came of one.

    Args:
        kind: the kind of unit, in a word.
        name: its name.
        step: what was to become of it.
        keys: which keys differ.
        state: `done`, `waiting` or `failed`.
        detail: why it failed, or whom it waits for.
    """

    kind: str
    name: str
    step: str
    keys: tuple[str, ...]
    state: str = "done"
    detail: str = ""


def difference(
    units: Units, wanted: Mapping[UnitKind, Sequence[UnitConfig]], spoiled: Sequence[SpoiledTable] = ()
) -> list[Change]:
    """Compare what there is with what is wanted; in the order in which it is best carried out.

    Args:
        units: what there is.
        wanted: what the file wants, by kind.
        spoiled: tables of the file that cannot be used.
    """
    unreadable = {(table.header, table.name): table.reason for table in spoiled}
    changes: list[Change] = []
    for kind in units.kinds:
        configs = {config.name: config for config in wanted.get(kind, ())}
        there = {unit.name: unit for unit in units.of(kind)}
        for unit in there.values():
            reason = unreadable.get((kind.header, unit.name))
            changes += _of_unit(unit, configs.get(unit.name), reason)
        for name, config in configs.items():
            if name not in there:
                changes.append(Change(ReloadStep.ADD, kind, name, config))
        for (header, name), reason in unreadable.items():
            if header == kind.header and name not in there:
                changes.append(Change(ReloadStep.SPOILED, kind, name, None, (), reason))
    # What goes does so in the opposite order of what comes.
    rank = {kind: number for number, kind in enumerate(units.kinds)}
    steps = list(ReloadStep)
    return sorted(
        changes,
        key=lambda change: (
            steps.index(change.step),
            rank[change.kind] * (-1 if change.step is ReloadStep.REMOVE else 1),
        ),
    )


def _of_unit(unit: Unit, config: UnitConfig | None, reason: str | None) -> Iterator[Change]:
    if reason is not None:
        yield Change(ReloadStep.SPOILED, unit.kind, unit.name, None, (), reason)
    elif config is None:
        if unit.origin is Origin.FILE:
            yield Change(ReloadStep.REMOVE, unit.kind, unit.name)
    elif unit.config is None or unit.failed is not None:
        yield Change(ReloadStep.RETRY, unit.kind, unit.name, config)
    elif differing := changed_keys(unit.config, config):
        step = ReloadStep.ADAPT if set(differing) <= set(unit.kind.live_keys) else ReloadStep.REPLACE
        yield Change(step, unit.kind, unit.name, config, differing)


class Reloading:
    """Carries a difference out. To be used with the registry's `changing` held.

    Args:
        registry: the units.
        nursery: where changes wait for users to go.
        force: turn users out, instead of waiting for them.
        log: where it is told what came of a change that waited.
    """

    def __init__(self, registry: Registry, nursery: trio.Nursery, force: bool, log: Logger) -> None:
        self._registry = registry
        self._units = registry.units
        self._nursery = nursery
        self._force = force
        self._log = log

    async def apply(
        self, changes: Sequence[Change], wanted: Mapping[UnitKind, Sequence[UnitConfig]]
    ) -> list[ChangeOutcome]:
        """Carry changes out, one after the other.

        Args:
            changes: from `difference`, made just now.
            wanted: what the file wants; it owns those from now on.

        Returns:
            What came of each, in the same order.
        """
        named = {(kind, config.name) for kind, configs in wanted.items() for config in configs}
        for unit in self._units:
            settle(unit)
            if (unit.kind, unit.name) in named:
                unit.origin = Origin.FILE
        outcomes = {id(change): await self._apply(change) for change in changes}
        # Two that exchanged their sockets, say: the first one could not have what the second one still had.
        for number, change in enumerate(changes, 1):
            helped = any(outcomes[id(later)].state == "done" for later in changes[number:])
            if helped and outcomes[id(change)].state == "failed" and change.config is not None:
                outcomes[id(change)] = await self._apply(change)
        return [outcomes[id(change)] for change in changes]

    async def _apply(self, change: Change) -> ChangeOutcome:
        unit = self._units.find(change.name, change.kind)
        if (
            unit is not None
            and change.step in (ReloadStep.REMOVE, ReloadStep.REPLACE)
            and unit.user is not None
            and not self._force
        ):
            return self._wait(unit, change)
        return await self._carry_out(unit, change)

    def _wait(self, unit: Unit, change: Change) -> ChangeOutcome:
        """Leave a unit to its user, and change it when that one has gone."""
        assert unit.life is not None
        unit.life.drain()
        unit.waiting = trio.CancelScope()
        self._nursery.start_soon(self._change_when_free, unit, change, unit.waiting)
        return _outcome(change, "waiting", f"until {unit.user} leaves")

    async def _change_when_free(self, unit: Unit, change: Change, waiting: trio.CancelScope) -> None:
        with waiting:
            assert unit.life is not None
            await unit.life.vacated()
            await self._registry.changing.acquire()
        if waiting.cancelled_caught:
            return
        try:
            if unit.waiting is waiting:
                unit.waiting = None
                outcome = await self._carry_out(unit, change)
                self._log.info("a pending change is made", function=unit.name, step=change.step, state=outcome.state)
        finally:
            self._registry.changing.release()

    async def _carry_out(self, unit: Unit | None, change: Change) -> ChangeOutcome:
        if change.step is ReloadStep.SPOILED:
            return self._note_spoiled(unit, change)
        if unit is None:
            unit = Unit(change.kind, change.name, change.config)
            self._units.put(unit)
        if change.config is None:
            return await self._remove(unit, change)
        unit.config = change.config
        if change.step is ReloadStep.ADAPT and unit.life is not None:
            unit.life.adopt(change.config)
            return _outcome(change)
        try:
            await self._registry.end(unit)
        except UnitHangs as hangs:
            return _outcome(change, "failed", str(hangs))
        errors = await self._registry.bring(unit)
        if errors:
            return _outcome(change, "failed", unit.failed or "")
        if unit.drained and unit.life is not None:
            unit.life.drain()
        return _outcome(change)

    async def _remove(self, unit: Unit, change: Change) -> ChangeOutcome:
        try:
            await self._registry.end(unit)
        except UnitHangs as hangs:
            return _outcome(change, "failed", str(hangs))
        self._units.drop(unit)
        return _outcome(change)

    def _note_spoiled(self, unit: Unit | None, change: Change) -> ChangeOutcome:
        if unit is None:
            unit = Unit(change.kind, change.name, None)
            self._units.put(unit)
        if unit.life is not None:
            return _outcome(change, "failed", f"stays as it is: {change.reason}")
        unit.failure = UnitFailure(change.reason)
        return _outcome(change, "failed", change.reason)


def _outcome(change: Change, state: str = "done", detail: str = "") -> ChangeOutcome:
    return ChangeOutcome(change.kind.word, change.name, change.step.value, change.keys, state, detail)
