"""How sub-commands write for people: as wide as the terminal, without tricks where there is none.

rich obeys TERM=dumb, NO_COLOR and COLUMNS by itself. What is not shown on a terminal is not folded either, so that a
line stays a line for whoever reads it from a pipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

#: A width that nothing reaches.
_ENDLESS = 10_000


def console_on(stream: TextIO) -> Console:
    """A console that takes text as it is.

    Args:
        stream: where it writes.
    """
    width = None if stream.isatty() else _ENDLESS
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def can_redraw(console: Console) -> bool:
    """Whether a line that was written can be written anew."""
    return console.is_terminal and not console.is_dumb_terminal


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table; where it does not fit, cells are folded between words.

    Args:
        heads: of the columns.
        rows: cells, a column each.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table with an empty line before it."""
    console.print()
    if console.width == _ENDLESS:
        # rich would pad every line to the width of the table.
        with console.capture() as captured:
            console.print(table_of(heads, rows))
        for line in captured.get().splitlines():
            console.print(line.rstrip())
    else:
        console.print(table_of(heads, rows))


def print_line(console: Console, text: str, style: str = "") -> None:
    """Write a line; what does not fit goes below it, indented as it was and a little more.

    Args:
        console: where.
        text: one line.
        style: rich's words for it, such as "red".
    """
    start = len(text) - len(text.lstrip(" "))
    if len(text) <= console.width:
        console.print(Text(text, style), soft_wrap=True)
        return
    first, *rest = Text(text[start:], style).wrap(console, max(20, console.width - start - 2))
    console.print(Padding(first, (0, 0, 0, start), expand=False))
    for part in rest:
        console.print(Padding(part, (0, 0, 0, start + 2), expand=False))
