"""`bench --against`: servers that are unlike ours, legal and hostile ones, beside one that stands for ours."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mutants.server import HEADER, Command, Connection, Server, serving
from plantedservers import HABITS
from plantedservers.habits import Leaves, VendorZero
from vfiouser_oob.cli.errors import ExitCode
from vfiouser_oob.cli.main import main
from vfiouser_oob.lab.bench.against import AgainstEffort, Compared, Comparison, Match, Visit
from vfiouser_oob.lab.bench.foreign import ForeignClient
from vfiouser_oob.lab.bench.placement import together
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_protocol.constants import Command as Number
from vfiouser_protocol.errors import ReplyError

EFFORT = AgainstEffort(rounds=2, reads=5, bursts=1, patience_s=5.0, return_s=0.1)
#: For servers that say nothing: what is waited for in vain.
IMPATIENT = AgainstEffort(rounds=1, reads=2, bursts=1, patience_s=0.3, return_s=0.1)
EVERYTHING = 12


@contextmanager
def threaded(server: Server) -> Iterator[None]:
    """A server in a thread of this process; it may end when its client leaves."""
    server.listen()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            server.stop()
        thread.join(10)
        server.listener.close()
        server.close()


def compare(tmp_path: Path, server: Server, effort: AgainstEffort = EFFORT) -> Comparison:
    """Compare a server with one that stands for ours; both are in this process."""
    found = Comparison()
    with threaded(server), serving(str(tmp_path / "ours")):
        visit = Visit(Path(server.path), effort, found)
        try:
            size = visit.state_size()
            Match(tmp_path / "ours", [os.getpid()], visit, found, effort).run(lambda line: None, size)
        finally:
            visit.leave()
    return found


def names(found: Comparison) -> list[str]:
    """What was compared."""
    return [line.name for line in found.results]


def test_everything_is_compared_pinned_and_unpinned(tmp_path: Path) -> None:
    """Each line has as many rounds of both, and nothing is left to be said."""
    found = compare(tmp_path, Server(str(tmp_path / "s")))
    kinds = [
        "read of configuration space",
        "register read",
        "DMA maps with a descriptor",
        "DMA maps without one",
        "saving a state of ",
    ]
    for placed in ("unpinned", "pinned"):
        lines = [name for name in names(found) if name.endswith(f", {placed}")]
        assert all(line.startswith(kind) for line, kind in zip(lines, [*kinds, "attach"], strict=True))
    assert [] == found.notes
    assert {2} == {len(values) for line in found.results for values in (line.ours, line.theirs)}
    assert all(0 < line.ratios[0] <= line.ratios[-1] for line in found.results)


def test_processors_are_given_back(tmp_path: Path) -> None:
    """Whoever was kept on one processor may run on all again."""
    before = os.sched_getaffinity(0)
    compare(tmp_path, Server(str(tmp_path / "s")))
    assert before == os.sched_getaffinity(0)


def test_a_process_that_cannot_be_seen_is_not_pinned() -> None:
    """A server in another pid namespace has no number here, and one that has gone has no threads."""
    before = os.sched_getaffinity(0)
    with together([os.getpid(), 0]) as problem:
        assert "cannot be seen" in problem
        assert before == os.sched_getaffinity(0)
    with together([0x3FFFFFFF]) as problem:
        assert "No such file" in problem
    with together([os.getpid()]) as problem:
        assert "" == problem
        assert 1 == len(os.sched_getaffinity(0))
    assert before == os.sched_getaffinity(0)


# Legal servers that are unlike ours


class NoBars(Server):
    """Its device has no BAR: no region but configuration space can be read."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        inner = connection.session.table[5]

        def without_bars(command: Command, fds: list[int]) -> bytes:
            payload = inner(command, fds)
            region = struct.unpack_from("<I", command.payload, 8)[0]
            return payload if region == 7 else struct.pack("<IIIIQQ", 32, 0, region, 0, 0, 0)

        connection.session.table[5] = without_bars
        connection.run()


class NeedsFiles(Server):
    """Takes no range that has no file."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        inner = connection.session.table[2]

        def checked(command: Command, fds: list[int]) -> bytes:
            self.need("", command.fds)
            return inner(command, fds)

        connection.session.table[2] = checked
        connection.run()


class _OldConnection(Connection):
    def _version(self, payload: bytes) -> tuple[bytes, list[int]]:
        super()._version(payload)
        return struct.pack("<HH", 0, 0), []


class SaysNothingOfItself(Server):
    """Version 0.0, and not one capability."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        _OldConnection(self, sock).run()


class _WithoutFds(Connection):
    def _spoil(self, found: dict[str, Any], proposed: dict[str, Any]) -> None:
        super()._spoil(found, proposed)
        found["max_msg_fds"] = 0


class TakesNoFds(Server):
    """No message may carry a descriptor."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        _WithoutFds(self, sock).run()


class LeavesForGood(Leaves):
    """Serves one client and ends; nobody starts it again."""

    def run(self) -> None:
        """Serve one client, and listen no more."""
        super().run()
        self.listener.close()


Make = Callable[[str], Server]
LEGAL: list[tuple[Make, int, list[str]]] = [
    (LeavesForGood, EVERYTHING - 1, ["it serves one client and no other after it"]),
    (HABITS["one-at-a-time"], EVERYTHING, []),
    (HABITS["few-maps"], EVERYTHING, []),
    (HABITS["refuses-in-stop-copy"], EVERYTHING, []),
    (HABITS["errors-with-data"], EVERYTHING, []),
    (HABITS["chain-to-itself"], EVERYTHING, []),
    (VendorZero, EVERYTHING, []),
    (HABITS["stays-stopped"], EVERYTHING - 2, ["no state was compared: it refuses DEVICE_FEATURE: Device or resource"]),
    (NoBars, EVERYTHING - 2, ["no register was compared: it has no BAR that can be read"]),
    (
        NeedsFiles,
        EVERYTHING - 2,
        [f"DMA maps without one, {placed}: not compared: it refuses DMA_MAP" for placed in ("unpinned", "pinned")],
    ),
    (SaysNothingOfItself, EVERYTHING, []),
    (TakesNoFds, EVERYTHING - 2, ["no maps with a descriptor were compared"]),
]


@pytest.mark.parametrize(("make", "lines", "notes"), LEGAL, ids=[make.__name__ for make, _, _ in LEGAL])
def test_what_a_server_does_not_do_costs_that_line(tmp_path: Path, make: Make, lines: int, notes: list[str]) -> None:
    """It is said, and everything else is compared."""
    found = compare(tmp_path, make(str(tmp_path / "s")))
    assert len(notes) == len(found.notes), found.notes
    assert all(said.startswith(note) for said, note in zip(found.notes, notes, strict=True)), found.notes
    assert lines == len(found.results), names(found)


def test_a_device_that_does_not_migrate(tmp_path: Path) -> None:
    """Its state is not compared, and it is never stopped."""
    server = Server(str(tmp_path / "s"), "@no-migration")
    found = compare(tmp_path, server)
    assert ["no state was compared: it does not migrate by the second generation's messages"] == [
        note.partition(" (")[0] for note in found.notes
    ]
    assert EVERYTHING - 2 == len(found.results)


# Hostile servers


class Mute(Server):
    """Takes everything, answers nothing."""

    def serve(self, sock: socket.socket) -> None:
        """Read until the client leaves."""
        with sock:
            while sock.recv(4096):
                pass


class MuteLater(Server):
    """Answers until it is asked to read a BAR."""

    def serve(self, sock: socket.socket) -> None:
        """Serve one client until it leaves."""
        connection = Connection(self, sock)
        inner = connection.session.table[9]

        def silent(command: Command, fds: list[int]) -> bytes:
            if struct.unpack_from("<QI", command.payload)[1] == 7:
                return inner(command, fds)
            command.flags |= 0x10  # as if no answer had been wanted
            return b""

        connection.session.table[9] = silent
        connection.run()


class Says(Server):
    """Answers VERSION with given bytes, in given pieces."""

    answer = b""
    piece = 1 << 30

    def serve(self, sock: socket.socket) -> None:
        """Answer, and read until the client leaves."""
        with sock:
            sock.recv(4096)
            with contextlib.suppress(OSError):
                for start in range(0, len(self.answer), self.piece):
                    sock.sendall(self.answer[start : start + self.piece])
                while sock.recv(4096):
                    pass


ANSWERS = {
    "a length of gigabytes": (HEADER.pack(1, 1, 0xFFFFFFF0, 1, 0), "claims to have 4294967280 bytes"),
    "a length of nothing": (HEADER.pack(1, 1, 3, 1, 0), "claims to have 3 bytes"),
    "a command": (HEADER.pack(1, 11, 16, 0, 0), "sent DMA_READ of its own instead of an answer to VERSION"),
    "another answer": (HEADER.pack(1, 4, 16, 1, 0), "belongs to another command or id"),
    "another's number": (HEADER.pack(9, 1, 16, 1, 0), "belongs to another command or id"),
    "a part": (HEADER.pack(1, 1, 20, 1, 0), "sent a part of an answer only for 0.3 s when it was asked VERSION"),
    "a refusal": (HEADER.pack(1, 1, 16, 0x21, 13), "refuses VERSION: Permission denied"),
    "a refusal without a reason": (HEADER.pack(1, 1, 16, 0x21, 0), "refuses VERSION: Input/output error"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_nonsense_is_named(tmp_path: Path, case: str) -> None:
    """Within its time, and without room for what it claims."""
    server = Says(str(tmp_path / "s"))
    server.answer, words = ANSWERS[case]
    with pytest.raises((BenchFailed, ReplyError), match=words):
        compare(tmp_path, server, IMPATIENT)


def test_nobody_answers(tmp_path: Path) -> None:
    """After its time, in plain words."""
    with pytest.raises(BenchFailed, match=r"said nothing for 0\.3 s when it was asked VERSION"):
        compare(tmp_path, Mute(str(tmp_path / "s")), IMPATIENT)


def test_an_answer_in_drops_ends(tmp_path: Path) -> None:
    """A server that sends a byte now and then does not hold us for ever, and one in pieces is understood."""
    server = Says(str(tmp_path / "s"))
    server.answer, server.piece = HEADER.pack(1, 1, 20, 1, 0) + bytes(4), 1
    with threaded(server), ForeignClient(tmp_path / "s", 5.0) as client:
        assert bytes(4) == client.ask(Number.VERSION, bytes(4))


def test_a_server_that_falls_silent_costs_that_line(tmp_path: Path) -> None:
    """Its connection is given up, since nobody knows what is still to come on it; another one serves for the rest."""
    found = compare(tmp_path, MuteLater(str(tmp_path / "s")), IMPATIENT)
    assert ["register read, unpinned: not compared: it said nothing for 0.3 s when it was asked REGION_READ"] == [
        note for note in found.notes if "unpinned" in note
    ]
    assert EVERYTHING - 2 == len(found.results)


class Slams(Server):
    """Lets nobody in."""

    def serve(self, sock: socket.socket) -> None:
        """Leave."""
        sock.close()


def test_a_flood_is_no_answer(tmp_path: Path) -> None:
    """However much of its own a server sends."""
    server = Says(str(tmp_path / "s"))
    server.answer = HEADER.pack(7, 11, 16, 0x10, 0) * 1000
    with threaded(server), pytest.raises(BenchFailed, match="DMA_READ of its own"):
        Visit(tmp_path / "s", EFFORT, Comparison())


def test_a_server_that_lets_nobody_in(tmp_path: Path) -> None:
    """It is gone as soon as somebody comes."""
    with threaded(Slams(str(tmp_path / "s"))), pytest.raises(BenchFailed, match="closed the connection"):
        Visit(tmp_path / "s", EFFORT, Comparison())


def test_the_command_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and one line, before any process is started; --scale does not go with it."""
    path = tmp_path / "nobody"
    assert ExitCode.FAILED == main(["bench", "--against", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} cannot be compared with: nobody listens at {path}: No such file or directory" in line
    with pytest.raises(SystemExit):
        main(["bench", "--against", str(path), "--scale"])


# Arithmetic


def test_ratios_are_those_of_the_rounds() -> None:
    """Sorted; what was measured once is compared with each round of the other."""
    line = Compared("a", "ms", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert [0.5, 1.0, 1.5] == line.ratios
    assert {"ratio": 1.0, "lowest": 0.5, "highest": 1.5}.items() <= line.as_json().items()
    assert [1.0, 2.0, 3.0] == Compared("a", "ms", [4.0, 8.0, 12.0], [4.0]).ratios
