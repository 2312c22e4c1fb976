"""QEMU's client with migration against real daemons, with each of its habits and all that it does wrong."""

from __future__ import annotations

import errno
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from migrationkit import RESUMING, RUNNING, STOP, Vmm
from rawclient import MIG_DATA_WRITE, connect
from vfiouser_agents.api import AgentState
from vfiouser_agents.errors import InvalidState
from vfiouser_agents.faults import Fails, FaultyAgent
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.config.schema import AgentConfig, MigrationConfig, P2p
from vfiouser_oob.lab.demo.hosts import HostOptions, two_hosts
from vfiouser_oob.lab.vmm.attachment import Attachment, ConfigState
from vfiouser_oob.lab.vmm.live import LiveMigration, LiveOptions, LiveProgress, MigrationPhase, VirtualMachine
from vfiouser_oob.lab.vmm.qemu_v2 import QemuV2Habits, QemuV2Side
from vfiouser_oob.lab.vmm.side import Generation, MigrationFailed
from vfiouser_oob.lab.vmm.voyage import SideOptions, Voyage
from vfiouser_protocol.errors import ReplyError, VfioUserError

BASE = 1 << 32
#: Nothing fails for lack of time here, however busy the machine is.
PATIENT = MigrationConfig(chunk_size=64 << 10, retry_s=0.02)
WITH_P2P = replace(PATIENT, p2p=P2p.ON)
CAPPED = replace(PATIENT, read_cap=128 << 10)


class IdleMachine(VirtualMachine):
    """A VM in which nothing runs."""

    def __init__(self) -> None:
        self.stopped = False
        self.where = ""

    async def stop(self) -> None:
        """Stop."""
        self.stopped = True

    def go(self) -> None:
        """Go on at the source."""
        self.stopped, self.where = False, "source"

    async def save(self) -> ConfigState:
        """Bus mastering and one vector."""
        return ConfigState(6, (0, 0, 0, 0, 0, 0), 1)

    async def arrive(self, place: Attachment) -> None:
        """Go on at the destination."""
        self.stopped, self.where = False, "destination"


@dataclass
class Pair:
    """Two daemons, each with its function, and the agents' side of both."""

    source: MemoryFunction
    destination: MemoryFunction
    agent: FaultyAgent
    paths: tuple[Path, Path]

    @property
    def run(self) -> tuple[bool, bool]:
        """Which of the two functions run."""
        here, there = (device.state is AgentState.RUNNING for device in (self.source, self.destination))
        return here, there

    @property
    def equal(self) -> bool:
        """Whether both have the same state."""
        return self.source.digest() == self.destination.digest()


@asynccontextmanager
async def two_daemons(directory: Path, config: MigrationConfig = PATIENT) -> AsyncIterator[Pair]:
    """Two daemons that know nothing of each other."""
    made = [MemoryFunction(name, 256 << 10, seed, churn=8192) for seed, name in enumerate(("src", "dst"), 1)]
    agent = FaultyAgent(MemoryAgent(made))
    functions = []
    for device in made:
        named = AgentConfig(kind="test", function=device.function_id)
        functions.append(function(directory, device.function_id, agent=named, migration=config))
    async with (
        serving(functions[0], agents={"test": agent}),
        serving(functions[1], agents={"test": agent}),
    ):
        yield Pair(made[0], made[1], agent, (directory / "src.sock", directory / "dst.sock"))


async def migrate(pair: Pair, habits: QemuV2Habits, options: LiveOptions | None = None) -> LiveProgress:
    """Migrate an idle VM from one to the other.

    Raises:
        VfioUserError: it failed.
    """
    machine = IdleMachine()
    here, there = ClientMemory(2 << 20, BASE), ClientMemory(2 << 20, BASE)
    try:
        async with (
            Attachment.open(pair.paths[0], here, use_mapping=False) as source,
            Attachment.open(pair.paths[1], there, use_mapping=False) as target,
        ):
            pair.source.work(changes=3000)
            sides = (QemuV2Side(source.client, habits), QemuV2Side(target.client, habits, memory=there))
            migration = LiveMigration(machine, *sides, here, target, options=options)
            try:
                return await migration.run()
            finally:
                assert not machine.stopped
                if migration.progress.phase is MigrationPhase.DONE:
                    assert (False, True) == pair.run
    finally:
        here.close()
        there.close()


HABITS = {
    "as in review": (QemuV2Habits(), PATIENT, True),
    "without pre-copy": (QemuV2Habits(), PATIENT, False),
    "whole buffers": (QemuV2Habits(whole_buffer=True), PATIENT, True),
    "several functions": (QemuV2Habits(several=True), WITH_P2P, True),
    "several functions, without pre-copy": (QemuV2Habits(several=True), WITH_P2P, False),
    "capped reads": (QemuV2Habits(), CAPPED, True),
    "a server without PRE_COPY": (QemuV2Habits(), replace(PATIENT, precopy=False), True),
}


@pytest.mark.parametrize("name", HABITS)
async def test_it_migrates(tmp_path: Path, name: str) -> None:
    """Whatever its patches and VM are, the function moves, with its state and nothing left running behind."""
    habits, config, precopy = HABITS[name]
    async with two_daemons(tmp_path, config) as pair:
        progress = await migrate(pair, habits, LiveOptions(precopy=precopy, rounds=2, compare=True))
        assert (True, MigrationPhase.DONE) == (progress.memory_equal, progress.phase)
        assert pair.equal
        assert (MigrationPhase.PRE_COPY.value in progress.state_bytes) == (precopy and config.precopy)


BLOCKED = {
    "several functions without P2P": (QemuV2Habits(several=True), MigrationFailed, "only if all of them do P2P"),
    "a pointer for a range": (QemuV2Habits(pointer=True), ReplyError, "DEVICE_FEATURE"),
}


@pytest.mark.parametrize("name", BLOCKED)
async def test_what_is_refused(tmp_path: Path, name: str) -> None:
    """What would corrupt the guest is refused at once, and the function runs on."""
    habits, error, words = BLOCKED[name]
    async with two_daemons(tmp_path) as pair:
        with pytest.raises(error, match=words):
            await migrate(pair, habits)
        assert (True, True) == pair.run


async def test_zeros_in_place_of_state(tmp_path: Path) -> None:
    """Where the source fails in the middle and the client fills up with zeros, nothing of that ever runs."""
    async with two_daemons(tmp_path) as pair:
        before = pair.destination.digest()
        pair.agent.inject("save", Fails(InvalidState("not now")), after=1, count=None)
        with pytest.raises(VfioUserError):
            await migrate(pair, QemuV2Habits(fills_up=True), LiveOptions(rounds=1))
        assert pair.run[0]
        assert not pair.equal
        assert before == pair.destination.digest() or not pair.run[1]


async def test_pause_and_go_on(tmp_path: Path) -> None:
    """Plain `stop` and `cont` of a VM of several functions go through the P2P states, and begin nothing."""
    async with two_daemons(tmp_path, WITH_P2P) as pair:
        memory = ClientMemory(1 << 20, BASE)
        async with Attachment.open(pair.paths[0], memory, use_mapping=False) as place:
            side = QemuV2Side(place.client, QemuV2Habits(several=True))
            for runs in (False, True, False, True):
                await side.vm_runs(runs)
                assert runs == pair.run[0]
        memory.close()


async def test_a_write_of_which_a_part_arrives(tmp_path: Path) -> None:
    """A write that is counted as sent when half of it was: what follows is taken for data, and no such load runs."""
    async with two_daemons(tmp_path) as pair:
        client = Vmm((await connect(pair.paths[1])).sock)
        await client.negotiate()
        await client.set_state(RESUMING)
        message = client.pack(MIG_DATA_WRITE, struct.pack("<II", 8 + (1 << 20), 1 << 20) + bytes(1 << 20))
        await client.send(message[: 600 << 10])
        await client.send(client.pack(16, struct.pack("<IIII", 16, 0x20002, RUNNING, 0)))
        client.close()
        client = Vmm((await connect(pair.paths[1])).sock)
        await client.negotiate()
        assert RUNNING == await client.state()
        assert pair.run[1]
        assert 0 == pair.destination.counter
        client.close()


async def test_a_reset_after_a_failed_set(tmp_path: Path) -> None:
    """After a SET that fails, DEVICE_RESET succeeds whatever it failed in, since QEMU ends the VM otherwise."""
    async with two_daemons(tmp_path) as pair:
        client = Vmm((await connect(pair.paths[1])).sock)
        await client.negotiate()
        for begin in (STOP, RESUMING):
            await client.set_state(begin)
            if begin == RESUMING:
                assert errno.EINVAL == await client.data_write_errno(b"no stream at all" * 8)
            assert errno.EINVAL == await client.set_state_errno(77)
            if begin == RESUMING:
                assert await client.set_state_errno(RUNNING)
            assert 0 == (await client.command(13)).error
            assert RUNNING == await client.state()
        client.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="qv-") as name:
        yield Path(name)


@pytest.mark.slow
async def test_between_two_hosts_under_io(place: Path) -> None:
    """An NVMe function moves between two real daemons and back with each habit, and its driver goes on."""
    options = HostOptions(tls=False, size=1 << 20, state_size=3 << 20, migration='p2p = "on", read_cap = "128K"')
    habits = (
        QemuV2Habits(),
        QemuV2Habits(whole_buffer=True),
        QemuV2Habits(several=True),
        QemuV2Habits(several=True, whole_buffer=True),
    )
    async with (
        two_hosts(place, options, lambda line: None) as pair,
        Voyage.open(pair.socket("A", "f0"), memory_size=2 << 20, pool_pages=64) as voyage,
    ):
        for number, chosen in enumerate(habits):
            sides = SideOptions(qemu=chosen)
            path = pair.socket("BA"[number % 2], "f0")
            with trio.fail_after(60):
                progress = await voyage.migrate(
                    path, Generation.V2, options=LiveOptions(compare=True), here=sides, there=sides
                )
                assert progress.memory_equal
                await voyage.driver.write(number * 8, bytes([number + 1]) * 4096)
                assert bytes([number + 1]) * 4096 == await voyage.driver.read(number * 8, 8)
