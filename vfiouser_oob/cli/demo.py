"""`demo`: what this is about, without a VMM: live migration under I/O, or I/O alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from trio import TooSlowError

from vfiouser_agents.extras import KIND_EXTRAS, missing
from vfiouser_agents.rpc.kinds import DEFAULT_KIND, SERVED_KINDS
from vfiouser_oob import __version__
from vfiouser_oob.cli.demo_display import Display, print_functions, print_journeys
from vfiouser_oob.cli.errors import CommandFailed, ExitCode, explain, leaves
from vfiouser_oob.cli.interruptible import run_interruptible
from vfiouser_oob.cli.options import add_key, count, option
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.models import find_model
from vfiouser_oob.config.values import SIZE
from vfiouser_oob.lab.demo.certificates import CertificatesUnavailable
from vfiouser_oob.lab.demo.children import ChildFailed
from vfiouser_oob.lab.demo.hosts import HostOptions
from vfiouser_oob.lab.demo.journey import MEMORY_SIZE, JourneyReport
from vfiouser_oob.lab.demo.migrate import show_migration
from vfiouser_oob.lab.demo.scenario import FunctionReport
from vfiouser_oob.lab.demo.stage import DemoOptions, show
from vfiouser_protocol.pci_header import FUNCTIONS_PER_BUS

_SEED_MAX = (1 << 32) - 1
#: A process that died is the cause, what its peers noticed of it the effect.
_TELLING = (KeyboardInterrupt, CertificatesUnavailable, ChildFailed, TooSlowError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `demo`."""
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    parser.add_argument(
        "--no-migration",
        action="store_true",
        help="use one host: write the whole namespace, read it back and reset, but do not migrate",
    )
    options = find_model("nvme").options
    size = "size of each namespace; without migration the demo writes and reads all of it (default: 64M)"
    add_key(parser, "--size", options, "size", size, metavar="BYTES", default=64 << 20)
    parser.add_argument(
        "--functions",
        metavar="N",
        type=count(1, FUNCTIONS_PER_BUS),
        default=1,
        help="number of functions, which migrate at the same time (default: 1)",
    )
    parser.add_argument(
        "--state-size",
        metavar="BYTES",
        type=option(SIZE.read),
        default=32 << 20,
        help="device memory that each function brings along in a migration (default: 32M)",
    )
    doorbells = "as messages, or in shared memory that is polled (default: polled)"
    add_key(parser, "--doorbells", options, "doorbells", doorbells, default="polled")
    parser.add_argument(
        "--agent",
        metavar="KIND[,KIND]",
        type=option(_read_agents),
        default=(DEFAULT_KIND, DEFAULT_KIND),
        help=f"protocol of the agents, or one for each host: {', '.join(SERVED_KINDS)} (default: {DEFAULT_KIND})",
    )
    parser.add_argument(
        "--seed", metavar="N", type=count(0, _SEED_MAX), default=1, help="seed of the data (default: 1)"
    )


def _read_agents(text: str) -> tuple[str, str]:
    kinds = text.split(",")
    if len(kinds) > 2 or not set(kinds) <= set(SERVED_KINDS):
        raise ValueError(f"must be one or two of {', '.join(SERVED_KINDS)}, got {text!r}")
    if "legacy-tcp" in kinds and len(set(kinds)) > 1:
        raise ValueError("legacy-tcp cannot describe the function to another kind of agent; use it for both hosts")
    return kinds[0], kinds[-1]


def run(args: argparse.Namespace) -> int:
    """Show it; succeeds only if everything was verified."""
    display = Display(sys.stderr if args.json else sys.stdout, MEMORY_SIZE + args.state_size, bars=args.functions == 1)
    _check_extras(args)
    display.line(
        "demo: live migration without a VMM, about half a minute"
        if not args.no_migration
        else "demo: I/O on one host, some seconds"
    )
    try:
        reports = _show(args, display)
    # Machines get their JSON in any case; `main` makes a line and the exit code of it.
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
        failure = _explained(error)
        if args.json:
            _print_json([], str(failure))
        raise failure from error
    finally:
        display.close()
    problem = next((f"{report.name}: {report.error}" for report in reports if not report.ok), None)
    if args.json:
        _print_json(reports, problem)
    else:
        print_journeys(sys.stdout, [report for report in reports if isinstance(report, JourneyReport)])
        print_functions(sys.stdout, [report for report in reports if isinstance(report, FunctionReport)])
    if problem is not None:
        raise CommandFailed(f"the demo failed: {problem}")
    return ExitCode.DONE


def _check_extras(args: argparse.Namespace) -> None:
    """Name what is not installed before anything starts.

    Raises:
        ConfigError: something is missing.
    """
    if args.no_migration:
        return
    wanted = ["demo", *(KIND_EXTRAS[kind] for kind in args.agent if kind in KIND_EXTRAS)]
    for extra in dict.fromkeys(wanted):
        lacking = missing(extra)
        if lacking is not None:
            raise ConfigError(f"{lacking}" + ("; or use --no-migration" if extra == "demo" else ""))


def _show(args: argparse.Namespace, display: Display) -> Sequence[JourneyReport | FunctionReport]:
    if args.no_migration:
        options = DemoOptions(args.size, args.functions, args.doorbells, args.seed)
        return run_interruptible(show, options, display.line)
    hosts = HostOptions(
        size=args.size,
        functions=args.functions,
        doorbells=args.doorbells,
        state_size=args.state_size,
        agents=args.agent,
    )
    return run_interruptible(show_migration, hosts, args.seed, display.line, display.meter)


def _explained(error: BaseException) -> CommandFailed:
    """One line for whatever ended the demonstration, in the order of how much it tells."""
    causes = list(leaves(error))
    known = next((cause for kind in _TELLING for cause in causes if isinstance(cause, kind)), None)
    if isinstance(known, TooSlowError):
        return CommandFailed("the demo failed: the device made no progress for a minute")
    if isinstance(known, ChildFailed | CertificatesUnavailable):
        return CommandFailed(f"the demo failed: {known}")
    return CommandFailed(f"the demo failed: {explain(known or causes[0])[1][0]}")


def _print_json(reports: Sequence[JourneyReport | FunctionReport], problem: str | None) -> None:
    document = {
        "version": __version__,
        "ok": problem is None,
        "error": problem,
        "functions": [report.as_json() for report in reports],
    }
    print(json.dumps(document, indent=2))
