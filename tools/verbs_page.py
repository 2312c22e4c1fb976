"""Write the tables of `docs/reference/control-socket.md` from the declared verbs.

    python tools/verbs_page.py [FILE]

A test fails when the page is not what this writes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from vfiouser_oob.config.tables import keys
from vfiouser_oob.config.values import Value
from vfiouser_oob.control.verbs import VERBS, ControlRole

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "control-socket.md"
BEGIN = "<!-- verbs: written by `make pages` -->"
END = "<!-- end of verbs -->"
_WHO: Mapping[ControlRole, str] = {ControlRole.READER: "the group", ControlRole.ADMIN: "administrators"}


def table() -> Iterator[str]:
    """The verbs, then the parameters of each."""
    yield "| method | who may | what it does |\n|---|---|---|"
    for name, verb in VERBS.items():
        yield f"| `{name}` | {_WHO[verb.role]} | {verb.meaning} |"
    yield "\n| method | parameter | value | default | meaning |\n|---|---|---|---|---|"
    for name, verb in VERBS.items():
        for one in keys(verb.parameters).values():
            assert isinstance(one.value, Value)
            default = "required" if one.required else f"`{one.literal}`" if one.literal else one.unset
            allowed = ", ".join(f'`"{word}"`' for word in one.value.choices) or one.value.rule
            yield f"| `{name}` | `{one.name}` | {allowed} | {default} | {one.full} |"


def page(text: str) -> str:
    """The page with its tables written anew.

    Args:
        text: as it is.
    """
    lines = "\n".join([BEGIN, "", *table(), "", END])
    text, count = re.subn(f"{re.escape(BEGIN)}.*?{END}", lambda _: lines, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"the page has {count} places for the verbs")
    return text


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
