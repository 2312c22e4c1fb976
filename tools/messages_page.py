"""Write `docs/reference/messages.md` from the declarations of the messages.

    python tools/messages_page.py [FILE]

A test fails when the page is not what this writes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vfiouser_protocol.codec import VARIANTS
from vfiouser_protocol.commands import COMMANDS, CommandSpec, ConnectionEnd
from vfiouser_protocol.fields import items_of, layout_table
from vfiouser_protocol.messages import (
    Empty,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "messages.md"
HEAD = """# Messages

<!-- Written by `make pages` from the declarations in protocol/vfiouser_protocol; edit those. -->

Every message begins with a header of 16 bytes; a command's reply repeats its number and id. All numbers are
little-endian. Offsets count from the end of the header. A field marked with * is there only under the condition that
its text names.
"""
#: Fields that stand on the wire and follow from others.
WIRE_ONLY = {"wr_cnt": "how many writes follow", "num_ranges": "how many ranges follow", "reserved": "0"}
FEATURES = (FeatureMigration, FeatureDeviceState, FeatureLoggingStart, FeatureLoggingReport)


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for spec in COMMANDS.values():
        parts += command(spec)
    parts.append("## DMA messages of QEMU 10.1 and 10.2\n")
    for variant in VARIANTS.values():
        parts += payload(variant, variant.__name__)
    parts.append("## Data of DEVICE_FEATURE\n")
    for feature in FEATURES:
        parts += payload(feature, feature.__name__)
    return "\n".join(parts)


def command(spec: CommandSpec) -> Iterator[str]:
    """Describe a command, its request and its reply."""
    name = spec.command.name
    yield f"## {name} ({spec.command.value})\n"
    facts = [f"Sent by the {'client' if spec.sender is ConnectionEnd.CLIENT else 'server'}"]
    for count, where in ((spec.request_fds, "request"), (spec.reply_fds, "reply")):
        if count:
            facts.append(f"at most {count} descriptor{'s' if count > 1 else ''} with the {where}")
    if not spec.no_reply:
        facts.append("always answered")
    if spec.needs is not None:
        facts.append(f"only if both sides announced `{spec.needs}`")
    yield "; ".join(facts) + ".\n"
    if spec.reply is spec.request:
        yield from payload(spec.request, "Request and reply")
    else:
        yield from payload(spec.request, "Request")
        yield from payload(spec.reply, "Reply", arguments(spec.request))


def payload(cls: type[Any], title: str, known: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """Describe a payload as a table; `known` tells what fields mean that it repeats."""
    if cls is Empty:
        yield f"{title}: no payload.\n"
        return
    meanings = {**WIRE_ONLY, **known, **arguments(cls)}
    yield f"### {title}: `{cls.__name__}`\n" if title != cls.__name__ else f"### `{title}`\n"
    yield "| offset | bytes | field | meaning |\n|---|---|---|---|"
    for row in layout_table(cls):
        mark = "*" if row.conditional else ""
        size = "…" if row.size is None else str(row.size)
        yield f"| {row.offset} | {size} | `{row.name}`{mark} | {meanings.get(row.name, '')} |"
    yield ""
    items = items_of(cls)
    if items is not None:
        field, item = items
        inner = "; ".join(f"`{name}`: {meaning}" for name, meaning in arguments(item).items())
        yield f"Each of `{field}` is a `{item.__name__}`: {inner}.\n"
    note = spec_line(cls)
    if note:
        yield f"Specification: {note}\n"


def arguments(cls: type[Any]) -> dict[str, str]:
    """What the docstring says of each field."""
    found: dict[str, str] = {}
    match = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL)
    for line in match[1].splitlines() if match else ():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        else:
            found[name] += f" {line.strip()}"
    return {name: text.rstrip(".").replace("|", "\\|") for name, text in found.items()}


def spec_line(cls: type[Any]) -> str:
    """Where the specification has it, as the docstring says."""
    match = re.search(r"Spec: (.*)", inspect.getdoc(cls) or "", re.DOTALL)
    return " ".join(match[1].split()) if match else ""


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(), encoding="utf-8")
