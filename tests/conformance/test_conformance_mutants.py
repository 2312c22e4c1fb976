"""The suite bites: it passes a server without faults, and each case fails those with the faults of its row."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from mutants import serving
from mutants.caught import CAUGHT_BY
from vfiouser_conformance.case import Case
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.runner import CaseResult, CaseVerdict, Runner
from vfiouser_conformance.stimulus import PROFILES
from vfiouser_conformance.trial import Target

#: Shorter than what a slow mutant takes, longer than anything else, in seconds.
TIMEOUT_S = 1.0
CASES = all_cases()


def run(case: Case, path: Path, fault: str) -> CaseResult:
    """Run one case against two servers with this fault."""
    variant = CAUGHT_BY[case.name][0].partition("@")[2]
    fault = fault if "@" in fault else f"{fault}@{variant}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving(str(path / "a.sock"), fault))
        stack.enter_context(serving(str(path / "b.sock"), fault))
        target = Target(str(path / "a.sock"), str(path / "b.sock"), TIMEOUT_S, PROFILES["test"](TIMEOUT_S))
        return Runner(target).run([case]).results[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_good_server_passes(case: Case, tmp_path: Path) -> None:
    """The server without faults passes every case, and no case is not applicable to it."""
    result = run(case, tmp_path, "")
    assert (CaseVerdict.PASSED, "") == (result.verdict, result.reason)


@pytest.mark.parametrize(
    ("case", "fault"),
    [pytest.param(case, fault, id=f"{case.name}-{fault}") for case in CASES for fault in CAUGHT_BY[case.name]],
)
def test_a_mutant_is_caught(case: Case, fault: str, tmp_path: Path) -> None:
    """The server with a fault that the case has to catch fails the case."""
    result = run(case, tmp_path, fault)
    assert CaseVerdict.FAILED is result.verdict, f"{fault} was not caught: {result.verdict} {result.reason}"
