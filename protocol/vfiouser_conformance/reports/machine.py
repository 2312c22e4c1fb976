"""The reports for machines: JSON and JUnit."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from vfiouser_conformance import describe
from vfiouser_conformance.case import Level
from vfiouser_conformance.findings import findings
from vfiouser_conformance.reports.table import failures_of, requirements_tested
from vfiouser_conformance.requirements import REQUIREMENTS
from vfiouser_conformance.runner import CaseResult, CaseVerdict, RunOutcome

#: Of the JSON document; raised when a field changes its meaning.
FORMAT = 1
#: What JUnit has one word for.
_SKIPPED = (CaseVerdict.NOT_APPLICABLE, CaseVerdict.CANNOT_TELL)


def as_json(outcome: RunOutcome) -> dict[str, Any]:
    """The run as a JSON document."""
    share = requirements_tested(outcome)
    return {
        "format": FORMAT,
        "server": _facts(outcome),
        "interrupted": outcome.interrupted,
        "failed": {level.value: failures_of(outcome, level) for level in Level},
        "findings": [
            {"cause": finding.cause, "server_in_trouble": finding.breaks, "cases": list(finding.names)}
            for finding in findings(outcome)
        ],
        "requirements": {"total": len(REQUIREMENTS), "tested": list(share.covered), "share": round(share.share, 4)},
        "cases": [_case(result) for result in outcome.results],
    }


def _facts(outcome: RunOutcome) -> dict[str, Any]:
    facts = outcome.facts
    return {
        "capabilities": facts.capabilities,
        "regions": [{"index": region.index, "size": region.size, "flags": region.flags} for region in facts.regions],
        "irqs": [{"flags": flags, "count": count} for flags, count in facts.irqs],
        "migration": facts.migration,
        "migration_region": facts.v1_region,
        "problems": facts.problems,
    }


def _case(result: CaseResult) -> dict[str, Any]:
    case = result.case
    return {
        "name": case.name,
        "area": case.area,
        "level": case.level.value,
        "requirements": list(case.requirements),
        "summary": case.summary,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "note": result.note,
        "seconds": round(result.seconds, 4),
        "seen": [{"topic": seen.topic, "value": seen.value, "recommended": seen.recommended} for seen in result.seen],
        "transcript": [
            {
                "direction": record.direction,
                "connection": record.channel,
                "at": round(record.at, 4),
                "size": record.size,
                "descriptors": record.fds,
                "bytes": record.data.hex(),
                "text": describe.message(record.data, record.fds),
            }
            for record in result.records
        ],
    }


def as_junit(outcome: RunOutcome) -> str:
    """The run as JUnit XML: a suite per area; a failed COMPAT case is a failure, too, and says its level."""
    suites = ElementTree.Element("testsuites", name="vfio-user conformance")
    for title in dict.fromkeys(result.case.area for result in outcome.results):
        results = [result for result in outcome.results if result.case.area == title]
        suite = ElementTree.SubElement(
            suites,
            "testsuite",
            name=title,
            tests=str(len(results)),
            failures=str(sum(result.verdict is CaseVerdict.FAILED for result in results)),
            errors=str(sum(result.verdict is CaseVerdict.NOT_RUN for result in results)),
            skipped=str(sum(result.verdict in _SKIPPED for result in results)),
        )
        for result in results:
            _junit_case(suite, result)
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _junit_case(suite: ElementTree.Element, result: CaseResult) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=result.case.area, name=result.case.name, time=f"{result.seconds:.4f}"
    )
    message = f"{result.case.level.value}: {_printable(result.reason)}"
    if result.verdict is CaseVerdict.FAILED:
        failure = ElementTree.SubElement(case, "failure", message=message)
        failure.text = _printable("\n".join(describe.transcript(result.records)))
    elif result.verdict is CaseVerdict.NOT_RUN:
        ElementTree.SubElement(case, "error", message=message)
    elif result.verdict in _SKIPPED:
        ElementTree.SubElement(case, "skipped", message=f"{result.verdict.value}: {_printable(result.reason)}")


def _printable(text: str) -> str:
    """Without characters that XML does not have; a hostile server chooses parts of these texts."""
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)
