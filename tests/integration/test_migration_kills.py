"""Any process of a migration is killed -9 in any phase: one copy runs at most, and what must stay stopped does.

All of it is judged by what the hosts' agents say, not by what a daemon believes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from killbed.hosts import Host, Service
from killbed.trip import Phase, Trip
from vfiouser_agents.api import AgentState, Role
from vfiouser_oob.client.client import Client
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_protocol.constants import DeviceState, RegionIndex
from vfiouser_protocol.errors import ReplyError

pytestmark = pytest.mark.slow

RUNNING, STOPPED, LOADING = AgentState.RUNNING, AgentState.STOPPED, AgentState.LOADING
CC, CSTS = 0x14, 0x1C


class Bed(NamedTuple):
    """Both hosts."""

    directory: Path
    source: Host
    destination: Host


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """Two hosts, up."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        directory = Path(name)
        (directory / "disk").write_bytes(bytes(1 << 20))
        hosts = Host(directory, "a"), Host(directory, "b")
        try:
            # The agents wait for no device and the daemons for no agent, so all of them may start together.
            for kind in zip(*(host.services for host in hosts), strict=True):
                for service, notify in [(service, service.begin()) for service in kind]:
                    service.await_ready(notify)
            yield Bed(directory, *hosts)
            # A contact that is lost is nobody's bug.
            assert [] == [line for host in hosts for line in host.daemon.log.splitlines() if "bug:" in line]
        finally:
            for host in hosts:
                for service in reversed(host.services):
                    service.close()


async def register(client: Client, offset: int) -> int:
    """Read a register of the controller."""
    return int.from_bytes(await client.region_read(RegionIndex.BAR0, offset, 4), "little")


async def stays_stopped(host: Host, state: AgentState) -> None:
    """Without a client it does what it did, as a daemon knows that may be new; the next attach resets it."""
    await host.until_fenced()
    assert state is (await host.status()).state
    async with Client.connect(host.socket) as client:
        status = await host.until(RUNNING)
        assert status.role is None
        assert 0 == await register(client, CC)


async def migrate_again(bed: Bed, generation: Generation) -> None:
    """Whatever was killed, the next migration succeeds."""
    async with Trip.open(bed.source.socket, bed.destination.socket, generation) as trip:
        await trip.go(Phase.LOADED)
        await finish(bed, trip)


async def finish(bed: Bed, trip: Trip) -> None:
    """The destination takes over, with the controller as the guest had it."""
    await trip.destination.start()
    assert RUNNING is (await bed.destination.status()).state
    assert 1 == await register(trip.target.client, CSTS) & 1


async def go_back(bed: Bed, trip: Trip) -> None:
    """The source goes on where it was."""
    await trip.source.cancel()
    assert RUNNING is (await bed.source.until(RUNNING)).state
    await trip.verify_io()


def at_source(phase: Phase) -> AgentState:
    """What the function does at the source while a client holds the migration in a phase."""
    return RUNNING if phase is Phase.PRE_COPY else STOPPED


GENERATIONS = list(Generation)
CASES = [
    # Each victim dies under either generation, in turns.
    pytest.param(victim, phase, GENERATIONS[(row + column) % 2], id=f"{victim}-{phase.value}")
    for row, victim in enumerate(("agent", "device", "daemon"))
    for column, phase in enumerate(Phase)
]


async def kill(victim: str, host: Host) -> None:
    """Kill one of a host's processes, and start it again."""
    service: Service = getattr(host, victim)
    service.kill()
    await service.start()


@pytest.mark.parametrize(("victim", "phase", "generation"), CASES)
async def test_source(bed: Bed, victim: str, phase: Phase, generation: Generation) -> None:
    """A part of the source dies: before the trailer it goes on or stays fenced, after it the destination takes over."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, generation) as trip:
            await trip.go(phase)
            await kill(victim, bed.source)
            # A device that was killed took its state along; the new one has none.
            held = RUNNING if victim == "device" else at_source(phase)
            assert (held, LOADING) == ((await bed.source.status()).state, (await bed.destination.status()).state)
            if phase is Phase.LOADED:
                await finish(bed, trip)
                assert held is (await bed.source.status()).state
            elif victim == "agent":
                await go_back(bed, trip)
                held = RUNNING
                assert LOADING is (await bed.destination.status()).state
        if held is STOPPED:
            await stays_stopped(bed.source, STOPPED)
        assert RUNNING is (await bed.source.status()).state
        if phase is not Phase.LOADED:
            await stays_stopped(bed.destination, LOADING)
        await migrate_again(bed, generation)


@pytest.mark.parametrize(("victim", "phase", "generation"), CASES)
async def test_destination(bed: Bed, victim: str, phase: Phase, generation: Generation) -> None:
    """A part of the destination dies: the client lets the source go on, and what was loaded never runs."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, generation) as trip:
            await trip.go(phase)
            await kill(victim, bed.destination)
            held = RUNNING if victim == "device" else LOADING
            assert at_source(phase) is (await bed.source.status()).state
            assert held is (await bed.destination.status()).state
            await go_back(bed, trip)
            assert held is (await bed.destination.status()).state
        assert RUNNING is (await bed.source.status()).state
        if held is LOADING:
            await stays_stopped(bed.destination, LOADING)
        await migrate_again(bed, generation)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("phase", list(Phase))
async def test_client(bed: Bed, phase: Phase, generation: Generation) -> None:
    """The client dies: a source that kept its trailer goes on by itself, any other copy stays stopped until a reset."""
    arguments = [str(bed.source.socket), str(bed.destination.socket), generation.value, phase.value]
    client = Service("client", "killbed.client", arguments, bed.directory)
    try:
        with trio.fail_after(60):
            await client.start()
            assert at_source(phase) is (await bed.source.status()).state
            client.kill()
            if phase.handed:
                await stays_stopped(bed.source, STOPPED)
            else:
                await bed.source.until(RUNNING)
            await stays_stopped(bed.destination, LOADING)
            await migrate_again(bed, generation)
    finally:
        client.close()


# The agent stays away: what becomes of a VM of QEMU's


async def set_as_qemu(trip: Trip, state: DeviceState, *, there: bool = False) -> bool:
    """As QEMU's v2 client does it: what fails is followed by a reset, and a reset that fails is the end of the VM.

    Returns:
        Whether the function got there.
    """
    client = trip.target.client if there else trip.place.client
    try:
        await client.set_device_state(state)
    except ReplyError:
        await client.reset()
        assert DeviceState.RUNNING == await client.get_device_state()
        return False
    assert state == await client.get_device_state()
    return True


async def test_a_vm_is_paused_without_its_agent(bed: Bed) -> None:
    """`stop` and `cont` without the agent, as often as one likes: the guest's queues go on, and nothing is lost."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, Generation.V2) as trip:
            bed.source.agent.kill()
            try:
                for _ in range(3):
                    assert await set_as_qemu(trip, DeviceState.STOP)
                    assert await set_as_qemu(trip, DeviceState.RUNNING)
                    await trip.verify_io()
            finally:
                await bed.source.agent.start()
            assert await set_as_qemu(trip, DeviceState.STOP)
            assert STOPPED is (await bed.source.status()).state
            assert await set_as_qemu(trip, DeviceState.RUNNING)
            await trip.verify_io()
        await migrate_again(bed, Generation.V2)


async def test_a_vm_whose_agent_is_started_again(bed: Bed) -> None:
    """An agent that is killed and started while the VM is paused, and while it goes on, costs time and nothing else."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, Generation.V2) as trip:
            for state, held in ((DeviceState.STOP, STOPPED), (DeviceState.RUNNING, RUNNING)):
                await kill("agent", bed.source)
                assert await set_as_qemu(trip, state)
                assert held is (await bed.source.status()).state
            await trip.verify_io()


async def test_a_cancelled_precopy_without_the_agent(bed: Bed) -> None:
    """The function was never stopped: the migration is cancelled without its agent, and I/O goes on."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, Generation.V2) as trip:
            await trip.go(Phase.PRE_COPY)
            bed.source.agent.kill()
            try:
                assert await set_as_qemu(trip, DeviceState.RUNNING)
                await trip.verify_io()
            finally:
                await bed.source.agent.start()
            await trip.verify_io()
        await stays_stopped(bed.destination, LOADING)
        await migrate_again(bed, Generation.V2)


@pytest.mark.parametrize("phase", list(Phase))
async def test_a_source_whose_agent_stays_away(bed: Bed, phase: Phase) -> None:
    """The next step fails and the reset that follows does not; nothing runs before the agent has reset it."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, Generation.V2) as trip:
            await trip.go(phase)
            bed.source.agent.kill()
            try:
                step = DeviceState.STOP_COPY if phase is Phase.PRE_COPY else DeviceState.RUNNING
                assert not await set_as_qemu(trip, step)
                # The machine is reset, and paused and let go on, and lives.
                await trip.place.client.reset()
                assert await set_as_qemu(trip, DeviceState.STOP)
                assert await set_as_qemu(trip, DeviceState.RUNNING)
            finally:
                await bed.source.agent.start()
            assert (await bed.source.until(RUNNING)).role in (None, Role.SOURCE)
            assert 0 == await register(trip.place.client, CC)
            assert LOADING is (await bed.destination.status()).state
        await stays_stopped(bed.destination, LOADING)
        await migrate_again(bed, Generation.V2)


@pytest.mark.parametrize("phase", [Phase.PRE_COPY, Phase.LOADING, Phase.LOADED])
async def test_a_destination_whose_agent_stays_away(bed: Bed, phase: Phase) -> None:
    """What was loaded never runs; the reset succeeds, and is done when the agent is back. The source goes on."""
    with trio.fail_after(60):
        async with Trip.open(bed.source.socket, bed.destination.socket, Generation.V2) as trip:
            await trip.go(phase)
            bed.destination.agent.kill()
            try:
                assert not await set_as_qemu(trip, DeviceState.RUNNING, there=True)
            finally:
                await bed.destination.agent.start()
            await bed.destination.until(RUNNING)
            assert 0 == await register(trip.target.client, CC)
            await go_back(bed, trip)
        await migrate_again(bed, Generation.V2)
