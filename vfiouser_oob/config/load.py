"""A configuration file becomes a DaemonConfig, or one line that says why not."""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from vfiouser_oob.config.agents import OWN_AGENT
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.lines import LineMap
from vfiouser_oob.config.schema import (
    DaemonConfig,
    FunctionConfig,
    UpstreamDevice,
    default_control_socket,
    default_state_directory,
)
from vfiouser_oob.config.tables import (
    Place,
    SpoiledTable,
    Table,
    key,
    read_section,
    read_table,
    schema_of,
    section,
)
from vfiouser_oob.config.values import NAME, shown
from vfiouser_oob.config.vms import VmConfig, check_vms, vm_sockets

# Far more than hundreds of functions need; a wrong path (a disk image) is refused before it fills memory.
CONFIG_SIZE_MAX = 4 << 20
_TOML_PLACE = re.compile(r"\s*\(at line (\d+), column \d+\)")


def _one_daemon(raw: Any, place: Place, around: Mapping[str, Any]) -> dict[str, Any]:
    return read_table(DaemonConfig, raw, replace(place, label="[daemon]"))


def tables_named(header: str, declared: type) -> Table:
    """At least one table under the same header, each with a `name`; a field `line` is told where it stands.

    Args:
        header: as it is written.
        declared: the section.
    """

    def read(raw: Any, place: Place, around: Mapping[str, Any]) -> tuple[Any, ...]:
        if isinstance(raw, Mapping):
            message = f"[{header.strip('[]')}] must be written {header}: there is one such table for each of them"
            raise ConfigError(message, place.source, place.line_of())
        if not isinstance(raw, list) or not raw:
            raise ConfigError(f"there must be at least one {header}", place.source, place.line_of())
        tables = (read_usable(table, place, index) for index, table in enumerate(raw))
        return tuple(table for table in tables if table is not None)

    def read_usable(raw: Any, place: Place, index: int) -> Any:
        """The table; None for one that is put aside."""
        try:
            return read_one(raw, place, index)
        except ConfigError as error:
            if place.spoiled is None or not NAME.fits(name_of(raw)):
                raise
            place.spoiled.append(SpoiledTable(header, name_of(raw), str(error)))
            return None

    def name_of(raw: Any) -> Any:
        return raw.get("name") if isinstance(raw, Mapping) else None

    def read_one(raw: Any, place: Place, index: int) -> Any:
        name = name_of(raw)
        label = f"{header} {shown(name)}" if isinstance(name, str) else f"{header} number {index + 1}"
        here = Place(label, place.source, partial(place.line_of, index))
        return read_section(declared, raw, here, line=here.line_of())

    return Table(read, lambda: {"type": "array", "minItems": 1, "items": schema_of(declared)})


@section
class ConfigFile:
    """The sections of a configuration file."""

    constraints: ClassVar[Mapping[str, Any]] = {"required": ["function"]}

    daemon: Mapping[str, Any] = key(
        Table(_one_daemon, lambda: schema_of(DaemonConfig)), "the process as a whole", factory=dict
    )
    function: tuple[FunctionConfig, ...] = key(
        tables_named("[[function]]", FunctionConfig), "one table per PCI function", default=()
    )
    vm: tuple[VmConfig, ...] = key(
        tables_named("[[vm]]", VmConfig),
        "one table per VM whose QEMU has no migration of its own for vfio-user",
        default=(),
    )


@section
class FunctionsOnly:
    """What `add` takes."""

    function: tuple[FunctionConfig, ...] = key(tables_named("[[function]]", FunctionConfig), "as in a configuration")


def load_config(path: Path, *, lenient: bool = False) -> DaemonConfig:
    """Read a configuration file.

    Args:
        path: the TOML file.
        lenient: put functions that cannot be used aside, as long as there are others.

    Raises:
        ConfigError: it cannot be read or used.
    """
    return parse_config(read_text(path), path, lenient=lenient)


def read_text(path: Path) -> str:
    """Read the text of a configuration file.

    Args:
        path: the file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", str(path)) from error
    if len(data) > CONFIG_SIZE_MAX:
        raise ConfigError(f"is larger than {CONFIG_SIZE_MAX >> 20} MiB, hardly a configuration file", str(path))
    if data.startswith(codecs.BOM_UTF8):
        message = "begins with a byte order mark (BOM), which TOML does not allow; save it as UTF-8 without BOM"
        raise ConfigError(message, str(path), 1)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError("is UTF-16 text; TOML is UTF-8, so save it as that", str(path), 1)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("is not UTF-8 text", str(path), line) from error


def parse_config(text: str, path: Path, *, lenient: bool = False) -> DaemonConfig:
    """Read the text of a configuration file.

    Args:
        text: TOML.
        path: where it came from, for messages.
        lenient: put functions that cannot be used aside, as long as there are others.

    Raises:
        ConfigError: it cannot be used.
    """
    source = str(path)
    spoiled: list[SpoiledTable] = []
    raw = _read_toml(text, source)
    place = Place("top level", source, LineMap(text).line, spoiled if lenient else None)
    top = read_table(ConfigFile, raw, place)
    if "function" not in top:
        raise ConfigError("there must be at least one [[function]]", source)
    if not top["function"]:
        raise ConfigError("; ".join(table.reason for table in spoiled))
    paths = {"control_socket": default_control_socket(), "state_directory": default_state_directory()}
    settings = paths | top.get("daemon", {})
    names = {*(function.name for function in top["function"]), *(table.name for table in spoiled)}
    vms = _usable_vms(top.get("vm", ()), frozenset(names), source, spoiled if lenient else None)
    config = DaemonConfig(functions=top["function"], vms=vms, source=path, spoiled=tuple(spoiled), **settings)
    check_unique(config)
    return config


def _usable_vms(
    vms: tuple[VmConfig, ...], functions: frozenset[str], source: str, spoiled: list[SpoiledTable] | None
) -> tuple[VmConfig, ...]:
    """The VMs that use functions which there are; the others are put aside, if they may be."""
    if spoiled is None:
        return vms
    usable: tuple[VmConfig, ...] = ()
    for vm in vms:
        try:
            check_vms((*usable, vm), functions, source)
            usable = (*usable, vm)
        except ConfigError as error:
            spoiled.append(SpoiledTable("[[vm]]", vm.name, str(error)))
    return usable


def parse_functions(text: str, source: str) -> tuple[FunctionConfig, ...]:
    """Read text that holds functions and nothing else.

    Args:
        text: TOML.
        source: where it came from, for messages.

    Raises:
        ConfigError: it cannot be used.
    """
    place = Place("top level", source, LineMap(text).line)
    functions: tuple[FunctionConfig, ...] = read_section(FunctionsOnly, _read_toml(text, source), place).function
    check_unique(DaemonConfig(functions=functions, source=Path(source)))
    return functions


def _read_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        message = _TOML_PLACE.sub("", str(error))
        raise ConfigError(f"not valid TOML: {message}", source, int(place[1]) if place else None) from error
    except RecursionError as error:
        raise ConfigError("not valid TOML: nested too deeply", source) from error


def check_unique(config: DaemonConfig) -> None:
    """Refuse two functions of one name, two users of one socket path, and VMs of functions that there are not.

    Raises:
        ConfigError: there are such.
    """
    source = str(config.source) if config.source else None
    names = {table.name for table in config.spoiled if table.header == "[[function]]"}
    sockets: dict[Path, str] = {}
    if config.control_socket is not None:
        sockets[config.control_socket] = "the control socket"
    for function in config.functions:
        if function.name in names:
            raise ConfigError(f"two functions are named {function.name!r}", source, function.line)
        names.add(function.name)
        if function.socket is None:
            continue
        if function.socket in sockets:
            user = sockets[function.socket]
            message = f"function {function.name!r}: socket {function.socket} is that of {user} already"
            raise ConfigError(message, source, function.line)
        sockets[function.socket] = f"function {function.name!r}"
    check_vms(config.vms, frozenset(names), source)
    for vm, what, path in vm_sockets(config.vms):
        if path in sockets:
            raise ConfigError(f"VM {vm.name!r}: {what} {path} is that of {sockets[path]} already", source, vm.line)
        sockets[path] = f"VM {vm.name!r}"
    for function in config.functions:
        # A function wrapped around its own socket would wait for itself.
        if isinstance(function.device, UpstreamDevice) and function.device.socket == function.socket:
            raise ConfigError(
                f"function {function.name!r}: its device's socket is its own socket, {function.socket}",
                source,
                function.line,
            )


def verify_agents(config: DaemonConfig, source: str) -> None:
    """Look whether what the agents are configured with can work at all, such as a library; connects to nothing.

    Args:
        config: the configuration.
        source: where it came from.

    Raises:
        ConfigError: it cannot.
    """
    from vfiouser_agents.options import OptionError
    from vfiouser_agents.registry import make_agent

    for function in config.functions:
        if function.agent is not None and function.agent.kind != OWN_AGENT:
            try:
                make_agent(function.agent.kind, function.agent.options).verify()
            except OptionError as error:
                Place(f'[[function]] "{function.name}": agent', source).fail(str(error))
