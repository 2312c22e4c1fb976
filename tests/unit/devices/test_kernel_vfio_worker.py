"""Jobs of a function's worker: their order, and what becomes of those that nobody waits for."""

from __future__ import annotations

import threading

import pytest
import trio

from vfiouser_oob.devices.kernel_vfio.worker import Job, OrderedWorker, explained
from vfiouser_protocol.errors import CommandError


async def test_jobs_run_in_order_and_one_at_a_time() -> None:
    """Each waits for the one before it, whoever asked, and the worker is busy until the last one ended."""
    worker = OrderedWorker()
    done: list[int] = []
    gate = threading.Event()

    def first(job: Job[None]) -> None:
        gate.wait(10)
        done.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        jobs = [worker.submit(Job(first)), worker.submit(Job(lambda job: done.append(2)))]
        assert worker.busy
        gate.set()
        for job in jobs:
            await job
        assert [1, 2] == done
        nursery.cancel_scope.cancel()


async def test_an_abandoned_job_is_undone_before_the_next() -> None:
    """What it achieved is taken back in its turn; a job that had not begun is not begun."""
    worker = OrderedWorker()
    done: list[str] = []
    gate = threading.Event()

    begun = threading.Event()

    def work(job: Job[str]) -> str:
        begun.set()
        gate.wait(10)
        done.append("mapped")
        return "it"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        job = worker.submit(Job(work, lambda it: done.append(f"unmapped {it}"), failed=lambda: done.append("failed")))
        await trio.to_thread.run_sync(begun.wait)
        never = worker.submit(Job(lambda job: done.append("never"), finish=lambda: done.append("finished")))
        for waited in (job, never):
            with trio.CancelScope() as scope:
                scope.cancel()
                await waited
        last = worker.submit(Job(lambda job: done.append("next")))
        gate.set()
        await last
        assert ["failed", "mapped", "unmapped it", "finished", "next"] == done
        nursery.cancel_scope.cancel()


async def test_a_job_that_is_over_gives_its_result_even_when_cancelled() -> None:
    """Nobody would undo it any more, so the caller has to learn of it."""
    worker = OrderedWorker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        job = worker.submit(Job(lambda job: 7, lambda it: pytest.fail("it was undone")))
        await worker.submit(Job(lambda job: None))
        with trio.CancelScope() as scope:
            scope.cancel()
            assert 7 == await job
        nursery.cancel_scope.cancel()


async def test_system_errors_say_what_was_being_done() -> None:
    """The client gets the errno, the log the sentence."""

    def work() -> None:
        raise OSError(16, "Device or resource busy")

    worker = OrderedWorker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        with pytest.raises(CommandError, match="resetting it failed: Device or resource busy") as refused:
            await worker.submit(Job(explained("resetting it", work)))
        assert 16 == refused.value.errno
        nursery.cancel_scope.cancel()
