"""The `agent` and `migration` tables, and the short form of ``--agent``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from vfiouser_oob.config.devices import DeviceConfig, KernelVfioDevice
from vfiouser_oob.config.tables import Place, Table, key, keys, read_section, read_table, schema_of, section
from vfiouser_oob.config.values import FLAG, TEXT, Word, one_of, seconds_between, shown, size_of

#: The agent that is the device's own kernel driver; it is no service, and so has no options.
OWN_AGENT = "kernel-vfio"


class Generations(Word):
    """Which generations of migration a client may use."""

    AUTO = "auto", "v2 for every client, the region of v1 for those that announce `migration` in VERSION"
    BOTH = "both", "both, for every client"
    V1 = "v1", "only v1"
    V2 = "v2", "only v2"
    NONE = "none", "neither, even with an agent"


class P2p(Word):
    """Whether v2 offers the P2P states."""

    AUTO = "auto", "on, unless the device may reach a peer's BAR"
    ON = "on", "always"
    OFF = "off", "never"


_SECONDS = seconds_between(0.01, 3600)


@section
class MigrationConfig:
    """How a function with an agent is migrated."""

    generations: Generations = key(
        one_of(Generations), "generations of migration that a client may use", default=Generations.AUTO
    )
    precopy: bool = key(
        FLAG,
        "whether v2 offers PRE_COPY; if the agent has no pre-copy, only the descriptor is sent before the stop",
        default=True,
    )
    pad_reads: bool = key(
        FLAG,
        "whether to fill replies to MIG_DATA_READ with zeros up to the requested size, for clients that expect that",
        default=False,
    )
    p2p: P2p = key(
        one_of(P2p),
        "whether v2 offers the P2P states, which QEMU's client needs to migrate a VM with several functions; in "
        "them the function runs on as in RUNNING and PRE_COPY, see "
        "[several functions](../explanation/migration.md#several-functions-of-one-vm)",
        default=P2p.AUTO,
    )
    read_cap: int | None = key(
        size_of(4 << 10, 16 << 20),
        "most bytes of data in a reply to MIG_DATA_READ, for clients that mishandle large replies (128K helps "
        "QEMU's); a client that follows the specification takes such a short reply for the end of the state",
        default=None,
        unset="as many as the client asks for",
    )
    chunk_size: int = key(
        size_of(4 << 10, 16 << 20),
        "bytes of state to ask of the agent at a time; each function holds about two chunks in memory. When several "
        "functions save at the same time, chunks above 1M shrink, so that all of them together hold about 32M",
        default=4 << 20,
    )
    v1_data_size: int = key(
        size_of(4 << 10, 64 << 20, unit=4096), "size of the data section of the v1 region", default=1 << 20
    )
    call_s: float = key(_SECONDS, "seconds for a small call to the agent", default=2.0)
    stop_s: float = key(_SECONDS, "seconds for a call that drains, starts or resets the function", default=5.0)
    data_s: float = key(_SECONDS, "seconds for moving a chunk of state, and for applying the state", default=30.0)
    retry_s: float = key(
        _SECONDS, "seconds before the first retry after a passing failure; they double with each retry", default=0.1
    )


def _read_migration(raw: Any, place: Place, around: Mapping[str, Any]) -> MigrationConfig:
    if "agent" not in around:
        place.fail("the function has no agent, so it cannot be migrated")
    return read_section(MigrationConfig, raw, place)


MIGRATION = Table(_read_migration, lambda: schema_of(MigrationConfig))


@section
class OwnAgent:
    """The agent that is the device's own kernel driver."""

    kind: str = key(TEXT, "its own kernel driver migrates the device, if it can")


@section
class AgentConfig:
    """The service that stops, saves, loads and resumes a function; what its adapter needs is in `options`."""

    kind: str = key(TEXT, "which adapter speaks to it; the daemon refuses an unknown one and lists those it knows")
    function: str = key(TEXT, "the agent's name for the function")
    options: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """The agent in a few words."""
        address = self.options.get("address")
        return f"{self.kind}:{address or ''} function {self.function}"


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
    if raw.get("kind") == OWN_AGENT:
        return _own_agent(raw, place, device)
    common = read_table(AgentConfig, {name: raw[name] for name in keys(AgentConfig) if name in raw}, place)
    options = {name: value for name, value in raw.items() if name not in common}
    # Imported here: a configuration without agents is read without what speaks to them.
    from vfiouser_agents.options import OptionError
    from vfiouser_agents.registry import make_agent

    try:
        make_agent(common["kind"], options)
    except OptionError as error:
        place.fail(str(error), error.key)
    return AgentConfig(**common, options=options)


def _own_agent(raw: Mapping[str, Any], place: Place, device: DeviceConfig) -> AgentConfig:
    read_table(OwnAgent, raw, place)
    if not isinstance(device, KernelVfioDevice):
        place.fail(f"kind {OWN_AGENT!r} is the kernel driver of a device of that kind, and this one is {device.kind!r}")
    return AgentConfig(kind=OWN_AGENT, function=device.name)


def agent_schema() -> Mapping[str, Any]:
    """The JSON Schema of an `agent` table; the options of adapters, and which there are, are open."""
    served = schema_of(AgentConfig)
    served["properties"]["kind"]["not"] = {"const": OWN_AGENT}
    return {"oneOf": [served | {"additionalProperties": True}, schema_of(OwnAgent, kind=OWN_AGENT)]}


AGENT = Table(lambda raw, place, around: read_agent(raw, place, around["device"]), agent_schema)


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
