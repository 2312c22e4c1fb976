"""What `demo` shows while it works, and the tables at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TextIO

from rich.live import Live
from rich.text import Text

from vfiouser_oob.cli.terminal import can_redraw, console_on, print_line, print_table
from vfiouser_oob.lab.demo.journey import JourneyReport, LegReport
from vfiouser_oob.lab.demo.scenario import FunctionReport
from vfiouser_oob.lab.vmm.live import LiveProgress, MigrationPhase

#: Characters of a bar where there is room, and of a line without its bar.
_BAR = 16
_BESIDE_BAR = 76
#: A bar is drawn this often at most, seconds.
_INTERVAL_S = 0.05
_OVER = (MigrationPhase.DONE, MigrationPhase.CANCELLED)


class Display:
    """Lines for steps, and a bar for each migration: redrawn on a terminal, otherwise one line per phase.

    Args:
        stream: where it goes.
        expected: bytes that a migration moves, about.
        bars: whether bars may be redrawn; only one migration at a time can have one.
    """

    def __init__(self, stream: TextIO, expected: int, *, bars: bool) -> None:
        self.console = console_on(stream)
        self._expected = max(1, expected)
        self._redraw = bars and can_redraw(self.console)
        self._drawn_at = 0.0
        self._bar_shown: Live | None = None
        self._phases: dict[str, MigrationPhase] = {}

    def line(self, text: str) -> None:
        """Show a step."""
        self.close()
        print_line(self.console, text)

    def meter(self, name: str, leg: LegReport, progress: LiveProgress) -> None:
        """Show how far a migration has come."""
        key = f"{name} {leg.source}→{leg.destination} {leg.generation}"
        new_phase = self._phases.get(key) is not progress.phase
        self._phases[key] = progress.phase
        now = time.monotonic()
        if not new_phase and (not self._redraw or now - self._drawn_at < _INTERVAL_S):
            return
        self._drawn_at = now
        text = f"{key}  {self._bar(progress)}  {progress.phase.value:<9}  {_moved(progress)}"
        if not self._redraw:
            print_line(self.console, text)
            return
        if self._bar_shown is None:
            self._bar_shown = Live(console=self.console, auto_refresh=False)
            self._bar_shown.start()
        self._bar_shown.update(Text(text), refresh=True)
        if progress.phase in _OVER:
            self.close()

    def _bar(self, progress: LiveProgress) -> str:
        done = progress.total_state + progress.total_memory
        part = 1.0 if progress.phase is MigrationPhase.DONE else min(done / self._expected, 0.99)
        length = max(4, min(_BAR, self.console.width - _BESIDE_BAR))
        filled = int(part * length)
        return f"[{'#' * filled}{'.' * (length - filled)}] {part:4.0%}"

    def close(self) -> None:
        """Leave the last bar as it is, and give the terminal back."""
        if self._bar_shown is not None:
            self._bar_shown.stop()
            self._bar_shown = None


def _moved(progress: LiveProgress) -> str:
    state, memory = progress.total_state / (1 << 20), progress.total_memory / (1 << 20)
    text = f"state {state:.1f}, memory {memory:.1f} MiB"
    if progress.phase is MigrationPhase.DONE:
        text += f", downtime {progress.downtime_s * 1000:.0f} ms"
    return text


def print_functions(stream: TextIO, reports: Sequence[FunctionReport]) -> None:
    """Write what the demonstration without migration found, if that was the one."""
    if not reports:
        return
    heads = ("function", "verified", "write", "read", "IRQs", "trapped", "direct", "reset", "sha256")
    console = console_on(stream)
    print_table(console, heads, [_function_row(report) for report in reports])
    total = sum(report.verified for report in reports) >> 20
    if all(report.ok for report in reports):
        console.print()
        print_line(console, f"verified: {total} MiB written and read back equal through the daemon")


def _function_row(report: FunctionReport) -> tuple[str, ...]:
    return (
        report.name,
        f"{report.verified >> 20}/{report.size >> 20} MiB",
        f"{report.write_mb_s:.0f} MB/s",
        f"{report.read_mb_s:.0f} MB/s",
        str(sum(report.interrupts)),
        str(report.trapped),
        str(report.direct),
        "intact" if report.survived_reset else "WRONG",
        report.sha256_read[:8],
    )


def print_journeys(stream: TextIO, reports: Sequence[JourneyReport]) -> None:
    """Write what the migrating demonstration found, if that was the one."""
    if not reports:
        return
    heads = ("function", "way", "state", "MB/s", "memory", "dirty", "in flight", "downtime", "after")
    rows = [_leg_row(report, leg) for report in reports for leg in report.legs]
    console = console_on(stream)
    print_table(console, heads, rows)
    if not all(report.ok for report in reports):
        return
    commands = sum(report.writes + report.reads for report in reports)
    verified = sum(report.verified for report in reports) / (1 << 20)
    console.print()
    print_line(
        console,
        f"verified: {commands} I/O commands, each executed exactly once by the controller's own count; "
        f"{verified:.0f} MiB read back equal; guest memory equal at every switch",
    )


def _leg_row(report: JourneyReport, leg: LegReport) -> tuple[str, ...]:
    return (
        report.name,
        f"{leg.source}→{leg.destination} {leg.generation}",
        f"{sum(leg.state_bytes.values()) / (1 << 20):.1f} MiB",
        f"{leg.state_mb_s:.0f}",
        f"{sum(leg.memory_bytes.values()) / (1 << 20):.1f} MiB",
        str(leg.dirty_by_device),
        str(leg.in_flight),
        f"{leg.downtime_s * 1000:.0f} ms",
        f"{leg.commands_after} I/O",
    )
