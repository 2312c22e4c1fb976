"""The client library as VMM against real processes: many migrations of one VM, many VMs at once, and a lot of state."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.demo.children import Child
from vfiouser_oob.lab.demo.hosts import HostOptions, HostPair, two_hosts
from vfiouser_oob.lab.demo.workload import Workload
from vfiouser_oob.lab.vmm.live import LiveOptions, LiveProgress, MigrationPhase
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_oob.lab.vmm.voyage import SideOptions, Voyage

pytestmark = pytest.mark.slow

SMALL_VM = 2 << 20
#: Some commands are in flight at every moment, and most of the processor is left for the migration.
PAUSE_S = 0.02


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


@asynccontextmanager
async def hosts(place: Path, **options: object) -> AsyncIterator[HostPair]:
    """Two hosts that talk to their agents in clear, which is quicker."""
    chosen = HostOptions(tls=False, **options)  # type: ignore[arg-type]
    async with two_hosts(place, chosen, lambda line: None) as pair:
        yield pair


@asynccontextmanager
async def under_io(voyage: Voyage, seed: str, *, writers: int, transfer: int) -> AsyncIterator[Workload]:
    """I/O in the block; afterwards everything that was written is right, and every command was executed once."""
    reads, writes = await voyage.driver.counted_commands()
    workload = Workload(voyage.driver, seed, writers=writers, transfer=transfer, pause_s=PAUSE_S)
    async with background_nursery() as nursery:
        await nursery.start(workload.run)
        yield workload
        await workload.finish()
    await workload.verify()
    assert 0 == workload.counts.mismatches
    counted = (reads + workload.counts.reads, writes + workload.counts.writes)
    assert counted == await voyage.driver.counted_commands()


async def test_ping_pong(place: Path) -> None:
    """Fifty migrations in turn, in both generations, under I/O: nothing lost, nothing done twice, memory carried."""
    async with (
        hosts(place, size=1 << 20, doorbells="trapped") as pair,
        Voyage.open(pair.socket("A", "f0"), memory_size=SMALL_VM, pool_pages=128) as voyage,
        under_io(voyage, "ping-pong", writers=4, transfer=8 << 10) as workload,
    ):
        for number in range(50):
            host, generation = "BA"[number % 2], (Generation.V1, Generation.V2)[number // 2 % 2]
            options = LiveOptions(compare=True, precopy=number % 5 != 4)
            with trio.fail_after(20):
                progress = await voyage.migrate(pair.socket(host, "f0"), generation, options=options)
                assert progress.memory_equal
                await workload.next_write()


class Changed(Exception):
    """The administrator has changed their mind."""


@pytest.mark.parametrize("generation", list(Generation))
async def test_cancel_in_each_phase(place: Path, generation: Generation) -> None:
    """A migration cancelled in any phase leaves the VM at the source under I/O, and the next attempt succeeds."""
    phases = [phase for phase in MigrationPhase if phase not in (MigrationPhase.DONE, MigrationPhase.CANCELLED)]
    async with (
        hosts(place, size=1 << 20, state_size=1 << 20) as pair,
        Voyage.open(pair.socket("A", "f0"), memory_size=SMALL_VM, pool_pages=128) as voyage,
        under_io(voyage, "cancel", writers=4, transfer=8 << 10) as workload,
    ):
        for phase in phases:

            def observe(progress: LiveProgress, phase: MigrationPhase = phase) -> None:
                if progress.phase is phase:
                    raise Changed

            with trio.fail_after(20):
                with pytest.raises(Changed):
                    await voyage.migrate(pair.socket("B", "f0"), generation, observe=observe)
                await workload.next_write()
        with trio.fail_after(20):
            progress = await voyage.migrate(pair.socket("B", "f0"), generation, options=LiveOptions(compare=True))
        assert progress.memory_equal


WAYS = (
    (Generation.V1, SideOptions(use_mapping=False), SideOptions(use_mapping=False)),
    (Generation.V1, SideOptions(use_mapping=False, natural=True), SideOptions(chunk_size=4097)),
    (Generation.V1, SideOptions(), SideOptions(use_mapping=False, natural=True, chunk_size=12345)),
    (Generation.V2, SideOptions(chunk_size=997), SideOptions(chunk_size=65537)),
    (Generation.V2, SideOptions(chunk_size=1 << 19), SideOptions(chunk_size=7)),
)


async def test_every_way_to_take_state(place: Path) -> None:
    """Region accesses instead of memory, tiny pieces, odd and different sizes: all carry the same state."""
    async with (
        hosts(place, size=1 << 20) as pair,
        Voyage.open(pair.socket("A", "f0"), memory_size=SMALL_VM, pool_pages=128) as voyage,
        under_io(voyage, "ways", writers=4, transfer=8 << 10),
    ):
        for number, (generation, here, there) in enumerate(WAYS):
            path = pair.socket("BA"[number % 2], "f0")
            with trio.fail_after(60):
                progress = await voyage.migrate(
                    path, generation, here=here, there=there, options=LiveOptions(compare=True)
                )
            assert progress.memory_equal


def connections(child: Child, port: int) -> int:
    """How many TCP connections a process has to a port."""
    inodes = set()
    for entry in os.listdir(f"/proc/{child.pid}/fd"):
        try:
            target = os.readlink(f"/proc/{child.pid}/fd/{entry}")
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    rows = [line.split() for line in Path(f"/proc/{child.pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and int(row[2].split(":")[1], 16) == port for row in rows)


async def test_sixteen_functions_at_once(place: Path) -> None:
    """Sixteen VMs migrate at the same time through one daemon on each side, which has one connection to its agent."""
    count = 16
    seen: set[int] = set()

    async def one(pair: HostPair, name: str, generation: Generation) -> None:
        async with (
            Voyage.open(pair.socket("A", name), memory_size=SMALL_VM, pool_pages=64) as voyage,
            under_io(voyage, name, writers=2, transfer=4 << 10),
        ):
            ready.append(name)
            if len(ready) == count:
                begin.set()
            await begin.wait()
            port = pair.agent_port("A")

            def observe(progress: LiveProgress) -> None:
                if progress.phase is MigrationPhase.STOP:
                    seen.add(connections(pair.daemon("A"), port))

            progress = await voyage.migrate(
                pair.socket("B", name), generation, options=LiveOptions(compare=True), observe=observe
            )
            assert progress.memory_equal

    ready: list[str] = []
    begin = trio.Event()
    async with hosts(place, size=1 << 20, functions=count, state_size=256 << 10, doorbells="trapped") as pair:
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(one, pair, f"f{number}", list(Generation)[number % 2])
    assert {1} == seen


def resident(child: Child, field: str) -> int:
    """A process's memory in bytes: VmRSS now, or VmHWM at its most."""
    for line in Path(f"/proc/{child.pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"{field} is not there")


# What would be kept of a state shows as well with four times the bound, in a quarter of the time.
@pytest.mark.parametrize(("generation", "size"), [(Generation.V1, 1 << 28), (Generation.V2, 1 << 28)])
async def test_much_state(place: Path, generation: Generation, size: int) -> None:
    """However much state there is, neither daemon grows by more than 64 MiB."""
    async with (
        hosts(place, size=1 << 20, state_size=size, state_churn=0) as pair,
        Voyage.open(pair.socket("A", "f0"), memory_size=SMALL_VM, pool_pages=64) as voyage,
    ):
        before = {host: resident(pair.daemon(host), "VmRSS") for host in "AB"}
        with trio.fail_after(240):
            progress = await voyage.migrate(pair.socket("B", "f0"), generation)
        assert size < progress.total_state
        growth = {host: resident(pair.daemon(host), "VmHWM") - before[host] for host in "AB"}
        assert all(grown <= 64 << 20 for grown in growth.values()), growth
