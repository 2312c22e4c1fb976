"""What `make demo-vm` shows; that it moves a guest is proven by the tests of migrations."""

from __future__ import annotations

import io

import pytest

from vmbed.demo import Progress, bar, histogram


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (0.0, f"[{'.' * 24}]   0%"),
        (0.5, f"[{'#' * 12}{'.' * 12}]  50%"),
        (1.0, f"[{'#' * 24}] 100%"),
        (1.2, f"[{'#' * 24}] 100%"),
    ],
)
def test_bar(part: float, shown: str) -> None:
    """QEMU may have sent more than there was."""
    assert bar(part) == shown


def test_histogram() -> None:
    """A class has its lower end, and one without rounds is left out."""
    lines = [line.split() for line in histogram([0, 49, 50, 700, 5000])]
    assert [line[-2:] for line in lines] == [["2", "#" * 16], ["1", "#" * 8], ["1", "#" * 8], ["1", "#" * 8]]
    assert [" ".join(line[:-2]) for line in lines] == [
        "0 to 50 ms",
        "50 to 100 ms",
        "500 to 1000 ms",
        "2000 ms and more",
    ]
    assert histogram([]) == []


def test_a_file_gets_the_last_state_only() -> None:
    """Where nothing can be redrawn."""
    out = io.StringIO()
    progress = Progress(out)
    progress.show("10%")
    progress.show("100%", last=True)
    assert out.getvalue() == "100%\n"
