"""Guests that run scenarios beside each other: each keeps one processor busy, and waits for nothing but itself."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import trio

from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.vfioguest import Answers, Boot, run_scenarios, scenarios_of

__all__ = ["AT_A_TIME", "Boots"]

#: Guests that run at a time: as many as the smallest machine that the suite is for has processors.
AT_A_TIME = 2


class Boots:
    """A context manager, in which the boots are carried out in order, `AT_A_TIME` of them at a time.

    Args:
        assets: the bed's assets.
        boots: those that will be asked for, the longest first.
    """

    def __init__(self, assets: Assets, boots: Sequence[Boot]) -> None:
        self._assets = assets
        self._answers: dict[Boot, Future[Answers]] = {boot: Future() for boot in boots}
        self._scope = trio.CancelScope()
        self._token: Future[trio.lowlevel.TrioToken] = Future()
        self._thread = threading.Thread(target=trio.run, args=(self._run_all,), name="boots")

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End those that still run: nobody will ask for them."""
        try:
            self._token.result().run_sync_soon(self._scope.cancel)
        except trio.RunFinishedError:
            pass
        self._thread.join()

    def answers(self, boot: Boot) -> Answers:
        """Wait for what a boot's scenarios said; one that was not foreseen is carried out now."""
        if boot not in self._answers:
            return run_scenarios(self._assets, boot)
        return self._answers[boot].result()

    async def _run_all(self) -> None:
        self._token.set_result(trio.lowlevel.current_trio_token())
        limiter = trio.CapacityLimiter(AT_A_TIME)
        with self._scope:
            async with trio.open_nursery() as nursery:
                for boot in self._answers:
                    await limiter.acquire_on_behalf_of(boot)
                    nursery.start_soon(self._run, boot, limiter)
        for future in self._answers.values():
            if not future.done():
                future.set_exception(BedError("the tests ended before this guest did"))

    async def _run(self, boot: Boot, limiter: trio.CapacityLimiter) -> None:
        try:
            self._answers[boot].set_result(await scenarios_of(self._assets, boot))
        except Exception as error:  # noqa: BLE001  whoever asks for the answers gets it
            self._answers[boot].set_exception(error)
        finally:
            limiter.release_on_behalf_of(boot)
