"""The processors of a VM, as far as a migration is concerned: they can be stopped and go on."""

from __future__ import annotations

from types import TracebackType

import trio


class _Running:
    """What the guest does in one go; a block of this waits while the processors are stopped."""

    def __init__(self) -> None:
        self.inside = 0
        self.may_enter = trio.Event()
        self.may_enter.set()
        self.left = trio.Event()

    async def __aenter__(self) -> None:
        while not self.may_enter.is_set():
            await self.may_enter.wait()
        self.inside += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside -= 1
        if not self.inside:
            self.left.set()


class Processors:
    """Every step in which the guest touches its memory or its device is a block ``async with running``.

    Steps must not contain one another.
    """

    def __init__(self) -> None:
        self.running = _Running()

    @property
    def stopped(self) -> bool:
        """Whether no step may begin."""
        return not self.running.may_enter.is_set()

    async def stop(self) -> None:
        """Let no step begin; returns when none is under way."""
        self.running.may_enter = trio.Event()
        while self.running.inside:
            self.running.left = trio.Event()
            await self.running.left.wait()

    def go(self) -> None:
        """Let steps begin again."""
        self.running.may_enter.set()
