"""What `demo` shows on a terminal, at the width of a plain one and of a wide one."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from vfiouser_oob.cli.demo_display import Display, print_functions, print_journeys
from vfiouser_oob.lab.demo.journey import JourneyReport, LegReport
from vfiouser_oob.lab.demo.scenario import FunctionReport
from vfiouser_oob.lab.vmm.live import LiveProgress, MigrationPhase

#: What the demo looked like when somebody last looked at it; delete a file and run the test to write it anew.
SNAPSHOTS = Path(__file__).parent / "snapshots"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_MIB = 1 << 20


class Screen(io.StringIO):
    """A terminal as far as it can be asked."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def leg(source: str, destination: str, generation: str) -> LegReport:
    """A migration that is over."""
    return LegReport(
        source,
        destination,
        generation,
        state_bytes={"pre-copy": 30 * _MIB, "stop-copy": 2 * _MIB},
        memory_bytes={"pre-copy": 18 * _MIB},
        dirty_by_device=521,
        downtime_s=0.052,
        state_mb_s=301.4,
        memory_equal=True,
        in_flight=8,
        commands_after=425,
    )


def journey(name: str) -> JourneyReport:
    """A function that went there and back."""
    legs = [leg("A", "B", "v1"), leg("B", "A", "v2")]
    return JourneyReport(name, legs, writes=2000, reads=2710, verified=163 * _MIB, ok=True)


WRITTEN = FunctionReport(
    "f0",
    size=64 * _MIB,
    written=64 * _MIB,
    verified=64 * _MIB,
    write_mb_s=112.2,
    read_mb_s=98.7,
    sha256_read="0123456789abcdef" * 4,
    interrupts=[12, 2048],
    trapped=91,
    direct=4120,
    survived_reset=True,
    ok=True,
)


def show(stream: io.StringIO) -> None:
    """Steps, each phase of a migration, and both tables."""
    # Two functions at a time: every phase is a line of its own.
    display = Display(stream, 48 * _MIB, bars=False)
    display.line("host A: simulator is ready, pid 101; agent at tls://127.0.0.1:34611; daemon is ready, pid 102")
    for phase in MigrationPhase:
        progress = LiveProgress(phase, downtime_s=0.052)
        if phase is not MigrationPhase.SETUP:
            progress.state_bytes["pre-copy"] = 32 * _MIB
            progress.memory_bytes["pre-copy"] = 18 * _MIB
        display.meter("f0", leg("A", "B", "v1"), progress)
    display.close()
    print_journeys(stream, [journey("f0"), journey("f1")])
    print_functions(stream, [WRITTEN])


@pytest.mark.parametrize("width", [80, 120])
def test_demo_looks_as_it_did(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Nothing is wider than the terminal, and words stay whole."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    show(screen)
    lines = [line.rstrip() for line in _ESCAPE.sub("", screen.getvalue()).splitlines()]
    assert width >= max(map(len, lines))
    text = "\n".join(lines) + "\n"
    path = SNAPSHOTS / f"demo-{width}.txt"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path} was written; look at it")
    assert path.read_text() == text
