"""Any other vfio-user server beside ours, in rounds in which they take turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import trio

from vfiouser_oob.lab.bench.contest import Contest, Side, contests_of, saved_size, saving
from vfiouser_oob.lab.bench.foreign import PATIENCE_S, ForeignClient, returned
from vfiouser_oob.lab.bench.placement import together
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_oob.lab.bench.streams import stream_bed
from vfiouser_oob.lab.demo.children import blaming
from vfiouser_protocol.errors import ReplyError

#: Bytes of the state of our function where the other server has none.
_NO_STATE = 1 << 16


@dataclass(frozen=True, slots=True)
class AgainstEffort:
    """How long to compare.

    Args:
        rounds: rounds of each measurement, in which the servers take turns.
        reads: register reads per round.
        bursts: bursts of maps and unmaps per round.
        patience_s: seconds that the other server may be silent.
        return_s: seconds in which it may come back where it ends with its client.
    """

    rounds: int = 9
    reads: int = 2000
    bursts: int = 20
    patience_s: float = PATIENCE_S
    return_s: float = 2.0


FULL_AGAINST = AgainstEffort()
QUICK_AGAINST = AgainstEffort(rounds=3, reads=300, bursts=4)


@dataclass(frozen=True, slots=True)
class Compared:
    """One line: the same of both servers.

    Args:
        name: what was measured.
        unit: its unit.
        ours: of each round.
        theirs: of each round.
    """

    name: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Ours to theirs in each round, the smallest first; rounds in which only one was measured take the other's
        median.
        """
        rounds = max(len(self.ours), len(self.theirs))
        ours, theirs = (
            values if len(values) == rounds else [median(values)] * rounds for values in (self.ours, self.theirs)
        )
        return sorted(mine / other for mine, other in zip(ours, theirs, strict=True))

    def as_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        ratios = self.ratios
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": round(median(self.ours), 3),
            "theirs": round(median(self.theirs), 3),
            "ratio": round(median(ratios), 3),
            "lowest": round(ratios[0], 3),
            "highest": round(ratios[-1], 3),
        }


@dataclass(slots=True)
class Comparison:
    """What was found.

    Args:
        results: what could be compared.
        notes: what could not, and why.
    """

    results: list[Compared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)


async def measure_against(path: Path, effort: AgainstEffort, progress: Callable[[str], None]) -> Comparison:
    """Compare our daemon with another server.

    Args:
        path: where that one listens.
        effort: how long.
        progress: takes one line per step.

    Raises:
        ChildFailed: our daemon did not start.
        BenchFailed: the other server cannot be attached to, or ours failed.
        ReplyError: it refused to be attached to.
    """
    found = Comparison()
    with ExitStack() as stack:
        progress(f"attaching to {path}")
        visit = await trio.to_thread.run_sync(Visit, path, effort, found)
        stack.callback(visit.leave)
        size = await trio.to_thread.run_sync(visit.state_size)
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="vfiouser-"))
        ours = stream_bed(Path(place, "ours"), 1, size or _NO_STATE)
        async with ours as bed, blaming([bed.daemon, bed.agent]):
            match = Match(bed.path("f0"), [bed.daemon.pid, bed.agent.pid], visit, found, effort)
            await trio.to_thread.run_sync(match.run, progress, size)
    return found


class Visit:
    """Our stay at the other server, which may end at any time, and with it perhaps the server.

    Args:
        path: where it listens.
        effort: how long it is waited for.
        found: takes notes.
    """

    def __init__(self, path: Path, effort: AgainstEffort, found: Comparison) -> None:
        self.path = path
        self._effort = effort
        self._found = found
        began = time.perf_counter()
        self.client: ForeignClient | None = ForeignClient(path, effort.patience_s)
        try:
            self.traits = self.client.attach()
        except BaseException:
            self.client.close()
            raise
        #: Milliseconds that it took to attach.
        self.attach_ms = 1000 * (time.perf_counter() - began)
        self.pid = self.client.pid
        #: Why it takes no client any more.
        self._lost = ""

    def state_size(self) -> int:
        """Bytes of the state of its device, which is stopped for that; 0 if it does not migrate."""
        assert self.client is not None
        try:
            size = saved_size(self.client)
            if not size:
                self._found.note("no state was compared: its state is empty")
            return size
        except ReplyError as refusal:
            self._found.note(f"no state was compared: {refusal}")
        except BenchFailed as failure:
            self._found.note(f"no state was compared: {failure}")
            self.leave()
        return 0

    def stay(self) -> ForeignClient:
        """The connection; a new one, if the last one could not be used any more.

        Raises:
            BenchFailed: there is none to be had.
        """
        if self._lost:
            raise BenchFailed(self._lost)
        if self.client is None:
            try:
                client = self.come()
            except (BenchFailed, ReplyError) as failure:
                self._lost = f"and it takes no other client: {failure}"
                raise BenchFailed(self._lost) from None
            self.client, self.pid = client, client.pid
        return self.client

    def come(self) -> ForeignClient:
        """Attach once more.

        Raises:
            BenchFailed: it takes no further client.
            ReplyError: it refuses one.
        """
        client = returned(self.path, self._effort.patience_s, self._effort.return_s)
        try:
            client.attach()
        except BaseException:
            client.close()
            raise
        return client

    def leave(self) -> None:
        """Hang up."""
        if self.client is not None:
            self.client.close()
            self.client = None


class Match:
    """The rounds.

    Args:
        path: the socket of our function.
        processes: our daemon and what is behind it.
        visit: our stay at the other server.
        found: takes results and notes.
        effort: how long.
    """

    def __init__(
        self, path: Path, processes: Sequence[int], visit: Visit, found: Comparison, effort: AgainstEffort
    ) -> None:
        self._path = path
        self._processes = processes
        self._visit = visit
        self._found = found
        self._effort = effort

    def run(self, progress: Callable[[str], None], state_size: int) -> None:
        """Measure everything that can be; what the other server does not do costs that line only.

        Args:
            progress: takes one line per step.
            state_size: bytes of the other server's state; 0 if it has none.
        """
        effort = self._effort
        with ForeignClient(self._path) as ours:
            contests = contests_of(self._visit.traits, ours.attach(), effort.reads, effort.bursts, self._found.note)
            contests += [saving(state_size)] if state_size else []
            for placed in self._placements():
                for contest in contests:
                    progress(f"{contest.name}, {placed}: ours and theirs in turn")
                    self._hold(contest, placed, ours)
        self._visit.leave()
        for placed in self._placements():
            progress(f"attach, {placed}: ours and theirs in turn")
            if not self._attaches(placed):
                break

    def _placements(self) -> Iterator[str]:
        """Where everybody runs, in words, while that is so."""
        yield "unpinned"
        with self._pinned() as possible:
            if possible:
                yield "pinned"

    @contextmanager
    def _pinned(self) -> Iterator[bool]:
        with together([*self._processes, self._visit.pid]) as problem:
            if problem:
                self._found.note(f"nothing was measured on one processor: {problem}")
            yield not problem

    def _hold(self, contest: Contest, placed: str, ours: ForeignClient) -> None:
        mine: list[float] = []
        others: list[float] = []
        try:
            # What a server does for the first time in its life is not what is compared.
            self._of_theirs(contest)
            contest.measure(ours, Side.OURS)
            for _ in range(self._effort.rounds):
                mine.append(contest.measure(ours, Side.OURS))
                others.append(self._of_theirs(contest))
        except _GaveUp as reason:
            self._found.note(f"{contest.name}, {placed}: not compared: {reason}")
        else:
            self._found.results.append(Compared(f"{contest.name}, {placed}", contest.unit, mine, others))

    def _of_theirs(self, contest: Contest) -> float:
        """Measure the other server, which may refuse."""
        try:
            return contest.measure(self._visit.stay(), Side.THEIRS)
        except ReplyError as refusal:
            raise _GaveUp(str(refusal)) from None
        except BenchFailed as failure:
            # Nobody knows what is still under way on that connection.
            self._visit.leave()
            raise _GaveUp(str(failure)) from None

    def _attaches(self, placed: str) -> bool:
        """Time clients that come one after the other; returns whether the other server takes more than one."""
        mine: list[float] = []
        others: list[float] = []
        try:
            for _ in range(self._effort.rounds):
                mine.append(_attached_ms(self._come))
                others.append(_attached_ms(self._visit.come))
        except (BenchFailed, ReplyError) as failure:
            if len(others) == len(mine):
                raise  # it was ours
            self._found.note(f"it serves one client and no other after it, so its attach was timed once: {failure}")
            self._found.results.append(Compared("attach, the first one", "ms", mine, [self._visit.attach_ms]))
            return False
        self._found.results.append(Compared(f"attach, {placed}", "ms", mine, others))
        return True

    def _come(self) -> ForeignClient:
        client = ForeignClient(self._path)
        client.attach()
        return client


class _GaveUp(Exception):
    """The other server cannot be measured in this; the text says why."""


def _attached_ms(connect: Callable[[], ForeignClient]) -> float:
    began = time.perf_counter()
    with connect():
        return 1000 * (time.perf_counter() - began)
