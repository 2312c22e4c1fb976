"""What is written for people, on terminals of every kind and on none."""

from __future__ import annotations

import io
import sys

import pytest

from vfiouser_oob.cli import bench
from vfiouser_oob.cli.demo_display import Display
from vfiouser_oob.cli.terminal import can_redraw, console_on, print_line, print_table
from vfiouser_oob.lab.bench.results import Budget, Result

HEADS = ("function", "what is to be said of it", "figure")
ROWS = [("f0", "word " * 30, "12 MB/s"), ("f1", "short", "3 MB/s")]


class Terminal(io.StringIO):
    """A terminal as far as it can be asked."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One of 80 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    return Terminal()


def show(stream: io.StringIO) -> list[str]:
    """A table and a long line."""
    console = console_on(stream)
    print_table(console, HEADS, ROWS)
    print_line(console, "    indented " + "word " * 30, "red")
    return stream.getvalue().splitlines()


def test_a_pipe_gets_whole_lines() -> None:
    """Nothing is folded, padded or coloured for whoever reads lines."""
    lines = show(io.StringIO())
    assert 5 == len(lines)
    assert [line.rstrip() for line in lines[:4]] == lines[:4]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("width", ["80", "120"])
def test_a_terminal_is_not_overrun(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    """Tables and lines are folded between words."""
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("NO_COLOR", "1")
    lines = show(terminal)
    assert max(len(line.rstrip()) for line in lines if "\x1b" not in line) <= int(width)
    assert any(line.startswith("      word") for line in lines)
    assert "\x1b[31m" not in terminal.getvalue()


def test_colours_are_for_those_who_want_them(terminal: Terminal) -> None:
    """A terminal that has them shows them."""
    show(terminal)
    assert "\x1b[31m" in terminal.getvalue()


def test_a_dumb_terminal_gets_no_escapes(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither colours nor anything redrawn."""
    monkeypatch.setenv("TERM", "dumb")
    console = console_on(terminal)
    assert not can_redraw(console)
    display = Display(terminal, 1, bars=True)
    display.line("a step")
    display.close()
    show(terminal)
    assert "\x1b" not in terminal.getvalue()


RESULTS = [
    Result("idle wake-ups, vfio-user, nobody attached", 0, "/s", budget=Budget(0), details={"cpu_percent": 0}),
    Result("trapped read, model", 9.1, "us", 24.0, "echo", Budget(0.45), {"p50": 9.1, "p90": 12.75, "p99": 20.5}),
    Result("DMA_MAP/UNMAP, 65535 ranges", 36972, "messages/s", 40000, "empty loop", Budget(0.9, at_most=False)),
]


@pytest.mark.parametrize("width", ["80", "120"])
def test_the_benchmark_fits(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    """Its table is as wide as the terminal at most, and loses nothing by that; NO_COLOR is obeyed."""
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal)
    bench._print_table(RESULTS)
    # Bold is not a colour.
    lines = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in terminal.getvalue().splitlines()]
    assert "\x1b" not in "".join(lines)
    assert max(map(len, lines)) <= int(width)
    words = " ".join(lines).split()
    assert [] == [word for word in ("wake-ups,", "p99", "20.5)", "empty", "40000", "ok") if word not in words]


def test_the_benchmark_on_a_dumb_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """No escapes at all."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", terminal)
    bench._print_table(RESULTS)
    assert "\x1b" not in terminal.getvalue()


def test_the_benchmark_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each result, which a script can cut."""
    bench._print_table(RESULTS)
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [result.name for result in RESULTS] == [line.split("  ")[0] for line in lines]
    assert lines == [line.rstrip() for line in lines]
