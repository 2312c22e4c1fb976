"""What `status` shows of a function."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vfiouser_oob.config.schema import FunctionConfig, P2p
from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.migration.record import Certainty
from vfiouser_oob.observability.status import (
    CapabilitiesStatus,
    ClientStatus,
    CommandStatus,
    FunctionStatus,
    MapsStatus,
    MigrationStatus,
    RegionStatus,
)
from vfiouser_oob.persist.capabilities import Source
from vfiouser_oob.server.function import Function
from vfiouser_oob.server.life import Life
from vfiouser_oob.server.unit import Unit
from vfiouser_protocol.constants import Command, RegionFlags, RegionIndex

if TYPE_CHECKING:
    from vfiouser_oob.migration.runner import MigrationRunner


def unit_status(unit: Unit) -> FunctionStatus:
    """Describe a function of the configuration at this moment, whether it could be opened or not."""
    if isinstance(unit.life, Life):
        return function_status(unit.life.function)
    config = unit.config if isinstance(unit.config, FunctionConfig) else None
    failure = unit.failure
    return FunctionStatus(
        name=unit.name,
        socket=str(config.socket or "") if config else "",
        device=config.device.describe() if config else "",
        phase="starting" if failure is None else "failed",
        since=iso_time(time.time() if failure is None else failure.since),
        failed=unit.failed,
        client=None,
        regions=[],
        maps=_maps(None),
        irqs={},
        fds=0,
        messages={},
        commands={},
        dma={},
        migration=None,
        unavailable=None,
        unavailable_since=None,
        last_error=None,
        last_error_at=None,
    )


def function_status(function: Function) -> FunctionStatus:
    """Describe a function at this moment."""
    attached = function.attached
    backend = None if attached is None else attached.backend
    irqs = backend.irq_summary() if backend is not None else {}
    maps = _maps(backend)
    trouble = function.context.trouble.last
    return FunctionStatus(
        name=function.name,
        socket=function.address,
        device=function.backend.summary,
        phase=function.phase,
        since=iso_time(function.since),
        failed=function.broken,
        client=_client(function),
        regions=_regions(backend),
        maps=maps,
        irqs=irqs,
        fds=sum(irqs.values()) + maps["files"] + (0 if attached is None else attached.sockets),
        messages={Command(number).name: count for number, count in enumerate(function.counts) if count},
        commands=_commands(function),
        dma={} if attached is None else attached.dma.summary(),
        migration=None if function.migration is None else _migration(function.migration),
        unavailable=function.backend.unavailable,
        unavailable_since=_iso_or_none(function.backend.unavailable_since),
        last_error=None if trouble is None else trouble.text,
        last_error_at=None if trouble is None else iso_time(trouble.time),
    )


def _commands(function: Function) -> dict[str, CommandStatus]:
    """How the client's commands are served."""
    return {
        Command(number).name: CommandStatus(
            count=latency.answered,
            per_s=round(latency.per_s, 3),
            p50_s=round(latency.p50_s, 9),
            p99_s=round(latency.p99_s, 9),
        )
        for number, latency in function.context.timings.summary(time.monotonic()).items()
    }


def _migration(runner: MigrationRunner) -> MigrationStatus:
    """Describe a migration."""
    record, source, caps = runner.record, runner.steps.source, runner.link.caps
    return MigrationStatus(
        agent=runner.link.function_id,
        migratable=record.blocked is None and (caps is None or caps.stop_copy),
        blocked=record.blocked,
        p2p=runner.config.p2p is P2p.ON,
        state=record.state_shown.name,
        known=record.certainty is not Certainty.UNKNOWN,
        unknown_since=_iso_or_none(record.unknown_since),
        agent_away_since=_iso_or_none(runner.link.away_time),
        paused_over_link=record.over_link,
        reset_due=record.reset_due is not None,
        held_back=record.awaiting,
        owner=None if record.owner is None else record.owner.value,
        fenced=record.fenced,
        epoch=source.epoch if source is not None else 0,
        bytes=runner.steps.moved,
        buffered=source.buffered if source is not None else 0,
        remaining=source.remaining if source is not None else 0,
        step=runner.tracer.doing,
        steps=runner.tracer.steps,
        failures=runner.tracer.failures,
        last_failure=runner.tracer.last_failure,
        last_failure_at=_iso_or_none(runner.tracer.last_failure_time),
        capabilities=_capabilities(runner),
    )


def _capabilities(runner: MigrationRunner) -> CapabilitiesStatus:
    """Describe what the agent can do, and how that is known."""
    facts = runner.link.facts
    problem = None if runner.memory is None else runner.memory.problem
    if facts is None:
        return CapabilitiesStatus(
            source=Source.CONFIGURATION.value, learned=None, stop_copy=None, precopy=None, dirty=None, problem=problem
        )
    return CapabilitiesStatus(
        source=facts.source.value,
        learned=iso_time(facts.learned),
        stop_copy=facts.caps.stop_copy,
        precopy=facts.caps.precopy,
        dirty=facts.caps.dirty,
        problem=problem,
    )


def iso_time(seconds: float) -> str:
    """Return a time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _iso_or_none(seconds: float | None) -> str | None:
    return None if seconds is None else iso_time(seconds)


def _client(function: Function) -> ClientStatus | None:
    peer = function.connection.peer if function.connection is not None else None
    return None if peer is None else ClientStatus(pid=peer.pid, uid=peer.uid, command=peer.command)


def _regions(backend: BackendSession | None) -> list[RegionStatus]:
    if backend is None:
        return []
    return [
        RegionStatus(
            index=spec.index,
            name=RegionIndex(spec.index).name
            if spec.index in RegionIndex._value2member_map_
            else f"region{spec.index}",
            size=spec.size,
            mapped=bool(spec.flags & RegionFlags.MMAP),
        )
        for spec in backend.description.regions
        if spec.size
    ]


def _maps(backend: BackendSession | None) -> MapsStatus:
    if backend is None:
        return MapsStatus(count=0, bytes=0, files=0)
    memory = backend.memory
    return MapsStatus(count=len(memory.map), bytes=memory.total_bytes, files=len(memory.files))
