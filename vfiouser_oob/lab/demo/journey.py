"""The migrating demonstration with one function: there with v1, back with v2, under I/O, and what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.demo.progress import Progress
from vfiouser_oob.lab.demo.workload import Workload
from vfiouser_oob.lab.vmm.live import LiveOptions, LiveProgress, MigrationPhase
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_oob.lab.vmm.voyage import Voyage

#: Guest memory of the VM.
MEMORY_SIZE = 16 << 20
#: I/O before the first, between, and after the last migration, seconds.
_SETTLE_S = 0.3
_LEG_TIMEOUT_S = 120.0
#: Where the VM begins, and where it goes with which generation.
ORIGIN = "A"
LEGS = (("B", Generation.V1), ("A", Generation.V2))


@dataclass
class LegReport:
    """One migration.

    Args:
        source: host it began at.
        destination: host it went to.
        generation: "v1" or "v2".
        state_bytes: bytes of the function's state, by phase.
        memory_bytes: bytes of guest memory, by phase.
        dirty_by_device: pages that the function's dirty log named.
        seconds: duration of each phase.
        downtime_s: how long the guest stood still.
        state_mb_s: throughput of state, MB/s, over the phases that carry it.
        memory_equal: whether guest memory there was equal to that here when the VM stopped.
        in_flight: I/O commands that were outstanding while the VM stood still.
        queues: submission tail, completion head and phase bit of each queue, with which it went on.
        commands_after: I/O commands that were completed after it and before the next one.
    """

    source: str
    destination: str
    generation: str
    state_bytes: dict[str, int] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    dirty_by_device: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    downtime_s: float = 0.0
    state_mb_s: float = 0.0
    memory_equal: bool = False
    in_flight: int = 0
    queues: list[tuple[int, int, int]] = field(default_factory=list)
    commands_after: int = 0


@dataclass
class JourneyReport:
    """What was found out about one function.

    Args:
        name: the function's name.
        legs: its migrations.
        writes: write commands that the driver saw completed.
        reads: read commands that the driver saw completed.
        device_writes: write commands that the controller counted, wherever it was.
        device_reads: read commands that the controller counted.
        verified: bytes that were read back equal.
        mismatches: reads that brought wrong data.
        interrupts: interrupts of each vector.
        ok: whether everything was as it should be.
        error: what was not.
    """

    name: str
    legs: list[LegReport] = field(default_factory=list)
    writes: int = 0
    reads: int = 0
    device_writes: int = 0
    device_reads: int = 0
    verified: int = 0
    mismatches: int = 0
    interrupts: list[int] = field(default_factory=list)
    ok: bool = False
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


#: Told how far a migration of a function has come.
Meter = Callable[[str, LegReport, LiveProgress], None]


async def travel(name: str, sockets: Mapping[str, Path], seed: int, progress: Progress, meter: Meter) -> JourneyReport:
    """Migrate one function to and fro under I/O.

    Args:
        name: the function's name.
        sockets: where the daemon of each host serves it.
        seed: seed of the data.
        progress: takes one line per step.
        meter: told how far each migration has come.

    Raises:
        VfioUserError: a function, a daemon, a simulator or an agent failed.
        TooSlowError: an I/O command was lost, or a migration does not come to an end.
    """
    report = JourneyReport(name)
    async with Voyage.open(sockets[ORIGIN], memory_size=MEMORY_SIZE) as voyage:
        driver = voyage.driver
        reads_before, writes_before = await driver.counted_commands()
        workload = Workload(driver, f"{seed}:{name}")
        progress(f"{name}: {driver.controller.model} attached at host {ORIGIN}; I/O begins")
        async with background_nursery() as nursery:
            await nursery.start(workload.run)
            await trio.sleep(_SETTLE_S)
            here = ORIGIN
            for there, generation in LEGS:
                leg = LegReport(here, there, generation.value)
                report.legs.append(leg)
                await _leg(name, voyage, sockets[there], leg, generation, meter)
                before = workload.counts.writes + workload.counts.reads
                await trio.sleep(_SETTLE_S)
                leg.commands_after = workload.counts.writes + workload.counts.reads - before
                here = there
            await workload.finish()
        await workload.verify()
        reads, writes = await driver.counted_commands()
        counts = workload.counts
        report.device_reads, report.device_writes = reads - reads_before, writes - writes_before
        report.reads, report.writes = counts.reads, counts.writes
        report.verified, report.mismatches = counts.bytes_verified, counts.mismatches
        report.interrupts = list(driver.interrupts)
    _judge(report)
    return report


async def _leg(name: str, voyage: Voyage, path: Path, leg: LegReport, generation: Generation, meter: Meter) -> None:
    def observe(progress: LiveProgress) -> None:
        if progress.phase is MigrationPhase.STOP_COPY and not leg.queues:
            leg.in_flight, leg.queues = voyage.driver.outstanding, voyage.driver.positions
        meter(name, leg, progress)

    with trio.fail_after(_LEG_TIMEOUT_S):
        done = await voyage.migrate(path, generation, options=LiveOptions(compare=True), observe=observe)
    leg.state_bytes, leg.memory_bytes, leg.seconds = done.state_bytes, done.memory_bytes, done.seconds
    leg.dirty_by_device, leg.downtime_s = done.dirty_by_device, done.downtime_s
    leg.memory_equal = bool(done.memory_equal)
    carrying = sum(done.seconds.get(phase, 0.0) for phase in done.state_bytes)
    leg.state_mb_s = done.total_state / carrying / 1e6 if carrying else 0.0


def _judge(report: JourneyReport) -> None:
    """Say the first thing that is wrong, if anything is."""
    checks = [
        (report.mismatches == 0, f"{report.mismatches} reads brought wrong data"),
        (report.device_writes == report.writes, _differ("write", report.writes, report.device_writes)),
        (report.device_reads == report.reads, _differ("read", report.reads, report.device_reads)),
        (all(report.interrupts), f"a vector never fired: {report.interrupts}"),
    ]
    for leg in report.legs:
        way = f"{leg.source} → {leg.destination} with {leg.generation}"
        checks += [
            (leg.memory_equal, f"{way}: guest memory differs"),
            (leg.dirty_by_device > 0, f"{way}: no page was reported dirty by the device"),
            (leg.in_flight > 0, f"{way}: no I/O was in flight"),
            (leg.commands_after > 0, f"{way}: no I/O was completed afterwards"),
        ]
    report.error = next((text for good, text in checks if not good), None)
    report.ok = report.error is None


def _differ(what: str, driver: int, device: int) -> str:
    return f"the driver saw {driver} {what} commands completed, the controller executed {device}"
