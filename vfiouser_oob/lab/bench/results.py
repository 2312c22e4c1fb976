"""What a benchmark says, and how it compares with its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit for a ratio or a value.

    Args:
        limit: the limit.
        at_most: True: the limit must not be exceeded; False: it has to be reached.
    """

    limit: float
    at_most: bool = True

    def holds(self, value: float) -> bool:
        """Whether a value is within the budget."""
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report.

    Args:
        name: what was measured.
        value: the measurement.
        unit: its unit.
        baseline: what it is compared with, in the same unit; None: nothing.
        baseline_name: what that is.
        budget: limit of value / baseline, or of the value when there is no baseline; None: only reported.
        details: further numbers.
    """

    name: str
    value: float
    unit: str
    baseline: float | None = None
    baseline_name: str = ""
    budget: Budget | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The value as a multiple of the baseline."""
        return None if self.baseline is None else self.value / self.baseline

    @property
    def ok(self) -> bool:
        """Whether it is within its budget; always, without one."""
        judged = self.value if self.ratio is None else self.ratio
        return self.budget is None or self.budget.holds(judged)

    def as_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        budget = None if self.budget is None else {"limit": self.budget.limit, "at_most": self.budget.at_most}
        return asdict(self) | {"budget": budget, "ratio": self.ratio, "ok": self.ok}


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of all values lie; the values are sorted already."""
    index = min(len(sorted_values) - 1, int(len(sorted_values) * percent / 100))
    return sorted_values[index]


class Samples:
    """Times of one thing, collected in rounds that alternate with those of another.

    A noisy machine is slow for a while and then fast again. The median over the rounds of each round's
    percentile forgets a bad round; alternating makes sure that both things had the same good and bad times.
    """

    def __init__(self) -> None:
        self._rounds: list[list[float]] = []

    def add(self, nanoseconds: Sequence[int]) -> None:
        """Add one round."""
        self._rounds.append(sorted(time / 1000 for time in nanoseconds))

    def percentile_us(self, percent: float) -> float:
        """Median over the rounds of a percentile, in microseconds."""
        return median(percentile(round_, percent) for round_ in self._rounds)

    def details(self) -> dict[str, float]:
        """The usual percentiles in microseconds."""
        return {f"p{percent}": round(self.percentile_us(percent), 2) for percent in (50, 90, 99)}
