"""What it costs to leave clients to the next daemon: the same function with a keeper and without one, in turn."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.bench.measure import (
    BURST,
    MapLoad,
    alternate,
    attach_ms,
    irq_rate,
    read_latency,
)
from vfiouser_oob.lab.bench.raw import RawClient
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.demo.children import running, running_command


async def measure_survival(directory: Path, rounds: int, reads: int, bursts: int) -> list[Result]:
    """Measure register accesses, maps, interrupts' set-up and attach.

    Args:
        directory: for logs and sockets; made.
        rounds: alternating rounds.
        reads: register reads per round.
        bursts: bursts of maps, and of set-ups of interrupts, per round.
    """
    soc = directory / "soc"
    soc.mkdir(parents=True)
    plain, kept = directory / "plain.sock", directory / "kept.sock"
    program = [sys.executable, "-m", "vfiouser_oob"]
    keeper = [*program, "keep", "--socket", f"unix:{directory / 'store'}", "--", *program]
    async with (
        running("simulator", ["simulate-soc", f"--socket-dir={soc}", "--size=1M", "--functions=2"], directory),
        running("plain", _serve(plain, soc / "f0.sock"), directory),
        running_command("kept", [*keeper, *_serve(kept, soc / "f1.sock")], directory),
    ):
        return _compared(plain, kept, rounds, reads, bursts)


def _serve(path: Path, device: Path) -> list[str]:
    options = ["--control-socket", "none", "--log-level", "warning"]
    return ["serve", "--socket-path", os.fspath(path), "--device", f"vfio-user:{device}", *options]


def _compared(plain: Path, kept: Path, rounds: int, reads: int, bursts: int) -> list[Result]:
    attaches = alternate({"plain": lambda: attach_ms(plain), "kept": lambda: attach_ms(kept)}, rounds)
    with ExitStack() as stack:
        memory = stack.enter_context(ClientMemory(1 << 20))
        load = MapLoad(memory.fileno(), 2 * BURST)
        clients = {
            "plain": stack.enter_context(RawClient.attach(plain)),
            "kept": stack.enter_context(RawClient.attach(kept)),
        }
        samples = read_latency(clients, rounds, reads)
        first, second = clients["plain"], clients["kept"]
        for client in clients.values():
            load.grow(client, 0, BURST)
        maps = alternate(
            {"plain": lambda: load.rate(first, BURST, bursts), "kept": lambda: load.rate(second, BURST, bursts)}, rounds
        )
        irqs = alternate({"plain": lambda: irq_rate(first, bursts), "kept": lambda: irq_rate(second, bursts)}, rounds)
    base = "without a keeper"
    read = {name: found.percentile_us(50) for name, found in samples.items()}
    return [
        Result("trapped read, vfio-user, kept", read["kept"], "us", read["plain"], base),
        Result("DMA_MAP/UNMAP, vfio-user, kept", maps["kept"], "messages/s", maps["plain"], base),
        Result("SET_IRQS, vfio-user, kept", irqs["kept"], "messages/s", irqs["plain"], base),
        Result("attach, vfio-user, kept", attaches["kept"], "ms", attaches["plain"], base),
    ]
