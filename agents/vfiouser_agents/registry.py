"""Finds adapters by their kind, so that anybody's can be installed beside ours.

An adapter is registered in the entry-point group `vfiouser_oob.agents` under its kind, and is a class (or anything
else) with a `from_options`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from .api import Agent
from .extras import KIND_EXTRAS, missing
from .options import OptionError, hint

if TYPE_CHECKING:
    from importlib import metadata

GROUP = "vfiouser_oob.agents"
#: Our own, found also where the distribution is not installed; the entry points in pyproject.toml are the same.
BUILT_IN: Mapping[str, str] = {
    "grpc": "vfiouser_agents.adapters.grpc_agent:GrpcAgent",
    "jsonrpc": "vfiouser_agents.adapters.jsonrpc:JsonRpcAgent",
    "legacy-tcp": "vfiouser_agents.adapters.legacy_tcp:LegacyTcpAgent",
    "msgpack-rpc": "vfiouser_agents.adapters.msgpack_rpc:MsgpackRpcAgent",
    "plugin-so": "vfiouser_agents.adapters.plugin_so:PluginSoAgent",
}


class AgentFactory(Protocol):
    """What an entry point leads to."""

    def from_options(self, options: Mapping[str, Any]) -> Agent:
        """Make an agent; connects to nothing yet.

        Args:
            options: what the configuration says beside `kind` and `function`.

        Raises:
            OptionError: an option cannot be used.
        """


def kinds() -> Mapping[str, metadata.EntryPoint]:
    """All adapters by kind."""
    # It takes 2.5 MB, which a daemon whose adapters are our own does not need.
    from importlib import metadata

    found = {name: metadata.EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    found.update((entry.name, entry) for entry in metadata.entry_points(group=GROUP) if entry.name not in BUILT_IN)
    return dict(sorted(found.items()))


def make_agent(kind: str, options: Mapping[str, Any]) -> Agent:
    """Make an agent; nothing is connected yet.

    Args:
        kind: name of the adapter.
        options: for the adapter.

    Raises:
        OptionError: there is no such kind, it cannot be loaded, or an option cannot be used.
    """
    lacking = missing(KIND_EXTRAS[kind]) if kind in KIND_EXTRAS else None
    if lacking is not None:
        raise OptionError(f"agent kind {kind!r} cannot be used: {lacking}")
    place, load = _found(kind)
    try:
        factory = cast("AgentFactory", load())
    except (ImportError, AttributeError) as error:
        raise OptionError(f"agent kind {kind!r} ({place}) cannot be loaded: {error}") from error
    return factory.from_options(options)


def _found(kind: str) -> tuple[str, Callable[[], Any]]:
    """Where an adapter is, and what loads it."""
    place = BUILT_IN.get(kind)
    if place is not None:
        module, _, name = place.partition(":")
        return place, lambda: getattr(import_module(module), name)
    entry = kinds().get(kind)
    if entry is None:
        raise OptionError(f"unknown kind of agent {kind!r}{hint(kind, kinds())}")
    return entry.value, entry.load


def parse_agent(text: str) -> tuple[str, dict[str, Any]]:
    """Read the short form of an agent.

    Args:
        text: ``KIND:[ADDRESS][,KEY=VALUE…]``; ``tls.ca=FILE`` is a key of the table `tls`; a comma inside a value is
            written twice.

    Returns:
        The kind, and the options by name; `function` is among them if it was given.

    Raises:
        OptionError: it is something else.
    """
    kind, colon, rest = text.partition(":")
    if not kind or not colon:
        raise OptionError(
            f"agent {text!r} must be KIND:ADDRESS[,KEY=VALUE…], such as msgpack-rpc:unix:///run/agent.sock"
        )
    parts = [part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", rest)]
    options: dict[str, Any] = {}
    if parts[0] and not re.match(r"[a-z_.]+=", parts[0]):
        options["address"] = parts.pop(0)
    for part in parts:
        name, equals, value = part.partition("=")
        if part and (not equals or not name):
            raise OptionError(f"agent {text!r}: {part!r} must be KEY=VALUE")
        if part:
            _put(options, name, value, text)
    return kind, options


def _put(options: dict[str, Any], name: str, value: str, text: str) -> None:
    table, dot, key = name.partition(".")
    target = options.setdefault(table, {}) if dot else options
    name = key if dot else name
    if not isinstance(target, dict) or name in target:
        raise OptionError(f"agent {text!r}: {name!r} is given twice")
    target[name] = value
