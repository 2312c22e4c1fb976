"""The demonstration's processes and files, and the order of events."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.demo.children import Child, blaming, running, watch
from vfiouser_oob.lab.demo.progress import Progress
from vfiouser_oob.lab.demo.scenario import FunctionReport, exercise


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to show.

    Args:
        size: bytes of each namespace; all of it is written and read.
        functions: how many functions.
        doorbells: "trapped" or "polled".
        seed: seed of the data.
    """

    size: int = 64 << 20
    functions: int = 1
    doorbells: str = "polled"
    seed: int = 1


async def show(options: DemoOptions, progress: Progress) -> list[FunctionReport]:
    """Start simulator and daemon, drive every function, stop both.

    Args:
        options: what to show.
        progress: takes one line per step.

    Returns:
        One report per function.

    Raises:
        ChildFailed: a process did not start or died.
        VfioUserError: a function failed.
    """
    names = [f"f{number}" for number in range(options.functions)]
    # Paths of sockets are limited to 107 bytes, so a short directory rather than one below a deep TMPDIR.
    with tempfile.TemporaryDirectory(prefix="vfiouser-") as place:
        directory = Path(place)
        soc = directory / "soc"
        soc.mkdir()
        (directory / "daemon.toml").write_text(_configuration(directory, soc, names), encoding="utf-8")
        progress(f"starting the SoC simulator with {len(names)} NVMe function{'s' * (len(names) > 1)}")
        async with running("simulate-soc", _simulator(options, soc), directory) as simulator:
            progress(f"starting the daemon (simulator is ready, pid {simulator.pid})")
            serve = ["serve", "--config", str(directory / "daemon.toml")]
            async with running("serve", serve, directory) as daemon:
                progress(f"attaching (daemon is ready, pid {daemon.pid})")
                return await _drive(names, directory, options.seed, progress, [simulator, daemon])


async def _drive(
    names: Sequence[str], directory: Path, seed: int, progress: Progress, children: Sequence[Child]
) -> list[FunctionReport]:
    reports: list[FunctionReport] = []
    async with blaming(children), background_nursery() as nursery:
        for child in children:
            nursery.start_soon(watch, child)
        reports += [await exercise(name, directory / f"{name}.sock", seed, progress) for name in names]
    return reports


def _simulator(options: DemoOptions, directory: Path) -> list[str]:
    return [
        "simulate-soc",
        f"--socket-dir={directory}",
        f"--functions={options.functions}",
        f"--size={options.size}",
        f"--doorbells={options.doorbells}",
    ]


def _configuration(directory: Path, soc: Path, names: Sequence[str]) -> str:
    lines = ["[daemon]", f'control_socket = "{directory / "control.sock"}"']
    for name in names:
        lines += [
            "[[function]]",
            f'name = "{name}"',
            f'socket = "{directory / f"{name}.sock"}"',
            f'device = {{ kind = "vfio-user", socket = "{soc / f"{name}.sock"}" }}',
        ]
    return "\n".join(lines) + "\n"
