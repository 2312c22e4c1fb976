"""`vfiouser-oob conformance` as a user has it: exit codes, reports, servers that hang, crash or are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mutants import serving
from vfiouser_oob.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def socket_path(tmp_path: Path) -> str:
    """Where the server listens."""
    return str(tmp_path / "s.sock")


def run(socket_path: str, *arguments: str) -> int:
    """Run the tool against a socket."""
    return main(["conformance", "--socket", socket_path, "--timeout", "1", *arguments])


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
    for part in ("sends:", "expects:", "why:", "R146", "dma-map/same-twice-lost"):
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


def test_no_server(socket_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a server nothing passes, and the run ends soon."""
    assert 1 == run(socket_path, "-k", "frame")
    out = capsys.readouterr().out
    assert "pass " not in out
    assert "FAIL    FRAME-001" in out
    assert "not run FRAME-002" in out


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
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "protocol", "agents"))}
    environ["PYTHONPATH"] += os.pathsep + str(ROOT / "tests" / "support")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vfiouser_oob", "conformance", "--socket", socket_path, "--timeout", "2"),
            *("--server-command", command("irq/unassigned-kills"), "--device-profile", "test"),
            *("-k", "IRQ-060 or IRQ-061 or IRQ-063"),
        ],
        env=environ,
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
    """A server command that does not work is said, and no case is run."""
    assert 1 == run(socket_path, "--server-command", "/nonexistent/server {socket}", "-k", "FRAME-001")
    assert "the server cannot be started" in capsys.readouterr().out
