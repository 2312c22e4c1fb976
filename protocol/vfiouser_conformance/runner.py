"""Runs cases one after the other, each on connections of its own, and keeps going whatever the server does."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vfiouser_conformance import migration, migration_v1, vectors, wire
from vfiouser_conformance.case import CannotTell, Case, CaseFailed, NotApplicable
from vfiouser_conformance.facts import EVERYTHING, ServerFacts, Survey, in_words
from vfiouser_conformance.link import Closed, NotThere, RawLink, TranscriptEntry
from vfiouser_conformance.trial import Seen, Target, Trial
from vfiouser_protocol.constants import Command, RegionIndex

#: What may go wrong while the bytes of a hostile server are looked at.
_SURPRISES = (
    *(CaseFailed, OSError, struct.error, ValueError, LookupError),
    *(ArithmeticError, TypeError, AttributeError, MemoryError, RecursionError),
)
#: Registers of config space that are put back after a case: command, BARs, ROM address, interrupt line.
_KEPT = ((0x04, 2), *((0x10 + 4 * bar, 4) for bar in range(6)), (0x30, 4), (0x3C, 1))
#: How long a process that dies may take for it, and one that leaves with its client, in seconds.
_END_S, _LEAVE_S = 1.0, 1.0
#: The survey may take so many times as long as an answer.
_SURVEY_TIMEOUTS = 24
#: The kernel takes no longer path of a socket, in bytes.
_PATH_MAX = 107
#: A whole run may take this long, in seconds.
RUN_S = 1800.0


class Unreachable(Exception):
    """No server is there to judge; the message says why."""


class CaseVerdict(Enum):
    """What came of a case."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    #: It was tried, and showed neither a pass nor a failure.
    CANNOT_TELL = "cannot tell"
    #: The server was gone and could not be started again, or the run ended first.
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How a case went, and what has to be said about it.

    Args:
        case: which.
        verdict: the outcome.
        reason: why it failed or did not apply.
        seconds: how long it took.
        seen: behaviours that were seen where several are allowed.
        records: what was sent and received, if it failed.
        restarted: whether the server had to be started again after it.
        trouble: what was wrong with the server, rather than with an answer; empty = nothing.
        note: what else has to be said, whatever the verdict.
    """

    case: Case
    verdict: CaseVerdict
    reason: str = ""
    seconds: float = 0.0
    seen: tuple[Seen, ...] = ()
    records: tuple[TranscriptEntry, ...] = ()
    restarted: bool = False
    trouble: str = ""
    note: str = ""


@dataclass(slots=True)
class RunOutcome:
    """What came of a run.

    Args:
        facts: what was found out about the server.
        results: one per case.
        pinned: whether a behaviour that is allowed but not recommended counts as a failure.
        interrupted: why the run ended before its last case; empty = it did not.
    """

    facts: ServerFacts
    results: list[CaseResult] = field(default_factory=list)
    pinned: bool = False
    interrupted: str = ""


class Runner:
    """Runs cases against one target.

    Args:
        target: what is tested.
        pinned: whether a behaviour that is allowed but not recommended fails its case.
        progress: told each result as it comes.
        limit_s: how long the whole run may take, in seconds.
    """

    def __init__(
        self,
        target: Target,
        *,
        pinned: bool = False,
        progress: Callable[[CaseResult], None] = lambda result: None,
        limit_s: float = RUN_S,
    ) -> None:
        self._target = target
        self._process = target.process
        self._pinned = pinned
        self._progress = progress
        self._limit_s = limit_s
        self._ends = float("inf")
        #: What an earlier case left the device in, where it had to leave it; empty = nothing.
        self._stuck = ""
        self.facts = ServerFacts()

    def run(self, cases: Sequence[Case]) -> RunOutcome:
        """Find out what the server has, then run the cases in order; an interruption ends the run, with what it has.

        Args:
            cases: the cases to run.

        Returns:
            One result per case, in the same order; a case that did not run has one, too.

        Raises:
            Unreachable: there is no server.
        """
        self._ends = time.monotonic() + self._limit_s
        outcome = RunOutcome(self.facts, pinned=self._pinned)
        try:
            self._start_first()
            self.facts = outcome.facts = self._discover()
            self._run_cases(cases, outcome)
        except KeyboardInterrupt:
            outcome.interrupted = "the run was interrupted"
        for case in cases[len(outcome.results) :]:
            outcome.results.append(CaseResult(case, CaseVerdict.NOT_RUN, outcome.interrupted))
            self._progress(outcome.results[-1])
        return outcome

    def _run_cases(self, cases: Sequence[Case], outcome: RunOutcome) -> None:
        """Run cases until the last, or until the server is gone or the time is over."""
        for case in cases:
            if time.monotonic() >= self._ends:
                outcome.interrupted = f"the run was not over within {self._limit_s:g} s"
                return
            result, gone = self._run_case(case)
            outcome.results.append(result)
            self._progress(result)
            if gone:
                outcome.interrupted = gone
                return
        self._release()

    def _start_first(self) -> None:
        path = self._target.socket_path
        if len(os.fsencode(path)) > _PATH_MAX:
            raise Unreachable(f"the socket's path has {len(os.fsencode(path))} bytes, more than {_PATH_MAX}: {path}")
        if self._process is not None:
            if trouble := self._process.ensure():
                raise Unreachable(trouble)
        elif not os.path.exists(path):
            raise Unreachable(f"{path}: there is no such socket")

    def _release(self) -> None:
        """Have the device profile put back what it used."""
        stimulus = self._target.stimulus
        if stimulus is None or not stimulus.in_use:
            return
        trial = self._trial(self.facts)
        try:
            link = trial.attach()
            stimulus.prepare(link)
            stimulus.release(link)
        except (*_SURPRISES, NotApplicable) as error:
            self.facts.problems["what the device profile used, to put it back"] = in_words(error)
        finally:
            trial.end()

    def _trial(self, facts: ServerFacts) -> Trial:
        trial = Trial(self._target, facts)
        trial.transcript.ends = min(trial.transcript.ends, self._ends)
        return trial

    def _run_case(self, case: Case) -> tuple[CaseResult, str]:
        if self._process is not None:
            self._process.ensure()
        trial = self._trial(self.facts)
        began = time.monotonic()
        verdict, reason, note = self._judge(case, trial)
        trouble = self._aftermath(case) if trial.connections or verdict is CaseVerdict.FAILED else ""
        restarted, gone = False, ""
        if trouble:
            verdict = CaseVerdict.FAILED
            reason = f"{reason}; then {trouble}" if reason else trouble
            gone = self._restart()
            restarted = not gone
        elif self._stuck and self._process is not None:
            gone = self._restart()
            restarted, self._stuck = not gone, ""
        odd = [seen for seen in trial.seen if not seen.recommended]
        if verdict is CaseVerdict.PASSED and self._pinned and odd:
            verdict = CaseVerdict.FAILED
            reason = f"allowed, but not recommended: {odd[0].topic}: {odd[0].value}"
        records = tuple(trial.transcript.records) if verdict in (CaseVerdict.FAILED, CaseVerdict.CANNOT_TELL) else ()
        seconds = time.monotonic() - began
        return CaseResult(case, verdict, reason, seconds, tuple(trial.seen), records, restarted, trouble, note), gone

    def _judge(self, case: Case, trial: Trial) -> tuple[CaseVerdict, str, str]:
        """Run a case and give everything back; returns the verdict, its reason, and what else has to be said."""
        verdict, reason, note = CaseVerdict.PASSED, "", ""
        stuck = self._stuck
        try:
            case.run(trial)
        except NotApplicable as error:
            verdict, reason = CaseVerdict.NOT_APPLICABLE, str(error)
        except CannotTell as error:
            verdict, reason = CaseVerdict.CANNOT_TELL, str(error)
        except _SURPRISES as error:
            verdict, reason = CaseVerdict.FAILED, in_words(error)
            unknown = next(iter(self.facts.problems.items()), None)
            if isinstance(error, LookupError) and unknown is not None:
                verdict, reason = CaseVerdict.CANNOT_TELL, f"{unknown[0]} is unknown: {unknown[1]}"
            elif stuck:
                verdict, reason = CaseVerdict.CANNOT_TELL, f"{stuck}; this failed then: {reason}"
        try:
            trial.end()
        except NotApplicable:
            pass  # what the device cannot do it has not done either
        except (*_SURPRISES, CannotTell) as error:
            note = f"the device could not be put back as it was: {in_words(error)}"
        return verdict, reason, note

    def _aftermath(self, case: Case) -> str:
        """What is wrong with the server after a case; empty if it still serves, or left as it may."""
        process = self._process
        if process is not None:
            if ended := process.crashed():
                return ended
            if process.leaves and process.left(_LEAVE_S):
                return process.ensure()
        trial = self._trial(self.facts)
        trial.transcript.ends = max(trial.transcript.ends, time.monotonic() + self._target.timeout)
        try:
            link = trial.attach()
            self._stuck = self._wake(trial, link, case)
            if case.effect.value:
                _put_back(trial, link)
            reply = link.call(Command.DEVICE_GET_INFO, wire.info())
            if reply.failed and not self._stuck:
                return f"the server does not serve a new client: GET_INFO fails with error {reply.error}"
        except (*_SURPRISES, NotApplicable) as error:
            # A process that dies closes its sockets a moment before its end can be seen.
            if process is not None and (ended := process.crashed(_END_S)):
                return ended
            return f"the server does not serve a new client: {in_words(error)}"
        finally:
            trial.end()
        return ""

    def _wake(self, trial: Trial, link: RawLink, case: Case) -> str:
        """Bring the device to RUNNING if the case left it elsewhere; says where it is left if that cannot be done.

        A server may keep the state when its client leaves, and refuse other commands in it.
        """
        found = ""
        if self.facts.migration is not None:
            found = migration.wake(link)
        if not found and self.facts.v1_region is not None:
            found = migration_v1.wake(migration_v1.View(trial, link))
        return (self._stuck or f"{case.name} left the device in {found}") if found else ""

    def _stays(self, trial: Trial) -> None:
        """See that the server takes another client after its first."""
        try:
            trial.drop(trial.attach())
        except (Closed, NotThere):
            path = self._target.socket_path
            raise Unreachable(
                f"{path}: the server ended with its first client, as it may; --server-command CMD restarts it"
            ) from None

    def _restart(self) -> str:
        """Have a fresh server; returns why there is none."""
        if self._process is None:
            return "the server is gone (with --server-command it would be started again)"
        self._process.stop()
        return self._process.ensure()

    def _discover(self) -> ServerFacts:
        if time.monotonic() >= self._ends:
            return ServerFacts()
        trial = self._trial(ServerFacts())
        trial.transcript.ends = min(trial.transcript.started + _SURVEY_TIMEOUTS * self._target.timeout, self._ends)
        crashes: list[str] = []

        def attach() -> RawLink:
            try:
                return trial.attach()
            except CaseFailed:
                # A process that dies closes its sockets a moment before its end can be seen.
                ended = self._process.crashed(_END_S) if self._process is not None else ""
                if not ended:
                    raise
                crashes.append(ended)
                self._restart()
                return trial.attach()

        try:
            link = trial.connect()
        except CaseFailed as error:
            raise Unreachable(f"{self._target.socket_path}: {error}") from None
        try:
            reply = link.ok(Command.VERSION, wire.version(vectors.QEMU_CAPABILITIES))
            trial.drop(link)
            if self._process is not None:
                self._process.learn_farewell(_LEAVE_S)
            else:
                self._stays(trial)
            facts = Survey(attach, trial.drop).run(reply)
        except (*_SURPRISES, NotApplicable) as error:
            facts = ServerFacts(problems=dict.fromkeys(EVERYTHING, f"negotiation failed: {in_words(error)}"))
        finally:
            trial.end()
        if self._process is not None and (ended := self._process.crashed(0.1 if crashes else 0)):
            crashes.append(ended)
            self._restart()
        if crashes:
            facts.problems["everything that clients ask for"] = crashes[0]
        return facts


def _put_back(trial: Trial, link: RawLink) -> None:
    """Write the registers of config space that a case changed as they were found."""
    found = trial.facts.config
    if len(found) < 64:
        return
    now = link.call(Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, 64)).payload[16:]
    for offset, width in _KEPT:
        if now[offset : offset + width] != found[offset : offset + width]:
            request = wire.access(RegionIndex.CONFIG, offset, width, found[offset : offset + width])
            link.call(Command.REGION_WRITE, request)
