"""The benchmark's processes, and which measurement is taken of which."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vfiouser_oob.client.guest import ClientMemory
from vfiouser_oob.lab.bench import budgets
from vfiouser_oob.lab.bench.adapters import measure_adapters
from vfiouser_oob.lab.bench.measure import (
    BURST,
    MapLoad,
    alternate,
    attach_ms,
    idle_cost,
    read_latency,
    resident_mb,
)
from vfiouser_oob.lab.bench.placement import apart
from vfiouser_oob.lab.bench.raw import RawClient
from vfiouser_oob.lab.bench.recording import measure_recording
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.bench.streams import FULL_STREAMS, QUICK_STREAMS, StreamEffort, measure_streams
from vfiouser_oob.lab.bench.survival import measure_survival
from vfiouser_oob.lab.demo.children import Child, blaming, running, running_command
from vfiouser_protocol.limits import DEFAULT_MAX_DMA_MAPS

Progress = Callable[[str], None]

_MODEL = '{ kind = "model", model = "nvme", size = "1M" }'


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Args:
        rounds: alternating rounds.
        reads: reads per round.
        bursts: bursts of maps and unmaps per round.
        attaches: attaches per round.
        functions: functions of the big daemon.
        idle_s: seconds of doing nothing.
        streams: how much state to move.
    """

    rounds: int = 9
    reads: int = 2000
    bursts: int = 20
    attaches: int = 3
    functions: int = 32
    idle_s: float = 3.0
    streams: StreamEffort = FULL_STREAMS


FULL = Effort()
QUICK = Effort(rounds=5, reads=400, bursts=6, attaches=1, functions=8, idle_s=1.0, streams=QUICK_STREAMS)


class BarePeer(NamedTuple):
    """A process that does nothing but read and answer.

    Args:
        client: a client of it.
        child: the process.
    """

    client: RawClient
    child: Child


@dataclass(frozen=True, slots=True)
class Bed:
    """What is measured.

    Args:
        directory: for logs and sockets.
        children: every process.
        model: the daemon with two `model` functions.
        model_socket: the first one's socket.
        second_socket: the second one's socket.
        upstream: the daemon with one `vfio-user` function.
        upstream_socket: its socket.
        simulator: the process behind that function.
        echo: the blocking echo and a client of it.
        empty_loop: the empty loop and a client of it.
    """

    directory: Path
    children: Sequence[Child]
    model: Child
    model_socket: Path
    second_socket: Path
    upstream: Child
    upstream_socket: Path
    simulator: Child
    echo: BarePeer
    empty_loop: BarePeer


async def measure(effort: Effort, progress: Progress) -> list[Result]:
    """Start everything, measure, stop everything.

    Args:
        effort: how long to measure.
        progress: takes one line per step.

    Raises:
        ChildFailed: a process did not start.
        BenchFailed: a measurement could not be made.
        VfioUserError: a server refused what it should not.
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="vfiouser-") as place:
        async with _bed(Path(place)) as bed, blaming(bed.children):
            progress("idle: nobody attached, then one client attached")
            results += _idle(bed, effort)
            progress("trapped reads: echo, model, vfio-user in turn")
            results += _reads(bed, effort)
            progress("DMA_MAP and DMA_UNMAP: empty loop, 64 ranges, 65535 ranges in turn")
            results += _maps(bed, effort)
            progress("attach: model, vfio-user in turn")
            results += _attaches(bed, effort)
        progress("writes to guest memory: recorded, not recorded in turn")
        results += await measure_recording(effort.rounds, effort.reads)
        progress("a daemon that may be restarted, beside one that may not: reads, maps, interrupts, attach in turn")
        results += await measure_survival(Path(place, "survival"), effort.rounds, effort.reads, effort.bursts)
        progress(f"memory: 1 function, then {effort.functions}")
        results += await _memory(Path(place), effort)
        results += await measure_streams(Path(place), effort.streams, progress)
        streams = effort.streams
        results += await measure_adapters(Path(place, "adapters"), streams.adapter_size, streams.rounds, progress)
    return results


@asynccontextmanager
async def _bed(directory: Path) -> AsyncIterator[Bed]:
    soc = directory / "soc"
    soc.mkdir()
    upstream = directory / "upstream.sock"
    first, second = directory / "model.sock", directory / "second.sock"
    device = f'{{ kind = "vfio-user", socket = "{soc / "f0.sock"}" }}'
    relay = _configuration(directory / "upstream.toml", {upstream: device})
    config = _configuration(directory / "models.toml", {first: _MODEL, second: _MODEL})
    async with (
        running("model", ["serve", "--config", os.fspath(config)], directory) as model_child,
        running("simulator", ["simulate-soc", f"--socket-dir={soc}", "--size=1M"], directory) as simulator,
        running("upstream", ["serve", "--config", os.fspath(relay)], directory) as upstream_child,
        _peer("echo", directory) as echo,
        _peer("empty-loop", directory) as empty_loop,
    ):
        children = (model_child, simulator, upstream_child)
        yield Bed(
            directory, children, model_child, first, second, upstream_child, upstream, simulator, echo, empty_loop
        )


@asynccontextmanager
async def _peer(kind: str, directory: Path) -> AsyncIterator[BarePeer]:
    """One of the processes that do nothing but read and answer, and a client of it."""
    ours, theirs = socket.socketpair()
    with theirs, RawClient(ours) as client:
        command = [sys.executable, "-m", "vfiouser_oob.lab.bench.peers", kind, str(theirs.fileno())]
        async with running_command(kind, command, directory, pass_fds=[theirs.fileno()]) as child:
            yield BarePeer(client, child)


def _reads(bed: Bed, effort: Effort) -> list[Result]:
    with RawClient.attach(bed.model_socket) as model, RawClient.attach(bed.upstream_socket) as upstream:
        clients = {"echo": bed.echo.client, "model": model, "upstream": upstream}
        servers = [bed.echo.child.pid, bed.model.pid, bed.upstream.pid]
        with apart(servers, [bed.simulator.pid]):
            samples = read_latency(clients, effort.rounds, effort.reads)
    echo, own, relayed = (samples[name].percentile_us(50) for name in ("echo", "model", "upstream"))
    return [
        Result("blocking echo", echo, "us", details=samples["echo"].details()),
        Result("trapped read, model", own, "us", echo, "echo", budgets.READ, samples["model"].details()),
        Result(
            "trapped read, vfio-user", relayed, "us", own, "model", budgets.UPSTREAM_READ, samples["upstream"].details()
        ),
    ]


def _maps(bed: Bed, effort: Effort) -> list[Result]:
    many = DEFAULT_MAX_DMA_MAPS - BURST
    with ExitStack() as stack:
        memory = stack.enter_context(ClientMemory(1 << 20))
        load = MapLoad(memory.fileno(), DEFAULT_MAX_DMA_MAPS)
        # Two functions of one daemon, so that few and many ranges can take turns.
        few_client = stack.enter_context(RawClient.attach(bed.model_socket))
        load.grow(few_client, 0, BURST)
        many_client = stack.enter_context(RawClient.attach(bed.second_socket))
        load.grow(many_client, 0, many)
        with apart([bed.empty_loop.child.pid, bed.model.pid]):
            rates = alternate(
                {
                    "empty": lambda: load.rate(bed.empty_loop.client, 0, effort.bursts),
                    "few": lambda: load.rate(few_client, BURST, effort.bursts),
                    "many": lambda: load.rate(many_client, many, effort.bursts),
                },
                effort.rounds,
            )
    empty, few, full = rates["empty"], rates["few"], rates["many"]
    return [
        Result("empty loop", empty, "messages/s"),
        Result("DMA_MAP/UNMAP, 64 ranges", few, "messages/s", empty, "empty loop", budgets.MAPS),
        Result("DMA_MAP/UNMAP, 65535 ranges", full, "messages/s", few, "64 ranges", budgets.MANY_MAPS),
    ]


def _attaches(bed: Bed, effort: Effort) -> list[Result]:
    times = alternate(
        {"model": lambda: attach_ms(bed.model_socket), "upstream": lambda: attach_ms(bed.upstream_socket)},
        effort.rounds * effort.attaches,
    )
    return [
        Result("attach, model", times["model"], "ms", budget=budgets.ATTACH_MS),
        Result("attach, vfio-user", times["upstream"], "ms", budget=budgets.UPSTREAM_ATTACH_MS),
    ]


def _idle(bed: Bed, effort: Effort) -> list[Result]:
    children = {"model": bed.model, "vfio-user": bed.upstream}
    results = []
    for title, sockets in (("nobody attached", ()), ("one client", (bed.model_socket, bed.upstream_socket))):
        with ExitStack() as clients:
            for path in sockets:
                clients.enter_context(RawClient.attach(path))
            costs = idle_cost([child.pid for child in children.values()], effort.idle_s)
        for name, (wakes, cpu) in zip(children, costs, strict=True):
            what = f"idle wake-ups, {name}, {title}"
            results.append(Result(what, wakes, "/s", budget=budgets.NO_WAKE_UPS, details={"cpu_percent": cpu}))
    return results


async def _memory(directory: Path, effort: Effort) -> list[Result]:
    one = await _resident(directory / "one", 1)
    many = await _resident(directory / "many", effort.functions)
    further = (many - one) / (effort.functions - 1)
    return [
        Result("memory, one function", one, "MB", budget=budgets.FIRST_FUNCTION_MB),
        Result("memory, each further function", further, "MB", budget=budgets.FURTHER_FUNCTION_MB),
    ]


async def _resident(directory: Path, functions: int) -> float:
    """Memory of a daemon whose functions all have a client."""
    config, soc, sockets = _many_functions(directory, functions)
    simulator = ["simulate-soc", f"--socket-dir={soc}", "--size=1M", f"--functions={functions}"]
    async with (
        running("simulator", simulator, directory),
        running("serve", ["serve", "--config", os.fspath(config)], directory) as daemon,
    ):
        with ExitStack() as clients:
            for path in sockets:
                clients.enter_context(RawClient.attach(path))
            return resident_mb(daemon.pid)


def _many_functions(directory: Path, functions: int) -> tuple[Path, Path, list[Path]]:
    """Prepare a daemon: its configuration, the simulator's directory, the sockets that it will serve."""
    soc = directory / "soc"
    soc.mkdir(parents=True)
    sockets = [directory / f"f{number}.sock" for number in range(functions)]
    devices = {path: f'{{ kind = "vfio-user", socket = "{soc / path.name}" }}' for path in sockets}
    return _configuration(directory / "daemon.toml", devices), soc, sockets


def _configuration(path: Path, devices: Mapping[Path, str]) -> Path:
    """Write a configuration: the device of each socket."""
    # The log level of a daemon in use; what is logged for each client is not to be measured.
    lines = ["[daemon]", 'control_socket = "none"', 'log_level = "warning"']
    for socket_path, device in devices.items():
        lines += [
            "[[function]]",
            f'name = "{socket_path.stem}"',
            f'socket = "{socket_path}"',
            f"device = {device}",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
