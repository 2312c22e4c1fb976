"""What an administrator can do with a running daemon: have units come, go and change, and choose what is logged."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import trio

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.load import check_unique, parse_functions
from vfiouser_oob.config.schema import DaemonConfig, FunctionConfig, LogLevel
from vfiouser_oob.config.tables import keys
from vfiouser_oob.observability import levels, log
from vfiouser_oob.server.containment import Contained
from vfiouser_oob.server.life import Life
from vfiouser_oob.server.registry import Registry, reason_of
from vfiouser_oob.server.reload import ChangeOutcome, Reloading, difference
from vfiouser_oob.server.unit import Unit, UnitHangs

#: Seconds that reading the configuration may take: a network file system or a FIFO may never answer.
READ_S = 10.0
#: Keys of `[daemon]` that count at once; the others take a restart.
_LIVE = frozenset({"log_level", "admin_uids"})

#: Reads the configuration again; it may block, and raises ConfigError.
Reread: TypeAlias = Callable[[], DaemonConfig]


class ChangeRefused(Exception):
    """Something that was asked for is not done; the text says why and what would help."""


@dataclass(frozen=True, slots=True)
class Rights:
    """Who may do what by the control socket.

    Args:
        admins: users that may change things.
        readers: groups whose members may ask.
    """

    admins: frozenset[int]
    readers: frozenset[int] = frozenset()


class Administration:
    """Changes a running daemon.

    Args:
        registry: its units.
        config: as it was started.
        reread: reads the configuration again; None if it did not come from a file.
        nursery: where changes wait for users to go.
        reader_groups: groups whose members may ask by the control socket.
    """

    def __init__(
        self,
        registry: Registry,
        config: DaemonConfig,
        reread: Reread | None,
        nursery: trio.Nursery,
        reader_groups: frozenset[int] = frozenset(),
    ) -> None:
        self.config = config
        self._registry = registry
        self._reread = reread
        self._nursery = nursery
        self._reader_groups = reader_groups
        self._log = log.get("daemon")

    @property
    def rights(self) -> Rights:
        """Who may do what now."""
        return Rights(frozenset({0, os.geteuid(), *self.config.admin_uids}), self._reader_groups)

    # Coming and going

    async def add(self, toml: str, source: str) -> list[dict[str, Any]]:
        """Add functions that no file of ours knows of.

        Args:
            toml: their tables.
            source: their origin, for messages.

        Returns:
            What came of each.

        Raises:
            ConfigError: the text cannot be used; nothing was added.
            ChangeRefused: one of them is there already, or uses another one's socket; nothing was added.
        """
        configs = parse_functions(toml, source)
        self._require_free(configs)
        return [asdict(await self._add(config)) for config in configs]

    def _require_free(self, configs: Sequence[FunctionConfig]) -> None:
        there = [unit.config for unit in self._registry.units if isinstance(unit.config, FunctionConfig)]
        for config in configs:
            if self._registry.units.find(config.name, self._registry.units.kinds[0]) is not None:
                raise ChangeRefused(f"function {config.name!r} exists already; `remove` it first, or `reload`")
        try:
            check_unique(replace(self.config, functions=(*there, *configs), source=None, spoiled=()))
        except ConfigError as error:
            raise ChangeRefused(error.message) from None

    async def _add(self, config: FunctionConfig) -> ChangeOutcome:
        # Whatever is wrong with it is told to who wanted it.
        with Contained() as outcome:
            await self._registry.add(config)
        if outcome.error is not None:
            reason = reason_of(outcome.taken())
            return ChangeOutcome("function", config.name, "add", (), "failed", reason)
        self._log.info("function added", function=config.name)
        return ChangeOutcome("function", config.name, "add", ())

    async def remove(self, name: str, force: bool) -> dict[str, Any]:
        """Remove a unit.

        Args:
            name: which.
            force: turn its user out.

        Returns:
            Its name, and who was turned out.

        Raises:
            ChangeRefused: there is none of that name, or it is in use.
        """
        unit = self._find(name)
        user = unit.user
        if user is not None and not force:
            raise ChangeRefused(f"{name} is in use by {user}; `drain {name}` waits for its end, `--force` ends it now")
        try:
            await self._registry.remove(name, unit.kind)
        except KeyError:
            raise ChangeRefused(f"{name} has just been removed") from None
        except UnitHangs as hangs:
            raise ChangeRefused(f"{name}: {hangs}") from None
        self._log.info(f"{unit.kind.word} removed", function=name, turned_out=user)
        return {"name": name, "turned_out": user}

    async def drain(self, name: str, undo: bool) -> dict[str, Any]:
        """Let a unit take no new user, and wait until the one that it has is gone.

        Args:
            name: which.
            undo: let it take users again, instead.

        Returns:
            Its name, and whether it is drained.

        Raises:
            ChangeRefused: there is none of that name, it does not work, or it went or was opened again meanwhile.
        """
        unit = self._find(name)
        unit.drained = not undo
        if unit.life is None or unit.failed is not None:
            raise ChangeRefused(f"{name} has failed, so it has no client: {unit.failed}")
        life = unit.life
        if undo:
            if unit.waiting is None:
                life.reopen()
            return {"name": name, "drained": False}
        life.drain()
        self._log.info(f"{unit.kind.word} accepts no new client", function=name, used_by=unit.user)
        await life.vacated()
        if not unit.drained:
            raise ChangeRefused(f"{name} was opened again before its client left")
        return {"name": name, "drained": True}

    async def disconnect(self, name: str) -> dict[str, Any]:
        """Turn the client of a function out, and wait until it is gone.

        Args:
            name: which.

        Returns:
            Its name, and who was turned out.

        Raises:
            ChangeRefused: there is none of that name, or it has no client.
        """
        life = self._find(name).life
        user = life.function.disconnect() if isinstance(life, Life) else None
        if user is None or life is None:
            raise ChangeRefused(f"{name} has no client")
        await life.vacated()
        return {"name": name, "turned_out": user}

    # Configuration

    async def reload(self, force: bool) -> dict[str, Any]:
        """Read the configuration again and make what it says true, unit by unit.

        Args:
            force: turn users of units that are to change out, instead of waiting for them.

        Returns:
            `changes`: what came of each; `applied`, `restart`: keys of `[daemon]` that changed and count now, or take a
            restart.

        Raises:
            ChangeRefused: there is no file, or it cannot be read or used; nothing was changed.
        """
        async with self._registry.changing:
            config = await self._read_again()
            applied, restart = self._adopt(config)
            wanted = {kind: kind.of(config) for kind in self._registry.units.kinds}
            changes = difference(self._registry.units, wanted, config.spoiled)
            reloading = Reloading(self._registry, self._nursery, force, self._log)
            outcomes = await reloading.apply(changes, wanted)
        for outcome in outcomes:
            write = self._log.error if outcome.state == "failed" else self._log.info
            told = {"keys": ",".join(outcome.keys), "detail": outcome.detail}
            shown = {key: value for key, value in told.items() if value}
            write("reload", function=outcome.name, step=outcome.step, state=outcome.state, **shown)
        self._log.info("reloaded", changes=len(outcomes), applied=",".join(applied), takes_restart=",".join(restart))
        return {"changes": [asdict(outcome) for outcome in outcomes], "applied": applied, "restart": restart}

    async def _read_again(self) -> DaemonConfig:
        if self._reread is None:
            raise ChangeRefused("the daemon was started without a configuration file; it has nothing to reload")
        try:
            with trio.fail_after(READ_S):
                return await trio.to_thread.run_sync(self._reread, abandon_on_cancel=True)
        except ConfigError as error:
            raise ChangeRefused(f"nothing is changed: {error}") from None
        except trio.TooSlowError:
            raise ChangeRefused(f"nothing is changed: reading the configuration took more than {READ_S:g} s") from None

    def _adopt(self, config: DaemonConfig) -> tuple[list[str], list[str]]:
        """Take over what counts at once; the rest stays what it is until a restart."""
        changed = [name for name in keys(DaemonConfig) if getattr(self.config, name) != getattr(config, name)]
        live = {name: getattr(config, name) for name in changed if name in _LIVE}
        self.config = replace(self.config, **live, functions=config.functions, vms=config.vms, spoiled=config.spoiled)
        if "log_level" in live:
            self._choose_level(config.log_level)
        return sorted(live), sorted(set(changed) - live.keys())

    def set_log_level(self, level: LogLevel, function: str | None) -> dict[str, Any]:
        """Choose the least important log records to write.

        Args:
            level: it.
            function: of which function; None for the whole daemon but for functions with a level of their own.

        Returns:
            What counts now.

        Raises:
            ChangeRefused: there is no such function.
        """
        if function is None:
            self._choose_level(level)
        else:
            life = self._find(function).life
            levels.choose(function, level)
            if isinstance(life, Life):
                life.function.level_changed()
        self._log.info("log level set", level=level.value, **({} if function is None else {"function": function}))
        return {"level": level.value, "function": function}

    def _choose_level(self, level: LogLevel) -> None:
        log.set_level(level)
        for unit in self._registry.units:
            if isinstance(unit.life, Life):
                unit.life.function.level_changed()

    def _find(self, name: str) -> Unit:
        unit = self._registry.units.find(name)
        if unit is None:
            raise ChangeRefused(f"there is no function {name!r}; `vfiouser-oob status` lists them")
        return unit
