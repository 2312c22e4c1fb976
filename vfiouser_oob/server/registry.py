"""The functions of a daemon: which there are, and the coming and going of each, also while others serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import trio

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import FunctionConfig
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.life import Life
from vfiouser_oob.server.opening import SharedParts, open_function


class Registry:
    """All functions of a running daemon, by name.

    Args:
        opened: lives that are to be started.
        means: what functions share.
        nursery: where they live; as long as it is open functions may come.
        exhausted: called when no client can reach any of them any more.
    """

    def __init__(
        self, opened: Iterable[Life], means: SharedParts, nursery: trio.Nursery, exhausted: Callable[[], None]
    ) -> None:
        self._lives = {life.name: life for life in opened}
        self._means = means
        self._nursery = nursery
        self._exhausted = exhausted

    def __iter__(self) -> Iterator[Life]:
        return iter(self._lives.values())

    @property
    def functions(self) -> list[Function]:
        """The functions, in the order in which they came."""
        return [life.function for life in self]

    async def start(self) -> None:
        """Start what was opened; returns when clients can connect everywhere."""
        async with trio.open_nursery() as starting:
            for life in self:
                starting.start_soon(self._start, life)

    async def _start(self, life: Life) -> None:
        await self._nursery.start(life.run, self._note_exhausted)

    def _note_exhausted(self) -> None:
        if all(life.exhausted for life in self):
            self._exhausted()

    async def add(self, config: FunctionConfig) -> Life:
        """Open and start one more function.

        Args:
            config: what it is.

        Returns:
            Its handle; clients can connect.

        Raises:
            ConfigError: there is one of this name, or its device or agent cannot be used.
            ListenError: its socket cannot be listened on.
        """
        if config.name in self._lives:
            raise ConfigError(f"there is a function {config.name!r} already")
        life = self._lives[config.name] = open_function(config, (), self._means)
        try:
            await self._start(life)
        except BaseException:
            del self._lives[config.name]
            life.close()
            raise
        return life

    async def remove(self, name: str) -> None:
        """Stop a function and wait until nothing of it is left.

        Args:
            name: which.

        Raises:
            KeyError: there is none of this name.
        """
        life = self._lives[name]
        life.stop()
        await life.ended.wait()
        del self._lives[name]

    async def leave(self) -> None:
        """Leave all clients to the daemon after this one, where that is possible."""
        async with trio.open_nursery() as leaving:
            for life in self:
                leaving.start_soon(life.leave)

    async def stop(self) -> None:
        """Stop all functions, side by side, and wait until nothing of them is left."""
        for life in self:
            life.stop()
        for life in self:
            await life.ended.wait()
