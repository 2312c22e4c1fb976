"""What can be asked on the control socket, as data: each verb with its parameters, who may use it, and what does it.

A verb's parameters are a section as the configuration has them (`config.tables`), so that their rules, the refusals and
the reference page come from one declaration. A new verb is one class of parameters, if it has any, and one row.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol, TypeAlias

from vfiouser_oob.config.schema import LogLevel
from vfiouser_oob.config.tables import NoOptions, key, section
from vfiouser_oob.config.values import FLAG, NAME, TEXT, one_of
from vfiouser_oob.observability.status import StatusProvider
from vfiouser_oob.server.administration import Administration


class ControlRole(IntEnum):
    """What a peer may do; who may do more may do less as well."""

    READER = 1
    ADMIN = 2


class Administered(StatusProvider, Protocol):
    """A daemon, as the control socket sees it."""

    @property
    def administration(self) -> Administration:
        """What changes it."""

    async def check_migration(self, vm: str, destination: str | None) -> dict[str, Any]:
        """What would be in the way of a VM's migration.

        Args:
            vm: its name.
            destination: what the other host says of itself; None to leave it out.

        Raises:
            ChangeRefused: that cannot be asked.
        """


@section
class AddParameters:
    """Functions that are to be added."""

    toml: str = key(TEXT, "their `[[function]]` tables, as in a configuration file")
    source: str = key(TEXT, "their origin, for messages", default="the request")


@section
class NameParameters:
    """A function by its name."""

    name: str = key(NAME, "the function's name")


@section
class RemoveParameters:
    """A function that is to go."""

    name: str = key(NAME, "the function's name")
    force: bool = key(FLAG, "disconnect its client; without this, a function with a client stays", default=False)


@section
class DrainParameters:
    """A function that is to have no new client."""

    name: str = key(NAME, "the function's name")
    undo: bool = key(FLAG, "let clients connect again", default=False)


@section
class ReloadParameters:
    """How the configuration is read again."""

    force: bool = key(FLAG, "disconnect clients of functions that change, instead of waiting for them", default=False)


@section
class LogLevelParameters:
    """What is logged."""

    level: LogLevel = key(one_of(LogLevel), "the least important log records to write")
    function: str | None = key(NAME, "of which function", default=None, unset="the whole daemon")


@section
class MigrateCheckParameters:
    """A VM that may be migrated."""

    vm: str = key(NAME, "the VM's name")
    destination: str | None = key(
        TEXT,
        "the `offer` that the other host gave, as JSON",
        default=None,
        unset="the check leaves the destination out",
    )


#: Does what a verb stands for, with its checked parameters.
Handle: TypeAlias = Callable[[Administered, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that can be asked for.

    Args:
        parameters: the section of its parameters.
        role: who may.
        meaning: what it does and answers, in Markdown.
        handle: does it; None for `watch`, whose answer does not end.
        waits: whether it may take as long as others like, so that it is given up when its client goes.
    """

    parameters: type
    role: ControlRole
    meaning: str
    handle: Handle | None
    waits: bool = False


async def _status(daemon: Administered, asked: NoOptions) -> Any:
    return daemon.status()


async def _migrations(daemon: Administered, asked: NoOptions) -> Any:
    return daemon.migrations()


async def _metrics(daemon: Administered, asked: NoOptions) -> Any:
    return daemon.metrics()


async def _add(daemon: Administered, asked: AddParameters) -> Any:
    return await daemon.administration.add(asked.toml, asked.source)


async def _remove(daemon: Administered, asked: RemoveParameters) -> Any:
    return await daemon.administration.remove(asked.name, asked.force)


async def _drain(daemon: Administered, asked: DrainParameters) -> Any:
    return await daemon.administration.drain(asked.name, asked.undo)


async def _disconnect(daemon: Administered, asked: NameParameters) -> Any:
    return await daemon.administration.disconnect(asked.name)


async def _reload(daemon: Administered, asked: ReloadParameters) -> Any:
    return await daemon.administration.reload(asked.force)


async def _log_level(daemon: Administered, asked: LogLevelParameters) -> Any:
    return daemon.administration.set_log_level(asked.level, asked.function)


async def _migrate_check(daemon: Administered, asked: MigrateCheckParameters) -> Any:
    return await daemon.check_migration(asked.vm, asked.destination)


VERBS: Mapping[str, Verb] = {
    "status": Verb(NoOptions, ControlRole.READER, "`result` is the [status document](status.md)", _status),
    "migrations": Verb(
        NoOptions,
        ControlRole.READER,
        "`result` is a list of [migrations that are over](migrations.md), the oldest first",
        _migrations,
    ),
    "metrics": Verb(
        NoOptions,
        ControlRole.READER,
        "`result` has the measurements behind the [metrics](metrics.md)",
        _metrics,
    ),
    "watch": Verb(
        NoOptions,
        ControlRole.READER,
        "`result` is the status document; then, for each change, a line with `event`. The connection then serves "
        "nothing else: it ends if the client sends anything more, and when the daemon stops",
        None,
    ),
    "add": Verb(
        AddParameters,
        ControlRole.ADMIN,
        "adds functions; `result` is a list of [outcomes](#outcomes). The configuration file stays as it is",
        _add,
    ),
    "remove": Verb(
        RemoveParameters,
        ControlRole.ADMIN,
        "removes a function; `result` has `name` and `turned_out`, its client or null",
        _remove,
    ),
    "reload": Verb(
        ReloadParameters,
        ControlRole.ADMIN,
        "reads the configuration again; `result` has `changes`, a list of [outcomes](#outcomes), and two lists of keys "
        "of `[daemon]` that changed: `applied` count now, `restart` after a restart",
        _reload,
    ),
    "drain": Verb(
        DrainParameters,
        ControlRole.ADMIN,
        "makes a function accept no new client and waits until its client has gone; `result` has `name` and "
        "`drained`. A client that leaves before the answer leaves the function closed",
        _drain,
        waits=True,
    ),
    "disconnect": Verb(
        NameParameters,
        ControlRole.ADMIN,
        "disconnects a function's client; `result` has `name` and `turned_out`. The next client may connect at once",
        _disconnect,
    ),
    "migrate-check": Verb(
        MigrateCheckParameters,
        ControlRole.ADMIN,
        "finds everything that would prevent a VM's migration, asking agents and QEMU; `result` has `vm`, "
        "`migratable`, `reasons`, each with `code`, `text` and `weight` (`refused` or `advice`), and `offer`, this "
        "host's answer about the VM for another host",
        _migrate_check,
        waits=True,
    ),
    "log-level": Verb(
        LogLevelParameters,
        ControlRole.ADMIN,
        "sets what the daemon logs from now on; `result` has `level` and `function`",
        _log_level,
    ),
}


def allowed_verbs(role: ControlRole) -> list[str]:
    """The names of the verbs that a peer may use."""
    return [name for name, verb in VERBS.items() if verb.role <= role]
