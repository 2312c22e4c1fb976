"""What each function's agent could do when it was last asked, kept on disk.

A daemon that begins anew, while its agent is away, so still tells a VMM the truth about the function at attach. A
file belongs to a function *and* to the agent that it was configured with: a changed configuration finds nothing. A
directory that cannot be read or written costs a warning, and what would have been remembered.

Rule 1: disk I/O is done by threads, one at a time; a start of the daemon waits `READ_S` for what is stored, at most.
Rule 2: nothing in here ever fails.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vfiouser_agents.api import Capabilities
from vfiouser_agents.rpc.wire import WireError, from_wire, to_wire
from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.record import UnusableRecord, read_record, write_record

KIND = "agent-capabilities"
VERSION = 1
#: Seconds that a start of the daemon waits for what is stored; a disk that hangs is as good as none.
READ_S = 1.0


class Source(Enum):
    """Where something about an agent is known from."""

    #: It said so since the daemon began.
    AGENT = "agent"
    #: It said so to a daemon before this one.
    STORED = "stored"
    #: Nobody ever heard it; what the configuration asks for is taken for possible.
    CONFIGURATION = "configuration"


@dataclass(frozen=True, slots=True)
class Facts:
    """What an agent said about a function.

    Args:
        caps: what can be done with it.
        learned: when it said so, in seconds since 1970.
        source: to whom.
    """

    caps: Capabilities
    learned: float
    source: Source = Source.AGENT


def agent_identity(*parts: Any) -> str:
    """A digest of what makes two agents the same; what goes in may be secret, so it is not kept itself.

    Args:
        parts: anything that JSON can carry; what it cannot counts as text.
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class CapabilityStore:
    """All that is remembered of the functions of a daemon.

    Args:
        directory: where; None remembers nothing.
        log: for what cannot be read or written.
    """

    def __init__(self, directory: Path | None, log: Logger) -> None:
        self._directory = None if directory is None else directory / "agents"
        self._log = log
        self._limiter = trio.CapacityLimiter(1)

    def drawer(self, function: str, identity: str) -> FunctionCapabilities:
        """The place of one function.

        Args:
            function: its name.
            identity: of its agent, by `agent_identity`.
        """
        path = None if self._directory is None else self._directory / f"{function}.json"
        return FunctionCapabilities(path, identity, self._limiter, self._log.bind(function=function))


class FunctionCapabilities:
    """What is remembered of one function; `CapabilityStore.drawer` makes it.

    Args:
        path: its file; None remembers nothing.
        identity: of the function's agent.
        limiter: of the threads that do the work.
        log: for what cannot be read or written.
    """

    def __init__(self, path: Path | None, identity: str, limiter: trio.CapacityLimiter, log: Logger) -> None:
        self._path = path
        self._identity = identity
        self._limiter = limiter
        self._log = log
        self._written: Capabilities | None = None
        self._pending: Facts | None = None
        self._writing = False
        #: Why the last attempt to read or write failed; None if it did not.
        self.problem: str | None = None

    async def recall(self) -> Facts | None:
        """Read what is remembered; None if that is nothing, of another agent, or not to be had in time."""
        path = self._path
        if path is None:
            return None
        facts = None
        with trio.move_on_after(READ_S) as scope:
            facts = await self._in_thread("read", partial(_read, path, self._identity))
        if scope.cancelled_caught:
            self._failed("read", f"{path}: the disk did not answer within {READ_S:g} s")
        self._written = None if facts is None else facts.caps
        return facts

    async def remember(self, facts: Facts) -> None:
        """Write what an agent said, unless that is what is written; while one is being written the last one counts.

        Args:
            facts: what it said.
        """
        path = self._path
        if path is None:
            return
        self._pending = facts
        if self._writing:
            return
        self._writing = True
        try:
            while self._pending is not None:
                facts, self._pending = self._pending, None
                if facts.caps != self._written:
                    # Noted before it is done: what cannot be written is not tried again with each session.
                    self._written = facts.caps
                    await self._in_thread("written", partial(_write, path, self._identity, facts))
        finally:
            self._writing = False

    async def _in_thread(self, what: str, work: Callable[[], Facts | None]) -> Facts | None:
        """Read or write in a thread; when we are cancelled it goes on alone, and leaves the file whole."""
        try:
            facts = await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            self._failed(what, f"{self._path}: {error.strerror or error}")
            return None
        except (UnusableRecord, WireError) as error:
            self._failed(what, f"{self._path}: {error}")
            return None
        self.problem = None
        return facts

    def _failed(self, what: str, reason: str) -> None:
        self.problem = reason
        self._log.warning(
            f"the record of what the agent can do could not be {what}; going on without it", reason=reason
        )


def _read(path: Path, identity: str) -> Facts | None:
    document = read_record(path, KIND, VERSION)
    if document is None or document.get("identity") != identity:
        return None
    caps: Capabilities = from_wire(Capabilities, document.get("capabilities"), "capabilities")
    learned = document.get("learned")
    if not isinstance(learned, int | float) or not 0 <= learned < 1 << 40:
        raise UnusableRecord(f"learned is {learned!r}; it must be a time")
    # A clock that was wrong once must not make facts from the future.
    return Facts(caps, min(float(learned), time.time()), Source.STORED)


def _write(path: Path, identity: str, facts: Facts) -> None:
    fields = {"identity": identity, "learned": round(facts.learned, 3), "capabilities": to_wire(facts.caps)}
    write_record(path, KIND, VERSION, fields)
