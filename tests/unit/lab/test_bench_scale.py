"""`bench --scale`: the storm, the bystander, and what is made of the figures."""

from __future__ import annotations

import json
import socket
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mutants.server import serving
from vfiouser_oob.cli.bench import write_plot
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.main import main
from vfiouser_oob.lab.bench import bystander
from vfiouser_oob.lab.bench.bystander import Bystander
from vfiouser_oob.lab.bench.curves import PICTURES, scale_svg
from vfiouser_oob.lab.bench.peers import echo
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_oob.lab.bench.scale_figures import TRENDS, ScaleFigures, Spread, scale_results, scale_table
from vfiouser_oob.lab.bench.storm import attach_storm

SIZES = (1, 16, 256)
SVG = "{http://www.w3.org/2000/svg}"


def figures(sizes: Sequence[int] = SIZES) -> list[ScaleFigures]:
    """Figures as they might be."""
    return [
        ScaleFigures(
            spread=spread.value,
            functions=size,
            start_s=0.5 + share * size,
            memory_mb=30 + share * size,
            descriptors=12 + 2 * size,
            idle_wake_ups=0.0,
            storm_p50_ms=size,
            storm_p99_ms=1.5 * size,
            attach_cpu_ms=1.25,
            migration_mb_s=400.0,
            migration_cpu_s=2.0,
            quiet_p99_ms=0.5,
            read_p99_ms=4.0,
        )
        for spread, share in zip(Spread, (0.25, 30.0), strict=True)
        for size in sizes
    ]


# The storm


def test_every_client_of_a_storm_is_timed(tmp_path: Path) -> None:
    """Each server gets a client, and each client's time is there, the shortest first."""
    paths = [tmp_path / f"{number}.sock" for number in range(3)]
    with ExitStack() as servers:
        running = [servers.enter_context(serving(str(path))) for path in paths]
        times = attach_storm(paths)
        assert all(server.wait_heard(15, 10) for server in running)
    assert len(times) == 3
    assert sorted(times) == times
    assert 0 < times[0]


def refusing(listener: socket.socket, answer: bytes) -> None:
    """Answer the first message of one client with these bytes, and leave."""
    with listener.accept()[0] as sock:
        sock.recv(4096)
        sock.sendall(answer)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (bytes.fromhex("0100 0100 10000000 21000000 16000000"), "refused VERSION: Invalid argument"),
        (b"\1", "closed the connection"),
        (b"", "closed the connection"),
    ],
)
def test_a_storm_that_a_server_ends_has_failed(tmp_path: Path, answer: bytes, words: str) -> None:
    """A client that was not attached is no quick one."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=refusing, args=(listener, answer))
        thread.start()
        with pytest.raises(BenchFailed, match=words):
            attach_storm([tmp_path / "s"])
        thread.join()


def test_a_storm_at_a_place_where_nobody_is(tmp_path: Path) -> None:
    """The path is named."""
    with pytest.raises(BenchFailed, match=f"{tmp_path}/s: No such file"):
        attach_storm([tmp_path / "s"])


# The bystander


@pytest.fixture
def reader() -> Iterator[Bystander]:
    """A bystander in a thread, which reads from the echo."""
    served, connection = socket.socketpair()
    ours, theirs = socket.socketpair()
    arguments = [str(connection.detach()), str(theirs.detach())]
    threads = [
        threading.Thread(target=echo, args=(served,)),
        threading.Thread(target=bystander.main, args=(arguments,)),
    ]
    for thread in threads:
        thread.start()
    with ours, served:
        yield Bystander(ours)
        ours.shutdown(socket.SHUT_RDWR)
        for thread in reversed(threads):
            thread.join()


def test_a_bystander_reads_between_beginning_and_end(reader: Bystander) -> None:
    """At least once, however short that was, and again when it is told to."""
    for _ in range(2):
        reader.begin()
        times = reader.end()
        assert times
        assert 0 < min(times)


def test_a_bystander_that_died_is_noticed() -> None:
    """No reads are not quick reads."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.send(b"")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.shutdown(socket.SHUT_WR)
        with theirs, pytest.raises(BenchFailed, match="died"):
            Bystander(ours).end()


# The figures


def test_figures_survive_json() -> None:
    """What is read is what was written."""
    for each in figures():
        assert each == ScaleFigures.from_json(json.loads(json.dumps(each.as_json())))


def test_a_thousand_functions_are_computed() -> None:
    """By the line through what was measured, where a figure grows; what does not grow stays."""
    one = figures()[: len(SIZES)]
    found = {trend.figure: trend.at(one, 1000) for trend in TRENDS}
    assert found["memory_mb"] == pytest.approx(280)
    assert found["storm_p99_ms"] == pytest.approx(1500)
    assert found["migration_mb_s"] == 400
    assert {trend.at(one[:1], 1000) for trend in TRENDS if trend.figure == "memory_mb"} == {one[0].memory_mb}


def test_the_table_has_a_cell_for_each_size() -> None:
    """A row for each figure and spread, and one cell more for what is computed."""
    rows = scale_table(figures(), 1000)
    assert len(rows) == 2 * len(TRENDS)
    assert {len(SIZES) + 2} == set(map(len, rows))
    assert ["memory (PSS), MB: one daemon", "30", "34", "94", "280"] == rows[0]


def test_budgets_are_for_one_daemon() -> None:
    """A storm, a crowd or a bystander over its budget fails for one daemon; wake-ups fail anywhere."""
    slow = [
        replace(each, storm_p99_ms=501, read_p99_ms=21, migration_mb_s=400.0 if each.functions == 1 else 300.0)
        for each in figures((1, 16))
    ]
    missed = [result.name for result in scale_results(slow) if not result.ok]
    assert [
        "attach storm p99, 1 functions, one daemon",
        "a bystander's read p99 meanwhile, 1 functions, one daemon",
        "attach storm p99, 16 functions, one daemon",
        "migrating at once, 16 functions, one daemon",
        "a bystander's read p99 meanwhile, 16 functions, one daemon",
    ] == missed
    assert all(result.ok for result in scale_results(figures()))
    woken = scale_results([replace(each, idle_wake_ups=0.5) for each in figures((1,))])
    assert 2 == len([result for result in woken if not result.ok])


# The curves


@pytest.mark.parametrize("sizes", [SIZES, (1,), (1, 2)])
def test_the_curves_are_a_picture(sizes: Sequence[int]) -> None:
    """Well-formed, with a line for each spread in each picture, and nothing outside of it."""
    root = ET.fromstring(scale_svg(figures(sizes)))
    pictures = root.findall(f"{SVG}g")
    assert len(PICTURES) == len(pictures)
    for picture in pictures:
        assert 2 == len(picture.findall(f"{SVG}polyline"))
        for dot in picture.findall(f"{SVG}circle"):
            assert 0 < float(dot.attrib["cx"]) < 300
            assert 0 < float(dot.attrib["cy"]) < 210


def test_a_larger_figure_is_higher() -> None:
    """Also where each step is ten times as much."""
    root = ET.fromstring(scale_svg(figures()))
    points = [line.attrib["points"].split() for line in root.iter(f"{SVG}polyline")]
    one, many = ([float(point.split(",")[1]) for point in line] for line in points[:2])
    assert many[0] > many[1] > many[2]
    assert one[2] > many[2]


def test_equal_figures_give_equal_bytes() -> None:
    """So that a committed picture can be compared."""
    assert scale_svg(figures()) == scale_svg(list(reversed(figures())))


def test_curves_that_cannot_be_written_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a sentence; and without --scale there are none."""
    write_plot(tmp_path / "curves.svg", figures())
    assert scale_svg(figures()) == (tmp_path / "curves.svg").read_text()
    with pytest.raises(CommandFailed, match="cannot be written: No such file"):
        write_plot(tmp_path / "nowhere" / "curves.svg", figures())
    assert ExitCode.USAGE == main(["bench", "--plot", str(tmp_path / "more.svg")])
    assert "--scale" in capsys.readouterr().err
    assert not (tmp_path / "more.svg").exists()
