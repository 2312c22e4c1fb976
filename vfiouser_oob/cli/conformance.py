"""`conformance`: test any vfio-user server for conformance."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from vfiouser_conformance.case import Case, Level
from vfiouser_conformance.cases import all_cases
from vfiouser_conformance.client_profiles import CLIENTS, cases_of
from vfiouser_conformance.process import ServerProcess
from vfiouser_conformance.reports.machine import as_json, as_junit
from vfiouser_conformance.reports.table import ReportLine, TableReport, explanation, failures_of, listing
from vfiouser_conformance.runner import RUN_S, CaseResult, CaseVerdict, Runner, RunOutcome, Unreachable
from vfiouser_conformance.select_cases import BadExpression, select
from vfiouser_conformance.stimulus import PROFILES
from vfiouser_conformance.trial import CASE_TIMEOUTS, Target
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.terminal import can_redraw, console_on, print_line
from vfiouser_oob.config.errors import ConfigError

_DEFAULT_TIMEOUT_S = 5.0
_TIMEOUT_MAX_S = 600.0
_RUN_MAX_S = 86400.0


def _seconds(text: str, most: float = _TIMEOUT_MAX_S) -> float:
    value = float(text)
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {most:g} seconds")
    return value


def _run_seconds(text: str) -> float:
    return _seconds(text, _RUN_MAX_S)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `conformance`."""
    parser.add_argument("--socket", metavar="PATH", help="socket of the server under test")
    parser.add_argument("--destination-socket", metavar="PATH", help="socket of a second server, to migrate to")
    parser.add_argument(
        "--server-command", metavar="CMD", help="command that starts the server; {socket} stands for PATH"
    )
    parser.add_argument(
        "--device-profile",
        choices=sorted(PROFILES),
        help="the device is of this kind, so make it do DMA, interrupts and failures",
    )
    parser.add_argument("--client", metavar="NAME", choices=sorted(CLIENTS),
                        help="play only this client, and fail if it could not work with the server: "
                             + "; ".join(f"{name}: {profile.title}" for name, profile in CLIENTS.items()))  # fmt: skip
    parser.add_argument("--safe", action="store_true", help="leave out cases that may disturb a device in use")
    parser.add_argument(
        "--strict", action="store_true", help="fail also on behaviour that is allowed but not recommended"
    )
    parser.add_argument("-k", "--filter", metavar="EXPR", help="cases whose name, area or requirement matches")
    levels = [level.value.lower() for level in Level]
    parser.add_argument("--level", action="append", choices=levels, help="only cases of this level; may be repeated")
    parser.add_argument("--timeout", metavar="S", type=_seconds, default=_DEFAULT_TIMEOUT_S,
                        help=f"seconds for each answer; a case has {CASE_TIMEOUTS} times that "
                             f"(default: {_DEFAULT_TIMEOUT_S:g} s)")  # fmt: skip
    parser.add_argument("--run-timeout", metavar="S", type=_run_seconds, default=RUN_S,
                        help=f"seconds for the whole run (default: {RUN_S:g} s)")  # fmt: skip
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show every case, and the messages that went each way"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the results to this file as JSON; - for standard output"
    )
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write the results to this file as JUnit XML")
    parser.add_argument("--list", action="store_true", help="list the cases that would run")
    parser.add_argument("--explain", metavar="CASE", help="explain what a case sends, what it expects and why")


def run(args: argparse.Namespace) -> int:
    """Run, list or explain cases.

    Raises:
        ConfigError: the options cannot be used.
    """
    if args.explain:
        return _explain(args.explain)
    try:
        levels = [Level(level.upper()) for level in args.level] if args.level else list(Level)
        wanted = cases_of(args.client, all_cases()) if args.client else all_cases()
        cases = select(wanted, expression=args.filter, levels=levels, safe=args.safe)
    except BadExpression as error:
        raise ConfigError(str(error)) from None
    if args.list:
        print("\n".join(listing(cases)))
        return ExitCode.DONE
    if args.socket is None:
        raise ConfigError("--socket PATH is needed (see vfiouser-oob conformance --help)")
    if not cases:
        raise ConfigError("no case matches -k, --level and --client together")
    outcome = _run_cases(args, cases)
    _write(args, outcome)
    unfinished = any(result.verdict is CaseVerdict.NOT_RUN for result in outcome.results)
    # What one client needs is no more than compatibility to the suite, and everything to that client.
    judged = Level if args.client else (Level.MUST,)
    failed = any(failures_of(outcome, level) for level in judged)
    return ExitCode.FAILED if unfinished or failed else ExitCode.DONE


def _explain(name: str) -> int:
    for case in all_cases():
        if case.name == name.upper():
            print("\n".join(explanation(case)))
            return ExitCode.DONE
    raise ConfigError(f"there is no case {name} (see vfiouser-oob conformance --list)")


def _run_cases(args: argparse.Namespace, cases: list[Case]) -> RunOutcome:
    out = sys.stderr if str(args.json) == "-" else sys.stdout
    console = console_on(out)
    report = TableReport(verbose=args.verbose)
    profile = PROFILES[args.device_profile](args.timeout) if args.device_profile else None
    process = ServerProcess(args.server_command, args.socket) if args.server_command else None
    target = Target(args.socket, args.destination_socket, args.timeout, profile, process)
    done = 0

    def progress(result: CaseResult) -> None:
        nonlocal done
        done += 1
        if args.verbose:
            _print_report(console, report.case(result))
        elif live is not None:
            live.update(f"{done} of {len(cases)} {result.case.name}")

    live = console.status(f"{len(cases)} cases") if can_redraw(console) and not args.verbose else None
    try:
        with live or contextlib.nullcontext(), _terminated_like_interrupted():
            # What a client cannot live with is more than what is not recommended.
            pinned = args.strict or args.client is not None
            runner = Runner(target, pinned=pinned, progress=progress, limit_s=args.run_timeout)
            outcome = runner.run(cases)
    except Unreachable as error:
        raise ConfigError(str(error)) from None
    finally:
        if process is not None:
            process.close()
    _print_report(console, report.whole(outcome))
    return outcome


def _print_report(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        print_line(console, line, line.style if isinstance(line, ReportLine) else "")


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the run as an interruption does: what it has is reported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(args: argparse.Namespace, outcome: RunOutcome) -> None:
    document = json.dumps(as_json(outcome), indent=2) + "\n"
    try:
        if str(args.json) == "-":
            sys.stdout.write(document)
        elif args.json is not None:
            args.json.write_text(document)
        if args.junit is not None:
            args.junit.write_text(as_junit(outcome))
    except OSError as error:
        raise CommandFailed(f"cannot write the report: {error}") from None
