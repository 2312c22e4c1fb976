"""What the innocent client felt, how the daemon fared, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Budget(NamedTuple):
    """Seconds that others may cost a register read."""

    p99: float = 0.020
    maximum: float = 0.250


BUDGET = Budget()
#: Attempts for a measurement whose latencies are out of budget: a machine may stall once, a hole stalls each time.
ATTEMPTS = 3


class Sample(NamedTuple):
    """One register read: what it took, and what of it remains when waits for a processor are taken off."""

    latency: float
    share: float


@dataclass(frozen=True)
class Felt:
    """The reads of one phase.

    A reader that waits makes no other reads meanwhile, so that one long stall would be one sample among thousands. The
    reads that it would have made are added: each finds what is left of the stall.

    Args:
        samples: in order.
        interval: seconds between reads.
    """

    samples: Sequence[Sample]
    interval: float

    def shares(self) -> list[float]:
        """What the daemon is answerable for, sorted."""
        return self._corrected([sample.share for sample in self.samples])

    def raw(self) -> list[float]:
        """What the reads took, sorted."""
        return self._corrected([sample.latency for sample in self.samples])

    def _corrected(self, values: list[float]) -> list[float]:
        found = []
        for value in values:
            found.append(value)
            while (value := value - self.interval) > 0:
                found.append(value)
        return sorted(found)

    def __str__(self) -> str:
        return f"{len(self.samples)} reads; the daemon's share {_figures(self.shares())}; raw {_figures(self.raw())}"


def quantile(values: Sequence[float], part: float) -> float:
    """A quantile of sorted values."""
    return values[min(len(values) - 1, int(len(values) * part))] if values else float("inf")


def _figures(values: Sequence[float]) -> str:
    p50, p99, maximum = (quantile(values, part) * 1000 for part in (0.5, 0.99, 1.0))
    return f"p50 {p50:.2f} p99 {p99:.2f} max {maximum:.1f} ms"


class Health(NamedTuple):
    """A process as the kernel sees it."""

    rss_mb: float
    fds: int
    threads: int

    def most(self, other: Health) -> Health:
        """The larger of each figure."""
        return Health(max(self.rss_mb, other.rss_mb), max(self.fds, other.fds), max(self.threads, other.threads))


@dataclass
class Verdict:
    """What is known after an attack.

    Args:
        name: of the attack.
        control: reads before the attack.
        felt: reads while it was going on, and right afterwards.
        before: the daemon before the attack.
        peak: the most that was seen of it.
        after: the daemon after the attack, as soon as it is as it was before, or after some seconds.
        alive: the daemon's process is still there, and serves a new client of the first function.
        harm: what the innocent client found changed, or did not get.
        noise: lines of the log that no attack may cause.
        log_kb: how much was logged.
        attack_error: why the attack itself failed.
    """

    name: str
    control: Felt
    felt: Felt
    before: Health
    peak: Health
    after: Health
    alive: bool
    harm: list[str] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    log_kb: float = 0.0
    attack_error: str | None = None

    def slow(self, budget: Budget = BUDGET) -> str | None:
        """Say how the latencies are out of budget; None when they are not."""
        return _slow("under attack", self.felt, budget)

    def unfit(self, budget: Budget = BUDGET) -> str | None:
        """Say why the machine was in no state to measure on; None when it was fit."""
        return _slow("without the attack", self.control, budget)

    def wrong(self, spare_mb: float) -> list[str]:
        """Say what no second attempt excuses."""
        found = [] if self.alive else ["the daemon is dead, or serves no new client of the first function"]
        found += self.harm + self.noise
        if self.attack_error is not None:
            found.append(f"the attack was not carried out: {self.attack_error}")
        if self.after.fds > self.before.fds:
            found.append(f"the daemon kept {self.after.fds - self.before.fds} descriptors")
        if self.after.rss_mb - self.before.rss_mb > spare_mb:
            found.append(f"the daemon kept {self.after.rss_mb - self.before.rss_mb:.1f} MB of memory")
        return found

    def __str__(self) -> str:
        return (
            f"{self.name}\n  before    {self.control}\n  attacked  {self.felt}\n"
            f"  daemon    before {_health(self.before)}; at most {_health(self.peak)}; after {_health(self.after)};"
            f" log {self.log_kb:.0f} KB"
        )


def _health(health: Health) -> str:
    return f"{health.rss_mb:.1f} MB, {health.fds} fds, {health.threads} threads"


def _slow(when: str, felt: Felt, budget: Budget) -> str | None:
    shares = felt.shares()
    if quantile(shares, 0.99) <= budget.p99 and quantile(shares, 1.0) <= budget.maximum:
        return None
    return f"{when} p99 and maximum are to be {budget.p99 * 1000:g} and {budget.maximum * 1000:g} ms: {felt}"
