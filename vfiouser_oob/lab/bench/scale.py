"""What many functions cost: in one daemon, and in as many processes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import trio

from vfiouser_oob.lab.bench.bystander import Bystander, bystander
from vfiouser_oob.lab.bench.fleet import Fleet, fleet
from vfiouser_oob.lab.bench.measure import open_descriptors, processor_ns, proportional_mb, wake_ups_by_thread
from vfiouser_oob.lab.bench.migrating import V2Mover
from vfiouser_oob.lab.bench.raw import BenchFailed, RawClient
from vfiouser_oob.lab.bench.results import percentile
from vfiouser_oob.lab.bench.scale_figures import ScaleFigures, Spread
from vfiouser_oob.lab.bench.storm import attach_storm
from vfiouser_oob.lab.demo.children import blaming
from vfiouser_protocol.constants import DeviceState

Progress = Callable[[str], None]

#: Seconds without a wake-up after which what was done before is over, and how long that may take.
_QUIET_S, _QUIET_AT_LAST_S = 0.2, 60.0


@dataclass(frozen=True, slots=True)
class ScaleEffort:
    """How much to measure.

    Args:
        sizes: numbers of functions, ascending.
        state_size: bytes of the state of each.
        rounds: storms, and migrations of all functions.
        idle_s: seconds of doing nothing.
        at_least: functions that migrate in a round, at least; few ones migrate again and again.
    """

    sizes: Sequence[int] = (1, 16, 64, 256)
    state_size: int = 4 << 20
    rounds: int = 3
    idle_s: float = 1.0
    at_least: int = 32


FULL_SCALE = ScaleEffort()
QUICK_SCALE = ScaleEffort(sizes=(1, 4, 16), state_size=1 << 20, rounds=2, idle_s=0.5, at_least=16)


async def measure_scale(effort: ScaleEffort, progress: Progress) -> list[ScaleFigures]:
    """Measure each number of functions in one daemon, then in as many processes.

    Args:
        effort: how much to measure.
        progress: takes one line per step.

    Raises:
        ChildFailed: a process did not start.
        BenchFailed: a measurement could not be made.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="vfiouser-") as place:
        for size in effort.sizes:
            progress(f"{size} functions in one daemon")
            async with fleet(Path(place, str(size)), size, effort.state_size) as one:
                await one.grow(size, Spread.ONE_DAEMON)
                found.append(await _measure(one, Spread.ONE_DAEMON, effort))
        async with fleet(Path(place, "each"), effort.sizes[-1], effort.state_size) as many:
            for size in effort.sizes:
                progress(f"{size} functions in a process each")
                await many.grow(size, Spread.MANY_PROCESSES)
                found.append(await _measure(many, Spread.MANY_PROCESSES, effort))
    return found


async def _measure(group: Fleet, spread: Spread, effort: ScaleEffort) -> ScaleFigures:
    async with blaming([group.agent, *group.daemons]):
        figures = await trio.to_thread.run_sync(_costs, group, effort)
        async with bystander(group.bystander, group.directory) as reader:
            figures |= await trio.to_thread.run_sync(_migrations, group, effort, reader)
    return ScaleFigures(spread=spread.value, functions=len(group.sockets), start_s=group.start_s, **figures)


def _costs(group: Fleet, effort: ScaleEffort) -> dict[str, Any]:
    """What attaching costs, and what attached clients do."""
    pids = [daemon.pid for daemon in group.daemons]
    storms = []
    cpu = 0.0
    for _ in range(effort.rounds):
        _settle(pids)
        before = _cpu(pids)
        storms.append(attach_storm(group.sockets))
        cpu += _cpu(pids) - before
    _settle(pids)
    with ExitStack() as clients:
        for path in group.sockets:
            clients.enter_context(RawClient.attach(path))
        _settle(pids)
        return {
            "memory_mb": sum(map(proportional_mb, pids)),
            "descriptors": sum(map(open_descriptors, pids)),
            "idle_wake_ups": _idle_rate(pids, effort.idle_s),
            "storm_p50_ms": median(percentile(storm, 50) for storm in storms),
            "storm_p99_ms": median(percentile(storm, 99) for storm in storms),
            "attach_cpu_ms": 1000 * cpu / (effort.rounds * len(group.sockets)),
        }


def _migrations(group: Fleet, effort: ScaleEffort, reader: Bystander) -> dict[str, Any]:
    """What moving all states at once costs, and what a bystander feels of it."""
    pids = [daemon.pid for daemon in group.daemons]
    _settle(pids)
    reader.begin()
    time.sleep(effort.idle_s)
    quiet = reader.end()
    busy: list[int] = []
    rates, total, cpu = [], 0, 0.0
    with ExitStack() as stack:
        movers = [stack.enter_context(V2Mover(path)) for path in group.sockets]
        for _ in range(effort.rounds):
            moved, took = 0, 0.0
            before = _cpu(pids)
            for _ in range(max(1, effort.at_least // len(movers))):
                reader.begin()
                began = time.perf_counter()
                moved += V2Mover.save_all(movers)
                took += time.perf_counter() - began
                busy += reader.end()
                for mover in movers:
                    mover.state(DeviceState.RUNNING)
            cpu += _cpu(pids) - before
            total += moved
            rates.append(moved / took / 1e6)
    return {
        "migration_mb_s": median(rates),
        "migration_cpu_s": cpu / total * 1e9,
        "quiet_p99_ms": percentile(sorted(quiet), 99) / 1e6,
        "read_p99_ms": percentile(sorted(busy), 99) / 1e6,
    }


def _cpu(pids: Sequence[int]) -> float:
    return sum(map(processor_ns, pids)) / 1e9


def _wakes_in(pids: Sequence[int], seconds: float) -> dict[int, int]:
    """How often each thread woke, by its id."""
    before = [wake_ups_by_thread(pid) for pid in pids]
    time.sleep(seconds)
    return {
        thread: count - counts.get(thread, 0)
        for pid, counts in zip(pids, before, strict=True)
        for thread, count in wake_ups_by_thread(pid).items()
    }


def _idle_rate(pids: Sequence[int], seconds: float) -> float:
    """Wake-ups per second of what wakes again and again.

    A thread of a pool that has had nothing to do for ten seconds wakes up once, and ends. So each thread is looked at
    twice, and its quieter time counts.
    """
    first, second = _wakes_in(pids, seconds), _wakes_in(pids, seconds)
    return sum(min(count, second.get(thread, 0)) for thread, count in first.items()) / seconds


def _settle(pids: Sequence[int]) -> None:
    """Wait until nothing is done any more of what clients that have left have caused."""
    deadline = time.monotonic() + _QUIET_AT_LAST_S
    while any(_wakes_in(pids, _QUIET_S).values()):
        if time.monotonic() > deadline:
            raise BenchFailed(f"something still wakes the daemons after {_QUIET_AT_LAST_S:g} s")
