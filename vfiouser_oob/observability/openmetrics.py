"""Metrics in the OpenMetrics text format, rendered from what was measured; needs the extra `metrics`.

The table says which metrics there are: the reference page, the dashboard's test and the rendering go by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from vfiouser_oob.observability.measured import BOUNDS_S, Measured, MeasuredCommand, MeasuredFunction, MeasuredVm

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PREFIX = "vfiouser_oob_"

#: Values of labels, and the value.
Sample: TypeAlias = tuple[tuple[str, ...], Any]


class MetricKind(Enum):
    """What a metric is."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


class Metric(NamedTuple):
    """One metric.

    Args:
        name: without the prefix, and without what its kind adds to it.
        kind: what it is.
        text: what it says.
        labels: what tells its samples apart.
        samples: takes them from what was measured.
    """

    name: str
    kind: MetricKind
    text: str
    labels: tuple[str, ...]
    samples: Callable[[Measured], Iterable[Sample]]

    @property
    def published(self) -> str:
        """The name under which a query finds it."""
        suffix = {MetricKind.COUNTER: "_total", MetricKind.INFO: "_info"}.get(self.kind, "")
        return f"{PREFIX}{self.name}{suffix}"


def _each(value: Callable[[MeasuredFunction], Any]) -> Callable[[Measured], Iterator[Sample]]:
    """One sample of each function that has a value."""

    def samples(measured: Measured) -> Iterator[Sample]:
        for function in measured["functions"]:
            number = value(function)
            if number is not None:
                yield (function["name"],), number

    return samples


def _spread(
    values: Callable[[MeasuredFunction], Iterable[Sample]],
) -> Callable[[Measured], Iterator[Sample]]:
    """Some samples of each function, whose name comes first."""

    def samples(measured: Measured) -> Iterator[Sample]:
        for function in measured["functions"]:
            for labels, number in values(function):
                yield (function["name"], *labels), number

    return samples


def _migrations(key: str) -> Callable[[MeasuredFunction], Iterator[Sample]]:
    def samples(function: MeasuredFunction) -> Iterator[Sample]:
        for direction, migrations in function["migrations"].items():
            if migrations[key] is not None:  # type: ignore[literal-required]
                yield (direction,), migrations[key]  # type: ignore[literal-required]

    return samples


def _outcomes(function: MeasuredFunction) -> Iterator[Sample]:
    for direction, migrations in function["migrations"].items():
        for outcome, count in migrations["outcomes"].items():
            yield (direction, outcome), count


def _agent(key: str) -> Callable[[MeasuredFunction], Any]:
    def value(function: MeasuredFunction) -> Any:
        agent = function["agent"]
        return None if agent is None else agent[key]  # type: ignore[literal-required]

    return value


def _each_vm(value: Callable[[MeasuredVm], Any]) -> Callable[[Measured], Iterator[Sample]]:
    """One sample of each VM."""
    return lambda measured: (((vm["name"],), value(vm)) for vm in measured.get("vms", []))


def _build(measured: Measured) -> Iterator[Sample]:
    yield (), {"version": measured["version"], "python": measured["python"], "kernel": measured["kernel"]}


_G, _C = MetricKind.GAUGE, MetricKind.COUNTER
_F, _DIRECTION, _VM = ("function",), ("function", "direction"), ("vm",)
METRICS: tuple[Metric, ...] = (
    Metric("build", MetricKind.INFO, "Versions of the daemon and of what it runs on", (), _build),
    Metric("start_time_seconds", _G, "When the daemon began, since 1970", (), lambda m: [((), m["started_s"])]),
    Metric(
        "starts",
        _C,
        "Daemons that began with this state directory, restarts and crashes included",
        (),
        lambda m: [] if m["starts"] is None else [((), m["starts"])],
    ),
    Metric("function_up", _G, "1 if the function serves clients, 0 if it has failed", _F, _each(lambda f: f["up"])),
    Metric("client_connected", _G, "1 while a client uses the function", _F, _each(lambda f: f["connected"])),
    Metric("clients", _C, "Clients that used the function", _F, _each(lambda f: f["clients"])),
    Metric("dma_maps", _G, "DMA mappings of the client", _F, _each(lambda f: f["maps"])),
    Metric("dma_mapped_bytes", _G, "Bytes in DMA mappings of the client", _F, _each(lambda f: f["mapped_bytes"])),
    Metric("dma_mapped_files", _G, "Files behind DMA mappings; 0: none shared", _F, _each(lambda f: f["mapped_files"])),
    Metric("client_fds", _G, "Descriptors held for the client", _F, _each(lambda f: f["fds"])),
    Metric("interrupts", _G, "Interrupt vectors with an eventfd", _F, _each(lambda f: f["interrupts"])),
    Metric(
        "messages_received",
        _C,
        "Messages received",
        ("function", "command"),
        _spread(lambda f: (((name,), count) for name, count in f["received"].items())),
    ),
    Metric(
        "request_duration_seconds",
        MetricKind.HISTOGRAM,
        "Time from a message to its reply; its count is the number of requests",
        ("function", "command"),
        _spread(lambda f: (((name,), command) for name, command in f["commands"].items())),
    ),
    Metric("agent_up", _G, "1 unless the agent is known not to answer", _F, _each(_agent("answers"))),
    Metric("agent_steps", _C, "Steps of migrations and calls to the agent", _F, _each(_agent("steps"))),
    Metric("agent_step_failures", _C, "Of those, the ones that failed", _F, _each(_agent("failures"))),
    Metric("migration_active", _G, "1 while the function's state is moved", _F, _each(lambda f: f["migrating"])),
    Metric("migrations", _C, "Migrations that are over", ("function", "direction", "outcome"), _spread(_outcomes)),
    Metric("migration_bytes", _C, "Bytes of state moved", _DIRECTION, _spread(_migrations("bytes"))),
    Metric(
        "migration_last_duration_seconds",
        _G,
        "How long the last migration took",
        _DIRECTION,
        _spread(_migrations("last_duration_s")),
    ),
    Metric(
        "migration_last_downtime_seconds",
        _G,
        "This side's part of the downtime of the last migration",
        _DIRECTION,
        _spread(_migrations("last_downtime_s")),
    ),
    Metric("vm_up", _G, "1 if the VM is served, 0 if it has failed", _VM, _each_vm(lambda vm: vm["phase"] != "failed")),
    Metric("vm_qemu_connected", _G, "1 while a QEMU has its monitor connected", _VM, _each_vm(lambda vm: vm["qemu"])),
    Metric("vm_functions", _G, "Functions of the VM", _VM, _each_vm(lambda vm: vm["functions"])),
    Metric(
        "vm_phase",
        _G,
        "1 for the phase in which the VM is; see the status page for what they mean",
        ("vm", "phase"),
        lambda m: (((vm["name"], vm["phase"]), 1) for vm in m.get("vms", [])),
    ),
    Metric(
        "vm_migration_refused",
        _G,
        "1 while a migration of the VM is under way that must not go through",
        _VM,
        _each_vm(lambda vm: vm["refused"]),
    ),
    Metric(
        "certificate_expiry_timestamp_seconds",
        _G,
        "When the first certificate in a file for agents expires, since 1970",
        ("file",),
        lambda m: (((file,), seconds) for file, seconds in m["certificates"].items()),
    ),
)


def render(measured: Measured) -> bytes:
    """What was measured, as OpenMetrics text.

    Args:
        measured: as the daemon gave it.

    Raises:
        ImportError: the extra `metrics` is not installed.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.openmetrics.exposition import generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(measured))
    return bytes(generate_latest(registry))  # type: ignore[no-untyped-call]


class _Collected:
    """What was measured, as the library wants to be given it."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def collect(self) -> Iterator[Any]:
        """Each metric with its samples."""
        from prometheus_client import core

        kinds = {
            MetricKind.GAUGE: core.GaugeMetricFamily,
            MetricKind.COUNTER: core.CounterMetricFamily,
            MetricKind.HISTOGRAM: core.HistogramMetricFamily,
            MetricKind.INFO: core.InfoMetricFamily,
        }
        for metric in METRICS:
            family: Any = kinds[metric.kind](PREFIX + metric.name, metric.text, labels=metric.labels)
            for labels, value in metric.samples(self._measured):
                if metric.kind is MetricKind.HISTOGRAM:
                    family.add_metric(labels, _buckets(value), value["sum_s"])
                else:
                    family.add_metric(labels, value)
            yield family


def _buckets(command: MeasuredCommand) -> list[tuple[str, int]]:
    bounds = [*(repr(bound) for bound in BOUNDS_S), "+Inf"]
    return list(zip(bounds, command["buckets"], strict=True))
