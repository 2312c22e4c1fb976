"""What it costs to leave clients to the next daemon: the same function with a keeper and without one, in turn."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.bench import budgets
from vfiouser_oob.lab.bench.measure import (
    BURST,
    REGISTER_READ,
    MapLoad,
    alternate,
    attach_ms,
    irq_rate,
    read_latency,
)
from vfiouser_oob.lab.bench.peers import READ_REPLY_SIZE
from vfiouser_oob.lab.bench.raw import RawClient
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.demo.children import Child, running, running_command

#: More starts than a keeper allows by itself are asked for here.
_STARTS = "1000"


async def measure_survival(directory: Path, rounds: int, reads: int, bursts: int) -> list[Result]:
    """Measure register accesses, maps, interrupts' set-up and attach, and how long a client waits for the next daemon.

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
    keeper = [*program, "keep", f"--socket=unix:{directory / 'store'}", "--max-starts", _STARTS, "--", *program]
    async with (
        running("simulator", ["simulate-soc", f"--socket-dir={soc}", "--size=1M", "--functions=2"], directory),
        running("plain", _serve(plain, soc / "f0.sock"), directory),
        running_command("kept", [*keeper, *_serve(kept, soc / "f1.sock")], directory) as child,
    ):
        return [*_compared(plain, kept, rounds, reads, bursts), *_silences(kept, child, max(2, rounds // 2))]


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


def _silences(path: Path, keeper: Child, times: int) -> list[Result]:
    """How long a client that reads all the time waits while the daemon restarts, and after it was killed."""
    with RawClient.attach(path) as client:
        restarts = [_silence(client, keeper, lambda _: os.kill(keeper.pid, signal.SIGUSR2)) for _ in range(times)]
        kills = [_silence(client, keeper, lambda daemon: os.kill(daemon, signal.SIGKILL)) for _ in range(times)]
    return [
        Result(what, median(found), "ms", budget=budgets.RESTART_MS, details={"max": max(found)})
        for what, found in (("restart, without an answer", restarts), ("kill -9, without an answer", kills))
    ]


def _silence(client: RawClient, keeper: Child, disturb: Callable[[int], None]) -> float:
    """Milliseconds that the slowest read takes, until one was sent to the next daemon and answered."""
    before = _daemon_of(keeper)
    disturb(before)
    worst = 0.0
    while True:
        now = _daemon_of(keeper)
        start = time.perf_counter()
        client.round_trips(REGISTER_READ, READ_REPLY_SIZE, 1)
        worst = max(worst, 1000 * (time.perf_counter() - start))
        if now not in (0, before):
            return worst


def _daemon_of(keeper: Child) -> int:
    """The process that a keeper runs now; 0: none."""
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text(encoding="ascii").split()
    return int(children[0]) if children else 0
