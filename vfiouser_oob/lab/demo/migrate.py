"""The migrating demonstration: two hosts, every function there and back at the same time."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.demo.children import blaming, watch
from vfiouser_oob.lab.demo.hosts import HOSTS, HostOptions, HostPair, two_hosts
from vfiouser_oob.lab.demo.journey import JourneyReport, Meter, travel
from vfiouser_oob.lab.demo.progress import Progress


async def show_migration(options: HostOptions, seed: int, progress: Progress, meter: Meter) -> list[JourneyReport]:
    """Start both hosts, migrate every function to and fro, stop both.

    Args:
        options: what the hosts have.
        seed: seed of the data.
        progress: takes one line per step.
        meter: told how far each migration has come.

    Returns:
        One report per function.

    Raises:
        ChildFailed: a process did not start or died.
        CertificatesUnavailable: the daemons cannot prove who they are.
        VfioUserError: a function failed.
    """
    reports: dict[str, JourneyReport] = {}

    async def one(pair: HostPair, name: str) -> None:
        sockets = {host: pair.socket(host, name) for host in HOSTS}
        reports[name] = await travel(name, sockets, seed, progress, meter)

    # Paths of sockets are limited to 107 bytes, so a short directory rather than one below a deep TMPDIR.
    with tempfile.TemporaryDirectory(prefix="vfiouser-") as place:
        progress("starting two hosts: SoC simulator with its agent, and daemon, on one shared disk image")
        async with two_hosts(Path(place), options, progress) as pair:
            await _travel_all(pair, one, options.names)
    return [reports[name] for name in options.names]


async def _travel_all(pair: HostPair, one: Callable[[HostPair, str], Awaitable[None]], names: Sequence[str]) -> None:
    """Let all functions travel at once, and name the process that dies meanwhile."""
    async with blaming(pair.children), background_nursery() as nursery:
        for child in pair.children:
            nursery.start_soon(watch, child)
        async with trio.open_nursery() as travellers:
            for name in names:
                travellers.start_soon(one, pair, name)
