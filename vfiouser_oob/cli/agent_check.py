"""`agent-check`: does this agent keep the contract that a migration relies on?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from vfiouser_agents.api import Agent
from vfiouser_agents.options import OptionError
from vfiouser_agents.registry import make_agent, parse_agent
from vfiouser_agents.testing import CHECKS, DEADLINE, CheckOutcome, CheckResult, NotUsable, check_agent
from vfiouser_oob.cli.errors import CommandFailed, ExitCode
from vfiouser_oob.cli.interruptible import run_interruptible
from vfiouser_oob.cli.options import count
from vfiouser_oob.cli.terminal import console_on, print_line
from vfiouser_oob.config.errors import ConfigError

_STYLES = {
    CheckOutcome.PASSED: "green",
    CheckOutcome.FAILED: "red",
    CheckOutcome.NOT_APPLICABLE: "dim",
}
_WIDTH = max(len(check.name) for check in CHECKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `agent-check`."""
    parser.add_argument(
        "--agent",
        metavar="KIND:…",
        help="the agent, such as msgpack-rpc:tls://soc:7711,tls.ca=ca.pem,function=nvme0; the checks stop its "
        "function, overwrite it with its own state and reset it, so choose one that nobody uses",
    )
    parser.add_argument("--function", metavar="ID", help="the function to check (default: the only one)")
    parser.add_argument(
        "--deadline", metavar="SECONDS", type=count(1, 3600), help=f"seconds for each check (default: {DEADLINE:.0f})"
    )
    parser.add_argument("-k", metavar="TEXT", dest="text", help="only the checks with this text in their names")
    parser.add_argument("--list", action="store_true", help="list the checks and what each proves, and run none")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the suite against the agent; exit code 1 if a check fails."""
    names = [check.name for check in CHECKS if args.text is None or args.text in check.name]
    if not names:
        raise ConfigError(f"no check has {args.text!r} in its name; --list shows all of them")
    if args.list:
        _print_list(names, as_json=args.json)
        return ExitCode.DONE
    if args.agent is None:
        raise ConfigError("--agent is missing; for example: --agent msgpack-rpc:unix:///run/agent.sock,function=nvme0")
    factory, function = _factory(args.agent, args.function)
    show = _ignore if args.json else _Table().row
    suite = partial(
        check_agent,
        factory,
        function_id=function,
        names=names,
        deadline_s=float(args.deadline or DEADLINE),
        on_result=show,
    )
    try:
        results = run_interruptible(suite)
    except NotUsable as error:
        raise CommandFailed(f"{args.agent}: {error}") from error
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in CheckOutcome}
    if args.json:
        print(json.dumps({"agent": args.agent, "checks": [_as_json(result) for result in results]}, indent=2))
    else:
        print("\n" + ", ".join(f"{number} {outcome.value}" for outcome, number in counts.items()))
    return ExitCode.FAILED if counts[CheckOutcome.FAILED] else ExitCode.DONE


def _factory(text: str, function: str | None) -> tuple[Callable[[], Agent], str | None]:
    try:
        kind, options = parse_agent(text)
        function = options.pop("function", None) if function is None else function
        make_agent(kind, options)  # whatever is wrong with the options is said before anything runs
    except OptionError as error:
        raise ConfigError(f"--agent: {error}") from error
    return partial(make_agent, kind, options), function


def _print_list(names: Sequence[str], *, as_json: bool) -> None:
    chosen = [check for check in CHECKS if check.name in names]
    if as_json:
        print(
            json.dumps([{"name": check.name, "says": check.says, "needs": check.needs} for check in chosen], indent=2)
        )
        return
    console = console_on(sys.stdout)
    for check in chosen:
        needs = f" ({', '.join(check.needs)})" if check.needs else ""
        print_line(console, f"{check.name.ljust(_WIDTH)}  {check.says}{needs}")


class _Table:
    """A row per check, under a heading that waits for the first: an agent that cannot be reached has no table."""

    def __init__(self) -> None:
        self._console = console_on(sys.stdout)
        self._begun = False

    def row(self, result: CheckResult) -> None:
        """Print a row."""
        if not self._begun:
            print_line(self._console, f"{'CHECK'.ljust(_WIDTH)}  RESULT  SECONDS  RULE", "bold")
            self._begun = True
        print_line(
            self._console,
            f"{result.name.ljust(_WIDTH)}  {result.outcome.value:6}  {result.seconds:7.3f}  {result.says}",
            _STYLES[result.outcome],
        )
        if result.detail:
            print_line(self._console, f"{' ' * _WIDTH}  {_safe(result.detail)}")


def _ignore(result: CheckResult) -> None:
    return None


def _as_json(result: CheckResult) -> dict[str, Any]:
    return {**asdict(result), "outcome": result.outcome.value, "seconds": round(result.seconds, 6)}


def _safe(text: str) -> str:
    # The agent chose its words: they must not steer the terminal.
    return "".join(character if character.isprintable() else "?" for character in text)
