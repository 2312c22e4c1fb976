"""A daemon that is restarted and killed while a client does I/O with a real function: the function does not notice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from kvfio import bed
from kvfio.bed import INTERFACE, NVME, Daemon, background_client
from kvfio.scenarios import IOVA, MIB, wait_until
from vfiouser_oob.cli.main import main as command
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.transport.fds import LentFd
from vfiouser_protocol.constants import RegionIndex

#: What the daemon does, written by the scenario; how many writes the client has read back, written by that.
PHASE, COUNTS = bed.RUN / "phase", bed.RUN / "counts"
AWAY, BACK, OVER = "away", "back", "over"
EXTRA = IOVA + (64 << 20)
#: A Python of the guest takes ten seconds to start the daemon.
START_S = 180.0
#: Writes that are read back after each life of the daemon has begun.
ENOUGH = 5


@contextmanager
def kept_daemon() -> Iterator[Daemon]:
    """A keeper, whose process this is the handle of, and the daemon that it runs; the log counts its lives."""
    socket, log = bed.RUN / "kept.sock", bed.RUN / "kept.log"
    keeper = os.fork()  # not a program of its own, which would take as long to start as the daemon
    if keeper == 0:
        os._exit(_keep(socket, log))
    try:
        _lives(log, 1)
        socket.chmod(0o666)
        yield Daemon(keeper, socket, bed.RUN / "none", log)
    finally:
        os.kill(keeper, signal.SIGTERM)
        os.waitpid(keeper, 0)


def _keep(socket: Path, log: Path) -> int:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 2)
    device = f"kernel-vfio:{NVME},interface={INTERFACE.value}"
    serve = ["serve", "--socket-path", str(socket), "--control-socket", "none", "--device", device]
    store = f"unix:{bed.RUN}/notify"
    return command(["keep", "--socket", store, "--", sys.executable, "-m", "vfiouser_oob", *serve])


def _lives(log: Path, count: int) -> None:
    wait_until(lambda: log.exists() and log.read_text().count(" ready ") >= count, START_S)


def _say(path: Path, text: str) -> None:
    """Write it whole: somebody else reads it all the time."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.rename(path)


def _counted() -> dict[str, int]:
    away, back = map(int, COUNTS.read_text().split())
    return {AWAY: away, BACK: back}


def _read_back(enough: int) -> bool:
    return _counted()[BACK] >= enough


async def io_over_restarts(path: Path) -> None:
    """Write and read back without a pause, and use what only the daemon does beside it, until the scenario is over."""
    counts = dict.fromkeys((AWAY, BACK), 0)
    async with Client.connect(path) as connected:
        with ClientMemory(8 * MIB, IOVA) as memory:
            await memory.map(connected)
            async with NvmeDriver.open(connected, memory) as driver:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_ask, connected)
                    number = 0
                    while (phase := PHASE.read_text()) != OVER:
                        number += 1
                        data = number.to_bytes(4, "little") * 4096
                        await driver.write(16, data)
                        assert data == await driver.read(16, len(data) // driver.namespace.block_size), number
                        counts[phase] += 1
                        _say(COUNTS, f"{counts[AWAY]} {counts[BACK]}")
                assert min(driver.interrupts) > 0, driver.interrupts
        assert connected.failure is None


async def _ask(connected: Client) -> None:
    """Map, read a register that is not mapped, and unmap; whatever the daemon does, each is answered, once."""
    fd = os.memfd_create("extra")
    os.ftruncate(fd, MIB)
    asked = 0
    while PHASE.read_text() != OVER:
        await connected.dma_map(EXTRA, MIB, fd=LentFd(fd))
        assert await connected.region_read(RegionIndex.CONFIG, 0, 2) == b"\x36\x1b"
        await connected.dma_unmap(EXTRA, MIB)
        asked += 1
        await trio.sleep(0.01)
    os.close(fd)
    print(f"asked={asked}")


def survives() -> None:
    """A restart and a kill -9 under I/O, which goes on meanwhile; no reset, no error, nothing mapped twice."""
    COUNTS.unlink(missing_ok=True)
    _say(PHASE, BACK)
    with kept_daemon() as served, background_client(io_over_restarts, served):
        try:
            wait_until(COUNTS.exists, START_S)
            for life, number in enumerate((signal.SIGUSR2, signal.SIGKILL), 2):
                _say(PHASE, AWAY)
                os.kill(served.pid if number is signal.SIGUSR2 else _child(served.pid), number)
                _lives(served.log, life)
                enough = _counted()[BACK] + ENOUGH
                _say(PHASE, BACK)
                wait_until(partial(_read_back, enough), START_S)
        finally:
            _say(PHASE, OVER)
    counted = _counted()
    print(f"read back while no daemon was there: {counted[AWAY]}; else: {counted[BACK]}")
    assert counted[AWAY] > 0, "the function stood still"
    text = served.log.read_text()
    assert text.count("client goes on after a restart") == 2, text[-3000:]
    assert "cannot be used now" not in text, text[-3000:]


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


SCENARIOS: Mapping[str, Callable[[], None]] = {"survives": survives}
