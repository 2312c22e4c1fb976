"""Runs cases one after the other, each on connections of its own, and keeps going whatever the server does."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vfiouser_oob.conformance import vectors, wire
from vfiouser_oob.conformance.case import Case, CaseFailed, NotApplicable
from vfiouser_oob.conformance.facts import Facts, discover
from vfiouser_oob.conformance.link import Link, Record
from vfiouser_oob.conformance.process import ServerProcess
from vfiouser_oob.conformance.trial import Seen, Target, Trial
from vfiouser_protocol.constants import Command, RegionIndex

#: What may go wrong while the bytes of a hostile server are looked at.
_SURPRISES = (CaseFailed, OSError, struct.error, ValueError, IndexError)
#: Registers of config space that are put back after a case: command, BARs, ROM address, interrupt line.
_KEPT = ((0x04, 2), *((0x10 + 4 * bar, 4) for bar in range(6)), (0x30, 4), (0x3C, 1))


_END_S = 1.0


class Verdict(Enum):
    """What came of a case."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    #: The server was gone, and could not be started again.
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one case.

    Args:
        case: which.
        verdict: the outcome.
        reason: why it failed or did not apply.
        seconds: how long it took.
        seen: behaviours that were seen where several are allowed.
        records: what was sent and received, if it failed.
        restarted: whether the server had to be started again after it.
    """

    case: Case
    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0
    seen: tuple[Seen, ...] = ()
    records: tuple[Record, ...] = ()
    restarted: bool = False


@dataclass(slots=True)
class Outcome:
    """What came of a run.

    Args:
        facts: what was found out about the server.
        results: one per case.
        pinned: whether a behaviour that is allowed but not recommended counts as a failure.
    """

    facts: Facts
    results: list[Result] = field(default_factory=list)
    pinned: bool = False


class Runner:
    """Runs cases against one target.

    Args:
        target: what is tested.
        process: the server's process, if we start it.
        pinned: whether a behaviour that is allowed but not recommended fails its case.
        progress: told each result as it comes.
    """

    def __init__(
        self,
        target: Target,
        *,
        process: ServerProcess | None = None,
        pinned: bool = False,
        progress: Callable[[Result], None] = lambda result: None,
    ) -> None:
        self._target = target
        self._process = process
        self._pinned = pinned
        self._progress = progress
        self.facts = Facts()

    def run(self, cases: Sequence[Case]) -> Outcome:
        """Find out what the server has, then run the cases in order."""
        gone = self._start()
        if not gone:
            self.facts = self._discover()
        outcome = Outcome(self.facts, pinned=self._pinned)
        for case in cases:
            if gone:
                result = Result(case, Verdict.NOT_RUN, gone)
            else:
                result, gone = self._run_case(case)
            outcome.results.append(result)
            self._progress(result)
        if not gone:
            self._release()
        return outcome

    def _release(self) -> None:
        """Have the device profile put back what it used."""
        stimulus = self._target.stimulus
        if stimulus is None or not stimulus.in_use:
            return
        trial = Trial(self._target, self.facts)
        try:
            link = trial.attach()
            stimulus.prepare(link)
            stimulus.release(link)
        except (*_SURPRISES, NotApplicable) as error:
            self.facts.problems.append(f"the device profile cannot put back what it used: {_text(error)}")
        finally:
            trial.end()

    def _run_case(self, case: Case) -> tuple[Result, str]:
        if self._process is not None:
            self._process.ensure()
        trial = Trial(self._target, self.facts)
        began = time.monotonic()
        verdict, reason = self._judge(case, trial)
        trouble = self._aftermath(case)
        restarted, gone = False, ""
        if trouble:
            verdict = Verdict.FAILED
            reason = f"{reason}; then {trouble}" if reason else trouble
            gone = self._start(again=True)
            restarted = not gone
        odd = [seen for seen in trial.seen if not seen.recommended]
        if verdict is Verdict.PASSED and self._pinned and odd:
            verdict = Verdict.FAILED
            reason = f"allowed, but not recommended: {odd[0].topic}: {odd[0].value}"
        records = tuple(trial.transcript.records) if verdict is Verdict.FAILED else ()
        seconds = time.monotonic() - began
        return Result(case, verdict, reason, seconds, tuple(trial.seen), records, restarted), gone

    def _judge(self, case: Case, trial: Trial) -> tuple[Verdict, str]:
        verdict, reason = Verdict.PASSED, ""
        try:
            case.run(trial)
        except NotApplicable as error:
            verdict, reason = Verdict.NOT_APPLICABLE, str(error)
            if self.facts.problems:
                verdict = Verdict.FAILED
                reason = f"{error}: it could not be found out, since {self.facts.problems[0]}"
        except _SURPRISES as error:
            verdict, reason = Verdict.FAILED, _text(error)
        try:
            trial.end()
        except NotApplicable:
            pass  # what the device cannot do it has not done either
        except _SURPRISES as error:
            if verdict is Verdict.PASSED:
                verdict, reason = Verdict.FAILED, f"putting the device back as it was: {_text(error)}"
        return verdict, reason

    def _aftermath(self, case: Case) -> str:
        """What is wrong with the server after a case; empty if it still serves."""
        if self._process is not None:
            ended = self._process.crashed()
            if ended:
                return ended
            self._process.ensure()
        trial = Trial(self._target, self.facts)
        try:
            link = trial.attach()
            if case.effect.value:
                _put_back(trial, link)
            link.alive()
        except _SURPRISES as error:
            # A process that dies closes its sockets a moment before its end can be seen.
            if self._process is not None and (ended := self._process.crashed(_END_S)):
                return ended
            return f"a new client is not served: {_text(error)}"
        finally:
            trial.end()
        return ""

    def _start(self, *, again: bool = False) -> str:
        """Have a server that listens; returns why there is none."""
        if self._process is not None:
            if again:
                self._process.stop()
            return self._process.ensure()
        if not again:
            return ""
        return "the server is gone (with --server-command it would be started again)"

    def _discover(self) -> Facts:
        trial = Trial(self._target, Facts())
        try:
            link = trial.connect()
            reply = link.call(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES))
            return discover(link, reply)
        except _SURPRISES as error:
            return Facts(problems=[f"negotiation: {_text(error)}"])
        finally:
            trial.end()


def _put_back(trial: Trial, link: Link) -> None:
    """Write the registers of config space that a case changed as they were found."""
    found = trial.facts.config
    if len(found) < 64:
        return
    now = link.call(Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 64)).payload[16:]
    for offset, width in _KEPT:
        if now[offset : offset + width] != found[offset : offset + width]:
            request = wire.access(RegionIndex.CONFIG, offset, width, found[offset : offset + width])
            link.call(Command.REGION_WRITE, request)


def _text(error: BaseException) -> str:
    if isinstance(error, CaseFailed):
        return str(error)
    return f"{type(error).__name__}: {error}"
