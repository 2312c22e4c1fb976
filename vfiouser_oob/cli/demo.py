"""`demo`: simulator, daemon and driver at work, without a VMM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from trio import TooSlowError

from vfiouser_oob import __version__
from vfiouser_oob.cli.errors import CommandFailed, ExitCode, explain, leaves
from vfiouser_oob.cli.options import count, option
from vfiouser_oob.config.devices import read_namespace_size
from vfiouser_oob.config.schema import Doorbells
from vfiouser_oob.config.soc import FUNCTIONS_MAX
from vfiouser_oob.demo.children import ChildFailed
from vfiouser_oob.demo.scenario import FunctionReport
from vfiouser_oob.demo.stage import DemoOptions, show

_SEED_MAX = (1 << 32) - 1
#: A process that died is the cause, what its peers noticed of it the effect.
_TELLING = (KeyboardInterrupt, ChildFailed, TooSlowError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `demo`."""
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument(
        "--size",
        metavar="BYTES",
        type=option(read_namespace_size),
        default=64 << 20,
        help="size of each namespace; all of it is written and read back (default: 64M)",
    )
    parser.add_argument(
        "--functions", metavar="N", type=count(1, FUNCTIONS_MAX), default=1, help="how many functions (default: 1)"
    )
    parser.add_argument(
        "--doorbells",
        choices=[way.value for way in Doorbells],
        default=Doorbells.POLLED.value,
        help="as messages, or in shared memory that is polled (default: polled)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=count(0, _SEED_MAX), default=1, help="seed of the data (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Show it; succeeds only if all data was verified."""
    import trio

    options = DemoOptions(args.size, args.functions, args.doorbells, args.seed)
    stream = sys.stderr if args.json else sys.stdout

    def progress(line: str) -> None:
        print(line, file=stream, flush=True)

    try:
        reports = trio.run(show, options, progress)
    # Machines get their JSON in any case; `main` makes a line and the exit code of it.
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
        failure = _explained(error)
        if args.json:
            _print_json([], str(failure))
        raise failure from error
    problem = next((f"{report.name}: {report.error}" for report in reports if not report.ok), None)
    if args.json:
        _print_json(reports, problem)
    else:
        _print_table(reports)
    if problem is not None:
        raise CommandFailed(f"the demonstration failed: {problem}")
    return ExitCode.DONE


def _explained(error: BaseException) -> CommandFailed:
    """One line for whatever ended the demonstration, in the order of how much it tells."""
    causes = list(leaves(error))
    known = next((cause for kind in _TELLING for cause in causes if isinstance(cause, kind)), None)
    if isinstance(known, TooSlowError):
        return CommandFailed("the demonstration failed: the device made no progress for a minute")
    if isinstance(known, ChildFailed):
        return CommandFailed(f"the demonstration failed: {known}")
    return CommandFailed(f"the demonstration failed: {explain(known or causes[0])[1][0]}")


def _print_json(reports: Sequence[FunctionReport], problem: str | None) -> None:
    document = {
        "version": __version__,
        "ok": problem is None,
        "error": problem,
        "functions": [report.as_json() for report in reports],
    }
    print(json.dumps(document, indent=2))


def _print_table(reports: Sequence[FunctionReport]) -> None:
    heads = (
        "function",
        "verified",
        "write",
        "read",
        "interrupts",
        "messages",
        "direct",
        "after reset",
        "sha256",
    )
    rows = [heads, *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    total = sum(report.verified for report in reports) >> 20
    if all(report.ok for report in reports):
        print(f"\nverified: {total} MiB written and read back equal through the daemon")


def _row(report: FunctionReport) -> tuple[str, ...]:
    return (
        report.name,
        f"{report.verified >> 20}/{report.size >> 20} MiB",
        f"{report.write_mb_s:.0f} MB/s",
        f"{report.read_mb_s:.0f} MB/s",
        str(sum(report.interrupts)),
        str(report.trapped),
        str(report.direct),
        "intact" if report.survived_reset else "WRONG",
        report.sha256_read[:16],
    )
