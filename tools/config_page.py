"""Write the tables of `docs/reference/configuration.md`, and `config.schema.json` beside it, from the declared keys.

    python tools/config_page.py [FILE]

A test fails when one of them is not what this writes. FILE is written alone: the schema if it ends in `.json`.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from vfiouser_oob.config.load import ConfigFile
from vfiouser_oob.config.models import find_model, models
from vfiouser_oob.config.schema import (
    AgentConfig,
    DaemonConfig,
    FunctionConfig,
    KernelVfioDevice,
    MigrationConfig,
    ModelDevice,
    UpstreamDevice,
    VmConfig,
)
from vfiouser_oob.config.tables import Key, keys, schema_of
from vfiouser_oob.config.values import Value

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
PAGE = REFERENCE / "configuration.md"
SCHEMA = REFERENCE / "config.schema.json"
END = "<!-- end of keys -->"
#: The tables, by the name in their mark on the page.
SECTIONS: Mapping[str, type] = {
    "daemon": DaemonConfig,
    "function": FunctionConfig,
    "vfio-user": UpstreamDevice,
    "kernel-vfio": KernelVfioDevice,
    "model": ModelDevice,
    "agent": AgentConfig,
    "migration": MigrationConfig,
    "vm": VmConfig,
}


def table(declared: type) -> Iterator[str]:
    """The keys of a section."""
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for name, key in keys(declared).items():
        cells = (f"`{name}`", allowed(key), default(key), key.full)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def allowed(key: Key) -> str:
    """What a key may hold."""
    if not isinstance(key.value, Value):
        return "a table"
    return ", ".join(f'`"{word}"`' for word in key.value.choices) or key.value.rule


def default(key: Key) -> str:
    """What counts without a key."""
    if key.required:
        return "required"
    return f"`{key.literal}`" if key.literal else key.unset


def model_tables() -> Iterator[str]:
    """The options of each model that we ship."""
    for name, entry in models().items():
        if entry.value.startswith(("vfiouser_oob.", "vfiouser_soc.")):
            options = find_model(name).options
            yield f'\nWith `model = "{name}"`: {inspect.getdoc(options)}\n'
            yield from table(options) if keys(options) else ["It has no options."]


def page(text: str) -> str:
    """The page with its tables written anew.

    Args:
        text: as it is.
    """
    for name, declared in SECTIONS.items():
        begin = f"<!-- keys of {name}: written by `make pages` -->"
        lines = [begin, "", *table(declared), *(model_tables() if declared is ModelDevice else ()), "", END]
        text, count = re.subn(f"{begin}.*?{END}", lambda _, lines=lines: "\n".join(lines), text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"the page has {count} places for the keys of {name}")
    return text


def schema() -> str:
    """The JSON Schema of a configuration file."""
    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "Written by `make pages` from the declared keys.",
        "title": "Configuration of vfiouser-oob",
    }
    return json.dumps(head | schema_of(ConfigFile), indent=2, ensure_ascii=False) + "\n"


def write(target: Path) -> None:
    """Write one of the two."""
    text = schema() if target.suffix == ".json" else page(PAGE.read_text(encoding="utf-8"))
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or (PAGE, SCHEMA):
        write(Path(name))
