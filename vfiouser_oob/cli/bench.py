"""`bench`: what the daemon costs on this machine, as ratios to the least that the same work can cost."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence

from vfiouser_oob import __version__
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.interruptible import run_interruptible
from vfiouser_oob.cli.terminal import console_on, print_line, print_table
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.bench.stage import FULL, QUICK, measure
from vfiouser_oob.lab.demo.children import ChildFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument(
        "--quick", action="store_true", help="take some seconds instead of a minute, and measure less exactly"
    )
    parser.add_argument("--strict", action="store_true", help="fail when a budget is exceeded")


def run(args: argparse.Namespace) -> int:
    """Measure; budgets that are exceeded are reported, and fail only with --strict."""
    console = console_on(sys.stderr if args.json else sys.stdout)

    def progress(line: str) -> None:
        print_line(console, line)

    try:
        results = run_interruptible(measure, QUICK if args.quick else FULL, progress)
    except (ChildFailed, BenchFailed) as error:
        raise CommandFailed(f"the benchmark failed: {error}") from error
    if args.json:
        _print_json(results, args.quick)
    else:
        _print_table(results)
    return verdict(results, strict=args.strict)


def verdict(results: Sequence[Result], *, strict: bool) -> ExitCode:
    """The exit code.

    Args:
        results: what was measured.
        strict: whether a budget that is exceeded is a failure.

    Raises:
        CommandFailed: it is one.
    """
    missed = [result.name for result in results if not result.ok]
    if missed and strict:
        raise CommandFailed(f"over budget: {', '.join(missed)}")
    return ExitCode.DONE


def _print_json(results: Sequence[Result], quick: bool) -> None:
    document = {
        "version": __version__,
        "quick": quick,
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "ok": all(result.ok for result in results),
        "results": [result.as_json() for result in results],
    }
    print(json.dumps(document, indent=2))


def _print_table(results: Sequence[Result]) -> None:
    heads = ("what", "value", "compared with", "ratio", "budget", "")
    print_table(console_on(sys.stdout), heads, [_row(result) for result in results])


def _row(result: Result) -> tuple[str, ...]:
    details = ", ".join(f"{name} {value:g}" for name, value in result.details.items())
    value = f"{_number(result.value)} {result.unit}" + (f" ({details})" if details else "")
    against = "" if result.baseline is None else f"{result.baseline_name} {_number(result.baseline)}"
    ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
    budget = "" if result.budget is None else str(result.budget)
    mark = "" if result.budget is None else ("ok" if result.ok else "over")
    return result.name, value, against, ratio, budget, mark


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
