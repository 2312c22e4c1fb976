"""The measurements themselves; each drives processes that `stage` has started."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

from vfiouser_oob.lab.bench.peers import READ_REPLY_SIZE, READ_REQUEST_SIZE
from vfiouser_oob.lab.bench.raw import RawClient, message
from vfiouser_oob.lab.bench.results import Samples
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import HEADER_SIZE, Command, IrqIndex, IrqSetFlags
from vfiouser_protocol.messages import DmaMap, DmaUnmap, RegionRead, SetIrqs

BURST = 64
#: Register that is read: the NVMe version, which has no side effects and no other use.
REGISTER_READ = message(Command.REGION_READ, encode(RegionRead(0x08, 0, 4)))
_MAP_REPLY_SIZE = HEADER_SIZE
_UNMAP_REPLY_SIZE = HEADER_SIZE + 24
_PAGE = 4096
#: Exchanges before each round that do not count.
_WARM_UP = 50
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def read_latency(clients: Mapping[str, RawClient], rounds: int, count: int) -> dict[str, Samples]:
    """Round trips of a trapped 4-byte read, the same bytes for each peer, in alternating rounds.

    Args:
        clients: connected clients by name.
        rounds: how many rounds.
        count: round trips of each client per round.
    """
    assert len(REGISTER_READ) == READ_REQUEST_SIZE
    samples = {name: Samples() for name in clients}
    for _ in range(rounds):
        for name, client in clients.items():
            client.round_trips(REGISTER_READ, READ_REPLY_SIZE, _WARM_UP)
            samples[name].add(client.round_trips(REGISTER_READ, READ_REPLY_SIZE, count))
    return samples


class MapLoad:
    """DMA_MAP and DMA_UNMAP messages for ranges of one page each, all of one file.

    Args:
        fd: the file; stays the caller's.
        total: how many ranges there are at most.
    """

    def __init__(self, fd: int, total: int) -> None:
        self._fds = [fd]
        # Each second page, so that no two ranges are neighbours, in an order that no tree likes.
        numbers = list(range(total))
        random.Random(1).shuffle(numbers)
        self._addresses = [0x1_0000_0000 + 2 * _PAGE * number for number in numbers]

    def grow(self, client: RawClient, start: int, end: int) -> None:
        """Map the ranges number `start` to `end` - 1."""
        for first in range(start, end, BURST):
            client.burst(self._maps(first, min(first + BURST, end)), self._fds, _MAP_REPLY_SIZE)

    def rate(self, client: RawClient, present: int, bursts: int) -> float:
        """Messages per second of bursts that map and unmap 64 ranges beyond the `present` ones."""
        maps, unmaps = self._maps(present, present + BURST), self._unmaps(present, present + BURST)
        start = time.perf_counter()
        for _ in range(bursts):
            client.burst(maps, self._fds, _MAP_REPLY_SIZE)
            client.burst(unmaps, (), _UNMAP_REPLY_SIZE)
        return 2 * BURST * bursts / (time.perf_counter() - start)

    def _maps(self, start: int, end: int) -> list[bytes]:
        return [
            message(Command.DMA_MAP, encode(DmaMap(32, 3, 0, address, _PAGE)), number)
            for number, address in enumerate(self._addresses[start:end])
        ]

    def _unmaps(self, start: int, end: int) -> list[bytes]:
        return [
            message(Command.DMA_UNMAP, encode(DmaUnmap(24, 0, address, _PAGE)), number)
            for number, address in enumerate(self._addresses[start:end])
        ]


def irq_rate(client: RawClient, count: int) -> float:
    """SET_IRQS per second, one after the other, each with an eventfd for MSI-X vector 0.

    Args:
        client: the client.
        count: how many bursts of 16.
    """
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
    request = message(Command.DEVICE_SET_IRQS, encode(SetIrqs(20, int(flags), IrqIndex.MSIX, 0, 1, b"")))
    with OwnedFd(os.eventfd(0)) as event:
        start = time.perf_counter()
        for _ in range(16 * count):
            client.burst([request], [event.fileno()], HEADER_SIZE)
        return 16 * count / (time.perf_counter() - start)


def alternate(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Take measurements in turn, several times; returns the median of each."""
    values: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            values[name].append(measure())
    return {name: median(found) for name, found in values.items()}


def attach_ms(path: Path) -> float:
    """Milliseconds from connect() to the end of what a VMM asks before its guest runs."""
    start = time.perf_counter()
    with RawClient.attach(path):
        return 1000 * (time.perf_counter() - start)


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB (10^6 bytes)."""
    fields = _status_fields(Path(f"/proc/{pid}/status"))
    return int(fields["VmRSS"].split()[0]) * 1024 / 1e6


def proportional_mb(pid: int) -> float:
    """Memory of a process in MB (10^6 bytes), pages that it shares with others counted by its share (PSS)."""
    fields = _status_fields(Path(f"/proc/{pid}/smaps_rollup"))
    return int(fields["Pss"].split()[0]) * 1024 / 1e6


def open_descriptors(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def wake_ups(pid: int) -> int:
    """How often the threads of a process have gone to sleep by themselves so far, each of which ended in a
    wake-up.
    """
    return sum(wake_ups_by_thread(pid).values())


def wake_ups_by_thread(pid: int) -> dict[int, int]:
    """The same of each thread, by its id: the count of one that ends is lost, and must not be taken for sleep."""
    found = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):  # it has just ended
            fields = _status_fields(Path(f"/proc/{pid}/task/{task}/status"))
            found[int(task)] = int(fields["voluntary_ctxt_switches"])
    return found


def processor_ns(pid: int) -> int:
    """Nanoseconds that the threads of a process have run so far; that of one that ends is lost."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text(encoding="utf-8").split()[0])
    return total


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    # The name in parentheses may hold anything, so the fields are counted from behind it.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def idle_cost(pids: Sequence[int], seconds: float) -> list[tuple[float, float]]:
    """Wake-ups per second and share of a CPU, in percent, of each process while nothing happens."""
    # What was just measured may still be settling.
    time.sleep(0.5)
    before = [(wake_ups(pid), cpu_seconds(pid)) for pid in pids]
    time.sleep(seconds)
    after = [(wake_ups(pid), cpu_seconds(pid)) for pid in pids]
    return [
        ((later[0] - earlier[0]) / seconds, 100 * (later[1] - earlier[1]) / seconds)
        for earlier, later in zip(before, after, strict=True)
    ]


def _status_fields(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
