"""The report for people."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TextIO

from vfiouser_oob.conformance import describe
from vfiouser_oob.conformance.case import Case, Level
from vfiouser_oob.conformance.requirements import REQUIREMENTS, coverage
from vfiouser_oob.conformance.runner import Outcome, Result, Verdict

_COLOURS = {Verdict.PASSED: "32", Verdict.FAILED: "31", Verdict.NOT_APPLICABLE: "2", Verdict.NOT_RUN: "33"}
_WORDS = {Verdict.PASSED: "pass", Verdict.FAILED: "FAIL", Verdict.NOT_APPLICABLE: "n/a", Verdict.NOT_RUN: "not run"}


def wants_colours(stream: TextIO) -> bool:
    """Whether colours make sense there."""
    return stream.isatty() and "NO_COLOR" not in os.environ


class TableReport:
    """Lines of text about a run.

    Args:
        colours: whether the text is coloured.
    """

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def line(self, result: Result) -> str:
        """One case, as it ends."""
        word = self._paint(f"{_WORDS[result.verdict]:7}", result.verdict)
        case = result.case
        text = f"{word} {case.name:16} {case.level.value:6} {case.summary}"
        if result.verdict is not Verdict.PASSED:
            text += f"\n        {result.reason}"
        if result.restarted:
            text += "\n        the server was started again"
        return text

    def failures(self, outcome: Outcome) -> Iterator[str]:
        """Every failure with what was sent and received."""
        for result in outcome.results:
            if result.verdict is Verdict.FAILED:
                yield ""
                yield self._paint(f"{result.case.name}: {result.reason}", Verdict.FAILED)
                yield f"  expected: {result.case.expected}"
                for line in describe.transcript(result.records):
                    yield f"  {line}"

    def summary(self, outcome: Outcome) -> Iterator[str]:
        """The score per area, the behaviours seen, and what all that says."""
        yield ""
        yield f"{'area':38} {'MUST':>9} {'SHOULD':>9} {'COMPAT':>9} {'n/a':>5}"
        for title, results in _by_area(outcome.results):
            cells = [f"{_score(results, level):>9}" for level in Level]
            absent = sum(result.verdict is Verdict.NOT_APPLICABLE for result in results)
            bad = any(result.verdict in (Verdict.FAILED, Verdict.NOT_RUN) for result in results)
            yield self._paint(f"{title:38} {' '.join(cells)} {absent or '':>5}",
                              Verdict.FAILED if bad else Verdict.PASSED)  # fmt: skip
        yield from self._behaviours(outcome)
        yield from _problems(outcome)
        yield ""
        yield self._last_line(outcome)

    def _behaviours(self, outcome: Outcome) -> Iterator[str]:
        seen = dict.fromkeys(entry for result in outcome.results for entry in result.seen)
        if not seen:
            return
        yield ""
        yield "where several behaviours are allowed, this server's:"
        for entry in seen:
            yield f"  {entry.topic}: {entry.value}" + ("" if entry.recommended else " (not the recommended one)")

    def _last_line(self, outcome: Outcome) -> str:
        counts = {verdict: sum(result.verdict is verdict for result in outcome.results) for verdict in Verdict}
        parts = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
        share = coverage(result.case for result in outcome.results if result.verdict is not Verdict.NOT_APPLICABLE)
        tested = f"{len(share.covered)} of {len(REQUIREMENTS)} requirements tested ({share.share:.0%})"
        failed = failures_of(outcome, Level.MUST)
        verdict = Verdict.FAILED if failed else Verdict.PASSED
        ending = f"{failed} MUST failed" if failed else "no MUST failed"
        return self._paint(f"{', '.join(parts)}; {tested}; {ending}", verdict)

    def _paint(self, text: str, verdict: Verdict) -> str:
        return f"\033[{_COLOURS[verdict]}m{text}\033[0m" if self._colours else text


def failures_of(outcome: Outcome, level: Level) -> int:
    """How many cases of a level failed or could not be run."""
    bad = (Verdict.FAILED, Verdict.NOT_RUN)
    return sum(result.verdict in bad and result.case.level is level for result in outcome.results)


def listing(cases: Sequence[Case]) -> Iterator[str]:
    """The cases, one per line, and what they cover together."""
    for case in cases:
        yield f"{case.name:16} {case.level.value:6} {case.summary}"
    found = coverage(cases)
    yield f"{len(cases)} cases; {len(found.covered)} of {len(REQUIREMENTS)} requirements ({found.share:.0%})"


def explanation(case: Case) -> Iterator[str]:
    """What a case is about."""
    level = f"{case.level.value} ({case.compat})" if case.compat else case.level.value
    yield f"{case.name}  {level}  {case.area}"
    yield f"  {case.summary}"
    yield f"  sends:   {case.sent}"
    yield f"  expects: {case.expected}"
    yield "  why:"
    for number in case.requirements:
        requirement = REQUIREMENTS[number]
        yield f"    {number} {requirement.text} ({requirement.source})"
    yield f"  planted faults that it catches: {', '.join(case.mutants)}"


def _by_area(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    for title in dict.fromkeys(result.case.area for result in results):
        yield title, [result for result in results if result.case.area == title]


def _score(results: Sequence[Result], level: Level) -> str:
    counted = [
        result for result in results if result.case.level is level and result.verdict is not Verdict.NOT_APPLICABLE
    ]
    passed = sum(result.verdict is Verdict.PASSED for result in counted)
    return f"{passed}/{len(counted)}" if counted else "-"


def _problems(outcome: Outcome) -> Iterator[str]:
    if outcome.facts.problems:
        yield ""
        yield "what could not be found out about the server:"
        for problem in outcome.facts.problems:
            yield f"  {problem}"
