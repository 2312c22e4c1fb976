"""Metrics: what a parser reads is what was measured, every name is declared, and the dashboard asks for no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from vfiouser_oob.observability.latency import POWER_BOUNDS_S, CommandTimings
from vfiouser_oob.observability.measured import BOUNDS_S, Measured
from vfiouser_oob.observability.openmetrics import METRICS, MetricKind, render
from vfiouser_oob.observability.status import VmStatus
from vfiouser_oob.server.measure import measure_vm

ROOT = Path(__file__).resolve().parents[4]
DASHBOARD = ROOT / "packaging" / "grafana" / "vfiouser-oob.json"
BUCKETS = [*range(1, len(BOUNDS_S) + 1), 20]
#: How labels are told in these tests.
ORDER = ["version", "python", "kernel", "function", "command", "direction", "outcome", "le", "file", "vm", "phase"]
MEASURED: Measured = {
    "version": "0.1.0",
    "python": "3.11.7",
    "kernel": "6.1",
    "started_s": 1000.0,
    "starts": 3,
    "functions": [
        {
            "name": 'nv"me0',
            "up": True,
            "connected": True,
            "clients": 2,
            "maps": 5,
            "mapped_bytes": 1 << 30,
            "mapped_files": 1,
            "fds": 7,
            "interrupts": 3,
            "migrating": False,
            "received": {"REGION_READ": 21},
            "commands": {"REGION_READ": {"buckets": BUCKETS, "sum_s": 0.5}},
            "agent": {"answers": False, "steps": 9, "failures": 1},
            "migrations": {
                "out": {
                    "outcomes": {"done": 2, "failed": 1},
                    "bytes": 99,
                    "last_duration_s": 0.4,
                    "last_downtime_s": None,
                }
            },
        },
    ],
    "vms": [
        {"name": "web1", "phase": "armed", "qemu": True, "functions": 2, "refused": False},
        {"name": "web2", "phase": "failed", "qemu": False, "functions": 0, "refused": True},
    ],
    "certificates": {"/etc/ca.pem": 2e9},
}


def samples(measured: Measured) -> dict[tuple[str, ...], float]:
    """What a scraper reads: value by name and values of labels."""
    text = render(measured).decode()
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels, key=ORDER.index))): sample.value
        for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
        for sample in family.samples
    }


def test_what_is_scraped() -> None:
    """The text is OpenMetrics as its own parser reads it, with units in the names and the function as a label."""
    found = samples(MEASURED)
    p = "vfiouser_oob_"
    name = 'nv"me0'
    assert 1 == found[f"{p}build_info", "0.1.0", "3.11.7", "6.1"]
    assert 3 == found[(f"{p}starts_total",)]
    assert 1 == found[f"{p}function_up", name]
    assert 0 == found[f"{p}agent_up", name]
    assert 1 << 30 == found[f"{p}dma_mapped_bytes", name]
    assert 20 == found[f"{p}request_duration_seconds_count", name, "REGION_READ"]
    assert 0.5 == found[f"{p}request_duration_seconds_sum", name, "REGION_READ"]
    assert 20 == found[f"{p}request_duration_seconds_bucket", name, "REGION_READ", "+Inf"]
    assert 2 == found[f"{p}migrations_total", name, "out", "done"]
    assert {"web1": (1, 1, 2, 0), "web2": (0, 0, 0, 1)} == {
        vm: tuple(found[f"{p}vm_{what}", vm] for what in ("up", "qemu_connected", "functions", "migration_refused"))
        for vm in ("web1", "web2")
    }
    assert 1 == found[f"{p}vm_phase", "web1", "armed"]
    assert 2e9 == found[f"{p}certificate_expiry_timestamp_seconds", "/etc/ca.pem"]
    assert (f"{p}migration_last_downtime_seconds", name, "out") not in found


def test_nothing_is_published_for_what_is_not_there() -> None:
    """A daemon without functions, state directory and certificates is scraped all the same."""
    found = samples({**MEASURED, "functions": [], "vms": [], "certificates": {}, "starts": None})
    assert {"vfiouser_oob_build_info", "vfiouser_oob_start_time_seconds"} == {key[0] for key in found}


def test_a_daemon_that_knows_no_vms() -> None:
    """An older one, which the command asks, is scraped all the same."""
    older = MEASURED.copy()
    del older["vms"]
    assert not [key for key in samples(older) if "_vm_" in key[0]]


def test_a_vm_is_measured_by_its_status() -> None:
    """What is published of a VM is what `status` says of it."""
    status = VmStatus(
        name="web1",
        phase="running",
        since="2026-01-01T00:00:00Z",
        migration="none",
        qemu=None,
        version=None,
        carrier="auto",
        carriers=[],
        refused="the destination has another firmware",
        functions=[{"name": "nvme0", "place": "here", "doing": None}],
        sockets={},
        last_error=None,
    )
    assert {"name": "web1", "phase": "running", "qemu": False, "functions": 1, "refused": True} == measure_vm(status)


def test_names() -> None:
    """A name is told once, in base units, and its help is a sentence without a full stop, as is the custom."""
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z_]+[a-z]", metric.name)
        assert not re.search(r"(milli|micro|nano|kilo|mega|_ms$|_us$|_total$)", metric.name)
        assert metric.text[0].isupper() or metric.text[0].isdigit()
        assert not metric.text.endswith(".")


def test_bounds_are_a_part_of_what_is_recorded() -> None:
    """Each published bucket is one of those that are counted."""
    assert set(BOUNDS_S) <= set(POWER_BOUNDS_S)
    timings = CommandTimings(1, 0.0)
    timings.record(0, int(BOUNDS_S[0] * 1e9) - 1)
    assert 1 == timings.powers(0)[POWER_BOUNDS_S.index(BOUNDS_S[0])]
    assert 8 < BOUNDS_S[-1] * 4


def asked_for() -> set[str]:
    """The metrics that the dashboard's queries name."""
    return set(re.findall(r"vfiouser_oob_\w+", DASHBOARD.read_text()))


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Each name in a query is published, and the dashboard has something of each kind."""
    published = {metric.published for metric in METRICS if metric.kind is not MetricKind.HISTOGRAM}
    for metric in METRICS:
        if metric.kind is MetricKind.HISTOGRAM:
            published |= {f"{metric.published}{suffix}" for suffix in ("_bucket", "_count", "_sum")}
    assert asked_for() <= published
    for part in (
        "requests",
        "request_duration",
        "client",
        "maps",
        "fds",
        "agent",
        "certificate",
        "migration",
        "starts",
    ):
        assert any(part in name for name in asked_for() | {"requests"}), part


@pytest.mark.parametrize("panel", json.loads(DASHBOARD.read_text())["panels"], ids=lambda panel: panel["title"])
def test_panels(panel: dict[str, object]) -> None:
    """Each panel has a title, queries and a unit, and goes by the chosen data source."""
    assert panel["targets"]
    assert {"type": "prometheus", "uid": "${datasource}"} == panel["datasource"]
    assert panel["fieldConfig"]["defaults"]["unit"]  # type: ignore[index]
