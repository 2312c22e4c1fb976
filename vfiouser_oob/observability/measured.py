"""The shape of what is measured: plain numbers, from which the metrics are rendered wherever somebody wants them."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from vfiouser_oob.observability.latency import POWER_BOUNDS_S

#: Upper bounds of the buckets that are published, in seconds: every fourth power of two below ten seconds.
BOUNDS_S = tuple(bound for bound in POWER_BOUNDS_S[::2] if bound < 10)


class MeasuredCommand(TypedDict):
    """The durations of one command: how many took no longer than each bound, and than any; and their sum in seconds."""

    buckets: list[int]
    sum_s: float


class MeasuredMigrations(TypedDict):
    """Migrations that are over: how many by outcome, the bytes that they moved, and the last one in seconds."""

    outcomes: dict[str, int]
    bytes: int
    last_duration_s: float | None
    last_downtime_s: float | None


class MeasuredAgent(TypedDict):
    """A function's agent: whether it answers, as far as is known, and how many steps were taken and failed."""

    answers: bool
    steps: int
    failures: int


class MeasuredFunction(TypedDict):
    """One function; `received` counts messages by command, `migrations` are by direction."""

    name: str
    up: bool
    connected: bool
    clients: int
    maps: int
    mapped_bytes: int
    mapped_files: int
    fds: int
    interrupts: int
    migrating: bool
    received: dict[str, int]
    commands: dict[str, MeasuredCommand]
    agent: MeasuredAgent | None
    migrations: dict[str, MeasuredMigrations]


class MeasuredVm(TypedDict):
    """One VM; `phase` is the one of its status, `qemu` whether a QEMU has connected its monitor.

    `functions` counts those that it has, `refused` is whether the migration under way must not go through.
    """

    name: str
    phase: str
    qemu: bool
    functions: int
    refused: bool


class Measured(TypedDict):
    """All of it: when the daemon began (since 1970), how often one did, and when certificates expire, by file.

    `vms` is missing where an older daemon answers.
    """

    version: str
    python: str
    kernel: str
    started_s: float
    starts: int | None
    functions: list[MeasuredFunction]
    vms: NotRequired[list[MeasuredVm]]
    certificates: dict[str, float]
