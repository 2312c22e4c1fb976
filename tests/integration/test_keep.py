"""The keeper with real processes: what they gave it outlives kill -9, and nobody else is heard."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import journalkit
from vfiouser_oob.keeper.handover import environment, start

SUPPORT = Path(journalkit.__file__).resolve().parents[1]
pytestmark = pytest.mark.slow  # each starts several processes, one after the other
KEEP = (sys.executable, "-m", "vfiouser_oob", "keep")
PYTHON = (sys.executable, "-m", "journalkit.kept")


class Keeping:
    """A keeper that runs.

    Args:
        place: a directory of its own.
        command: what it runs.
        options: of the keeper.
        environ: what is added to the environment.
    """

    def __init__(
        self,
        place: Path,
        command: tuple[str, ...],
        options: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
    ) -> None:
        self.address = place / "notify"
        self.report = place / "report"
        os.mkfifo(self.report)
        self._lines = open(os.open(self.report, os.O_RDWR), "rb", buffering=0)  # noqa: SIM115  # it never ends
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vfiouser_oob",
                "keep",
                "--socket",
                f"unix:{self.address}",
                *options,
                "--",
                *command,
            ],
            env={**os.environ, "PYTHONPATH": str(SUPPORT), **(environ or {})},
            stderr=subprocess.PIPE,
            text=True,
        )

    def next(self) -> dict[str, Any]:
        """Wait for what the command says next."""
        ready, _, _ = select.select([self._lines], [], [], 60)
        assert ready, "the command said nothing for a minute"
        found: dict[str, Any] = json.loads(self._lines.readline())
        return found

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Tell the keeper to end; returns its exit code and what it logged."""
        if number:
            self.process.send_signal(number)
        _, text = self.process.communicate(timeout=60)
        return self.process.returncode, text

    def close(self) -> None:
        """End it, however it is."""
        self._lines.close()
        if self.process.poll() is None:
            self.process.terminate()
        with self.process:  # waits
            pass


@contextmanager
def keeping(place: Path, count: int, *options: str, **environ: str) -> Iterator[Keeping]:
    """A keeper of a service that has so many sockets and a journal."""
    keeper = Keeping(place, (*PYTHON, str(place / "report"), str(count)), options, environ)
    try:
        yield keeper
    finally:
        keeper.close()


def test_what_is_kept_outlives_kills_and_restarts(tmp_path: Path) -> None:
    """The journal goes on over each; sockets whose peer died with their process are not handed over."""
    with keeping(tmp_path, 3) as keeper:
        line = keeper.next()
        assert ([], 0, True, 4096) == (line["found"], line["starts"], line["whole"], line["limit"])
        for starts in (1, 2):
            os.kill(line["pid"], signal.SIGKILL)
            line = keeper.next()
            assert (["vfu/journal"], starts, True) == (line["found"], line["starts"], line["whole"])
        keeper.process.send_signal(signal.SIGUSR2)
        line = keeper.next()
        assert (["vfu/journal"], 3) == (line["found"], line["starts"])
        code, text = keeper.end()
    assert code == 0
    assert text.count("started again") == 3
    assert not keeper.address.exists()


@pytest.mark.parametrize("room", [0, 2])
def test_what_is_not_kept_is_noticed(tmp_path: Path, room: int) -> None:
    """A keeper with too little room refuses in words, and its client finds out."""
    with keeping(tmp_path, 3, "--max-descriptors", str(room)) as keeper:
        assert keeper.next()["whole"] is False
        code, text = keeper.end(signal.SIGINT)
    assert code == 0
    assert f"more than {room} descriptors" in text


def test_strangers_are_not_heard(tmp_path: Path) -> None:
    """Another process of the same user, a flood of it and rubbish change nothing; its descriptors are closed."""
    with keeping(tmp_path, 0) as keeper:
        line = keeper.next()
        mine, theirs = socket.socketpair()
        with mine, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(str(keeper.address))
            socket.send_fds(sock, [b"FDSTORE=1\nFDNAME=vfu/evil"], [theirs.fileno()])
            theirs.close()
            assert mine.recv(1) == b""  # nobody has the other end any more
            sock.send(b"FDSTOREREMOVE=1\nFDNAME=vfu/journal")
            for _ in range(2000):
                sock.send(os.urandom(100) * 100)
        os.kill(line["pid"], signal.SIGKILL)
        assert ["vfu/journal"] == keeper.next()["found"]
        code, text = keeper.end()
    assert code == 0
    assert "message from an unknown process" in text
    assert text.count("\n") < 40


def test_states_are_passed_on(tmp_path: Path) -> None:
    """A supervisor above hears READY of each start, and no STOPPING of a restart."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as above:
        above.bind(str(tmp_path / "above"))
        above.settimeout(60)
        with keeping(tmp_path, 0, NOTIFY_SOCKET=str(tmp_path / "above")) as keeper:
            keeper.next()
            assert above.recv(100) == b"READY=1"
            keeper.process.send_signal(signal.SIGUSR2)
            keeper.next()
            assert above.recv(100) == b"READY=1"
            assert keeper.end()[0] == 0


def test_sockets_are_passed_on(tmp_path: Path) -> None:
    """What a supervisor opened reaches the command under its name at each start."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "sock"))
        sock.listen()
        script = f"echo $LISTEN_FDS $LISTEN_FDNAMES $(( $LISTEN_PID == $$ )) >> {tmp_path}/report; exit 1"
        command = (*KEEP, "--socket", str(tmp_path / "notify"), "--", "sh", "-c", script)
        pid = start(command, [sock], environment(os.environ, ["nvme0"], "", 0))
        assert 1 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert "1 nvme0 1\n" * 5 == (tmp_path / "report").read_text()


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("true",), 0, ""),
        (("sh", "-c", "exit 2"), 2, "its arguments are wrong"),
        (("/nonexistent/program",), 127, "it was not found"),
        (("sh", "-c", "exit 3"), 1, "5 times within 10 s, the last time with exit code 3"),
        (("sh", "-c", "kill -9 $$"), 1, "5 times within 10 s, the last time with signal 9"),
    ],
)
def test_commands_that_end(tmp_path: Path, command: tuple[str, ...], code: int, words: str) -> None:
    """The keeper ends as they do, or says why it gives up."""
    keeper = Keeping(tmp_path, command)
    try:
        found, text = keeper.end(0)
    finally:
        keeper.close()
    assert (code, True) == (found, words in text)


def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """After the time that it has."""
    stubborn = f"trap '' TERM; echo '{{}}' > {tmp_path}/report; while :; do sleep 1; done"
    keeper = Keeping(tmp_path, ("sh", "-c", stubborn), ("--stop-timeout", "1"))
    try:
        keeper.next()
        code, text = keeper.end()
    finally:
        keeper.close()
    assert code == 0
    assert "did not end in time and was killed" in text


def test_two_keepers_do_not_share_a_socket(tmp_path: Path) -> None:
    """The second one says so; what a dead one left is removed."""
    with keeping(tmp_path, 0) as keeper:
        line = keeper.next()
        second = subprocess.run(
            [*KEEP, "--socket", str(keeper.address), "--", "true"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (2, True) == (second.returncode, "Address already in use" in second.stderr)
        keeper.process.kill()
        keeper.process.wait(60)
        os.kill(line["pid"], signal.SIGKILL)
        third = subprocess.run(
            [*KEEP, "--socket", str(keeper.address), "--", "true"],
            timeout=60,
            check=False,
        )
        assert third.returncode == 0


def test_a_command_is_needed() -> None:
    """Without one it is bad usage."""
    done = subprocess.run(KEEP, capture_output=True, text=True, timeout=60, check=False)
    assert (2, True) == (done.returncode, "the command is missing" in done.stderr)
