"""What many functions cost, as values: figures, what they say of more functions, and how they compare with budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from statistics import linear_regression
from typing import Any

from vfiouser_oob.lab.bench.results import Budget, Result

# The budgets of the design; those of storms and throughput are for one daemon.
_STORM_BUDGET_MS = Budget(500)
_NO_WAKE_UPS = Budget(0)
_CROWD_BUDGET = Budget(0.9, at_most=False)
_BYSTANDER_BUDGET_MS = Budget(20)


class Spread(Enum):
    """How functions are spread over processes."""

    ONE_DAEMON = "one daemon"
    MANY_PROCESSES = "a process each"


@dataclass(frozen=True, slots=True)
class ScaleFigures:
    """What so many functions cost, each with a client where nothing else is said.

    Args:
        spread: over which processes they are spread.
        functions: how many.
        start_s: seconds from the start of the first process until all functions could be attached to.
        memory_mb: memory of all daemons (PSS), in 10^6 bytes.
        descriptors: that all daemons have open.
        idle_wake_ups: of all daemons, per second.
        storm_p50_ms: half of all clients that attach at once are done within this.
        storm_p99_ms: nearly all of them.
        attach_cpu_ms: processor time of the daemons for each of those.
        migration_mb_s: state that all functions together save per second.
        migration_cpu_s: processor time of the daemons per 10^9 bytes of that.
        quiet_p99_ms: register read of a bystander while nothing else happens.
        read_p99_ms: the same while all functions migrate.
    """

    spread: str
    functions: int
    start_s: float
    memory_mb: float
    descriptors: int
    idle_wake_ups: float
    storm_p50_ms: float
    storm_p99_ms: float
    attach_cpu_ms: float
    migration_mb_s: float
    migration_cpu_s: float
    quiet_p99_ms: float
    read_p99_ms: float

    @classmethod
    def from_json(cls, document: Any) -> ScaleFigures:
        """Read what `as_json` wrote."""
        return cls(**document)

    def as_json(self) -> dict[str, Any]:
        """The figures as a JSON object, as exact as they are."""
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}


def scale_results(figures: Sequence[ScaleFigures]) -> list[Result]:
    """The figures as lines of a report, those of one daemon with their budgets.

    Args:
        figures: of both spreads.
    """
    one = {each.functions: each for each in figures if each.spread == Spread.ONE_DAEMON.value}
    least = one[min(one)]
    results = []
    for each in figures:
        alone = each.spread == Spread.ONE_DAEMON.value
        title = f"{each.functions} functions, {each.spread}"
        crowd = _CROWD_BUDGET if alone and each is not least else None
        results += [
            Result(f"memory, {title}", each.memory_mb, "MB", details={"descriptors": each.descriptors}),
            Result(f"idle wake-ups, {title}", each.idle_wake_ups, "/s", budget=_NO_WAKE_UPS),
            Result(
                f"attach storm p99, {title}",
                each.storm_p99_ms,
                "ms",
                budget=_STORM_BUDGET_MS if alone else None,
                details={"p50": round(each.storm_p50_ms, 2), "cpu_ms_each": round(each.attach_cpu_ms, 2)},
            ),
            Result(f"migrating at once, {title}", each.migration_mb_s, "MB/s", least.migration_mb_s, "one", crowd),
            Result(
                f"a bystander's read p99 meanwhile, {title}",
                each.read_p99_ms,
                "ms",
                budget=_BYSTANDER_BUDGET_MS if alone else None,
                details={"quiet": round(each.quiet_p99_ms, 3)},
            ),
        ]
    return results


@dataclass(frozen=True, slots=True)
class Trend:
    """One of the figures, in words, and how it goes on beyond the sizes that were measured.

    Args:
        figure: its name in `ScaleFigures`.
        words: what it is, with its unit.
        digits: behind the point, where it is told.
        grows: by the straight line through what was measured; otherwise it stays as it was last.
    """

    figure: str
    words: str
    digits: int = 0
    grows: bool = True

    def at(self, figures: Sequence[ScaleFigures], functions: int) -> float:
        """Say what so many functions would have.

        Args:
            figures: of one spread, by ascending numbers of functions; one at least.
            functions: how many.
        """
        values = [float(getattr(each, self.figure)) for each in figures]
        if not self.grows or len(values) == 1:
            return values[-1]
        slope, start = linear_regression([each.functions for each in figures], values)
        return max(0.0, start + slope * functions)


#: What is told of each number of functions.
TRENDS = (
    Trend("memory_mb", "memory (PSS), MB"),
    Trend("descriptors", "open descriptors"),
    Trend("idle_wake_ups", "wake-ups per second, idle", digits=1),
    Trend("start_s", "start of all, s", digits=1),
    Trend("storm_p99_ms", "all attach at once, p99, ms"),
    Trend("attach_cpu_ms", "processor time of each, ms", digits=2, grows=False),
    Trend("migration_mb_s", "all save at once, MB/s", grows=False),
    Trend("migration_cpu_s", "processor time per 10^9 bytes, s", digits=2, grows=False),
    Trend("quiet_p99_ms", "a bystander's read, p99, nothing else happens, ms", digits=2, grows=False),
    Trend("read_p99_ms", "the same while all save, ms", digits=2, grows=False),
)


def by_spread(figures: Sequence[ScaleFigures]) -> Mapping[str, list[ScaleFigures]]:
    """The figures of each spread, by ascending numbers of functions."""
    found: dict[str, list[ScaleFigures]] = {spread.value: [] for spread in Spread}
    for each in sorted(figures, key=lambda figure: figure.functions):
        found[each.spread].append(each)
    return found


def scale_table(figures: Sequence[ScaleFigures], computed_for: int) -> list[list[str]]:
    """The rows of a table: what, a cell for each number of functions, and one for what that says of many more.

    Args:
        figures: of both spreads, for the same numbers of functions.
        computed_for: how many functions the last cell is for.
    """
    rows = []
    for trend in TRENDS:
        for spread, found in by_spread(figures).items():
            values = [float(getattr(each, trend.figure)) for each in found]
            cells = [*values, trend.at(found, computed_for)]
            rows.append([f"{trend.words}: {spread}", *(f"{value:,.{trend.digits}f}" for value in cells)])
    return rows
