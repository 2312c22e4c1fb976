"""The reference agent protocol, version 1: its methods as a table that client, server and documents share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfiouser_agents.api import Chunk, Descriptor, DirtyReport, Estimate, Outcome, Phase, Range, Role, Status

PROTOCOL = "vfiouser-oob-agent"
#: Versions that we speak, the best first.
VERSIONS = (1,)
#: Messages have this many bytes at most beside the data that they carry.
OVERHEAD = 64 << 10

HELLO = "agent.hello"
PING = "agent.ping"
FUNCTIONS = "agent.functions"
OPEN = "session.open"
CLOSE = "session.close"
WATCH = "session.watch"
EVENT = "session.event"


@dataclass(frozen=True, slots=True)
class SessionMethod:
    """One row: a method that belongs to a session.

    Args:
        name: on the wire.
        op: the method of `Session`.
        params: parameters besides `session`, in the order of the `Session` method, with their types.
        result: type of the result; None = nil.
        result_key: the key of a result that is no dataclass.
        at_once: it waits for no other call of its function.
        overtakes: it ends the calls of its function that are under way.
    """

    name: str
    op: str
    params: Mapping[str, Any] = field(default_factory=dict)
    result: Any = None
    result_key: str = ""
    at_once: bool = False
    overtakes: bool = False


SESSION_METHODS: Sequence[SessionMethod] = (
    SessionMethod("migration.describe", "describe", result=Descriptor),
    SessionMethod("migration.check", "check", {"descriptor": Descriptor}),
    SessionMethod("migration.begin", "begin", {"role": Role, "migration_id": str}),
    SessionMethod("migration.status", "status", result=Status, at_once=True),
    SessionMethod("migration.quiesce", "quiesce"),
    SessionMethod("migration.stop", "stop"),
    SessionMethod("migration.resume", "resume"),
    SessionMethod("migration.estimate", "estimate", result=Estimate),
    SessionMethod("migration.save", "save", {"offset": int, "limit": int, "phase": Phase}, Chunk),
    SessionMethod("migration.load_begin", "load_begin", {"total": int | None}),
    SessionMethod("migration.load", "load", {"offset": int, "data": bytes}),
    SessionMethod("migration.load_commit", "load_commit", {"total": int, "sha256": bytes}),
    SessionMethod("migration.abort", "abort"),
    SessionMethod("migration.end", "end", {"outcome": Outcome}),
    SessionMethod("dirty.start", "dirty_start", {"ranges": tuple[Range, ...], "page_size": int}, int, "page_size"),
    SessionMethod("dirty.report", "dirty_report", {"iova": int, "length": int}, DirtyReport),
    SessionMethod("dirty.stop", "dirty_stop"),
    SessionMethod("device.reset", "reset", overtakes=True),
)
BY_NAME: Mapping[str, SessionMethod] = {method.name: method for method in SESSION_METHODS}
BY_OP: Mapping[str, SessionMethod] = {method.op: method for method in SESSION_METHODS}
