"""What is measured of each function and VM, as the metrics take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiouser_oob.observability.latency import POWER_BOUNDS_S, CommandTimings
from vfiouser_oob.observability.measured import (
    BOUNDS_S,
    MeasuredAgent,
    MeasuredCommand,
    MeasuredFunction,
    MeasuredMigrations,
    MeasuredVm,
)
from vfiouser_oob.observability.status import VmStatus
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.status import function_status
from vfiouser_protocol.constants import Command

if TYPE_CHECKING:
    from vfiouser_oob.migration.runner import MigrationRunner

_TAKEN = [POWER_BOUNDS_S.index(bound) for bound in BOUNDS_S]


def measure_function(function: Function) -> MeasuredFunction:
    """Measure a function at this moment.

    Args:
        function: the function.
    """
    status = function_status(function)
    runner = function.migration
    timings = function.context.timings
    came = [number for number, row in enumerate(timings.rows) if row is not None]
    return MeasuredFunction(
        name=function.name,
        up=status["phase"] != "failed" and status["unavailable"] is None,
        connected=status["client"] is not None,
        clients=function.clients_served,
        maps=status["maps"]["count"],
        mapped_bytes=status["maps"]["bytes"],
        mapped_files=status["maps"]["files"],
        fds=status["fds"],
        interrupts=sum(status["irqs"].values()),
        migrating=runner is not None and runner.record.stream is not None,
        received=status["messages"],
        commands={Command(number).name: _command(timings, number) for number in came},
        agent=None if runner is None else _agent(runner),
        migrations={} if runner is None else _migrations(runner),
    )


def _command(timings: CommandTimings, number: int) -> MeasuredCommand:
    powers = timings.powers(number)
    buckets = [*(powers[index] for index in _TAKEN), powers[-1]]
    return MeasuredCommand(buckets=buckets, sum_s=timings.sum_s(number))


def _agent(runner: MigrationRunner) -> MeasuredAgent:
    tracer = runner.tracer
    return MeasuredAgent(answers=runner.link.away_since is None, steps=tracer.steps, failures=tracer.failures)


def _migrations(runner: MigrationRunner) -> dict[str, MeasuredMigrations]:
    history = runner.history
    if history is None:
        return {}
    found: dict[str, MeasuredMigrations] = {}
    for (direction, outcome), count in history.ended.items():
        last = next(entry for entry in reversed(history.entries) if entry["direction"] == direction)
        measured = found.setdefault(
            direction,
            MeasuredMigrations(
                outcomes={},
                bytes=history.moved[direction],
                last_duration_s=last["duration_s"],
                last_downtime_s=last["downtime_s"],
            ),
        )
        measured["outcomes"][outcome] = count
    return found


def measure_vm(status: VmStatus) -> MeasuredVm:
    """Take from a VM's status what is published of it.

    Args:
        status: as the daemon describes the VM.
    """
    return MeasuredVm(
        name=status["name"],
        phase=status["phase"],
        qemu=status["qemu"] is not None,
        functions=len(status["functions"]),
        refused=status["refused"] is not None,
    )
