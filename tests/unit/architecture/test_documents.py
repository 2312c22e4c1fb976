"""What the documents say is true: snippets parse, links lead somewhere, every option and key is described."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiouser_oob.cli.main import COMMANDS, build_parser
from vfiouser_oob.config.load import load_config, parse_config
from vfiouser_oob.config.schema import (
    DaemonConfig,
    FunctionConfig,
    KernelVfioDevice,
    MigrationConfig,
    ModelDevice,
    UpstreamDevice,
)
from vfiouser_oob.config.tables import keys
from vfiouser_oob.control.protocol import ErrorCode
from vfiouser_oob.observability.status import (
    CapabilitiesStatus,
    ClientStatus,
    CommandStatus,
    DaemonStatus,
    FunctionStatus,
    MapsStatus,
    MigrationEntry,
    MigrationStatus,
    RegionStatus,
)
from vfiouser_soc.nvme.options import NvmeOptions

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "protocol/README.md", ROOT / "agents/README.md"]
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Every fenced block of a language, with the document that it stands in."""
    for path in DOCUMENTS:
        for match in _FENCE.finditer(path.read_text()):
            if match[2] == language:
                yield path.relative_to(ROOT).as_posix(), match[3]


def document(name: str) -> str:
    """The text of a document."""
    return (ROOT / name).read_text()


def test_json_parses() -> None:
    """Every JSON block is a JSON document per block or per line."""
    found = list(blocks("json"))
    assert found
    for name, text in found:
        try:
            json.loads(text)
        except ValueError:
            pytest.fail(f"{name}: {text}")


def test_json_inside_commands_parses() -> None:
    """The JSON values of QEMU's -device option, whose braces others' documents lose, are complete."""
    found = [(name, value) for name, text in blocks("sh") for value in re.findall(r"-device '([^']*)'", text)]
    assert found
    for _, value in found:
        assert "vfio-user-pci" == json.loads(value)["driver"]


def test_configurations_are_accepted() -> None:
    """Every TOML block of the documents is a configuration that the daemon would take."""
    found = list(blocks("toml"))
    assert found
    for name, text in found:
        assert parse_config(text, Path(name)).functions


def test_the_shipped_configuration_is_accepted() -> None:
    """The configuration that is installed is good as it stands."""
    assert load_config(ROOT / "packaging" / "config.toml").functions


def test_links_lead_somewhere() -> None:
    """Every relative link names a file of this repository."""
    for path in DOCUMENTS:
        for target in _LINK.findall(path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path}: {target}"


def options(module: str) -> set[str]:
    """The long options of a sub-command."""
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


@pytest.mark.parametrize(
    "name",
    [
        "serve",
        "check-config",
        "status",
        "snippet",
        "migrate-check",
        "libvirt-hook",
        "bind",
        "unbind",
        "simulate-soc",
        "agent-check",
        "conformance",
        "demo",
        "bench",
        "install-files",
    ],
)
def test_every_option_is_described(name: str) -> None:
    """The reference has a section for the command that names each of its options, and no others."""
    text = document("docs/reference/cli.md")
    section = re.search(rf"^## {name}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    entry = next(entry for entry in COMMANDS if entry.name == name)
    rows = re.findall(r"^\| (`.*?) \|", section[0], re.MULTILINE)
    described = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    assert options(entry.module) - {"--help"} == described


def test_every_command_is_described() -> None:
    """The reference has a section for each command of the table, and the parser knows them all."""
    sections = re.findall(r"^## ([a-z-]+)", document("docs/reference/cli.md"), re.MULTILINE)
    assert [entry.name for entry in COMMANDS] == sections
    for entry in COMMANDS:
        assert entry.name in build_parser().format_help()


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("[daemon]", {*keys(DaemonConfig)}),
        ("[[function]]", {*keys(FunctionConfig)}),
        ("migration", {*keys(MigrationConfig)}),
        ('device, kind = "vfio-user"', {*keys(UpstreamDevice)}),
        ('device, kind = "kernel-vfio"', {*keys(KernelVfioDevice)}),
        ('device, kind = "model"', {*keys(ModelDevice), *keys(NvmeOptions)}),
    ],
)
def test_every_key_is_described(heading: str, keys: set[str]) -> None:
    """The reference has a table for each kind of TOML table that names each of its keys, and no others."""
    text = document("docs/reference/configuration.md")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    assert keys == set(re.findall(r"^\| `([a-z0-9_]+)` \|", section[1], re.MULTILINE))


def test_the_status_document_is_described() -> None:
    """The example in the reference has exactly the fields of the types, at every level."""
    _, text = next(block for block in blocks("json") if block[0] == "docs/reference/status.md")
    example = json.loads(text)
    function = example["functions"][0]
    pairs = [
        (DaemonStatus, example["daemon"]),
        (FunctionStatus, function),
        (ClientStatus, function["client"]),
        (MapsStatus, function["maps"]),
        (MigrationStatus, function["migration"]),
        (CapabilitiesStatus, function["migration"]["capabilities"]),
        *((CommandStatus, command) for command in function["commands"].values()),
        *((RegionStatus, region) for region in function["regions"]),
    ]
    for declared, shown in pairs:
        assert set(declared.__annotations__) == set(shown), declared.__name__


def test_events_are_described() -> None:
    """Every event that the server announces stands in the reference, and no other."""
    announced = set()
    for path in (ROOT / "vfiouser_oob" / "server").glob("*.py"):
        announced |= set(re.findall(r"\.announce\(\"([a-z-]+)\"", path.read_text()))
    trace = (ROOT / "vfiouser_oob" / "migration" / "trace.py").read_text()
    announced |= set(re.findall(r"publish\(\s*\"([a-z-]+)\"", trace))
    described = re.findall(r"^\| `([a-z-]+)` \|.*`function`", document("docs/reference/status.md"), re.MULTILINE)
    assert announced == set(described)


def test_migrations_are_described() -> None:
    """The example in the reference has the fields of the type, and each has its row."""
    _, text = next(block for block in blocks("json") if block[0] == "docs/reference/migrations.md")
    assert set(MigrationEntry.__annotations__) == set(json.loads(text)[0])
    rows = re.findall(r"^\| (`.*?) \|", document("docs/reference/migrations.md"), re.MULTILINE)
    assert set(MigrationEntry.__annotations__) == {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_error_codes_are_described() -> None:
    """Every error code of the control socket stands in its reference."""
    text = document("docs/reference/control-socket.md")
    assert [] == [code.value for code in ErrorCode if f"| `{code.value}` |" not in text]


def test_tomllib_reads_what_we_show() -> None:
    """The TOML blocks are plain TOML, too: no extension of ours crept in."""
    for _, text in blocks("toml"):
        assert tomllib.loads(text)


def test_texts_that_are_quoted_are_ours() -> None:
    """A page quotes the log or an error as the program says it; a reader who searches for the words finds them."""
    tool = runpy.run_path(str(ROOT / "tools" / "prose_code.py"))
    said = "\n".join(text.words for path in tool["modules"]() for text in tool["literals"](ast.parse(path.read_text())))
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    quoted = {
        (page.name, quote)
        for page in pages
        for quote in re.findall(
            r"(?<!`)`([a-z][^`\n]+)`(?!`)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        )
        # Words, and nothing that only commands, options and values have.
        if len(quote.split()) >= 4 and not re.search(r"[=\[{/<$|(]| -|^driverctl ", quote)
    }
    assert len(quoted) > 10
    parts = [(page, part.strip()) for page, quote in quoted for part in re.split(r"…|[A-Z]{2,}|\d+", quote)]
    assert [(page, part) for page, part in parts if len(part) > 6 and part not in said] == []
