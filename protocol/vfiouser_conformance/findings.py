"""What a run found, by cause: a crash that fails twelve cases is one finding with twelve names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vfiouser_conformance.case import Level
from vfiouser_conformance.runner import CaseResult, CaseVerdict, RunOutcome

#: What differs from case to case although the cause is one: numbers, and bytes in hexadecimal.
_VARIABLE = re.compile(r"0x[0-9a-f]+|'[0-9a-f]*'|\b[0-9a-f]{8,}\b|\d+")


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause of failures, and the cases that failed by it.

    Args:
        cause: in words, as the first of the cases told it.
        results: the cases that failed by it, in order.
        breaks: whether the server itself was in trouble, rather than an answer wrong.
    """

    cause: str
    results: tuple[CaseResult, ...]
    breaks: bool

    def count(self, level: Level) -> int:
        """How many cases of a level."""
        return sum(result.case.level is level for result in self.results)

    @property
    def names(self) -> tuple[str, ...]:
        """The cases' names."""
        return tuple(result.case.name for result in self.results)

    @property
    def rank(self) -> tuple[bool, int, int, int]:
        """What makes it important: a MUST first, then a server in trouble, then how many cases."""
        must = self.count(Level.MUST)
        return must > 0, self.breaks, must, len(self.results)


def findings(outcome: RunOutcome) -> Sequence[Finding]:
    """The causes of all failures, the most important one first."""
    grouped: dict[str, list[CaseResult]] = {}
    for result in outcome.results:
        if result.verdict is CaseVerdict.FAILED:
            grouped.setdefault(_VARIABLE.sub("#", _cause(result)), []).append(result)
    found = [Finding(_cause(results[0]), tuple(results), bool(results[0].trouble)) for results in grouped.values()]
    return sorted(found, key=lambda finding: finding.rank, reverse=True)


def _cause(result: CaseResult) -> str:
    return result.trouble or result.reason
