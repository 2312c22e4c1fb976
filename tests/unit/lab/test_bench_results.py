"""The benchmark's arithmetic: percentiles, ratios, budgets, and what they make of the exit code."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

import pytest

from vfiouser_oob.cli.bench import verdict
from vfiouser_oob.cli.errors import CommandFailed
from vfiouser_oob.lab.bench.measure import MapLoad, alternate, cpu_seconds, idle_cost, resident_mb, wake_ups
from vfiouser_oob.lab.bench.peers import READ_REPLY_SIZE, READ_REQUEST_SIZE, echo, empty_loop
from vfiouser_oob.lab.bench.raw import BenchFailed, RawClient, message
from vfiouser_oob.lab.bench.results import Budget, Result, Samples, percentile
from vfiouser_protocol.codec import encode
from vfiouser_protocol.constants import Command
from vfiouser_protocol.messages import RegionRead, RegionReadReply


def test_percentiles() -> None:
    """A percentile is a value that occurred, below which that share of all values lies."""
    values = list(range(1, 101))
    assert [1, 51, 91, 100, 100] == [percentile(values, percent) for percent in (0, 50, 90, 99, 100)]
    assert 7 == percentile([7], 99)


def test_one_bad_round_does_not_count() -> None:
    """The median over the rounds forgets a round in which the machine was busy."""
    samples = Samples()
    for factor in (1, 50, 1):
        samples.add([1000 * factor, 3000 * factor, 2000 * factor])
    assert 2.0 == samples.percentile_us(50)
    assert {"p50": 2.0, "p90": 3.0, "p99": 3.0} == samples.details()


@pytest.mark.parametrize(
    ("result", "ok"),
    [
        (Result("a", 7, "us", 10, "b", Budget(0.7)), True),
        (Result("a", 7.1, "us", 10, "b", Budget(0.7)), False),
        (Result("a", 5, "/s", 10, "b", Budget(0.5, at_most=False)), True),
        (Result("a", 4.9, "/s", 10, "b", Budget(0.5, at_most=False)), False),
        (Result("a", 60, "MB", budget=Budget(60)), True),
        (Result("a", 61, "MB", budget=Budget(60)), False),
        (Result("a", 1e9, "us"), True),
    ],
)
def test_budgets(result: Result, ok: bool) -> None:
    """A budget limits the ratio, or the value when there is nothing to compare with; strict makes a miss a
    failure.
    """
    assert ok == result.ok == result.as_json()["ok"]
    assert 0 == verdict([result], strict=False)
    if ok:
        assert 0 == verdict([result], strict=True)
    else:
        with pytest.raises(CommandFailed, match="over budget: a"):
            verdict([result], strict=True)


def test_measurements_take_turns() -> None:
    """Rounds alternate, and the median of each is returned."""
    order: list[str] = []
    values = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}

    def measure(name: str) -> float:
        order.append(name)
        return next(values[name])

    found = alternate({"a": lambda: measure("a"), "b": lambda: measure("b")}, 3)
    assert ["a", "b"] * 3 == order
    assert {"a": 2.0, "b": 5.0} == found


def served(peer: Callable[[socket.socket], None]) -> tuple[RawClient, threading.Thread]:
    """One of the peers in a thread, and a client of it."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            peer(theirs)

    thread = threading.Thread(target=serve)
    thread.start()
    return RawClient(ours), thread


def test_echo_has_the_sizes_of_a_register_read() -> None:
    """The echo moves exactly as many bytes as a 4-byte REGION_READ and its reply."""
    assert READ_REQUEST_SIZE == len(message(Command.REGION_READ, encode(RegionRead(0, 0, 4))))
    assert READ_REPLY_SIZE == len(message(Command.REGION_READ, encode(RegionReadReply(0, 0, 4, bytes(4)))))
    client, thread = served(echo)
    with client:
        assert 10 == len(client.round_trips(bytes(READ_REQUEST_SIZE), READ_REPLY_SIZE, 10))
    thread.join()


def test_empty_loop_answers_maps_and_closes_what_comes_with_them() -> None:
    """The empty loop takes the very messages of the benchmark and keeps no descriptor."""
    memory = os.memfd_create("memory")
    client, thread = served(empty_loop)
    before = len(os.listdir("/proc/self/fd"))
    with client:
        assert 0 < MapLoad(memory, 128).rate(client, 0, 2)
        assert before == len(os.listdir("/proc/self/fd"))
    thread.join()
    os.close(memory)


def test_refused_burst_is_noticed() -> None:
    """An error reply is no success that happened to be quick."""

    def refuse(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.send(bytes(8) + b"\x21" + bytes(7))

    client, thread = served(refuse)
    with client, pytest.raises(BenchFailed, match="refused"):
        client.burst([bytes(48)], (), 16)
    thread.join()


def test_server_that_hangs_up_is_noticed() -> None:
    """The end of the stream is a failed measurement, not a quick one."""
    client, thread = served(lambda sock: None)
    thread.join()
    with client, pytest.raises((BenchFailed, BrokenPipeError)):
        client.round_trips(bytes(READ_REQUEST_SIZE), READ_REPLY_SIZE, 1)


def test_process_figures() -> None:
    """What /proc says of a process is found and plausible, and a busy process is no idle one."""
    pid = os.getpid()
    assert 5 < resident_mb(pid) < 5000
    assert 0 < wake_ups(pid)
    before = cpu_seconds(pid)
    stop = threading.Event()

    def burn() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=burn)
    thread.start()
    ((_, cpu),) = idle_cost([pid], 0.3)
    stop.set()
    thread.join()
    assert 1 < cpu
    assert before < cpu_seconds(pid)
