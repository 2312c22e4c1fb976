"""`vfiouser-oob conformance` as a user has it: exit codes, reports, servers that hang, crash or are not there."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mutants import serving
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.client_profiles import CLIENTS, cases_of
from vfiouser_oob.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PLACES = [str(ROOT / part) for part in ("", "protocol", "agents", "tests/support")]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(PLACES), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    """Where the server listens."""
    return str(tmp_path / "s.sock")


def run(socket_path: str, *arguments: str) -> int:
    """Run the tool against a socket."""
    return main(["conformance", "--socket", socket_path, "--timeout", "1", "--verbose", *arguments])


def test_all_is_well(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without failures ends with 0, a line per case, a score per area and the share of requirements."""
    with serving(socket_path):
        assert 0 == run(socket_path, "-k", "info")
    out = capsys.readouterr().out
    assert "pass    INFO-001" in out
    assert "device and interrupt information" in out
    assert "requirements tested" in out
    assert "no MUST failed" in out


def test_a_failed_must(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed MUST ends with 1, and shows what was sent and received, in words and bytes."""
    with serving(socket_path, "info/argsz-zero"):
        assert 1 == run(socket_path, "-k", "INFO-001")
    out = capsys.readouterr().out
    assert "FAIL    INFO-001" in out
    assert "argsz of the reply: expected 16, got 0" in out
    assert "command DEVICE_GET_INFO" in out
    assert "reply DEVICE_GET_INFO" in out
    assert re.search(r"0000  02 40 04 00 20 00 00 00 .*id 0x4002, msg_size 32, flags 0x0", out)


def test_a_failed_should(socket_path: str) -> None:
    """A failed SHOULD or COMPAT does not change the exit code."""
    with serving(socket_path, "version/reply-too-long"):
        assert 0 == run(socket_path, "-k", "VERSION-007 or VERSION-008")


def test_levels(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--level leaves the other levels out."""
    with serving(socket_path):
        assert 0 == run(socket_path, "-k", "version", "--level", "compat")
    out = capsys.readouterr().out
    assert "VERSION-007" in out
    assert "VERSION-001" not in out


def test_strict(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An allowed behaviour that is not recommended is reported, and fails with --strict."""
    with serving(socket_path, "info/intx-flags-plain"):
        assert 0 == run(socket_path, "-k", "INFO-023")
        assert "INTx flags: EVENTFD only (not the recommended one)" in capsys.readouterr().out
        run(socket_path, "-k", "INFO-023", "--strict")
        assert "FAIL    INFO-023" in capsys.readouterr().out


def test_a_client(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--client plays one client, and fails where that client could not live with the server."""
    with serving(socket_path):
        assert 0 == run(socket_path, "--client", "qemu-v2", "-v", "--device-profile", "test")
        out = capsys.readouterr().out
        for name in ("CLIENT-001", "CLIENT-014", "CLIENT-016", "CLIENT-023"):
            assert name in out
        assert "CLIENT-008" not in out
        assert "FRAME-001" not in out
    with serving(socket_path, "client/descriptor-said"):
        assert 1 == run(socket_path, "--client", "qemu-v2", "-k", "CLIENT-016")
        assert 0 == run(socket_path, "-k", "CLIENT-016")


def test_every_client_case_is_somebodys() -> None:
    """Each case of the area CLIENT belongs to a client, and each client has cases that there are."""
    played = {case.name for client in CLIENTS for case in cases_of(client, all_cases())}
    assert {case.name for case in all_cases() if case.name.startswith("CLIENT-")} == played
    assert all(len(cases_of(name, all_cases())) == len(profile.cases) for name, profile in CLIENTS.items())


def test_machine_reports(socket_path: str, tmp_path: Path) -> None:
    """--json and --junit have every case with its verdict, and the failures' bytes."""
    with serving(socket_path, "info/argsz-zero"):
        arguments = [
            "-k",
            "INFO and not REGION",
            "--json",
            str(tmp_path / "r.json"),
            "--junit",
            str(tmp_path / "r.xml"),
        ]
        assert 1 == run(socket_path, *arguments)
    document = json.loads((tmp_path / "r.json").read_text())
    cases = {case["name"]: case for case in document["cases"]}
    assert "failed" == cases["INFO-001"]["verdict"]
    assert "passed" == cases["INFO-004"]["verdict"]
    assert "10000000" == cases["INFO-001"]["transcript"][2]["bytes"][32:40]
    assert document["failed"]["MUST"] == sum(
        case["verdict"] == "failed" and case["level"] == "MUST" for case in document["cases"]
    )
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert str(len(cases)) == suite.attrib["tests"]
    assert any(case.find("failure") is not None for case in suite if case.attrib["name"] == "INFO-001")


def test_json_on_standard_output(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--json -` prints the document alone on standard output."""
    with serving(socket_path):
        assert 0 == run(socket_path, "-k", "INFO-001", "--json", "-")
    assert 1 == json.loads(capsys.readouterr().out)["format"]


def test_not_applicable(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the server lacks is not applicable, never passed."""
    with serving(socket_path, "@no-migration"):
        assert 0 == run(socket_path, "-k", "MIGRATION-001")
    assert "n/a     MIGRATION-001" in capsys.readouterr().out


def test_list_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    """--list and --explain need no server."""
    assert 0 == main(["conformance", "--list", "-k", "DMA-MAP"])
    listed = capsys.readouterr().out
    assert "DMA-MAP-004" in listed
    assert "requirements" in listed.splitlines()[-1]
    assert 0 == main(["conformance", "--explain", "dma-map-004"])
    text = capsys.readouterr().out
    for part in ("sends:", "expects:", "why:", "R146"):
        assert part in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["-k", "FRAME-001"],
        ["--explain", "NOTHING-001"],
        ["--socket", "x", "-k", "(("],
        ["--socket", "x", "-k", "nothing-like-this"],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Bad usage is one line and exit code 2."""
    assert 2 == main(["conformance", *arguments])
    assert 1 == len(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("listening", [True, False])
def test_no_server(socket_path: str, listening: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a server there is nothing to judge: one line, exit code 2, and no case is blamed."""
    if listening:  # a socket that nobody listens on any more
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
            left.bind(socket_path)
    assert 2 == run(socket_path, "-k", "frame")
    captured = capsys.readouterr()
    assert "" == captured.out
    assert 1 == len(captured.err.splitlines())
    assert socket_path in captured.err


def test_a_path_that_no_socket_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path over 107 bytes is said to be too long, before anything is tried."""
    assert 2 == run(str(tmp_path / ("x" * 108)))
    assert "107" in capsys.readouterr().err


def test_a_good_server_fits_on_a_screen(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --verbose a whole run against a good server is told in at most 24 lines of 80 columns or a few more."""
    with serving(socket_path):
        assert 0 == main(["conformance", "--socket", socket_path, "--timeout", "2", "--device-profile", "test"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert "no MUST failed" in lines[-1]


class Terminal(io.StringIO):
    """A terminal, as far as a program can ask it."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.mark.parametrize(
    ("environ", "redraws", "colours"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
    ids=["colours", "NO_COLOR", "dumb"],
)
def test_what_a_terminal_can_show(
    socket_path: str, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], redraws: bool, colours: bool
) -> None:
    """A terminal shows how far the run is, in one line; a dumb one gets the report alone, without an escape."""
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": "80", **environ}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with serving(socket_path):
        assert 0 == main(["conformance", "--socket", socket_path, "--timeout", "2", "-k", "info"])
    text = terminal.getvalue()
    assert redraws == ("\x1b[2K" in text)
    assert colours == (re.search(r"\x1b\[(?:1;)?3\dm", text) is not None)
    assert redraws or "\x1b" not in text
    assert "no MUST" in text


def test_an_interrupted_run_reports_what_it_has(tmp_path: Path, socket_path: str) -> None:
    """SIGTERM ends the run; what was judged is told, and written as JSON and JUnit; the rest was not run."""
    found = [tmp_path / "r.json", tmp_path / "r.xml"]
    with serving(socket_path, "irq/empty-disable-hangs"):
        arguments = ["-k", "IRQ-010 or IRQ-011 or IRQ-012", "--timeout", "60", "--verbose"]
        arguments += ["--json", str(found[0]), "--junit", str(found[1])]
        process = subprocess.Popen(
            [sys.executable, "-m", "vfiouser_oob", "conformance", "--socket", socket_path, *arguments],
            env=ENVIRON,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            assert "IRQ-010" in process.stdout.readline()
            process.terminate()
            rest = process.stdout.read()
        assert 1 == process.wait(30)
    assert "interrupted" in rest.splitlines()[-1]
    document = json.loads(found[0].read_text())
    assert ["passed", "not run", "not run"] == [case["verdict"] for case in document["cases"]]
    assert "the run was interrupted" == document["interrupted"]
    # What was not run counts for nothing.
    assert document["requirements"]["tested"] == document["cases"][0]["requirements"]
    assert "2" == ElementTree.parse(found[1]).getroot()[0].attrib["errors"]


def test_a_run_has_a_bound(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--run-timeout ends the run; cases that were not run are no failures, but the run is none that passed."""
    with serving(socket_path):
        assert 1 == run(socket_path, "-k", "frame", "--run-timeout", "0.000001")
    assert "the run was not over within 1e-06 s" in capsys.readouterr().out.splitlines()[-1]


def test_a_hang_costs_one_case(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is never answered in time fails its case; the next ones run."""
    with serving(socket_path, "irq/empty-disable-hangs"):
        run(socket_path, "-k", "IRQ-010 or IRQ-011 or IRQ-012")
    out = capsys.readouterr().out
    assert "FAIL    IRQ-011" in out
    assert "pass    IRQ-012" in out


def command(fault: str) -> str:
    """The command line of a server process with a fault."""
    return f"{sys.executable} -m mutants {{socket}} {fault}"


def test_a_crash_is_noticed_and_the_server_restarted(socket_path: str) -> None:
    """A server that dies fails the case at hand, is started again, and serves the next cases."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vfiouser_oob", "conformance", "--socket", socket_path, "--timeout", "2"),
            *("--server-command", command("irq/unassigned-kills"), "--device-profile", "test"),
            *("--verbose", "-k", "IRQ-060 or IRQ-061 or IRQ-063"),
        ],
        env=ENVIRON,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pass    IRQ-060" in done.stdout, done.stderr
    assert "FAIL    IRQ-061" in done.stdout
    assert "the server ended with status 1" in done.stdout
    assert "the server was started again" in done.stdout
    assert "pass    IRQ-063" in done.stdout
    assert 1 == done.returncode


def test_a_server_that_cannot_be_started(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A server command that does not work is said in one line, exit code 2, and no case is run."""
    assert 2 == run(socket_path, "--server-command", "/nonexistent/server {socket}", "-k", "FRAME-001")
    captured = capsys.readouterr()
    assert "" == captured.out
    assert "the server cannot be started" in captured.err
