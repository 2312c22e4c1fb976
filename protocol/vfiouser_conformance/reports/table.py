"""The report for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from vfiouser_conformance import describe
from vfiouser_conformance.case import Case, Level
from vfiouser_conformance.findings import findings
from vfiouser_conformance.requirements import REQUIREMENTS, SENTENCES, Coverage, coverage
from vfiouser_conformance.runner import CaseResult, CaseVerdict, RunOutcome

_STYLES = {
    CaseVerdict.PASSED: "green",
    CaseVerdict.FAILED: "red",
    CaseVerdict.NOT_APPLICABLE: "dim",
    CaseVerdict.CANNOT_TELL: "yellow",
    CaseVerdict.NOT_RUN: "yellow",
}
_WORDS = {
    CaseVerdict.PASSED: "pass",
    CaseVerdict.FAILED: "FAIL",
    CaseVerdict.NOT_APPLICABLE: "n/a",
    CaseVerdict.CANNOT_TELL: "unclear",
    CaseVerdict.NOT_RUN: "not run",
}
#: What fits on a screen: causes, names of each, lines of anything else.
_CAUSES, _NAMES, _LINES = 3, 12, 4


class ReportLine(str):
    """A line of a report whose colour says something.

    Args:
        text: the line, without any colour.
        style: the colour in a word, as rich has it.
    """

    style: str

    def __new__(cls, text: str, style: str) -> Self:
        """Make a line."""
        line = super().__new__(cls, text)
        line.style = style
        return line


class TableReport:
    """Lines of text about a run.

    Args:
        verbose: whether everything is told, or what fits on a screen.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self._verbose = verbose

    def case(self, result: CaseResult) -> Iterator[str]:
        """One case, as it ends."""
        case = result.case
        yield _paint(f"{_WORDS[result.verdict]:7} {case.name:16} {case.level.value:6} {case.summary}", result.verdict)
        if result.verdict is not CaseVerdict.PASSED:
            yield f"        {result.reason}"
        if result.note:
            yield f"        {result.note}"
        if result.restarted:
            yield "        the server was started again"

    def whole(self, outcome: RunOutcome) -> Iterator[str]:
        """All that is said when a run has ended."""
        if self._verbose or failed(outcome) == 1:
            yield from self.failures(outcome)
        yield from self._causes(outcome)
        yield from self._areas(outcome) if self._verbose else self._levels(outcome)
        yield from self._behaviours(outcome)
        yield from self._problems(outcome)
        yield ""
        yield self._last_line(outcome)

    def failures(self, outcome: RunOutcome) -> Iterator[str]:
        """Every failure with what was sent and received."""
        for result in outcome.results:
            if result.verdict is CaseVerdict.FAILED:
                yield ""
                yield _paint(f"{result.case.name}: {result.reason}", CaseVerdict.FAILED)
                yield f"  expected: {result.case.expected}"
                for line in describe.transcript(result.records):
                    yield f"  {line}"

    def _causes(self, outcome: RunOutcome) -> Iterator[str]:
        found = findings(outcome)
        if not found:
            return
        yield ""
        total = failed(outcome)
        first = ", the most important first" if len(found) > 1 else ""
        yield f"{total} failed by {len(found)} cause{'s' if len(found) > 1 else ''}{first}:"
        shown = found if self._verbose else found[:_CAUSES]
        for finding in shown:
            levels = ", ".join(f"{count} {level.value}" for level in Level if (count := finding.count(level)))
            yield _paint(f"  {finding.cause} ({levels})", CaseVerdict.FAILED)
            yield f"    {self._names(finding.names)}"
        if len(found) > len(shown):
            more = len(found) - len(shown)
            yield f"  … and {more} more cause{'s' if more > 1 else ''}: --verbose, --json FILE"

    def _levels(self, outcome: RunOutcome) -> Iterator[str]:
        shown = [verdict for verdict in CaseVerdict if any(result.verdict is verdict for result in outcome.results)]
        yield ""
        yield f"{'level':8}" + "".join(f"{_HEADS[verdict]:>13}" for verdict in shown)
        for level in Level:
            results = [result for result in outcome.results if result.case.level is level]
            counts = [sum(result.verdict is verdict for result in results) for verdict in shown]
            if results:
                yield f"{level.value:8}" + "".join(f"{count:>13}" for count in counts)

    def _areas(self, outcome: RunOutcome) -> Iterator[str]:
        yield ""
        yield f"{'area':38} {'MUST':>9} {'SHOULD':>9} {'COMPAT':>9} {'n/a':>5}"
        for title, results in _by_area(outcome.results):
            cells = [f"{_score(results, level):>9}" for level in Level]
            absent = sum(result.verdict is CaseVerdict.NOT_APPLICABLE for result in results)
            bad = any(result.verdict in (CaseVerdict.FAILED, CaseVerdict.NOT_RUN) for result in results)
            yield _paint(f"{title:38} {' '.join(cells)} {absent or '':>5}",
                              CaseVerdict.FAILED if bad else CaseVerdict.PASSED)  # fmt: skip

    def _behaviours(self, outcome: RunOutcome) -> Iterator[str]:
        seen = list(dict.fromkeys(entry for result in outcome.results for entry in result.seen))
        if not self._verbose:
            seen = [entry for entry in seen if not entry.recommended]
        lines = [f"{entry.topic}: {entry.value}" + ("" if entry.recommended else " (not the recommended one)")
                 for entry in seen]  # fmt: skip
        yield from self._listed("this server's choices where several are allowed:", lines)

    def _problems(self, outcome: RunOutcome) -> Iterator[str]:
        lines = [f"{what}: {why}" for what, why in outcome.facts.problems.items()]
        yield from self._listed("unknown about the server:", lines)
        unclear = [(result.reason, result) for result in outcome.results if result.verdict is CaseVerdict.CANNOT_TELL]
        yield from self._listed("neither passed nor failed:", self._by_reason(unclear))
        notes = [(result.note, result) for result in outcome.results if result.note]
        yield from self._listed("notes:", self._by_reason(notes))

    def _by_reason(self, told: Sequence[tuple[str, CaseResult]]) -> list[str]:
        """One line per reason, with the cases that it stands for."""
        return [
            f"{reason}: {self._names([result.case.name for other, result in told if other == reason])}"
            for reason in dict.fromkeys(reason for reason, _ in told)
        ]

    def _names(self, names: Sequence[str]) -> str:
        shown = names if self._verbose or len(names) <= _NAMES else names[: _NAMES - 1]
        return " ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")

    def _listed(self, title: str, lines: Sequence[str]) -> Iterator[str]:
        if not lines:
            return
        yield ""
        yield title
        shown = lines if self._verbose or len(lines) <= _LINES else lines[: _LINES - 1]
        yield from (f"  {line}" for line in shown)
        if len(lines) > len(shown):
            yield f"  … and {len(lines) - len(shown)} more: --verbose"

    def _last_line(self, outcome: RunOutcome) -> str:
        counts = {verdict: sum(result.verdict is verdict for result in outcome.results) for verdict in CaseVerdict}
        parts = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
        share = requirements_tested(outcome)
        covered = f"{len(share.covered)} of {len(REQUIREMENTS)} requirements tested ({share.share:.0%})"
        must = failures_of(outcome, Level.MUST)
        ending = f"{must} MUST failed" if must else "no MUST failed"
        if counts[CaseVerdict.NOT_RUN]:
            reason = next(result.reason for result in outcome.results if result.verdict is CaseVerdict.NOT_RUN)
            ending += f"; the run is incomplete: {reason}"
        good = not must and not counts[CaseVerdict.NOT_RUN]
        return _paint(f"{', '.join(parts)}; {covered}; {ending}", CaseVerdict.PASSED if good else CaseVerdict.FAILED)


def _paint(text: str, verdict: CaseVerdict) -> ReportLine:
    return ReportLine(text, _STYLES[verdict])


#: Heads of the columns of verdicts.
_HEADS = {verdict: verdict.value for verdict in CaseVerdict} | {CaseVerdict.NOT_APPLICABLE: "n/a"}


def failures_of(outcome: RunOutcome, level: Level) -> int:
    """How many cases of a level failed."""
    return sum(result.verdict is CaseVerdict.FAILED and result.case.level is level for result in outcome.results)


def failed(outcome: RunOutcome) -> int:
    """How many cases failed, of any level."""
    return sum(failures_of(outcome, level) for level in Level)


def requirements_tested(outcome: RunOutcome) -> Coverage:
    """Which requirements a run tested: a case counts that passed or failed, no other."""
    judged = (CaseVerdict.PASSED, CaseVerdict.FAILED)
    return coverage(result.case for result in outcome.results if result.verdict in judged)


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
        if number in SENTENCES:
            yield f'      "{SENTENCES[number]}"'


def _by_area(results: Sequence[CaseResult]) -> Iterator[tuple[str, list[CaseResult]]]:
    for title in dict.fromkeys(result.case.area for result in results):
        yield title, [result for result in results if result.case.area == title]


def _score(results: Sequence[CaseResult], level: Level) -> str:
    beside = (CaseVerdict.NOT_APPLICABLE, CaseVerdict.CANNOT_TELL)
    counted = [result for result in results if result.case.level is level and result.verdict not in beside]
    passed = sum(result.verdict is CaseVerdict.PASSED for result in counted)
    return f"{passed}/{len(counted)}" if counted else "-"
