"""A status document as tables for people: at least 80 columns, and coloured where the terminal shows colours."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vfiouser_oob.cli.status_words import (
    FunctionWord,
    age,
    client_words,
    memory_words,
    notes_of,
    plural,
    printable,
    short_size,
    short_time,
    since_of,
    word_of,
)
from vfiouser_oob.observability.status import CommandStatus, FunctionStatus, StatusReport, VmFunctionStatus, VmStatus

#: Functions whose particulars are told without being asked for; of more, only of those that somebody ought to look at.
FEW = 8
_COLOURS: Mapping[FunctionWord, str] = MappingProxyType(
    {
        FunctionWord.RUNNING: "green",
        FunctionWord.FAILED: "bold red",
        FunctionWord.UNKNOWN: "red",
        FunctionWord.HELD: "red",
    }
)
_OTHER_COLOUR = "yellow"
_WRONG = "red"
#: A width that no table reaches: what is not shown to a person is not folded either.
_ENDLESS = 10_000


def render(
    status: StatusReport, now: datetime | None = None, width: int | None = None, names: Collection[str] = ()
) -> str:
    """The whole document as plain text.

    Args:
        status: as the daemon gave it.
        now: the time that ages are counted from; None = now.
        width: columns; None folds nothing.
        names: functions to be told of; empty = all.
    """
    return as_text(view(status, now, names), width=width)


def as_text(*parts: RenderableType, width: int | None) -> str:
    """Anything of rich's as plain text.

    Args:
        parts: what, one below the other.
        width: columns; None folds nothing.
    """
    text = io.StringIO()
    console = Console(file=text, width=width or _ENDLESS, color_system=None, highlight=False, emoji=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def view(status: StatusReport, now: datetime | None = None, names: Collection[str] = ()) -> Group:
    """The whole document: about the daemon, a table of functions, one of VMs, then what is wrong or worth knowing.

    Args:
        status: as the daemon gave it.
        now: the time that ages are counted from; None = now.
        names: functions to be told of; empty = all.
    """
    now = now or datetime.now(UTC)
    functions = [each for each in status["functions"] if not names or each["name"] in names]
    parts: list[RenderableType] = [Text(line) for line in _head(status, now)]
    if functions:
        parts += ["", _function_table(functions, now)]
    vms = [] if names else status.get("vms", [])
    if vms:
        parts += ["", _vm_table(vms, status["functions"], now), *_vm_troubles(vms)]
    told, untold = _particulars(functions, asked=bool(names), now=now)
    parts += told
    if untold:
        parts += ["", Text(f"{plural(untold, 'function')} more without trouble: vfiouser-oob status NAME shows one")]
    return Group(*parts)


def _head(status: StatusReport, now: datetime) -> Iterator[str]:
    daemon = status["daemon"]
    yield (
        f"vfiouser-oob {daemon['version']}, pid {daemon['pid']}, up {age(daemon['started'], now)}, "
        f"Python {daemon['python']}, Linux {printable(daemon['kernel'])}"
    )
    words = Counter(word_of(function).value for function in status["functions"])
    counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
    yield plural(daemon["functions"], "function") + (f": {counts}" if counts else "")


def plain_table(*headings: str) -> Table:
    """A table without lines.

    Args:
        headings: of its columns.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _function_table(functions: Collection[FunctionStatus], now: datetime) -> Table:
    table = plain_table("FUNCTION", "STATE", "SINCE", "CLIENT", "MEMORY", "IRQS")
    for column in (1, 2):
        table.columns[column].no_wrap = True
    for function in functions:
        word = word_of(function)
        irqs = sum(function["irqs"].values())
        table.add_row(
            Text(printable(function["name"])),
            Text(word.value, style=_COLOURS.get(word, _OTHER_COLOUR)),
            Text(age(since_of(function), now)),
            Text(client_words(function["client"])),
            Text(memory_words(function["maps"])),
            Text(str(irqs) if irqs else "-"),
        )
    return table


def _vm_table(vms: Collection[VmStatus], functions: Collection[FunctionStatus], now: datetime) -> Table:
    moved = {each["name"]: each["migration"]["bytes"] for each in functions if each["migration"] is not None}
    table = plain_table("VM", "STATE", "SINCE", "QEMU", "MIGRATION", "CARRIER", "MOVED", "FUNCTIONS")
    for vm in vms:
        qemu = "none" if vm["qemu"] is None else f"{printable(vm['version'] or '?')}[{vm['qemu']['pid']}]"
        connected = "" if vm["carrier"] in vm["carriers"] else " (not connected)"
        bytes_moved = sum(moved.get(function["name"], 0) for function in vm["functions"])
        table.add_row(
            Text(printable(vm["name"])),
            Text(printable(vm["phase"]), style=_WRONG if vm["phase"] == "barred" else ""),
            Text(age(vm["since"], now)),
            Text(qemu),
            Text(printable(vm["migration"])),
            Text(printable(vm["carrier"]) + connected),
            Text(short_size(bytes_moved) if bytes_moved else "-"),
            Text(", ".join(_vm_function(function) for function in vm["functions"])),
        )
    return table


def _vm_function(function: VmFunctionStatus) -> str:
    doing = f", {function['doing']}" if function["doing"] else ""
    return printable(f"{function['name']} {function['place']}{doing}")


def _vm_troubles(vms: Collection[VmStatus]) -> Iterator[Text]:
    for vm in vms:
        if vm["refused"]:
            yield Text(f"{printable(vm['name'])} does not migrate now: {printable(vm['refused'])}", style=_WRONG)
        if vm["last_error"]:
            yield Text(f"{printable(vm['name'])}: last error: {printable(vm['last_error'])}", style=_WRONG)


def _particulars(
    functions: Collection[FunctionStatus], *, asked: bool, now: datetime
) -> tuple[list[RenderableType], int]:
    """What is told of each function beside its row, and of how many nothing is."""
    told: list[RenderableType] = []
    untold = 0
    for function in functions:
        notes = list(notes_of(function, now))
        if not asked and len(functions) > FEW and not any(note.wrong for note in notes):
            untold += 1
            continue
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, show_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for note in notes:
            table.add_row(f"  {note.label}", Text(note.text, style=_WRONG if note.wrong else ""))
        told += ["", Text(printable(function["name"]), style="bold"), table]
        if function["commands"]:
            told.append(_command_table(function["commands"]))
    return told, untold


def _command_table(commands: Mapping[str, CommandStatus]) -> Table:
    table = plain_table("  COMMAND", "COUNT", "RATE", "HALF WITHIN", "99% WITHIN")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, command in sorted(commands.items(), key=lambda item: -item[1]["count"]):
        rate = command["per_s"]
        table.add_row(
            f"  {name}",
            str(command["count"]),
            f"{rate:.0f}/s" if rate >= 10 or not rate else f"{rate:.2g}/s",
            short_time(command["p50_s"]),
            short_time(command["p99_s"]),
        )
    return table
