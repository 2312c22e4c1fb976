"""What `status` shows of a function."""

from __future__ import annotations

from datetime import UTC, datetime

from vfiouser_oob.devices.base import BackendSession
from vfiouser_oob.migration.engine import MigrationEngine
from vfiouser_oob.migration.standing import Truth
from vfiouser_oob.observability.status import (
    CapabilitiesStatus,
    ClientStatus,
    FunctionStatus,
    MapsStatus,
    MigrationStatus,
    RegionStatus,
)
from vfiouser_oob.persist.capabilities import Source
from vfiouser_oob.server.function import Function
from vfiouser_protocol.constants import Command, RegionFlags, RegionIndex


def function_status(function: Function) -> FunctionStatus:
    """Describe a function at this moment."""
    connection = function.connection
    backend = connection.backend if connection is not None else None
    irqs = backend.irq_summary() if backend is not None else {}
    maps = _maps(backend)
    return FunctionStatus(
        name=function.name,
        socket=function.address,
        device=function.backend.summary,
        phase=function.phase,
        since=iso_time(function.since),
        client=_client(function),
        regions=_regions(backend),
        maps=maps,
        irqs=irqs,
        fds=sum(irqs.values()) + maps["files"] + (connection.sockets if connection is not None else 0),
        messages={Command(number).name: count for number, count in enumerate(function.counts) if count},
        dma=connection.dma_summary() if connection is not None else {},
        migration=None if function.engine is None else _migration(function.engine),
        unavailable=function.backend.unavailable,
        last_error=function.last_error,
    )


def _migration(engine: MigrationEngine) -> MigrationStatus:
    """Describe a migration."""
    source = engine.work.source
    caps = engine.link.caps
    return MigrationStatus(
        agent=engine.link.function_id,
        migratable=engine.blocked is None and (caps is None or caps.stop_copy),
        blocked=engine.blocked,
        state=engine.state_shown.name,
        known=engine.truth is not Truth.UNKNOWN,
        unknown_since=None if engine.unknown_since is None else iso_time(engine.unknown_since),
        agent_away_since=None if engine.link.away_time is None else iso_time(engine.link.away_time),
        paused_over_link=engine.paused_over_link,
        reset_due=engine.reset_due,
        held_back=engine.awaiting,
        owner=None if engine.owner is None else engine.owner.value,
        fenced=engine.fenced,
        generation=source.generation if source is not None else 0,
        bytes=engine.moved,
        buffered=source.buffered if source is not None else 0,
        remaining=source.remaining if source is not None else 0,
        step=engine.tracer.doing,
        steps=engine.tracer.steps,
        failures=engine.tracer.failures,
        last_failure=engine.tracer.last_failure,
        capabilities=_capabilities(engine),
    )


def _capabilities(engine: MigrationEngine) -> CapabilitiesStatus:
    """Describe what the agent can do, and how that is known."""
    facts = engine.link.facts
    problem = None if engine.memory is None else engine.memory.problem
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
