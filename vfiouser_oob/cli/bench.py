"""`bench`: what the daemon costs on this machine, as ratios to the least that the same work can cost."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from vfiouser_oob import __version__
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.interruptible import run_interruptible
from vfiouser_oob.cli.terminal import console_on, print_line, print_table
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.lab.bench.against import FULL_AGAINST, QUICK_AGAINST, measure_against
from vfiouser_oob.lab.bench.curves import scale_svg
from vfiouser_oob.lab.bench.raw import BenchFailed
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.bench.scale import FULL_SCALE, QUICK_SCALE, measure_scale
from vfiouser_oob.lab.bench.scale_figures import ScaleFigures, scale_results
from vfiouser_oob.lab.bench.stage import FULL, QUICK, measure
from vfiouser_oob.lab.demo.children import ChildFailed
from vfiouser_protocol.errors import ReplyError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument(
        "--quick", action="store_true", help="take some seconds instead of a minute, and measure less exactly"
    )
    parser.add_argument("--strict", action="store_true", help="fail when a budget is exceeded")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--against",
        metavar="SOCKET",
        type=Path,
        help="compare with the vfio-user server that listens there, instead",
    )
    what.add_argument(
        "--scale", action="store_true", help="what 1 to 256 functions cost in one daemon and in a process each, instead"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the curves of --scale as an SVG")


class Report(NamedTuple):
    """What a benchmark found.

    Args:
        results: the lines of its table.
        extra: what its JSON document has besides.
    """

    results: Sequence[Result]
    extra: Mapping[str, Any]


def run(args: argparse.Namespace) -> int:
    """Measure; budgets that are exceeded are reported, and fail only with --strict.

    Raises:
        ConfigError: the options do not fit together.
    """
    if args.plot is not None and not args.scale:
        raise ConfigError("--plot draws the curves of --scale, which is missing")
    console = console_on(sys.stderr if args.json else sys.stdout)

    def progress(line: str) -> None:
        print_line(console, line)

    try:
        if args.against is not None:
            return _compare(args, progress)
        report = _measured(args, progress)
    except (ChildFailed, BenchFailed) as error:
        raise CommandFailed(f"the benchmark failed: {error}") from error
    if args.json:
        _print_json(report, args.quick)
    else:
        _print_table(report.results)
    return verdict(report.results, strict=args.strict)


def _measured(args: argparse.Namespace, progress: Callable[[str], None]) -> Report:
    if not args.scale:
        return Report(run_interruptible(measure, QUICK if args.quick else FULL, progress), {})
    figures = run_interruptible(measure_scale, QUICK_SCALE if args.quick else FULL_SCALE, progress)
    if args.plot is not None:
        write_plot(args.plot, figures)
    return Report(scale_results(figures), {"scale": [each.as_json() for each in figures]})


def _compare(args: argparse.Namespace, progress: Callable[[str], None]) -> ExitCode:
    """Compare with another server; what it does not do is told, and is no failure."""
    effort = QUICK_AGAINST if args.quick else FULL_AGAINST
    try:
        found = run_interruptible(measure_against, args.against, effort, progress)
    except (BenchFailed, ReplyError) as error:
        raise CommandFailed(f"{args.against} cannot be compared with: {error}") from error
    if args.json:
        results = [compared.as_json() for compared in found.results]
        print(json.dumps(_heading(args.quick) | {"results": results, "notes": found.notes}, indent=2))
        return ExitCode.DONE
    console = console_on(sys.stdout)
    rows = []
    for line in found.results:
        ours, theirs, ratios = median(line.ours), median(line.theirs), line.ratios
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        rows.append((line.name, line.unit, _number(ours), _number(theirs), f"{median(ratios):.2f}", spread))
    print_table(console, ("what", "unit", "ours", "theirs", "ratio", "of each round"), rows)
    print_line(console, "The ratio is ours to theirs: below 1 is faster where time is told, above 1 where a rate is.")
    for note in found.notes:
        print_line(console, f"note: {note}")
    return ExitCode.DONE


def write_plot(path: Path, figures: Sequence[ScaleFigures]) -> None:
    """Write the curves.

    Args:
        path: to which file.
        figures: what they show.

    Raises:
        CommandFailed: it cannot be written.
    """
    try:
        path.write_text(scale_svg(figures), encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"{path} cannot be written: {error.strerror}") from error


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


def _heading(quick: bool) -> dict[str, Any]:
    """What every JSON document begins with."""
    machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    return {"version": __version__, "quick": quick, "machine": machine}


def _print_json(report: Report, quick: bool) -> None:
    document = {
        **_heading(quick),
        "ok": all(result.ok for result in report.results),
        "results": [result.as_json() for result in report.results],
        **report.extra,
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
