"""Tests of commands that a signal ends."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from vfiouser_oob.cli.interruptible import run_interruptible


def test_result() -> None:
    """What the work returns is returned, also when it is None."""

    async def work(value: int | None) -> int | None:
        await trio.lowlevel.checkpoint()
        return value

    assert 5 == run_interruptible(work, 5)
    assert run_interruptible(work, None) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal(number: signal.Signals) -> None:
    """A signal cancels the work, which cleans up, and is told as an interrupt."""
    steps = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        run_interruptible(work)
    assert ["cleaned up"] == steps


def test_error() -> None:
    """An error of the work leaves it as it is."""

    async def work() -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there"):
        run_interruptible(work)
