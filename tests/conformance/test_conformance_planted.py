"""The suite does not accuse the innocent: servers with a habit that the specification allows, each its own process.

And it does not hang, and names the cause, where a server is hostile or dies.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from plantedservers import HABITS
from vfiouser_conformance.case import Case, Level
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.findings import findings
from vfiouser_conformance.process import ServerProcess
from vfiouser_conformance.reports.table import TableReport, requirements_tested
from vfiouser_conformance.runner import CaseVerdict, Runner, RunOutcome, Unreachable
from vfiouser_conformance.select_cases import select
from vfiouser_conformance.stimulus import PROFILES
from vfiouser_conformance.trial import CASE_TIMEOUTS, Target

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TIMEOUT_S = 5.0
CASES = all_cases()
#: Cases that connect often, and those that look at what the end of a connection leaves behind.
RECONNECTING = "SESSION or FRAME-01 or FRAME-02 or VERSION-01 or CLIENT or R031 or R235 or R347 or LOGGING-015"


def judge(path: Path, habit: str, cases: Sequence[Case] = CASES, *, drives: bool = True, timeout: float = TIMEOUT_S,
          own: bool = True) -> RunOutcome:  # fmt: skip
    """Run cases against a process with this habit.

    Args:
        path: a directory.
        habit: its name.
        cases: which.
        drives: whether the device can be made to do things.
        timeout: for every answer, in seconds.
        own: whether the run may start the server again; if not, it is started once.
    """
    socket_path = str(path / "s.sock")
    # Without the site packages it starts in no time: some of these servers are started hundreds of times.
    code = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import plantedservers.__main__ as main; main.main()"
    command = shlex.join([sys.executable, "-S", "-E", "-c", code, "{socket}", habit])
    process = ServerProcess(command, socket_path)
    profile = PROFILES["test"](timeout) if drives else None
    try:
        if not own:
            assert "" == process.ensure()
        target = Target(socket_path, None, timeout, profile, process if own else None)
        return Runner(target).run(cases)
    finally:
        process.close()


def of(outcome: RunOutcome, *verdicts: CaseVerdict, level: Level | None = None) -> dict[str, str]:
    """Cases with these verdicts, and why."""
    results = [result for result in outcome.results if result.verdict in verdicts]
    return {result.case.name: result.reason for result in results if level in (None, result.case.level)}


def bad(outcome: RunOutcome) -> dict[str, str]:
    """What neither passed nor did not apply."""
    return of(outcome, CaseVerdict.FAILED, CaseVerdict.CANNOT_TELL, CaseVerdict.NOT_RUN)


def test_every_habit_is_tried() -> None:
    """No server is planted in vain."""
    text = Path(__file__).read_text()
    assert [] == [habit for habit in HABITS if f'"{habit}"' not in text]


@pytest.mark.parametrize(("habit", "cases"), [("leaves", CASES), ("leaves-with-status", RECONNECTING)])
def test_a_server_that_leaves_with_its_client(habit: str, cases: Sequence[Case] | str, tmp_path: Path) -> None:
    """A server that exits when its client leaves is started again without a word, between connections of a case too."""
    outcome = judge(tmp_path, habit, select(CASES, expression=cases) if isinstance(cases, str) else cases)
    assert {} == bad(outcome)
    assert [] == [result.case.name for result in outcome.results if result.restarted or result.note]
    assert {} == outcome.facts.problems


@pytest.mark.parametrize("habit", ["one-at-a-time", "refuses-in-stop-copy", "vendor-zero", "few-maps"])
@pytest.mark.parametrize("own", [True, False])
def test_an_odd_but_correct_server(habit: str, own: bool, tmp_path: Path) -> None:
    """A server that keeps the specification in a way of its own passes every case that applies to it."""
    if own:
        outcome = judge(tmp_path, habit, select(CASES, expression="not (FRAME or IRQ)"))
    else:
        outcome = judge(tmp_path, habit, own=False)
    assert {} == bad(outcome)


def test_a_device_that_cannot_run_again(tmp_path: Path) -> None:
    """A device may fail a transition: what needs it cannot be told, and nothing else is blamed."""
    outcome = judge(tmp_path, "stays-stopped")
    assert {} == of(outcome, CaseVerdict.FAILED)
    unclear = of(outcome, CaseVerdict.CANNOT_TELL)
    assert [] == [name for name in unclear if not name.startswith(("MIGRATION-", "CLIENT-"))]
    assert [] == [f"{name}: {reason}" for name, reason in unclear.items() if "RUNNING" not in reason]
    passed = of(outcome, CaseVerdict.PASSED)
    assert {"MIGRATION-006", "MIGRATION-031", "MIGRATION-032"} <= set(passed)
    notes = {result.case.name: result.note for result in outcome.results}
    assert "could not be put back" in notes["MIGRATION-031"]


def test_a_device_that_is_left_stopped(tmp_path: Path) -> None:
    """Where nobody can start the server again, what one case leaves behind fails no other."""
    outcome = judge(tmp_path, "stays-stopped", select(CASES, expression="MIGRATION or REGION or V1"), own=False)
    assert {} == of(outcome, CaseVerdict.FAILED, level=Level.MUST)


def test_a_server_that_keeps_the_state(tmp_path: Path) -> None:
    """The specification has a server retain the device's state: only those who build on the contrary may complain."""
    outcome = judge(tmp_path, "keeps-state", own=False)
    assert {} == of(outcome, CaseVerdict.FAILED, level=Level.MUST) | of(outcome, CaseVerdict.FAILED, level=Level.SHOULD)
    assert {"LOGGING-015"} == set(bad(outcome))


@pytest.mark.parametrize(
    ("habit", "failed"), [("serial-dma", {"DMA-009", "DMA-019"}), ("dma-inside", {"DMA-009", "DMA-019"})]
)
def test_a_server_that_takes_one_message_at_a_time(habit: str, failed: set[str], tmp_path: Path) -> None:
    """It owes no answer while it is owed one: this is what COMPAT cases are for."""
    outcome = judge(tmp_path, habit, timeout=2.0)
    assert failed == set(of(outcome, CaseVerdict.FAILED))
    assert failed == set(of(outcome, CaseVerdict.FAILED, level=Level.COMPAT))
    assert {"DMA-014"} == set(of(outcome, CaseVerdict.CANNOT_TELL))


def test_a_server_without_dma(tmp_path: Path) -> None:
    """A server whose device does no DMA may ignore maps: what it says about them is not judged."""
    outcome = judge(tmp_path, "agrees-to-maps", drives=False)
    assert {} == of(outcome, CaseVerdict.FAILED, level=Level.MUST) | of(outcome, CaseVerdict.FAILED, level=Level.SHOULD)
    reasons = of(outcome, CaseVerdict.NOT_APPLICABLE)
    for name in ("DMA-MAP-013", "DMA-MAP-040", "SESSION-005", "SESSION-009"):
        assert "ignores DMA maps" in reasons[name]


def test_a_server_that_loses_its_place(tmp_path: Path) -> None:
    """One command that it refuses does not spoil what is found out with others, and what is absent is n/a."""
    outcome = judge(tmp_path, "loses-its-place", timeout=2.0)
    assert {} == outcome.facts.problems
    assert {} == of(outcome, CaseVerdict.FAILED, level=Level.MUST)
    assert {"FRAME-029", "FD-004", "FEATURE-007"} == set(bad(outcome))
    assert "offers no migration" in of(outcome, CaseVerdict.NOT_APPLICABLE)["MIGRATION-002"]


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        ("chain-to-itself", "in a circle at 32"),
        ("chain-in-a-circle", "in a circle at 32"),
        ("chain-outside", "at 4096"),
        ("chain-into-the-head", "at 8, inside the fixed part"),
    ],
)
def test_a_chain_that_leads_nowhere(habit: str, words: str, tmp_path: Path) -> None:
    """Capabilities that point anywhere but on end the case, in words of ours."""
    outcome = judge(tmp_path, habit, select(CASES, expression="REGION-INFO"))
    reasons = of(outcome, CaseVerdict.FAILED)
    assert {"REGION-INFO-012", "REGION-INFO-013"} <= set(reasons)
    assert all(words in reasons[name] for name in ("REGION-INFO-012", "REGION-INFO-013"))
    assert not any("error:" in reason or "Error" in reason for reason in reasons.values())


def test_a_flood(tmp_path: Path) -> None:
    """A server that never stops sending commands of its own keeps no case longer than its time."""
    cases = select(CASES, expression="INFO-020 or FRAME-008 or FRAME-009")
    outcome = judge(tmp_path, "floods", cases, timeout=0.3)
    assert {"INFO-020", "FRAME-008", "FRAME-009"} == set(of(outcome, CaseVerdict.FAILED))
    assert all(result.seconds < 3 * CASE_TIMEOUTS * 0.3 for result in outcome.results)


def test_one_crash_is_one_finding(tmp_path: Path) -> None:
    """A server that dies of one command is told once, with its last words and with the names of all cases."""
    outcome = judge(tmp_path, "crashes", select(CASES, expression="INFO or FRAME"))
    (finding,) = findings(outcome)
    assert "the server was killed by SIGSEGV: null pointer in irq_info()" == finding.cause
    assert {"FRAME-008", "INFO-020"} < set(finding.names)
    assert len(finding.names) > 6
    # The survey, too, asked what kills the server: the first case does not take the blame.
    assert CaseVerdict.PASSED is outcome.results[0].verdict
    assert any("SIGSEGV" in reason for reason in outcome.facts.problems.values())
    lines = list(TableReport().whole(outcome))
    assert "SIGSEGV" in lines[2]
    assert len(lines) <= 30


def test_an_error_reply_with_data(tmp_path: Path) -> None:
    """What the specification rules out is not let pass because an implementation does it."""
    outcome = judge(tmp_path, "errors-with-data")
    assert {"FRAME-004"} == set(bad(outcome))


def test_a_server_that_never_listens(tmp_path: Path) -> None:
    """There is nothing to judge, and the server's last words say why."""
    with pytest.raises(Unreachable, match="ended at once with status 4: warming up / no firmware found"):
        judge(tmp_path, "never-listens")


def test_a_server_that_leaves_and_cannot_be_started(tmp_path: Path) -> None:
    """A server that leaves with its first client is not accused, but the user is told what is needed."""
    with pytest.raises(Unreachable, match="ended with its first client, as it may; --server-command"):
        judge(tmp_path, "leaves", timeout=0.3, own=False)


def test_what_was_not_run_was_not_tested(tmp_path: Path) -> None:
    """A server that dies in the middle of a run leaves little to count."""
    outcome = judge(tmp_path, "crashes-late", select(CASES, expression="FRAME"), timeout=0.3, own=False)
    ran = [result for result in outcome.results if result.verdict in (CaseVerdict.PASSED, CaseVerdict.FAILED)]
    assert {"FRAME-009"} == set(of(outcome, CaseVerdict.FAILED))
    assert 10 > len(ran)
    covered = {number for result in ran for number in result.case.requirements}
    assert covered == set(requirements_tested(outcome).covered)
