"""Write what `--help` says of every command at 80 and at 120 columns, which a test compares.

    python tools/help_texts.py

The texts are the same on every machine and every Python: what depends on them is fixed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vfiouser_oob.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "unit" / "oob" / "cli" / "help"
WIDTHS = (80, 120)
#: Defaults that depend on who asks.
_ENVIRONMENT: Mapping[str, str] = {"NO_COLOR": "1", "XDG_RUNTIME_DIR": ""}


def help_text(width: int) -> str:
    """What `--help` says of the program and of every command.

    Args:
        width: columns.
    """
    before = dict(os.environ)
    # argparse leaves two columns free.
    os.environ.update(_ENVIRONMENT, COLUMNS=str(width))
    try:
        texts = [build_parser().format_help()]
        for entry in COMMANDS:
            parser = build_parser(entry.name)
            [commands] = [
                action for action in parser._actions if hasattr(action, "choices") and action.dest == "command"
            ]
            assert commands.choices is not None
            texts.append(dict(commands.choices)[entry.name].format_help())
    finally:
        os.environ.clear()
        os.environ.update(before)
    rule = "\n" + "=" * width + "\n"
    return rule.join(text.rstrip() + "\n" for text in texts)


def target(width: int) -> Path:
    """Where the text of a width is kept."""
    return FOLDER / f"{width}.txt"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for columns in WIDTHS:
        target(columns).write_text(help_text(columns), encoding="utf-8")
