"""What is being done for one QEMU: tasks that end with it, and one lane for each function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import trio

Work = Callable[..., Awaitable[object]]


class QemuJobs:
    """Tasks that nobody waits for, until they are left all at once.

    Args:
        nursery: where they run.
        names: the functions'; what is done to one of them is done in order.
    """

    def __init__(self, nursery: trio.Nursery, names: Iterable[str]) -> None:
        self._nursery = nursery
        self._names = tuple(names)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self._lanes = {name: trio.Lock() for name in self._names}

    def begin(self, work: Work, *args: Any) -> trio.CancelScope:
        """Begin a task; returns what cancels it.

        Args:
            work: what is done.
            args: for it.
        """
        scope = trio.CancelScope()
        self._scopes.add(scope)
        self._nursery.start_soon(self._run, scope, self._scopes, work, args)
        return scope

    def begin_in_lane(self, name: str, work: Work, *args: Any) -> None:
        """Begin a task when all that was begun before for a function is done."""
        self.begin(self._in_lane, self._lanes[name], work, args)

    async def _run(
        self, scope: trio.CancelScope, scopes: set[trio.CancelScope], work: Work, args: tuple[Any, ...]
    ) -> None:
        try:
            with scope:
                await work(*args)
        finally:
            scopes.discard(scope)

    async def _in_lane(self, lane: trio.Lock, work: Work, args: tuple[Any, ...]) -> None:
        async with lane:
            await work(*args)

    def leave(self) -> None:
        """Give all of them up; what is begun from now on does not wait for them."""
        for scope in tuple(self._scopes):
            scope.cancel()
        self._begin_anew()
