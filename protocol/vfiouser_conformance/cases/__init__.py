"""The cases. Each module has one area, or a part of it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vfiouser_conformance.case import Area, Case

#: In the order in which they run: what everything else rests on comes first.
_MODULES = (
    "framing",
    "version",
    "version_refusals",
    "version_size",
    "info",
    "region_info",
    "access",
    "access_odd",
    "pci",
    "pci_fields",
    "dma_map",
    "dma_map_limits",
    "descriptors",
    "irqs",
    "irq_refusals",
    "irq_device",
    "io_fds",
    "io_fds_use",
    "write_multi",
    "reset",
    "leaving",
    "dma",
    "dma_meanwhile",
    "feature",
    "migrate",
    "migrate_data",
    "migrate_errors",
    "logging_cases",
    "logging_edges",
    "region_v1",
    "dirty_v1",
    "clients",
    "clients_migration",
    "clients_qemu_v2",
)


def areas() -> Sequence[Area]:
    """Every area once, in order."""
    found: list[Area] = []
    for name in _MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        if module.AREA not in found:
            found.append(module.AREA)
    return found


def all_cases() -> Sequence[Case]:
    """Every case, in order."""
    return tuple(case for area in areas() for case in sorted(area.cases, key=lambda case: case.name))
