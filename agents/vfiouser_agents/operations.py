"""The operations of a session, as the one table that everybody who names, sends or judges one of them reads.

    status = await invoke(session, Operation.STATUS)
    chunk = await invoke(session, Operation.SAVE, offset, limit, Phase.FINAL)

A name, its arguments and its result are those of the method of `Session`; all else that is true of an operation,
whoever carries it out, stands in its row.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_type_hints

from .api import Role, Session

P = ParamSpec("P")
T = TypeVar("T")


class Patience(Enum):
    """How long an operation may take: the kind of its deadline."""

    #: It is a call without much work.
    CALL = "call"
    #: It drains, starts or resets the function.
    STOP = "stop"
    #: It moves or applies state.
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Op(Generic[P, T]):
    """One row: an operation of a session, with its arguments `P` and its result `T`.

    Args:
        method: of `Session`; the operation has its name, arguments and result.
        wire: the method of the reference protocol; empty: it is not part of that.
        changes: it changes what the function does, so whoever lost its answer does not know what that is.
        repeatable: when its answer was lost, asking again does no more than asking once.
        contact: its answer shows that the agent is there; some adapters answer the others themselves.
        anybody: any session may make it, whoever is in the migration.
        role: the side of a migration that it needs; None: any, or none.
        patience: the kind of its deadline.
        at_once: it waits for no other call of its function.
        overtakes: it ends the calls of its function that are under way.
        result_key: the key in the reference protocol of a result that is no dataclass.
    """

    method: Callable[Concatenate[Any, P], Awaitable[T]]
    wire: str
    changes: bool = False
    repeatable: bool = False
    contact: bool = False
    anybody: bool = False
    role: Role | None = None
    patience: Patience = Patience.CALL
    at_once: bool = False
    overtakes: bool = False
    result_key: str = ""

    @property
    def name(self) -> str:
        """Its name, as code and people say it."""
        return self.method.__name__

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments, in order, with their types."""
        return _types(self.method)[0]

    @property
    def result(self) -> Any:
        """The type of the result; None: there is none."""
        return _types(self.method)[1]

    def __str__(self) -> str:
        return self.name


@cache
def _types(method: Callable[..., Any]) -> tuple[Mapping[str, Any], Any]:
    hints = get_type_hints(method)
    result = hints.pop("return")
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    return {name: hints[name] for name in names}, None if result is type(None) else result


class Operation:
    """The table. What decides something has its word here; what a row leaves out is not so."""

    DESCRIBE = Op(Session.describe, "migration.describe", anybody=True, repeatable=True)
    CHECK = Op(Session.check, "migration.check", anybody=True, repeatable=True)
    BEGIN = Op(Session.begin, "migration.begin", anybody=True, repeatable=True, contact=True)
    STATUS = Op(Session.status, "migration.status", anybody=True, repeatable=True, contact=True, at_once=True)
    # Where there is no p2p, an adapter may answer `quiesce` without having asked.
    QUIESCE = Op(Session.quiesce, "migration.quiesce", changes=True, repeatable=True, patience=Patience.STOP)
    STOP = Op(Session.stop, "migration.stop", changes=True, repeatable=True, contact=True, patience=Patience.STOP)
    RESUME = Op(Session.resume, "migration.resume", changes=True, repeatable=True, contact=True, patience=Patience.STOP)
    ESTIMATE = Op(Session.estimate, "migration.estimate", repeatable=True)
    SAVE = Op(Session.save, "migration.save", repeatable=True, contact=True, role=Role.SOURCE, patience=Patience.DATA)
    LOAD_BEGIN = Op(
        Session.load_begin, "migration.load_begin", changes=True, repeatable=True, contact=True, role=Role.DESTINATION
    )
    LOAD = Op(Session.load, "migration.load", repeatable=True, role=Role.DESTINATION, patience=Patience.DATA)
    # The second one finds nothing to commit; `status` tells whether the first one did it.
    LOAD_COMMIT = Op(
        Session.load_commit,
        "migration.load_commit",
        changes=True,
        contact=True,
        role=Role.DESTINATION,
        patience=Patience.DATA,
    )
    ABORT = Op(Session.abort, "migration.abort", repeatable=True)
    END = Op(Session.end, "migration.end", repeatable=True)
    # The second one finds that it is logging already.
    DIRTY_START = Op(Session.dirty_start, "dirty.start", result_key="page_size")
    # What the first one told is forgotten.
    DIRTY_REPORT = Op(Session.dirty_report, "dirty.report")
    DIRTY_STOP = Op(Session.dirty_stop, "dirty.stop", repeatable=True)
    # Between the two, the guest may have begun to use the function.
    RESET = Op(
        Session.reset,
        "device.reset",
        changes=True,
        contact=True,
        anybody=True,
        patience=Patience.STOP,
        overtakes=True,
    )
    WAS_RESET = Op(Session.was_reset, "", anybody=True, repeatable=True)


#: All of them, in the order of the table.
OPERATIONS: tuple[Op[..., Any], ...] = tuple(row for row in vars(Operation).values() if isinstance(row, Op))
#: Those of the reference protocol, by its methods.
BY_WIRE: Mapping[str, Op[..., Any]] = {op.wire: op for op in OPERATIONS if op.wire}
#: All of them, by name.
BY_NAME: Mapping[str, Op[..., Any]] = {op.name: op for op in OPERATIONS}


async def invoke(session: Session, op: Op[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Carry out an operation on a session.

    Args:
        session: which.
        op: a row of `Operation`.
        args: its arguments.
        kwargs: its arguments.

    Returns:
        Its result.

    Raises:
        AgentError: as the method of `Session` says.
    """
    method: Callable[P, Awaitable[T]] = getattr(session, op.name)
    return await method(*args, **kwargs)
