"""The published JSON Schema takes what the daemon takes, and refuses what the daemon refuses by form."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import jsonschema
import pytest

from vfiouser_oob.config import ConfigError, parse_config
from vfiouser_oob.config.schema import (
    DaemonConfig,
    FunctionConfig,
    KernelVfioDevice,
    MigrationConfig,
    UpstreamDevice,
)
from vfiouser_oob.config.tables import keys
from vfiouser_oob.config.values import Value
from vfiouser_soc.nvme.options import NvmeOptions

ROOT = Path(__file__).resolve().parents[4]
SCHEMA = json.loads((ROOT / "docs/reference/config.schema.json").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
_FENCE = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NVME = 'device = { kind = "model", model = "nvme"'
UPSTREAM = 'device = { kind = "vfio-user", socket = "/u"'
KERNEL = 'device = { kind = "kernel-vfio", bdf = "3b:00.2"'
AGENT = 'agent = { kind = "msgpack-rpc", address = "unix:///a", function = "f" }'
#: A section, and a file with a place for one of its keys.
TABLES: Mapping[type, str] = {
    DaemonConfig: f'[daemon]\nKEY\n[[function]]\nname = "f"\n{NVME} }}\n',
    FunctionConfig: f'[[function]]\nKEY\nname = "f"\n{NVME} }}\n',
    NvmeOptions: f'[[function]]\nname = "f"\n{NVME}, KEY }}\n',
    UpstreamDevice: f'[[function]]\nname = "f"\n{UPSTREAM}, KEY }}\n',
    KernelVfioDevice: f'[[function]]\nname = "f"\n{KERNEL}, KEY }}\n',
    MigrationConfig: f'[[function]]\nname = "f"\n{KERNEL} }}\n{AGENT}\nmigration = {{ KEY }}\n',
}


def examples() -> Iterator[tuple[str, str]]:
    """Every configuration of this repository, with where it stands."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("agents/*.md")]):
        for number, match in enumerate(_FENCE.finditer(path.read_text())):
            yield f"{path.relative_to(ROOT)} {number}", match[1]
    for path in sorted([*ROOT.glob("packaging/**/*.toml"), *ROOT.glob("examples/**/*.toml")]):
        if path.name != "pyproject.toml":
            yield str(path.relative_to(ROOT)), path.read_text()


EXAMPLES = dict(examples())


def refused_by_schema(text: str) -> bool:
    """Whether the schema refuses a file."""
    return not VALIDATOR.is_valid(tomllib.loads(text))


def refused_by_reader(text: str) -> bool:
    """Whether the daemon refuses a file."""
    try:
        parse_config(text, Path("c.toml"))
    except ConfigError:
        return True
    return False


def test_the_schema_is_one() -> None:
    """It is a JSON Schema of the draft that it names."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_accepted(name: str) -> None:
    """Every configuration that we show or ship fits the schema."""
    VALIDATOR.validate(tomllib.loads(EXAMPLES[name]))


#: What no key takes: other types, what is empty or no word, and a number that is out of every range.
WRONG = ["{ x = 1 }", '[["x"]]', '""', "-1", "1.5e-9", "1979-05-27"]


PLAIN_KEYS = [
    pytest.param(declared, name, id=f"{declared.__name__}-{name}")
    for declared in TABLES
    for name, key in keys(declared).items()
    if isinstance(key.value, Value)
]


@pytest.mark.parametrize(("declared", "name"), PLAIN_KEYS)
def test_each_key_is_refused_alike(declared: type, name: str) -> None:
    """A value of the wrong type, an empty one and a word that is not among a key's words are refused by both."""
    without = re.sub(rf'(?<!\w){name} = "[^"]*"(, )?', "", TABLES[declared])
    for value in WRONG:
        text = without.replace("KEY", f"{name} = {value}")
        assert refused_by_reader(text), text
        assert refused_by_schema(text), text


@pytest.mark.parametrize("declared", TABLES, ids=lambda part: part.__name__)
def test_unknown_keys_are_refused_alike(declared: type) -> None:
    """A key that there is not is refused by both, in each table."""
    text = TABLES[declared].replace("KEY", "bogus = 1")
    assert refused_by_reader(text)
    assert refused_by_schema(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[daemon]\n",
        "function = []\n",
        "function = 3\n",
        f'[funktion]\n[[function]]\nname = "f"\n{NVME} }}\n',
        '[[function]]\nname = "f"\n',
        f"[[function]]\n{NVME} }}\n",
        '[[function]]\nname = "f"\ndevice = "model:nvme"\n',
        '[[function]]\nname = "f"\ndevice = { model = "nvme" }\n',
        '[[function]]\nname = "f"\ndevice = { kind = "modl", model = "nvme" }\n',
        '[[function]]\nname = "f"\ndevice = { kind = "model" }\n',
        '[[function]]\nname = "f"\ndevice = { kind = "model", model = "nvne" }\n',
        '[[function]]\nname = "f"\ndevice = { kind = "model", model = "test", size = "1M" }\n',
        '[[function]]\nname = "f"\ndevice = { kind = "vfio-user" }\n',
        '[[function]]\nname = "f"\ndevice = { kind = "kernel-vfio" }\n',
        f'[[function]]\nname = "f"\n{KERNEL}, mdev = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001" }}\n',
        f'[[function]]\nname = "f"\n{KERNEL} }}\nmigration = {{ precopy = true }}\n',
        f'[[function]]\nname = "f"\n{KERNEL} }}\nagent = "kernel-vfio"\n',
        f'[[function]]\nname = "f"\n{KERNEL} }}\nagent = {{ kind = "kernel-vfio", address = "x" }}\n',
        f'[[function]]\nname = "f"\n{KERNEL} }}\nagent = {{ kind = "msgpack-rpc", address = "unix:///a" }}\n',
        f'[[function]]\nname = "f"\n{KERNEL} }}\nagent = {{ address = "unix:///a", function = "f" }}\n',
        f'[[function]]\nname = "f"\n{KERNEL} }}\nagent = {{ kind = 3, function = "f" }}\n',
    ],
)
def test_files_are_refused_alike(text: str) -> None:
    """What is missing, of an unknown kind, or in conflict with another key is refused by both."""
    assert refused_by_reader(text)
    assert refused_by_schema(text)


@pytest.mark.parametrize("declared", TABLES, ids=lambda part: part.__name__)
def test_what_the_cases_start_from_is_accepted(declared: type) -> None:
    """The files that the cases spoil are good before."""
    text = TABLES[declared].replace(", KEY", "").replace("KEY", "")
    assert not refused_by_reader(text)
    assert not refused_by_schema(text)


@pytest.mark.parametrize("declared", TABLES, ids=lambda part: part.__name__)
def test_defaults_can_be_written(declared: type) -> None:
    """Each default, as the reference page and the schema have it, is what the daemon takes, and changes nothing."""
    for name, key in keys(declared).items():
        if key.literal:
            text = TABLES[declared].replace("KEY", f"{name} = {key.literal}")
            assert not refused_by_reader(text), text
            assert not refused_by_schema(text), text
            assert tomllib.loads(f"x = {key.literal}")["x"] == json.loads(key.literal)
            assert isinstance(key.value, Value)
            assert key.default == key.value.read(json.loads(key.literal))
