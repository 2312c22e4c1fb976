"""The simulated SoC as real processes that are killed apart: device, agent, and whoever uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme
from xxhash import xxh3_128_digest

from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import AgentState, Outcome, Phase, Range, Role, Session
from vfiouser_agents.errors import AgentError, AuthError, ConnectError, Incompatible
from vfiouser_agents.rpc.endpoint import TlsOptions, parse_address
from vfiouser_agents.testing import CheckOutcome, check_agent
from vfiouser_oob.client.client import Client
from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.client.mapping import MappedRegion
from vfiouser_oob.lab.demo.children import Child, running
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_protocol.constants import IrqIndex

pytestmark = pytest.mark.slow

MEMORY_BASE, MEMORY_SIZE = 0x2_0000_0000, 16 << 20
CHUNK = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


@asynccontextmanager
async def soc(place: Path, *options: str, name: str = "soc") -> AsyncIterator[Child]:
    """A simulator or a part of it, with its sockets in the directory."""
    async with running(name, ["simulate-soc", f"--socket-dir={place}", "--size=8M", *options], place) as child:
        yield child


def agent_file(place: Path) -> dict[str, object]:
    """What the agent says about itself."""
    found: dict[str, object] = json.loads((place / "agent.json").read_text())
    return found


def agent_at(place: Path, tls: TlsOptions | None = None) -> MsgpackRpcAgent:
    """A client of the agent."""
    addresses = agent_file(place)["addresses"]
    assert isinstance(addresses, list)
    return MsgpackRpcAgent(parse_address(addresses[0]), tls=tls)


def kill_agent(place: Path) -> None:
    """Kill the agent process the hard way."""
    pid = agent_file(place)["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)


async def state_of(place: Path) -> AgentState:
    """What the function does, asked as soon as an agent answers."""
    with trio.fail_after(30):
        while True:
            try:
                async with agent_at(place) as agent:
                    return (await (await agent.open("f0")).status()).state
            except (ConnectError, AgentError):
                await trio.sleep(0.05)


@asynccontextmanager
async def driver(place: Path, memory: ClientMemory) -> AsyncIterator[NvmeDriver]:
    """A driver bound to f0."""
    async with Client.connect(place / "f0.sock", dma_server=memory) as client:
        await memory.map(client)
        async with NvmeDriver.open(client, memory) as nvme:
            yield nvme


async def save(session: Session, offset: int, phase: Phase) -> bytes:
    """Everything that there is to save now."""
    parts = []
    while True:
        chunk = await session.save(offset, CHUNK, phase)
        parts.append(chunk.data)
        offset += len(chunk.data)
        if chunk.eof or chunk.drained:
            return b"".join(parts)


async def load(session: Session, stream: bytes) -> None:
    """Load a whole stream."""
    await session.load_begin(len(stream))
    for start in range(0, len(stream), CHUNK):
        await session.load(start, stream[start : start + CHUNK])
    await session.load_commit(len(stream), xxh3_128_digest(stream))


async def test_live_agent_keeps_the_contract(place: Path) -> None:
    """All of the contract, through both processes, over TCP, with state memory and shared device memory."""
    async with soc(place, "--state-size=1M", "--cmb=2M", "--doorbells=polled"):
        results = await check_agent(lambda: agent_at(place), function_id="f0")
        assert [] == [result for result in results if result.outcome is not CheckOutcome.PASSED]


async def test_stop_survives_the_agent(place: Path) -> None:
    """A killed agent process comes back at the same address; the function is still stopped, in the same migration."""
    async with soc(place):
        before = agent_file(place)
        async with agent_at(place) as agent:
            session = await agent.open("f0")
            await session.begin(Role.SOURCE, "first")
            await session.stop()
            first = await save(session, 0, Phase.FINAL)
            kill_agent(place)
            assert AgentState.STOPPED is await state_of(place)
            assert before["addresses"] == agent_file(place)["addresses"]
            assert before["pid"] != agent_file(place)["pid"]
            session = await agent.open("f0")
            await session.begin(Role.SOURCE, "first")
            status = await session.status()
            assert (AgentState.STOPPED, Role.SOURCE, "first") == (status.state, status.role, status.migration_id)
            assert first == await save(session, 0, Phase.FINAL)
            await session.resume()
            await session.end(Outcome.CANCELLED)
        assert AgentState.RUNNING is await state_of(place)


@pytest.mark.parametrize("retain", [False, True])
async def test_stop_survives_the_client(place: Path, retain: bool) -> None:
    """A client that goes leaves a stopped function stopped; the next one finds it reset, or resets it if it likes."""
    with ClientMemory(MEMORY_SIZE, base=MEMORY_BASE) as memory:
        async with soc(place, *(["--retain-state"] if retain else [])):
            async with agent_at(place) as agent:
                session = await agent.open("f0")
                async with Client.connect(place / "f0.sock", dma_server=memory) as client:
                    await memory.map(client)
                    await session.stop()
                assert AgentState.STOPPED is (await session.status()).state
            assert AgentState.STOPPED is await state_of(place)
            async with Client.connect(place / "f0.sock", dma_server=memory) as client:
                assert (AgentState.STOPPED if retain else AgentState.RUNNING) is await state_of(place)
                await client.reset()
                assert AgentState.RUNNING is await state_of(place)
            async with driver(place, memory) as nvme:
                await nvme.write(0, b"x" * 512)


async def test_parts_are_killed_apart(place: Path) -> None:
    """An agent alone answers for a device that is not there with a clear error, and for one that comes back with it."""
    async with soc(place, "--agent-only", name="agent"), agent_at(place) as agent:
        with pytest.raises(ConnectError, match=r"device\.sock"):
            await agent.open("f0")
        async with soc(place, "--device-only", name="device") as device:
            session = await agent.open("f0")
            await session.begin(Role.SOURCE, "one")
            await session.stop()
            device.process.send_signal(signal.SIGKILL)
            await device.process.wait()
            with pytest.raises(AgentError):
                await session.save(0, 1, Phase.FINAL)
        async with soc(place, "--device-only", name="device2"):
            assert AgentState.RUNNING is await state_of(place)


async def test_device_takes_its_agent_along(place: Path) -> None:
    """A killed device process leaves no agent behind that would hold its address."""
    async with soc(place) as device:
        pid = agent_file(place)["pid"]
        assert isinstance(pid, int)
        agent = os.pidfd_open(pid)
        try:
            device.process.send_signal(signal.SIGKILL)
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(agent)
        finally:
            os.close(agent)


async def test_no_agent(place: Path) -> None:
    """Without an agent there is neither its file nor the socket for it."""
    async with soc(place, "--no-agent"):
        assert {"f0.sock"} == {name for name in os.listdir(place) if name.endswith((".sock", ".json"))}


def certificates(place: Path) -> tuple[list[str], TlsOptions]:
    """Options of the agent, and what a client needs for it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(place / "ca.pem"))
    for who, name in (("agent", "127.0.0.1"), ("client", "daemon")):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(str(place / f"{who}.pem"))
    options = ["--agent-listen=tls://127.0.0.1:0", f"--tls-cert={place}/agent.pem", f"--tls-ca={place}/ca.pem"]
    return options, TlsOptions(ca=f"{place}/ca.pem", cert=f"{place}/client.pem")


async def test_mutual_tls(place: Path) -> None:
    """A client with a certificate is served; one without, or in plain text, is not."""
    options, tls = certificates(place)
    async with soc(place, *options):
        async with agent_at(place, tls) as agent:
            assert ["f0"] == [function.function_id for function in await agent.functions()]
        async with agent_at(place, TlsOptions(ca=tls.ca)) as agent:
            with pytest.raises((AuthError, ConnectError)):
                await agent.functions()
        port = parse_address(str(agent_file(place)["addresses"][0])).port  # type: ignore[index]
        async with MsgpackRpcAgent(parse_address(f"tcp://127.0.0.1:{port}")) as agent:
            with pytest.raises(AgentError):
                await agent.functions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--agent-listen=tcp://0.0.0.0:0"], "TCP without TLS is for this host only"),
        (["--agent-listen=tls://127.0.0.1:0"], "a TLS server needs tls.cert"),
        (["--agent-listen=http://x"], "must be tcp://HOST:PORT"),
        (["--shared-image"], "only an image can be shared"),
    ],
)
async def test_bad_options_end_it_at_once(place: Path, options: list[str], message: str) -> None:
    """What cannot work is said in one line, with the exit code for bad usage."""
    command = [sys.executable, "-m", "vfiouser_oob", "simulate-soc", f"--socket-dir={place}", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = await trio.run_process(command, capture_stderr=True, check=False, env=environment)
    assert 2 == done.returncode
    assert message in done.stderr.decode()


async def test_image_is_not_shared_unless_wanted(place: Path) -> None:
    """A second simulator on the image is refused, whichever of the two did not say that it shares."""
    image = f"--image={place / 'disk'}"
    (place / "a").mkdir()
    async with soc(place / "a", image, "--no-agent"):
        for more in ([], ["--shared-image"]):
            command = ["simulate-soc", f"--socket-dir={place}", image, "--no-agent", *more]
            done = await trio.run_process(
                [sys.executable, "-m", "vfiouser_oob", *command],
                capture_stderr=True,
                check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            assert 2 == done.returncode
            assert b"is in use by another process" in done.stderr


class Paused:
    """Registers that the driver cannot reach while its machine is paused, and that can be exchanged meanwhile."""

    def __init__(self, bar: MappedRegion) -> None:
        self.bar = bar
        self.running = trio.Event()
        self.running.set()

    async def read(self, offset: int, width: int) -> int:
        """Read a register once the machine runs."""
        await self.running.wait()
        return await self.bar.read(offset, width)

    async def write(self, offset: int, width: int, value: int) -> None:
        """Write a register once the machine runs."""
        await self.running.wait()
        await self.bar.write(offset, width, value)

    def close(self) -> None:
        """Unmap."""
        self.bar.close()


async def plug_over(nvme: NvmeDriver, client: Client, bars: Paused) -> None:
    """Give the driver another function: its registers and its interrupts, and nothing else."""
    bars.bar.close()
    bars.bar = await MappedRegion.open(client, 0)
    nvme._client = client
    nvme.function._client = client
    await client.set_eventfds(IrqIndex.MSIX, nvme._eventfds)


@pytest.mark.parametrize("options", [[], ["--doorbells=polled", "--cmb=2M", "--state-size=32M"]])
async def test_a_driver_moves_with_io_in_flight(place: Path, options: list[str]) -> None:
    """Between two simulators on one image: the same queues go on, no command is lost, and all data is there."""
    image = [f"--image={place / 'disk'}", "--shared-image", *options]
    (place / "a").mkdir()
    (place / "b").mkdir()
    with ClientMemory(MEMORY_SIZE, base=MEMORY_BASE) as memory:
        async with (
            soc(place / "a", *image),
            soc(place / "b", *image),
            Client.connect(place / "a" / "f0.sock", dma_server=memory) as here,
            Client.connect(place / "b" / "f0.sock", dma_server=memory) as there,
            agent_at(place / "a") as agent_a,
            agent_at(place / "b") as agent_b,
        ):
            await memory.map(here)
            await memory.map(there)
            async with NvmeDriver.open(here, memory) as nvme:
                bars = Paused(nvme.bar)
                nvme.bar = bars  # type: ignore[assignment]
                for queue in nvme._queues:
                    queue._bar = bars  # type: ignore[assignment]
                written = 0
                under_way = trio.Event()

                async def work(first: int) -> None:
                    nonlocal written
                    for lba in range(first, first + 400):
                        data = lba.to_bytes(4, "little") * 128
                        await nvme.write(lba, data)
                        assert data == await nvme.read(lba, 1)
                        written += 1
                        if written == 100:
                            under_way.set()

                async with trio.open_nursery() as nursery:
                    for worker in range(4):
                        nursery.start_soon(work, worker * 1000)
                    giver, taker = await agent_a.open("f0"), await agent_b.open("f0")
                    await giver.begin(Role.SOURCE, "move")
                    await taker.begin(Role.DESTINATION, "move")
                    await taker.check(await giver.describe())
                    await giver.dirty_start([Range(MEMORY_BASE, MEMORY_SIZE)], 4096)
                    stream = await save(giver, 0, Phase.PRECOPY)
                    await under_way.wait()
                    bars.running = trio.Event()
                    # A doorbell that is on its way must not be overtaken by the stop.
                    await here.get_info()
                    await giver.stop()
                    report = await giver.dirty_report(MEMORY_BASE, MEMORY_SIZE)
                    assert report.bitmap is not None
                    assert any(report.bitmap)
                    stream += await save(giver, len(stream), Phase.FINAL)
                    await taker.stop()
                    await load(taker, stream)
                    at_stop = written
                    await plug_over(nvme, there, bars)
                    await taker.resume()
                    bars.running.set()
                assert 1600 == written
                assert at_stop < 1600
                for lba in (0, 399, 1000, 3399):
                    assert lba.to_bytes(4, "little") * 128 == await nvme.read(lba, 1)
                await giver.end(Outcome.SUCCESS)
                await taker.end(Outcome.SUCCESS)
                assert AgentState.STOPPED is await state_of(place / "a")


async def test_functions_that_do_not_fit_are_refused(place: Path) -> None:
    """Another firmware and a namespace in the other simulator's RAM are named as reasons."""
    (place / "a").mkdir()
    (place / "b").mkdir()
    async with (
        soc(place / "a"),
        soc(place / "b", "--firmware=9.9"),
        agent_at(place / "a") as agent_a,
        agent_at(place / "b") as agent_b,
    ):
        descriptor = await (await agent_a.open("f0")).describe()
        with pytest.raises(Incompatible) as caught:
            await (await agent_b.open("f0")).check(descriptor)
        assert "firmware is '1.0' there and '9.9' here" in caught.value.reasons
        assert 2 == len(caught.value.reasons)
        assert caught.value.reasons[1].startswith("namespace 1 store is 'memory ")


def test_help_loads_no_event_loop() -> None:
    """The options can be shown without loading what runs the simulator."""
    code = (
        "import sys; from vfiouser_oob.cli.main import main\n"
        "try:\n main(['simulate-soc', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('trio' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert 0 == done.returncode
