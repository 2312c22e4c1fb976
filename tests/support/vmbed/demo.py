"""`python -m vmbed.demo`: a Linux guest moves to another QEMU and back by plain `migrate`, under verified I/O.

Two hosts are played on this machine, each a simulated SoC with an NVMe function, its agent, and a daemon. QEMU is
Debian's, unmodified. Nothing needs root.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import trio

from vmbed.assets import Assets, locate
from vmbed.errors import BedError
from vmbed.guest import Guest
from vmbed.hosts import FINAL, Host, HostConfig, host, make_disk, migrate
from vmbed.load import begin_load, goes_on, quiet, rounds
from vmbed.qemu import Qemu

__all__ = ["Hop", "bar", "histogram", "main"]

#: Names of the hosts.
HOSTS = ("a", "b")
HOPS = 2
#: Upper ends of the histogram's classes, in milliseconds.
CLASSES = (50, 100, 200, 500, 1000, 2000)
_BAR = 24
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Hop:
    """One migration.

    Args:
        way: from where to where.
        seconds: from `migrate` until the VM ran at the destination.
        moved: bytes that QEMU sent.
        downtime_ms: for which the VM stood, as QEMU says.
        stood_ms: for which its functions stood, as both daemons say: from their stop until they ran.
        rounds: how many of the guest's rounds went well by the time it was over.
    """

    way: str
    seconds: float
    moved: int
    downtime_ms: int
    stood_ms: float
    rounds: int


def bar(part: float) -> str:
    """A progress bar.

    Args:
        part: what is done, 0 to 1.
    """
    filled = int(max(0.0, min(part, 1.0)) * _BAR)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {max(0.0, min(part, 1.0)):4.0%}"


def histogram(milliseconds: Sequence[int]) -> list[str]:
    """How many rounds took how long, one line for each class that there is.

    Args:
        milliseconds: for each round.
    """
    lines, low = [], 0
    most = max(len(milliseconds), 1)
    for high in (*CLASSES, None):
        count = sum(low <= each and (high is None or each < high) for each in milliseconds)
        name = f"{low} ms and more" if high is None else f"{low} to {high} ms"
        if count:
            lines.append(f"{name:>16}  {count:6}  {'#' * max(1, count * 40 // most)}")
        low = high or low
    return lines


class Progress:
    """One line that is redrawn on a terminal; elsewhere only its last state is shown.

    Args:
        stream: where it goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def step(self, text: str) -> None:
        """Show something that is done."""
        print(text, file=self._stream, flush=True)

    def show(self, text: str, *, last: bool = False) -> None:
        """Show how far it is."""
        if self._stream.isatty():
            print(f"\r{text}\x1b[K", end="\n" if last else "", file=self._stream, flush=True)
        elif last:
            self.step(text)


async def hop(hosts: tuple[Host, Host], source: Qemu, destination: Qemu, stream: Path, progress: Progress) -> Hop:
    """Migrate from one host to the other, and show how far it is.

    Raises:
        BedError: it failed.
    """
    here, there = hosts
    way = f"{here.folder.name} → {there.folder.name}"
    began = time.monotonic()
    await migrate(source, destination, stream)
    while (found := await source.qmp.execute("query-migrate")).get("status") not in FINAL:
        ram = found.get("ram", {})
        total = ram.get("total", 0)
        part = (total - ram.get("remaining", total)) / total if total else 0.0
        progress.show(f"{way}  {bar(part)}  {found.get('status', '')}")
        await trio.sleep(_LOOK_S)
    if found["status"] != "completed":
        raise BedError(f"the migration {way} {found['status']}: {found.get('error-desc', 'no reason given')}")
    await destination.qmp.event("RESUME")
    seconds, moved = time.monotonic() - began, found["ram"]["transferred"]
    count = await goes_on(destination.guest)
    progress.show(f"{way}  {bar(1)}  completed, and the guest goes on", last=True)
    stood = await here.stood_ms("out") + await there.stood_ms("in")
    return Hop(way, seconds, moved, found.get("downtime", 0), stood, count)


async def run(assets: Assets, workdir: Path, hops: int, progress: Progress) -> None:
    """Boot the guest, move it to and fro, and tell how it went."""
    disk = make_disk(workdir)
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        here, there = [await stack.enter_async_context(host(workdir, name, disk, HostConfig())) for name in HOSTS]
        progress.step("two hosts: each a simulated SoC, its agent and a daemon")
        qemu = await stack.enter_async_context(here.machine(assets))
        await qemu.guest.ready()
        progress.step(
            f"QEMU {assets.qemu_version}: Linux {assets.kernel_version} is up ({time.monotonic() - began:.0f} s)"
        )
        await begin_load(qemu.guest)
        done = []
        for _ in range(hops):
            other = await stack.enter_async_context(there.machine(assets, incoming=("-incoming", "defer")))
            await there.phase("incoming")
            done.append(await hop((here, there), qemu, other, workdir / "stream", progress))
            await qemu.kill()
            await here.phase("absent")  # only then it can be a destination
            qemu, here, there = other, there, here
        await summarize(qemu.guest, done, progress)


async def summarize(guest: Guest, hops: Sequence[Hop], progress: Progress) -> None:
    """Tell how it went."""
    progress.step("\nway     seconds  sent by QEMU  VM stood  functions stood  rounds verified by then")
    for each in hops:
        sent = f"{each.moved / (1 << 20):.1f} MiB"
        stood = f"{each.downtime_ms:5} ms {each.stood_ms:12.0f} ms"
        progress.step(f"{each.way}  {each.seconds:7.1f}  {sent:>12}  {stood}  {each.rounds:10}")
    times = await rounds(guest)
    progress.step(
        "\nwrite 64 KiB, read back, compare: rounds by their time on the guest's clock, which stands with the VM"
    )
    for line in histogram(times):
        progress.step(line)
    await quiet(guest)
    progress.step(
        f"\nverified: {len(times)} rounds read back what they wrote, the longest in {max(times)} ms; the guest's driver"
        " had no reset and no timeout"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo-vm", description=__doc__)
    parser.add_argument("--hops", type=int, default=HOPS, help=f"migrations (default: {HOPS}, there and back)")
    args = parser.parse_args(argv)
    workdir = Path(tempfile.mkdtemp(prefix="demo-vm-"))
    try:
        trio.run(run, locate(), workdir, args.hops, Progress(sys.stdout))
    except BaseExceptionGroup as errors:
        found = errors.subgroup(BedError)
        if found is None:
            raise
        sys.stderr.write(f"demo-vm: {found.exceptions[0]}\n")
        return 1
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
