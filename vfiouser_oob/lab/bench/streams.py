"""State streams: how fast the daemon passes state between an agent and a client, beside the least that it can cost."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import trio
from xxhash import xxh3_128

from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import Outcome, Phase, Role
from vfiouser_agents.rpc.endpoint import parse_address
from vfiouser_oob.lab.bench import budgets
from vfiouser_oob.lab.bench.measure import alternate
from vfiouser_oob.lab.bench.migrating import PORTION, V1Mover, V2Mover
from vfiouser_oob.lab.bench.peers import STREAM_PIECE
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.demo.children import Child, running, running_command
from vfiouser_protocol.constants import DeviceState

_STREAM_BUDGETS = {"save": budgets.SAVING, "load": budgets.LOADING}
_DEVICE = '{ kind = "model", model = "nvme", size = "1M" }'
#: Source and destination of the streams.
_SOURCE, _DESTINATION = "f0", "f1"
_SMALL_STATE = 64 << 10


@dataclass(frozen=True, slots=True)
class StreamEffort:
    """How much to move.

    Args:
        rounds: alternating rounds.
        state_size: bytes of a state.
        functions: functions that migrate at once.
        many_size: bytes of the state of each of those.
        downtimes: migrations whose downtime is measured.
        adapter_size: bytes of the state that each adapter carries.
    """

    rounds: int = 5
    state_size: int = 128 << 20
    functions: int = 64
    many_size: int = 8 << 20
    downtimes: int = 20
    adapter_size: int = 64 << 20


FULL_STREAMS = StreamEffort()
QUICK_STREAMS = StreamEffort(
    rounds=2, state_size=32 << 20, functions=16, many_size=4 << 20, downtimes=5, adapter_size=16 << 20
)


@dataclass(frozen=True, slots=True)
class StreamBed:
    """A daemon whose functions have an agent.

    Args:
        directory: where its sockets are.
        daemon: the daemon.
        agent: its agent.
        address: the agent's address.
    """

    directory: Path
    daemon: Child
    agent: Child
    address: str

    def path(self, name: str) -> Path:
        """The socket of a function."""
        return self.directory / f"{name}.sock"


@asynccontextmanager
async def stream_bed(directory: Path, functions: int, state_size: int) -> AsyncIterator[StreamBed]:
    """Run a daemon and an agent on plain loopback TCP.

    Args:
        directory: does not exist yet.
        functions: how many, f0, f1 …
        state_size: bytes of the state of each.
    """
    await trio.Path(directory).mkdir()
    where = directory / "address"
    command = [sys.executable, "-m", "vfiouser_oob.lab.bench.agent", str(where), str(functions), str(state_size)]
    async with running_command("agent", command, directory) as agent:
        address = where.read_text(encoding="utf-8")
        lines = ["[daemon]", 'control_socket = "none"', 'log_level = "warning"']
        for number in range(functions):
            lines += [
                "[[function]]",
                f'name = "f{number}"',
                f'socket = "{directory / f"f{number}.sock"}"',
                f"device = {_DEVICE}",
                f'agent = {{ kind = "msgpack-rpc", address = "{address}", function = "f{number}" }}',
            ]
        config = directory / "daemon.toml"
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        async with running("serve", ["serve", "--config", str(config)], directory) as daemon:
            yield StreamBed(directory, daemon, agent, address)


class PlainCopy:
    """A process that copies from TCP to a UNIX socket, another one that feeds it, and us at the end.

    Args:
        sock: our end of the UNIX socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(STREAM_PIECE))

    def move(self, count: int) -> None:
        """Let so many bytes come through."""
        self._sock.sendall(count.to_bytes(8, "little"))
        while count:
            received = self._sock.recv_into(self._buffer, min(count, STREAM_PIECE))
            if not received:
                raise BenchFailed("the plain copy ended")
            count -= received


@asynccontextmanager
async def plain_copy(directory: Path) -> AsyncIterator[PlainCopy]:
    """Run the plain copy.

    Args:
        directory: for logs.
    """
    async with AsyncExitStack() as stack:
        ours, sink = socket.socketpair()
        stack.enter_context(ours)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            source = socket.create_connection(listener.getsockname())
            feed, _ = listener.accept()
        with sink, source, feed:
            for peer, sockets in (("stream", (feed,)), ("copy", (source, sink))):
                fds = [sock.fileno() for sock in sockets]
                command = [sys.executable, "-m", "vfiouser_oob.lab.bench.peers", peer, *map(str, fds)]
                await stack.enter_async_context(running_command(peer, command, directory, pass_fds=fds))
        yield PlainCopy(ours)


async def measure_streams(directory: Path, effort: StreamEffort, progress: Callable[[str], None]) -> list[Result]:
    """Measure everything about streams.

    Args:
        directory: for logs and sockets.
        effort: how much to move.
        progress: takes one line per step.

    Raises:
        ChildFailed: a process did not start.
        BenchFailed: a measurement could not be made.
    """
    progress("state streams: plain copy, v2 and v1, saving and loading in turn")
    async with (
        stream_bed(directory / "streams", 2, effort.state_size) as bed,
        plain_copy(directory) as plain,
    ):
        results = await trio.to_thread.run_sync(_throughput, bed, plain, effort)
    progress("downtime: agent alone, then through the daemon")
    async with stream_bed(directory / "downtime", 2, _SMALL_STATE) as bed:
        results += await _downtime(bed, effort)
    progress(f"migrations at once: one function, then {effort.functions}")
    async with stream_bed(directory / "crowd", effort.functions, effort.many_size) as bed:
        results += await trio.to_thread.run_sync(_crowd, bed, effort)
    return results


def _throughput(bed: StreamBed, plain: PlainCopy, effort: StreamEffort) -> list[Result]:
    kept: list[bytes] = []
    with ExitStack() as stack:
        saver, loader = V2Mover(bed.path(_SOURCE)), V2Mover(bed.path(_DESTINATION))
        stack.enter_context(saver)
        stack.enter_context(loader)
        saver.save(kept)
        saver.state(DeviceState.RUNNING)
        size = sum(map(len, kept))
        v2 = alternate(
            {
                "copy": lambda: _rate(size, lambda: plain.move(size)),
                "save": lambda: _rate(size, saver.save, lambda: saver.state(DeviceState.RUNNING)),
                "load": lambda: _rate(size, lambda: loader.load(kept)),
            },
            effort.rounds,
        )
    with V1Mover(bed.path(_SOURCE)) as source, V1Mover(bed.path(_DESTINATION)) as destination:
        v1 = alternate(
            {
                "copy": lambda: _rate(size, lambda: plain.move(size)),
                "save": lambda: _rate(size, source.save, source.run),
                "load": lambda: _rate(size, lambda: destination.load(kept)),
            },
            effort.rounds,
        )
    return [
        Result("plain TCP → UNIX copy", v2["copy"], "MB/s"),
        *_against_copy("v2", v2),
        *_against_copy("v1", v1),
    ]


def _against_copy(generation: str, rates: Mapping[str, float]) -> list[Result]:
    """Both ways of a generation, beside the plain copy."""
    return [
        Result(f"state stream, {generation} {way}", rates[way], "MB/s", rates["copy"], "copy", budget)
        for way, budget in _STREAM_BUDGETS.items()
    ]


def _rate(size: int, move: Callable[[], object], restore: Callable[[], object] | None = None) -> float:
    """MB/s of something that moves so many bytes; what `restore` takes does not count."""
    began = time.perf_counter()
    move()
    took = time.perf_counter() - began
    if restore is not None:
        restore()
    return size / took / 1e6


async def _downtime(bed: StreamBed, effort: StreamEffort) -> list[Result]:
    ways: Mapping[str, Callable[[StreamBed], float]] = {
        "through the daemon": partial(_downtime_through, V2Mover, pre_copy=False),
        "v2 with pre-copy": partial(_downtime_through, V2Mover, pre_copy=True),
        "v1 with pre-copy": partial(_downtime_through, V1Mover, pre_copy=True),
    }
    times: dict[str, list[float]] = {"alone": [], **{name: [] for name in ways}}
    for _ in range(effort.downtimes):
        times["alone"].append(await _downtime_alone(bed.address))
        for name, measure in ways.items():
            times[name].append(await trio.to_thread.run_sync(measure, bed))
    alone = median(times["alone"])
    results = [Result("downtime, agent alone", alone, "ms")]
    for name in ways:
        through = median(times[name])
        added = "downtime added by the daemon" if name == "through the daemon" else f"downtime added, {name}"
        results += [
            Result(f"downtime, {name}", through, "ms", alone, "agent alone"),
            Result(added, through - alone, "ms", budget=budgets.ADDED_DOWNTIME_MS),
        ]
    return results


async def _downtime_alone(address: str) -> float:
    """Milliseconds from the stop of the source to the running destination, without a daemon."""
    async with MsgpackRpcAgent(parse_address(address)) as agent:
        source, destination = await agent.open(_SOURCE), await agent.open(_DESTINATION)
        await source.begin(Role.SOURCE, "bench")
        await destination.begin(Role.DESTINATION, "bench")
        await destination.stop()
        await destination.load_begin(None)
        began = time.perf_counter()
        await source.stop()
        offset, digest, last = 0, xxh3_128(), False
        while not last:
            chunk = await source.save(offset, PORTION, Phase.FINAL)
            await destination.load(offset, chunk.data)
            digest.update(chunk.data)
            offset, last = offset + len(chunk.data), chunk.eof
        await destination.load_commit(offset, digest.digest())
        await destination.resume()
        took = time.perf_counter() - began
        await source.resume()
        for session in (source, destination):
            await session.end(Outcome.SUCCESS)
        return 1000 * took


def _downtime_through(kind: type[V2Mover | V1Mover], bed: StreamBed, *, pre_copy: bool) -> float:
    """Milliseconds from the stop of the source to the running destination, as a client sees it.

    Args:
        kind: of client.
        bed: the daemon.
        pre_copy: whether the client begins while its guest runs, as QEMU does where the device says that it can.
    """
    with kind(bed.path(_SOURCE)) as source, kind(bed.path(_DESTINATION)) as destination:
        destination.begin_load()
        if pre_copy:
            destination.write(source.pre_copy())
        began = time.perf_counter()
        portions: list[bytes] = []
        source.save(portions)
        destination.write(portions)
        destination.run()
        took = time.perf_counter() - began
        source.run()
        return 1000 * took


def _crowd(bed: StreamBed, effort: StreamEffort) -> list[Result]:
    with ExitStack() as stack:
        movers = [stack.enter_context(V2Mover(bed.path(f"f{number}"))) for number in range(effort.functions)]
        size = movers[0].save()
        movers[0].state(DeviceState.RUNNING)

        def run() -> None:
            for mover in movers:
                mover.state(DeviceState.RUNNING)

        rates = alternate(
            {
                "one": lambda: _rate(size * len(movers), lambda: [mover.save() for mover in movers], run),
                "all": lambda: _rate(size * len(movers), lambda: V2Mover.save_all(movers), run),
            },
            max(2, effort.rounds // 2),
        )
    return [
        Result("one function migrating", rates["one"], "MB/s"),
        Result(
            f"{effort.functions} functions migrating at once", rates["all"], "MB/s", rates["one"], "one", budgets.CROWD
        ),
    ]
