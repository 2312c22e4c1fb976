"""The units of a daemon: which there are, and the coming and going of each, also while others serve.

Changes are made one at a time, in the order in which they were asked for. Each is about one unit, and costs no other
one anything; a unit that cannot be opened stays here as a failed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import trio

from vfiouser_agents.causes import words_of
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import FunctionConfig, VmConfig
from vfiouser_oob.config.tables import SpoiledTable
from vfiouser_oob.observability import log
from vfiouser_oob.server.containment import Contained, root_cause
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.life import Life
from vfiouser_oob.server.unit import Origin, Unit, UnitConfig, UnitFailure, UnitHangs, UnitKind

#: Finds a function by its name; None if it is not served.
FindFunction: TypeAlias = Callable[[str], Function | None]

_LOG = log.get("daemon")
#: Seconds after which a unit that was stopped is not waited for any more: a call into the kernel may never return.
END_S = 60.0


class Units:
    """All units of a daemon, by kind and name, opened or failed; none of them runs yet.

    Args:
        kinds: the kinds that there are, in the order in which units are started; they end in the opposite one.
    """

    def __init__(self, kinds: Sequence[UnitKind]) -> None:
        self.kinds = list(kinds)
        self._units: dict[tuple[str, str], Unit] = {}

    def __iter__(self) -> Iterator[Unit]:
        return iter(tuple(self._units.values()))

    def __len__(self) -> int:
        return len(self._units)

    def of(self, kind: UnitKind) -> list[Unit]:
        """Those of one kind, in the order in which they came."""
        return [unit for unit in self if unit.kind is kind]

    def configured(self) -> list[FunctionConfig]:
        """The functions as they are configured, of all that can be read."""
        return [unit.config for unit in self if isinstance(unit.config, FunctionConfig)]

    def configured_vms(self) -> list[VmConfig]:
        """The VMs as they are configured, of all that can be read."""
        return [unit.config for unit in self if isinstance(unit.config, VmConfig)]

    def find(self, name: str, kind: UnitKind | None = None) -> Unit | None:
        """The unit of a name; without a kind, of the first kind that has one."""
        kinds = self.kinds if kind is None else [kind]
        return next((self._units[each.word, name] for each in kinds if (each.word, name) in self._units), None)

    def put(self, unit: Unit) -> None:
        """Take a unit in; the name must be free."""
        assert (unit.kind.word, unit.name) not in self._units
        self._units[unit.kind.word, unit.name] = unit

    def drop(self, unit: Unit) -> None:
        """Forget a unit."""
        del self._units[unit.kind.word, unit.name]

    def open_all(self, kind: UnitKind, configs: Sequence[UnitConfig], spoiled: Sequence[SpoiledTable] = ()) -> None:
        """Open units at the daemon's start.

        Args:
            kind: what they are.
            configs: each one's configuration.
            spoiled: those of the file that cannot even be read; of other kinds as well.

        Raises:
            Exception: they are vital, there are some, and none of them can be had; what the first one said.
        """
        for config in configs:
            self.put(Unit(kind, config.name, config))
        for table in spoiled:
            if table.header == kind.header:
                self.put(Unit(kind, table.name, None, failure=UnitFailure(table.reason)))
                _LOG.error(f"a {kind.word} has an error in its configuration", function=table.name, reason=table.reason)
        errors: list[Exception] = []
        try:
            for unit in self.of(kind):
                if unit.config is not None:
                    errors += open_unit(unit)
            if errors and kind.vital and all(unit.life is None for unit in self.of(kind)):
                raise errors[0]
        finally:
            errors.clear()

    def close(self) -> None:
        """Give back what was opened for those that do not run."""
        for unit in self:
            if unit.life is not None:
                unit.life.close()


def find_function(units: Units, name: str) -> Function | None:
    """The function of that name, if it is served.

    Args:
        units: all units.
        name: which.
    """
    unit = units.find(name, units.kinds[0])
    return unit.life.function if unit is not None and isinstance(unit.life, Life) else None


def open_unit(unit: Unit) -> list[Exception]:
    """Open a unit that does not live.

    Args:
        unit: what to open; if that fails, the reason is noted.

    Returns:
        The error, if there was one.
    """
    assert unit.config is not None
    # Whatever is wrong with one unit costs that one alone.
    with Contained() as outcome:
        unit.life = unit.kind.open(unit.config)
        unit.failure = None
    return [] if outcome.error is None else [note_failure(unit, outcome.taken())]


def reason_of(error: Exception) -> str:
    """What was wrong, for people.

    Args:
        error: what opening a unit raised.
    """
    cause = root_cause(error)
    if isinstance(cause, OSError) and cause.errno:
        return f"{cause.filename}: {words_of(cause)}" if cause.filename else words_of(cause)
    known = isinstance(cause, ConfigError | OSError | ValueError)
    return str(cause) if known and str(cause) else f"{type(cause).__name__}: {cause}"


def note_failure(unit: Unit, error: Exception) -> Exception:
    """Note why a unit cannot be had.

    Returns:
        The first single error.
    """
    cause = root_cause(error)
    assert isinstance(cause, Exception)
    reason = reason_of(cause)
    unit.life = None
    unit.failure = UnitFailure(reason)
    _LOG.error(
        f"cannot provide a {unit.kind.word}; the daemon tries again on reload", function=unit.name, reason=reason
    )
    return cause


class Registry:
    """The units of a running daemon.

    Args:
        units: what was opened.
        nursery: where they live; as long as it is open units may come.
        exhausted: called when nobody can reach any of them any more.
    """

    def __init__(self, units: Units, nursery: trio.Nursery, exhausted: Callable[[], None]) -> None:
        self.units = units
        #: Held while something is changed.
        self.changing = trio.Lock()
        self._nursery = nursery
        self._exhausted = exhausted

    async def start(self) -> None:
        """Start what was opened, kind by kind; returns when users can connect everywhere.

        Raises:
            Exception: no function can be started; what the first one said.
        """
        for kind in self.units.kinds:
            opened = [unit for unit in self.units.of(kind) if unit.life is not None]
            errors: list[Exception] = []
            try:
                async with trio.open_nursery() as starting:
                    for unit in opened:
                        starting.start_soon(self._start_noting, unit, errors)
                if opened and kind.vital and len(errors) == len(opened):
                    raise errors[0]
            finally:
                errors.clear()

    async def _start_noting(self, unit: Unit, errors: list[Exception]) -> None:
        errors += await self.start_unit(unit)

    async def start_unit(self, unit: Unit) -> list[Exception]:
        """Start a unit that was opened.

        Returns:
            The error, if there was one; it is noted.
        """
        assert unit.life is not None
        life = unit.life
        with Contained() as outcome:
            await self._nursery.start(life.run, self._note_exhausted)
        if outcome.error is None:
            return []
        life.close()
        return [note_failure(unit, outcome.taken())]

    def _note_exhausted(self) -> None:
        if all(unit.life is None or unit.life.exhausted for unit in self.units):
            self._exhausted()

    # Coming and going; to be called with `changing` held, but for the first two

    async def add(self, config: UnitConfig, kind: UnitKind | None = None) -> Unit:
        """Open and start one more unit, which no file knows of.

        Args:
            config: how it is configured.
            kind: what it is; None for the first kind.

        Returns:
            It; users can connect.

        Raises:
            ConfigError: there is one of this name, or it cannot be opened as configured.
            Exception: it cannot be opened or started; then there is none.
        """
        async with self.changing:
            kind = kind or self.units.kinds[0]
            if self.units.find(config.name, kind) is not None:
                raise ConfigError(f"there is a {kind.word} {config.name!r} already")
            unit = Unit(kind, config.name, config, Origin.ADDED)
            self.units.put(unit)
            errors: list[Exception] = []
            try:
                errors += await self.bring(unit)
                if errors:
                    raise errors[0]
                return unit
            finally:
                errors.clear()
                if unit.life is None:
                    self.units.drop(unit)

    async def remove(self, name: str, kind: UnitKind | None = None) -> None:
        """Stop a unit and wait until nothing of it is left.

        Args:
            name: which.
            kind: what it is; None for the first kind that has one of that name.

        Raises:
            KeyError: there is none of this name.
            UnitHangs: it does not end.
        """
        async with self.changing:
            unit = self.units.find(name, kind)
            if unit is None:
                raise KeyError(name)
            await self.end(unit)
            self.units.drop(unit)

    async def bring(self, unit: Unit) -> list[Exception]:
        """Open and start a unit that does not live.

        Returns:
            The error, if there was one; it is noted.
        """
        try:
            return open_unit(unit) or await self.start_unit(unit)
        except BaseException:
            if unit.life is not None:
                unit.life.close()
                unit.life = None
            raise

    async def end(self, unit: Unit) -> None:
        """Stop a unit, if it lives, and wait until nothing of it is left.

        Raises:
            UnitHangs: it does not end; that is noted.
        """
        settle(unit)
        if unit.life is None:
            return
        unit.life.stop()
        with trio.move_on_after(END_S):
            await unit.life.ended.wait()
        if not unit.life.ended.is_set():
            unit.failure = UnitFailure(f"it should have ended, but a part of it still hangs after {END_S:g} s")
            raise UnitHangs(unit.failure.reason)
        unit.life = None

    async def leave(self) -> None:
        """Leave the users of all units to the daemon after this one where that is possible, the last kind first."""
        for kind in reversed(self.units.kinds):
            async with trio.open_nursery() as leaving:
                for unit in self.units.of(kind):
                    if unit.life is not None:
                        leaving.start_soon(unit.life.leave)

    async def stop(self) -> None:
        """Stop all units, those of a kind side by side, and wait until nothing of them is left."""
        for kind in reversed(self.units.kinds):
            lives = [unit.life for unit in self.units.of(kind) if unit.life is not None]
            for life in lives:
                life.stop()
            for life in lives:
                await life.ended.wait()


def settle(unit: Unit) -> None:
    """Give up a change that waits for the unit's user to go."""
    if unit.waiting is not None:
        unit.waiting.cancel()
        unit.waiting = None
        if unit.life is not None and not unit.drained:
            unit.life.reopen()
