"""The `agent` and `migration` tables, and the short form of ``--agent``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfiouser_oob.config.schema import (
    AgentConfig,
    DaemonConfig,
    DeviceConfig,
    Generations,
    KernelVfioDevice,
    MigrationConfig,
)
from vfiouser_oob.config.tables import Key, Place, read_table
from vfiouser_oob.config.values import one_of, read_size, read_string, seconds_between, shown

#: The agent that is the device's own kernel driver; it is no service, and so has no options.
OWN_AGENT = "kernel-vfio"
_PAGE = 4096
_CHUNK_MIN, _CHUNK_MAX = 4096, 16 << 20
_V1_DATA_MAX = 64 << 20


def read_flag(value: Any) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {shown(value)}")
    return value


def read_chunk_size(value: Any) -> int:
    """Bytes of state that are asked for at once."""
    size = read_size(value)
    if not _CHUNK_MIN <= size <= _CHUNK_MAX:
        raise ValueError(f"must be a size from 4K to 16M, got {shown(value)}")
    return size


def read_data_size(value: Any) -> int:
    """Bytes of the data section of the v1 migration region."""
    size = read_size(value)
    if not _PAGE <= size <= _V1_DATA_MAX or size % _PAGE:
        raise ValueError(f"must be a size from 4K to 64M in whole pages of 4096 bytes, got {shown(value)}")
    return size


_seconds = seconds_between(0.01, 3600)

MIGRATION_KEYS = (
    Key("generations", one_of(Generations)),
    Key("precopy", read_flag),
    Key("pad_reads", read_flag),
    Key("chunk_size", read_chunk_size),
    Key("v1_data_size", read_data_size),
    Key("call_s", _seconds),
    Key("stop_s", _seconds),
    Key("data_s", _seconds),
    Key("retry_s", _seconds),
)


def read_migration(raw: Any, place: Place) -> MigrationConfig:
    """Read a `migration` table.

    Args:
        raw: what stands in its place.
        place: where it stands.

    Raises:
        ConfigError: it cannot be used.
    """
    return MigrationConfig(**read_table(raw, MIGRATION_KEYS, place))


def read_agent(raw: Any, place: Place, device: DeviceConfig) -> AgentConfig:
    """Read an `agent` table; the options of a kind are its adapter's to judge, but for what all of them have.

    Args:
        raw: what stands in its place.
        place: where it stands.
        device: the function's device.

    Raises:
        ConfigError: it cannot be used.
    """
    if not isinstance(raw, Mapping):
        place.fail(f'must be a table such as {{kind = "msgpack-rpc", address = …, function = …}}, got {shown(raw)}')
    options = dict(raw)
    if options.get("kind") == OWN_AGENT:
        return _own_agent(options, place, device)
    for name in ("kind", "function"):
        if name not in options:
            place.fail(f"key {name!r} is missing")
        try:
            read_string(options[name])
        except ValueError as error:
            place.fail(f"{name} {error}", name)
    kind, function = options.pop("kind"), options.pop("function")
    # Imported here: a configuration without agents is read without what speaks to them.
    from vfiouser_agents.options import OptionError
    from vfiouser_agents.registry import make_agent

    try:
        make_agent(kind, options)
    except OptionError as error:
        place.fail(str(error), error.key)
    return AgentConfig(kind=kind, function=function, options=options)


def _own_agent(options: Mapping[str, Any], place: Place, device: DeviceConfig) -> AgentConfig:
    read_table(options, (Key("kind", read_string),), place)
    if not isinstance(device, KernelVfioDevice):
        place.fail(f"kind {OWN_AGENT!r} is the kernel driver of a device of that kind, and this one is {device.kind!r}")
    return AgentConfig(kind=OWN_AGENT, function=device.name)


def parse_agent(text: str, device: DeviceConfig, source: str | None = None) -> AgentConfig:
    """Read the short form of an agent.

    Args:
        text: ``KIND:ADDRESS,function=NAME[,KEY=VALUE…]``, as `vfiouser_agents.registry.parse_agent` has it.
        device: the function's device.
        source: the option that it came from.

    Raises:
        ConfigError: it cannot be used.
    """
    from vfiouser_agents.options import OptionError
    from vfiouser_agents.registry import parse_agent as parse

    place = Place(f"agent {shown(text)}", source)
    if text.rstrip(":") == OWN_AGENT:
        return read_agent({"kind": OWN_AGENT}, place, device)
    try:
        kind, options = parse(text)
    except OptionError as error:
        place.fail(str(error))
    return read_agent({"kind": kind, **options}, place, device)


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
